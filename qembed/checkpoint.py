"""A checkpoint: where it comes from, and its config, tensors, tokenizer and prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed import token_table
from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

DEFAULT_MODEL = "Qwen/Qwen3-Embedding-0.6B"
SAMPLE = "sample"
INT4_SUFFIX = "-AWQ-INT4"
CARD = "qembed.json"
INDEX = "model.safetensors.index.json"
HUB_FILES = ("*.json", "*.safetensors", "merges.txt", "1_Pooling/*", "LICENSE*", "README.md")
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model as the hub publishes it, and the name that the user knows it by."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return read_json(self.folder / "config.json")

    @property
    def is_int4(self) -> bool:
        """Whether the linear layers are AWQ INT4."""
        quantization = self._quantization
        return quantization.get("quant_method") in ("awq", token_table.QUANT_METHOD) and quantization.get("bits") == 4

    @property
    def has_int8_table(self) -> bool:
        """Whether the token table is stored in INT8, as `qembed.token_table` says."""
        return self._quantization.get("token_table") == token_table.INT8

    @property
    def _quantization(self) -> dict[str, Any]:
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @cached_property
    def card(self) -> dict[str, Any]:
        """What `qembed quantize` noted in qembed.json about source, settings and hashes; empty if it made no such file."""
        path = self.folder / CARD
        return read_json(path) if path.exists() else {}

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Prompt texts by name ("query", "document"), as config_sentence_transformers.json has them."""
        path = self.folder / "config_sentence_transformers.json"
        stored = read_json(path).get("prompts") or {} if path.exists() else {}
        if not isinstance(stored, dict) or not all(isinstance(prompt, str) for prompt in stored.values()):
            raise BadInput(f"{path}: prompts are not texts by name")
        return {"query": instruct(DEFAULT_INSTRUCTION), "document": "", **stored}

    @cached_property
    def files(self) -> dict[str, Path]:
        """The safetensors file of each tensor.

        Raises:
            BadInput: no safetensors file, a shard that is missing, or an index that names a file outside the folder.
        """
        index = self.folder / INDEX
        single = self.folder / "model.safetensors"
        if not index.exists():
            if not single.exists():
                raise BadInput(f"{self.folder}: no model.safetensors and no {INDEX}; only safetensors checkpoints are read")
            with open_tensors(single, "np") as tensors:
                return dict.fromkeys(tensors.keys(), single)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise BadInput(f"{index}: its weight_map does not say which file holds which tensor")
        for name in sorted(set(weight_map.values())):
            if not name or Path(name).name != name or name == ".." or "\0" in name:
                raise BadInput(f"{index}: names a file outside the folder: {name!r}")
            if not (self.folder / name).is_file():
                raise BadInput(f"{self.folder}: shard {name} is missing; {INDEX} names it")
        return {tensor: self.folder / name for tensor, name in weight_map.items()}

    @property
    def prefix(self) -> str:
        """What stands before `layers.0…` in tensor names: nothing in Qwen3-Embedding, `model.` in causal language models."""
        return "model." if any(name.startswith("model.embed_tokens.") for name in self.files) else ""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, as stored.

        Raises:
            BadInput: there is no such tensor, or its file is damaged.
        """
        if name not in self.files:
            raise BadInput(f"{self.folder}: tensor {name} is missing")
        with open_tensors(self.files[name]) as tensors:
            stored: torch.Tensor = tensors.get_tensor(name)
        return stored

    def row_blocks(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """The matrix `name` in blocks of at most `rows` rows, as stored; no more than a block of it is in memory.

        Raises:
            BadInput: there is no such tensor, or its file is damaged.
        """
        if name not in self.files:
            raise BadInput(f"{self.folder}: tensor {name} is missing")
        with open_tensors(self.files[name]) as tensors:
            stored = tensors.get_slice(name)
            for start in range(0, stored.get_shape()[0], rows):
                yield stored[start : start + rows]

    def shapes(self) -> dict[str, tuple[list[int], str]]:
        """Shape and safetensors dtype name ("F16", "I32", …) of each tensor, read from the headers alone.

        A tensor that is not in the file in which the index says it is has none.
        """
        found: dict[str, tuple[list[int], str]] = {}
        for path in sorted(set(self.files.values())):
            with open_tensors(path, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is no dict
                    if self.files.get(name) == path:
                        view = tensors.get_slice(name)
                        found[name] = (view.get_shape(), view.get_dtype())
        return found

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which appends the model's own last token.

        Raises:
            BadInput: tokenizer.json is missing or damaged.
        """
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise BadInput(f"{self.folder}: tokenizer.json is missing")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise BadInput(f"{path}: not a tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def instruct(instruction: str) -> str:
    """What Qwen3-Embedding puts before a query for the task that `instruction` describes."""
    return f"Instruct: {instruction}\nQuery:"


def find(model: str, *, download: bool = True) -> Checkpoint:
    """The checkpoint that `model` names: `sample`, a folder, or a hub id (downloaded once, into the hub's own cache).

    Without `download` a hub id is looked up in that cache alone.

    Raises:
        BadInput: no such folder, not a checkpoint, or a hub id that cannot be had.
    """
    if model == SAMPLE:
        from qembed.sample import FOLDER

        return _checked(SAMPLE, FOLDER)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve().name, folder)
    if folder.is_file():
        raise BadInput(f"{model}: a file; name the folder that holds the checkpoint")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise BadInput(f"{model}: no such folder; a model is a folder, a hub id such as {DEFAULT_MODEL}, or '{SAMPLE}'")
    return _checked(model, _download(model, local=not download))


def short_name(model: str) -> str:
    """The last part of a hub id or folder: `Qwen/Qwen3-Embedding-0.6B` → `Qwen3-Embedding-0.6B`."""
    folder = Path(model).expanduser()
    return folder.resolve().name if model != SAMPLE and folder.is_dir() else model.split("/")[-1]


def default_output(model: str) -> Path:
    """Where `qembed quantize --model MODEL` writes by default, in the working directory."""
    return Path(short_name(model) + INT4_SUFFIX)


def find_int4(model: str | None) -> Checkpoint:
    """The INT4 checkpoint meant by `model`: such a folder itself, or what `quantize` made of that model in this directory.

    With `model` None: what `quantize` made of the default model, or else the only INT4 folder of this directory.

    Raises:
        BadInput: there is none, or more than one could be meant.
    """
    if model is not None and Path(model).expanduser().is_dir():
        checkpoint = find(model)
        if checkpoint.is_int4:
            return checkpoint
    made = default_output(model or DEFAULT_MODEL)
    if made.is_dir():
        checkpoint = find(str(made))
        if checkpoint.is_int4:
            return checkpoint
        raise BadInput(f"{made}: not an AWQ INT4 checkpoint")
    if model is not None:
        if "/" not in model and model != SAMPLE and not Path(model).is_dir():
            raise BadInput(f"{model}: no such folder; a model is a folder, a hub id such as {DEFAULT_MODEL}, or '{SAMPLE}'")
        raise BadInput(f"no INT4 checkpoint of {model} at ./{made}; run: qembed quantize --model {model}")
    here = sorted(path.parent for path in Path().glob(f"*{INT4_SUFFIX}/config.json"))
    if len(here) == 1:
        return find(str(here[0]))
    if here:
        raise BadInput(f"several INT4 checkpoints here: {', '.join(map(str, here))}; choose one with --model")
    raise BadInput(f"no INT4 checkpoint at ./{made}; run: qembed quantize, or name a folder with --model")


def find_served(int4: bool, model: str | None) -> Checkpoint:
    """What `--int4 --model MODEL` means, as `find_int4` does; without `int4` the original that such a checkpoint was made from.

    Raises:
        BadInput: there is none, or more than one could be meant.
    """
    if int4:
        return find_int4(model)
    found = find(model) if model else _made_here() or find(DEFAULT_MODEL)
    return find(source_of(found)) if found.is_int4 else found


def _made_here() -> Checkpoint | None:
    try:
        return find_int4(None)
    except BadInput:
        return None


def source_of(checkpoint: Checkpoint) -> str:
    """The model that an INT4 checkpoint was made from, as `find` takes it. A folder is noted relative to the checkpoint's own.

    Raises:
        BadInput: the checkpoint does not say, because `qembed quantize` did not make it.
    """
    noted = checkpoint.card.get("source")
    source = noted if isinstance(noted, dict) else {}
    if isinstance(folder := source.get("folder"), str):
        return os.path.normpath(checkpoint.folder.resolve() / folder)
    if isinstance(model := source.get("model"), str):
        return model
    raise BadInput(f"{checkpoint.folder}: {CARD} does not name the source model; name it with --baseline-model or --model")


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """An open safetensors file; damage is reported as BadInput. Framework "np" reads headers without importing torch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except SafetensorError as error:
        raise BadInput(f"{path}: damaged safetensors file: {error}") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        BadInput: it cannot be read, is not JSON, or is no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise BadInput(f"{path}: not JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object")
    return value


def _checked(name: str, folder: Path) -> Checkpoint:
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder}: not a checkpoint: config.json is missing")
    return Checkpoint(name, folder)


def _download(model: str, *, local: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hint = f"name a folder that holds it (--model FOLDER), or try the embedded sample (--model {SAMPLE})"
    try:
        return Path(
            snapshot_download(model, allow_patterns=list(HUB_FILES), token=os.environ.get("HF_TOKEN"), local_files_only=local)
        )
    except HFValidationError as error:
        raise BadInput(f"{model}: no such folder, and not a hub id") from error
    except GatedRepoError as error:
        raise BadInput(f"{model}: the hub wants you to accept its terms first; set HF_TOKEN, or {hint}") from error
    except RepositoryNotFoundError as error:
        raise BadInput(f"{model}: no such folder, and no such model on the hub; {hint}") from error
    except LocalEntryNotFoundError as error:
        raise BadInput(f"{model}: the hub cannot be reached and the model is not in its cache; {hint}") from error
    except (HfHubHTTPError, OSError) as error:
        raise BadInput(f"{model}: the download failed ({type(error).__name__}); try again, or {hint}") from error
