"""A checkpoint on disk: its config, tensors, tokenizer, prompts and manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint import int8_table
from qembed.checkpoint.embedder import Embedder, describe
from qembed.checkpoint.files import check_file, open_tensors, read_json
from qembed.checkpoint.numbers import check_numbers
from qembed.checkpoint.prompts import read_prompts
from qembed.checkpoint.reranker import Reranker, Task
from qembed.checkpoint.reranker import describe as describe_reranker
from qembed.checkpoint.rope import check_rope
from qembed.checkpoint.vocabulary import Vocabulary, added_by_config, check_normalizer, check_settings, lower_casing, token_ids
from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

MANIFEST = "qembed.json"
INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"layers\.(\d{1,6})\.")
MOST_ADDED = 64
"""Tokens that a tokenizer may make of a single letter: it and what is added to every text."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model as the hub publishes it, and the name that the user knows it by.

    `task` is what the user says that it is for; None: what its files say, such as the manifest of `qembed quantize`.
    """

    name: str
    folder: Path
    task: Task | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says.

        Raises:
            BadInput: it cannot be read, or has a number that no model can have.
        """
        config = self._json("config.json")
        check_numbers(config, self.folder / "config.json")
        return config

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name, self.folder)

    @property
    def is_int4(self) -> bool:
        """Whether the linear layers are AWQ INT4."""
        quantization = self._quantization
        return quantization.get("quant_method") in ("awq", int8_table.QUANT_METHOD) and quantization.get("bits") == 4

    @property
    def has_int8_table(self) -> bool:
        """Whether the token table is stored in INT8, as `qembed.checkpoint.int8_table` says."""
        return self._quantization.get("token_table") == int8_table.INT8

    @property
    def _quantization(self) -> dict[str, Any]:
        config = self.config.get("quantization_config")
        return config if isinstance(config, dict) else {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What `qembed quantize` noted in qembed.json about source, settings and hashes; empty if it made no such file."""
        return self._json(MANIFEST) if (self.folder / MANIFEST).exists() else {}

    @cached_property
    def embedder(self) -> Embedder:
        """What the checkpoint does with a text.

        Raises:
            BadInput: it is a reranker, or something in the folder changes the vectors and is not supported.
        """
        if self.reranker is not None:
            raise BadInput(
                f"{self.folder}: a reranker, which scores pairs of a query and a document and makes no vectors; qembed serve "
                "serves it, qembed eval --task rerank measures it, --rerank uses it"
            )
        self._check_companions()
        return describe(self.name, self.folder, self.config, self.files, self._source)

    @cached_property
    def reranker(self) -> Reranker | None:
        """What the checkpoint does with a query and a document; None if it is no reranker.

        Raises:
            BadInput: it is one that is not supported, or something in the folder changes its scores.
        """
        reranker = describe_reranker(
            self.name,
            self.folder,
            self.config,
            lambda: self.files,
            self._stored_tokenizer,
            source=self._source,
            task=self.task or self._noted_task,
        )
        if reranker is not None:
            self._check_companions()
        return reranker

    @property
    def trunk(self) -> Embedder:
        """The transformer, whatever stands on it: of a reranker its own description, otherwise `embedder`."""
        return self.reranker.trunk if self.reranker is not None else self.embedder

    @property
    def _noted_task(self) -> Task | None:
        """What `qembed quantize` noted that this is for."""
        noted = self.manifest.get("task")
        return noted if noted in ("embed", "rerank") else None

    @property
    def _source(self) -> str | None:
        """The name of the model that this was quantized from."""
        source = self.manifest.get("source")
        model = source.get("model") if isinstance(source, dict) else None
        return model if isinstance(model, str) else None

    def _check_companions(self) -> None:
        """Refuse what libraries compute in different ways: an adapter, rotary settings, settings of the tokenizer."""
        check_rope(self.config, self.folder / "config.json")
        if (adapter := self.folder / "adapter_config.json").exists():
            raise BadInput(f"{adapter}: an adapter, which some libraries would add to the model; merge it, or remove the file")
        path = self.folder / "tokenizer_config.json"
        if path.exists() and (self.folder / "tokenizer.json").exists():
            check_settings(self._json(path.name), self._stored_tokenizer, path)

    @cached_property
    def prompts(self) -> Mapping[str, str]:
        """Prompt texts by name ("query", "document"), as config_sentence_transformers.json has them.

        Raises:
            BadInput: that file is damaged, or has a setting that is not supported.
        """
        return read_prompts(self.folder, self.name, self._source).texts

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
        weight_map = self._json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise BadInput(f"{index}: its weight_map does not say which file holds which tensor")
        for name in sorted(set(weight_map.values())):
            if single.exists() and name != single.name and single.name not in weight_map.values():
                raise BadInput(
                    f"{self.folder}: both model.safetensors and an {INDEX} that does not name it; libraries differ in what "
                    "they read, so remove one"
                )
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
        shapes: dict[str, tuple[list[int], str]] = {}
        for path in sorted(set(self.files.values())):
            with open_tensors(path, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is no dict
                    if self.files.get(name) == path:
                        view = tensors.get_slice(name)
                        shapes[name] = (view.get_shape(), view.get_dtype())
        return shapes

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which appends the model's own last token, and lower-cases texts if the model reads them so.

        Raises:
            BadInput: tokenizer.json is missing or damaged.
        """
        tokenizer = self._stored_tokenizer()
        if self.trunk.lower_case:
            tokenizer.normalizer = lower_casing(tokenizer.normalizer)
        return tokenizer

    def _stored_tokenizer(self) -> Tokenizer:
        """The tokenizer as tokenizer.json has it, without truncation and padding."""
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise BadInput(f"{self.folder}: tokenizer.json is missing")
        check_file(path, self.folder)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise BadInput(f"{path}: not a tokenizer: {error}") from error
        check_normalizer(tokenizer, path)
        if (tokenizer.truncation or {}).get("direction", "right").lower() != "right":
            raise BadInput(f"{path}: truncation at the left is not supported: texts are cut at their end")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if (tokens := len(token_ids(tokenizer, "a", str(self.folder)))) > MOST_ADDED:
            raise BadInput(f"{path}: makes {tokens:,} tokens of a single letter; it is damaged, or meant to take memory")
        return tokenizer

    def check_layers(self) -> None:
        """Check that config.json and the tensors have the same number of layers, before a model is built from either.

        Raises:
            BadInput: they have not.
        """
        numbers = {int(match[1]) for name in self.files if (match := LAYER.match(name.removeprefix(self.prefix)))}
        told = self.config.get("num_hidden_layers")
        if numbers and (numbers != set(range(len(numbers))) or len(numbers) != told):
            raise BadInput(f"{self.folder}: config.json has {told} layers, the safetensors files {len(numbers)}")

    def vocabulary(self) -> Vocabulary:
        """The tokenizer beside the token table, with the tokens that have no row in it.

        Tokens that tokenizer_config.json adds get the ids after the tokenizer's last, as transformers gives them.

        Raises:
            BadInput: the tokenizer or the token table is missing or damaged, or the tokenizer appends a token without a row to
                every text.
        """
        tokenizer = self.tokenizer()
        path = self.folder / "tokenizer_config.json"
        if path.exists() and (added := added_by_config(tokenizer.get_vocab(), self._json(path.name))):
            tokenizer.add_special_tokens(added)
        rows = self.table_rows()
        beyond = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
        vocabulary = Vocabulary(tokenizer, rows, beyond)
        appended = max(token_ids(tokenizer, "", str(self.folder)), default=0)
        if appended >= rows:
            raise BadInput(
                f"{self.folder}: the tokenizer adds the token {tokenizer.id_to_token(appended)!r} (id {appended}) to every "
                f"text, but the token table has {rows} rows; the tokenizer is not this model's"
            )
        return vocabulary

    @cached_property
    def vocabulary_warning(self) -> str | None:
        """A line that names the tokens without a row in the token table; None if there are none, or no tokenizer.json."""
        return self.vocabulary().warning() if (self.folder / "tokenizer.json").exists() else None

    @cached_property
    def appended_token(self) -> str | None:
        """The token that the tokenizer puts after every text; None if it puts none, or there is no tokenizer.json."""
        if not (self.folder / "tokenizer.json").exists():
            return None
        tokenizer = self.tokenizer()
        name = str(self.folder)
        last, alone = token_ids(tokenizer, "a", name)[-1:], token_ids(tokenizer, "", name)[-1:]
        return tokenizer.id_to_token(last[0]) if last and last == alone else None

    def file_stamps(self) -> list[tuple[str, int, int]]:
        """Path within the folder, bytes and modification time (ns) of each file that decides vectors, those of modules too.

        They identify the checkpoint: hashing 16 GB would take longer than reading them.
        """
        modules = [path for suffix in ("json", "safetensors") for path in self.folder.glob(f"[0-9]_*/*.{suffix}")]
        paths = sorted({*self.files.values(), *self.folder.glob("*.json"), *modules})
        stats = [(path.relative_to(self.folder).as_posix(), path.stat()) for path in paths]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]

    def table_rows(self) -> int:
        """The rows of the token table.

        Raises:
            BadInput: the checkpoint has no token table.
        """
        for name in ("qweight", "weight"):  # an INT8 table also has an empty `weight`
            tensor = f"{self.prefix}embed_tokens.{name}"
            if (path := self.files.get(tensor)) is not None:
                with open_tensors(path, "np") as tensors:
                    return int(tensors.get_slice(tensor).get_shape()[0])
        raise BadInput(f"{self.folder}: no token table (embed_tokens)")
