"""Any task of the `mteb` package, with the vectors of either side; the scores are mteb's own."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qembed.errors import BadInput, MissingExtra
from qembed.eval.evaluation import Embed, SelfScoring
from qembed.eval.tasks import Metric, Outcome, Task, mteb_rows
from qembed.installation import how_to_install
from qembed.text.texts import Text


@dataclass(frozen=True)
class Part:
    """The main score of a subset in a split, and the rows behind it if known."""

    subset: str
    score: float
    rows: mteb_rows.Rows | None


def task(name: str) -> SelfScoring:
    """The mteb task `name`, with its data loaded.

    Raises:
        BadInput: mteb has no such task, it is not about texts, or its data is unavailable.
        MissingExtra: mteb is not installed.
    """
    loaded = _loaded(name)

    def score(embed: Embed) -> list[Part]:
        return _scores(loaded, embed)

    def record(candidate: list[Part], baseline: list[Part]) -> dict[str, Any]:
        return _record(name, loaded, candidate, baseline)

    return SelfScoring(f"mteb:{name}", score, record)


def _loaded(name: str) -> Any:
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--task mteb:NAME needs the mteb package: {how_to_install('mteb')}") from error
    try:
        mteb_task = mteb.get_task(name)
    except KeyError as error:
        raise BadInput(f"mteb:{name}: mteb {mteb.__version__} has no such task: {_short(error.args[0])}") from error
    if set(mteb_task.metadata.modalities) != {"text"}:
        raise BadInput(f"mteb:{name}: a task about {', '.join(mteb_task.metadata.modalities)}, not about texts alone")
    try:
        mteb_task.load_data()
    except Exception as error:
        raise BadInput(f"mteb:{name}: its data cannot be loaded ({type(error).__name__}: {_short(error)})") from error
    return mteb_task


def _scores(task: Any, embed: Embed) -> list[Part]:
    """mteb's main score of each subset in each split. The score of the whole task is their mean (mteb's `get_score`)."""
    import mteb

    logging.getLogger("mteb").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="qembed-mteb-") as folder:
        evaluated = mteb.evaluate(_model(embed), task, cache=None, show_progress_bar=False, prediction_folder=folder)
        path = Path(folder, getattr(task, "prediction_file_name", ""))  # a task made of tasks has none
        predicted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    (result,) = evaluated.task_results
    parts = []
    for split, subsets in result.scores.items():
        for scores in subsets:
            subset, score = str(scores["hf_subset"]), float(scores["main_score"])
            data = getattr(task, "dataset", None) or {}
            data = data.get(subset, data).get(split)
            rows = mteb_rows.read(predicted.get(subset, {}).get(split), data, task, score)
            parts.append(Part(subset, score, rows))
    return parts


def _model(embed: Embed) -> Any:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    class Model(AbsEncoder):
        """The model interface that mteb calls for vectors."""

        def __init__(self) -> None:
            self.mteb_model_meta = ModelMeta.create_empty({"name": "qembed/eval", "revision": "none"})

        def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> Any:
            """Vectors of the texts of all batches; documents without prompt, others with the task's instruction if there is
            one.
            """
            kind, instruction = "document", None
            if prompt_type != PromptType.document:
                instruction = _instruction(task_metadata.prompt, prompt_type)
                kind = "query" if prompt_type == PromptType.query or instruction else "document"
            texts = [text for batch in inputs for text in batch["text"]]
            return np.asarray(embed([Text(str(row), text, kind, None, instruction) for row, text in enumerate(texts)]))

    return Model()


def _instruction(prompt: Any, prompt_type: Any) -> str | None:
    """The instruction of a task: one for all texts, or one per kind."""
    if isinstance(prompt, dict):
        prompt = prompt.get(getattr(prompt_type, "value", None) or "query")
    return prompt if isinstance(prompt, str) and prompt else None


def _record(name: str, loaded: Any, candidate: list[Part], baseline: list[Part]) -> dict[str, Any]:
    subsets = list(dict.fromkeys(part.subset for part in candidate))
    metrics = []
    for group in [None, *(subsets if len(subsets) > 1 else [])]:
        sides = [[part for part in side if group in (None, part.subset)] for side in (baseline, candidate)]
        scores = [float(np.mean([part.score for part in side])) if side else np.nan for side in sides]
        values = [score if np.isfinite(score) else None for score in scores]
        rows = [[part.rows for part in side if part.rows is not None] for side in sides]
        complete = all(len(known) == len(side) for known, side in zip(rows, sides, strict=True))
        interval = mteb_rows.interval(rows[1], rows[0]) if complete and len(rows[0]) == len(rows[1]) else None
        count = sum(len(part_rows.values) for part_rows in rows[1]) if complete else 0
        metrics.append(
            Metric(str(loaded.metadata.main_score), values[0], values[1], interval, count, group, main=group is None)
        )
    data = {"name": name, "sha256": None, "revision": str(loaded.metadata.revision)}
    described = Task(f"mteb:{name}", data, [], lambda *_: Outcome([]))
    notes = [] if metrics[0].interval else ["mteb reports one score of the whole set, so there is no interval"]
    return described.record(Outcome(metrics, notes))


def _short(error: object) -> str:
    return " ".join(str(error).split())[:160]
