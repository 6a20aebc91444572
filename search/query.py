"""Embeds questions for an index: by a running server, or by the index's model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.find import INT4_SUFFIX, find
from qembed.command.progress import reporter
from qembed.errors import BadInput, QembedError
from qembed.search.store import Store
from qembed.text.cleaning import clean
from qembed.text.prompts import chosen_prompt, instruct
from qembed.text.texts import model_input
from qembed.vectors import sources

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class QuestionSettings:
    """What embeds the questions, and their prompt.

    Attributes:
        url: of a running server; None: `model` runs here.
        model: hub id or folder; None: the model recorded in the index.
        engine: "transformers" or "vllm", without `url`.
        prompt: name of one of the model's prompts, empty for none; None: the instruction recorded in the index, otherwise the
            prompt "query".
        instruction: a task description in place of `prompt`.
        any_model: skip the check that the model is the index's.
        api_key: goes with requests to `url`; None: the key in the environment.
    """

    url: str | None = None
    model: str | None = None
    engine: str = "transformers"
    prompt: str | None = None
    instruction: str | None = None
    any_model: bool = False
    api_key: str | None = field(default=None, repr=False)


Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Unit vectors [len(texts), store.dimensions] float32 of texts, with their prompt."""


@contextmanager
def opened(store: Store, settings: QuestionSettings, progress: Console) -> Iterator[Embed]:
    """Open what embeds questions; inside the block the yielded function embeds them.

    Raises, also when texts are embedded:
        BadInput: the model is not the index's, has no such prompt, or its vectors have another length.
        QembedError: a server or an engine fails, or returns an unusable vector.
    """
    model = settings.model or (None if settings.url else store.model)
    if model is None and settings.url is None:
        raise BadInput(f"{store.path} does not say which model made its vectors; name it with --model, or a server with --url")
    checkpoint = _checkpoint(model, store, settings) if model is not None else None
    if checkpoint is not None and not settings.any_model:
        check_model(store, checkpoint.name)
    if settings.url:
        embedder = sources.server(settings.url, settings.api_key)
        name = str(embedder.identity["model"])
        if not settings.any_model:
            check_model(store, name)
    else:
        assert checkpoint is not None
        name = checkpoint.name
        embedder = sources.vllm(checkpoint) if settings.engine == "vllm" else sources.transformers(checkpoint)
    prompt = _prompt(checkpoint, name, store, settings)
    if checkpoint is not None and settings.prompt is None and not prompt and checkpoint.embedder.query_note is not None:
        progress.print(f"{checkpoint.folder}: {checkpoint.embedder.query_note}", markup=False, soft_wrap=True)

    with ExitStack() as stack:
        with reporter(f"opening {name}", progress) as shown:
            source = stack.enter_context(embedder.open(lambda stage: shown.stage(f"{name}: {stage}")))

        def embed(texts: Sequence[str]) -> NDArray[np.float32]:
            with reporter(f"embedding with {name}", progress):
                return fitted(source.embed([model_input(text, prompt) for text in texts], lambda _: None), store, name)

        yield embed


def _checkpoint(model: str, store: Store, settings: QuestionSettings) -> Checkpoint:
    try:
        return find(model)
    except BadInput as error:
        if settings.model is not None:
            raise
        raise BadInput(
            f"{store.path}: its vectors are of {model}, which is not here ({error}); name it with --model, or a --url"
        ) from error


def _prompt(checkpoint: Checkpoint | None, model: str, store: Store, settings: QuestionSettings) -> str:
    """The prompt text of a question; of the `model` only its name is known if there is no `checkpoint`."""
    recorded = store.source.get("instruction")
    if settings.prompt is None and settings.instruction is None and isinstance(recorded, str) and recorded:
        return instruct(clean(recorded))
    name = "query" if settings.prompt is None else settings.prompt
    prompts = None if checkpoint is None else checkpoint.prompts
    return chosen_prompt(prompts, name, settings.instruction, "", model=model)


def check_model(store: Store, name: str) -> None:
    """Check that the model `name` is the one of the index's vectors; INT4 and FP16, folder and hub id count as the same.

    Raises:
        BadInput: it is another model.
    """
    if store.model is not None and family(name) != family(store.model):
        raise BadInput(
            f"{store.path}: its vectors are of {store.model}, the question's would be of {name}; "
            "use the same model, or add --any-model if only the name differs"
        )


def family(name: str) -> str:
    """The name that variants of a model share: "Qwen/X", "./X" and "X-AWQ-INT4" all give "x"."""
    return name.rstrip("/").rpartition("/")[2].removesuffix(INT4_SUFFIX).lower()


def fitted(vectors: NDArray[np.float32], store: Store, name: str) -> NDArray[np.float32]:
    """Vectors [n, D] cut to the index's dimensions (Matryoshka) and scaled to unit length.

    They are cut only for an index of vectors from `qembed embed`: for others it is unknown whether theirs were cut.

    Raises:
        BadInput: they have another length.
        QembedError: a vector is zero or not finite.
    """
    width = vectors.shape[1]
    if width != store.dimensions and not (width > store.dimensions and store.source.get("dimensions") == store.dimensions):
        raise BadInput(f"{store.path}: its vectors have {store.dimensions} dimensions, those of {name} have {width}")
    cut = vectors[:, : store.dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise QembedError(f"{name}: returned a vector that is zero or not finite")
    return np.asarray(cut / lengths, np.float32)
