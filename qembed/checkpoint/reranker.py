"""What a Qwen3-Reranker does with a query and a document: one description, from which every command takes it.

It is a language model that reads both in a template and answers "yes" or "no". The score is the probability of yes among the
two at the last token (Zhang et al. 2025, "Qwen3 Embedding", section 2; template as on the model card). Two forms are published:
the original, whose scores come from the logits of the tokens yes and no, and a sequence classifier with one label, whose row is
the difference of the two (`score.weight`), so that its sigmoid is the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qembed.checkpoint.embedder import Embedder, positive
from qembed.checkpoint.files import open_tensors, read_bytes, read_json, read_json_value
from qembed.checkpoint.modules import MODULES
from qembed.errors import BadInput
from qembed.text.prompts import DEFAULT_INSTRUCTION

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Form = Literal["original", "converted"]
Task = Literal["embed", "rerank"]
FAMILY = "qwen3"
ORIGINAL, CONVERTED = "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"
SYSTEM = "Judge whether the Document meets the requirements based on the Query and the Instruct provided."
BEFORE = (
    f'<|im_start|>system\n{SYSTEM} Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)  # fmt: skip
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
ANSWERS = ("no", "yes")
LONGEST = 8192
"""Tokens of a prompt, as the model card cuts it; the model has positions for more."""
LABEL_HEAD = "score.weight"
LOGIT_SCORE = "LogitScore"
"""sentence-transformers' module that makes a score of the logits of two tokens."""
NAME = "reranker"
"""A part of the name of a checkpoint that is a reranker, in lower case."""


@dataclass(frozen=True)
class Reranker:
    """What a checkpoint does with a query and a document.

    Attributes:
        form: "original" (logits of yes and no) or "converted" (a classifier with one label).
        answers: the token ids of ANSWERS.
        trunk: the transformer below: its family, context and positions; its `context` bounds a whole prompt in tokens.
    """

    form: Form
    answers: tuple[int, int]
    trunk: Embedder

    @property
    def overrides(self) -> dict[str, Any]:
        """What vLLM needs in its config to compute the score of either form: one label, made of the rows of two tokens."""
        if self.form == "converted":
            return {}
        return {"architectures": [CONVERTED], "classifier_from_token": list(ANSWERS), "is_original_qwen3_reranker": True}


def body(query: str, document: str, instruction: str | None = None) -> str:
    """The part of the prompt between BEFORE and AFTER."""
    return f"{head(query, instruction)} {document}"


def head(query: str, instruction: str | None = None) -> str:
    """The part of `body` before the document: what must not be cut."""
    return f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>:"


def describe(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    files: Callable[[], Mapping[str, Path]],
    tokenizer: Callable[[], Tokenizer],
    *,
    source: str | None = None,
    task: Task | None = None,
) -> Reranker | None:
    """The description of the checkpoint `name` in `folder` with its `config`; None if it is no reranker.

    `files` and `tokenizer` return its tensors' files and its tokenizer; `source` is the name of the model that it was quantized
    from. `task` says what it is where its files do not.

    Raises:
        BadInput: it is a reranker, or `task` says so, but not one whose scores are known here.
    """
    if task == "embed" or (form := _form(name, source, folder, config, forced=task == "rerank")) is None:
        return None
    path = folder / "config.json"
    if config.get("model_type") != FAMILY:
        raise BadInput(f"{path}: a reranker of model_type {str(config.get('model_type'))[:60]!r} is not supported; {FAMILY} is")
    no, yes = (tokenizer().token_to_id(word) for word in ANSWERS)
    if no is None or yes is None:
        raise BadInput(f"{folder}: not a Qwen3-Reranker: its tokenizer has no single token for yes and for no")
    answers = (no, yes)
    hidden_size, positions = (positive(config, key, path) for key in ("hidden_size", "max_position_embeddings"))
    if form == "converted":
        _check_label(config, files(), hidden_size, path)
    else:
        _check_logit_score(folder, answers)
    trunk = Embedder(
        family=FAMILY,
        attention="causal",
        pooling="last",
        dense=(),
        normalized=False,
        hidden_size=hidden_size,
        sizes=(),
        is_matryoshka=False,
        context=min(LONGEST, positions),
        positions=positions,
    )
    return Reranker(form, answers, trunk)


def _form(name: str, source: str | None, folder: Path, config: Mapping[str, Any], *, forced: bool) -> Form | None:
    """The form of a reranker; None if the checkpoint is none, as far as its files and its name tell."""
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture == CONVERTED:
        return "converted"
    if architecture != ORIGINAL:
        if forced:
            raise BadInput(
                f"{folder / 'config.json'}: architecture {str(architecture)[:60]!r} is no reranker that is supported; "
                f"{ORIGINAL} and {CONVERTED} are"
            )
        return None
    if forced or _logit_score(folder) is not None:
        return "original"
    if (folder / MODULES).exists():  # an embedder's pooling
        return None
    named = any(NAME in model.lower() for model in (name, source or ""))
    return "original" if named or SYSTEM in _chat_template(folder) else None


def _chat_template(folder: Path) -> str:
    """The tokenizer's chat template, which a chat model has too; empty if it has none."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_bytes(path, folder).decode(errors="replace")
    path = folder / "tokenizer_config.json"
    template = read_json(path, folder).get("chat_template") if path.exists() else None
    return template if isinstance(template, str) else ""


def _logit_score(folder: Path) -> Path | None:
    """The config of the module LOGIT_SCORE, if modules.json lists it."""
    path = folder / MODULES
    modules = read_json_value(path, folder) if path.exists() else None
    for module in modules if isinstance(modules, list) else ():
        kind, place = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if str(kind).rpartition(".")[2] == LOGIT_SCORE and isinstance(place, str) and Path(place).name == place:
            return folder / place / "config.json"
    return None


def _check_logit_score(folder: Path, answers: tuple[int, int]) -> None:
    """Refuse sentence-transformers' description of a score if it has other tokens or another template than this one."""
    path = _logit_score(folder)
    if path is None:
        return
    config = read_json(path, folder)
    tokens = (config.get("false_token_id"), config.get("true_token_id"))
    if tokens != answers:
        raise BadInput(f"{path}: false_token_id and true_token_id are {str(tokens)[:60]}, not those of no and yes, {answers}")
    template = _chat_template(folder)
    if template and SYSTEM not in template:
        raise BadInput(f"{folder}: its chat template is not Qwen3-Reranker's; other templates are not supported")


def _check_label(config: Mapping[str, Any], files: Mapping[str, Path], hidden_size: int, path: Path) -> None:
    """Refuse a classifier without exactly one label, or whose row does not fit the model."""
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels")
    if count != 1:
        raise BadInput(f"{path}: a reranker has one label (id2label), not {str(count)[:20]}")
    if LABEL_HEAD not in files:
        raise BadInput(f"{path.parent}: the tensor {LABEL_HEAD} is missing")
    with open_tensors(files[LABEL_HEAD], "np") as tensors:
        shape = tensors.get_slice(LABEL_HEAD).get_shape() if LABEL_HEAD in tensors.keys() else []  # noqa: SIM118 - no dict
    if shape != [1, hidden_size]:
        raise BadInput(f"{path.parent}: tensor {LABEL_HEAD} has shape {shape}, not [1, {hidden_size}]")
