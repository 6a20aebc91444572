"""Any task of the `mteb` package, with the vectors of either side; the scores are mteb's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from qembed.errors import BadInput, MissingExtra
from qembed.eval.compare import Embed, SelfScoring
from qembed.eval.tasks import Metric, Outcome, Task
from qembed.eval.texts import Text


def task(name: str) -> SelfScoring:
    """The task that mteb knows as `name`, its data loaded.

    Raises:
        BadInput: mteb has no such task, it is not about texts, or its data cannot be had.
        MissingExtra: mteb is not installed.
    """
    loaded = _loaded(name)

    def score(embed: Embed) -> dict[str, float | None]:
        return _scores(loaded, embed)

    def record(candidate: dict[str, float | None], baseline: dict[str, float | None]) -> dict[str, Any]:
        return _record(name, loaded, candidate, baseline)

    return SelfScoring(f"mteb:{name}", score, record)


def _loaded(name: str) -> Any:
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise MissingExtra("--task mteb:NAME needs the mteb package: pip install 'qembed[mteb]'") from error
    try:
        found = mteb.get_task(name)
    except KeyError as error:
        raise BadInput(f"mteb:{name}: mteb {mteb.__version__} has no such task: {_short(error.args[0])}") from error
    if set(found.metadata.modalities) != {"text"}:
        raise BadInput(f"mteb:{name}: a task about {', '.join(found.metadata.modalities)}, not about texts alone")
    try:
        found.load_data()
    except Exception as error:
        raise BadInput(f"mteb:{name}: its data cannot be loaded ({type(error).__name__}: {_short(error)})") from error
    return found


def _scores(task: Any, embed: Embed) -> dict[str, float | None]:
    """mteb's main score: of the whole task ("all"), and of each of its subsets."""
    import mteb

    logging.getLogger("mteb").setLevel(logging.ERROR)
    answer = mteb.evaluate(_model(embed), task, cache=None, show_progress_bar=False)
    (result,) = answer.task_results
    subsets: dict[str, list[float]] = {}
    for split in result.scores.values():
        for scores in split:
            subsets.setdefault(str(scores["hf_subset"]), []).append(float(scores["main_score"]))
    return {"all": _defined(result.get_score()), **{name: _defined(np.mean(values)) for name, values in subsets.items()}}


def _defined(score: Any) -> float | None:
    return float(score) if np.isfinite(score) else None


def _model(embed: Embed) -> Any:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    class Model(AbsEncoder):
        """What mteb asks for vectors."""

        def __init__(self) -> None:
            self.mteb_model_meta = ModelMeta.create_empty({"name": "qembed/eval", "revision": "none"})

        def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> Any:
            """Vectors of the texts of all batches; documents bare, all else with the task's instruction if it has one."""
            kind, instruction = "document", None
            if prompt_type != PromptType.document:
                instruction = _instruction(task_metadata.prompt, prompt_type)
                kind = "query" if prompt_type == PromptType.query or instruction else "document"
            texts = [text for batch in inputs for text in batch["text"]]
            return np.asarray(embed([Text(str(row), text, kind, None, instruction) for row, text in enumerate(texts)]))

    return Model()


def _instruction(prompt: Any, prompt_type: Any) -> str | None:
    """The instruction that a task names: for all of its texts, or for each kind."""
    if isinstance(prompt, dict):
        prompt = prompt.get(getattr(prompt_type, "value", None) or "query")
    return prompt if isinstance(prompt, str) and prompt else None


def _record(name: str, loaded: Any, candidate: dict[str, float | None], baseline: dict[str, float | None]) -> dict[str, Any]:
    subsets: Sequence[str] = [key for key in candidate if key != "all"]
    groups = ["all", *(subsets if len(subsets) > 1 else [])]
    metrics = [
        Metric(
            str(loaded.metadata.main_score), baseline.get(group), candidate.get(group), None, 0,
            None if group == "all" else group, main=group == "all",
        )
        for group in groups
    ]  # fmt: skip
    data = {"name": name, "sha256": None, "revision": str(loaded.metadata.revision)}
    plan = Task(f"mteb:{name}", data, [], lambda *_: Outcome([]))
    return plan.record(Outcome(metrics, ["mteb tells one score of a whole set, so there is no interval"]))


def _short(error: object) -> str:
    return " ".join(str(error).split())[:160]
