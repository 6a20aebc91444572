"""The folder that `quantize` writes: parts as they are made, config.json last, one rename at the end.

Everything goes into a hidden folder beside the target. The target appears by a rename when it is whole; a run that ends early
leaves the target as it was, and the next run clears away what is left of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qembed.checkpoint import CARD, INDEX, Checkpoint
from qembed.errors import BadInput, QembedError
from qembed.token_table import INT8, QUANT_METHOD

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1_000_000_000
COPIED = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
    "[0-9]_*/config.json",
    "LICENSE*",
    "NOTICE",
)
REPEATED = ("vocab.json", "merges.txt")
"""Files that say again what tokenizer.json says: 4.4 MB of Qwen3-Embedding's."""


@contextmanager
def new_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `target`, which becomes `target` when the context ends without an error.

    With `force` a checkpoint that `qembed quantize` wrote there before is replaced, at that moment and not earlier.

    Raises:
        BadInput: the target exists, cannot be written, or another run is writing it.
    """
    partial, replaced = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.replaced")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent}: no such folder; make it first, or choose another --output")
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    if target.exists() or target.is_symlink():
        if not force:
            raise BadInput(f"{target}: exists already; choose another --output, or replace it with --force")
        if not (target / CARD).exists():
            raise BadInput(f"{target}: not made by qembed quantize, so --force does not replace it; choose another --output")
    try:
        partial.mkdir(exist_ok=True)
        lock = (partial / "lock").open("w")
    except OSError as error:
        raise BadInput(f"{partial}: cannot be written: {error.strerror}") from error
    with lock:
        _lock(lock, target)
        _empty(partial)
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            (partial / "lock").unlink()
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                target.rename(replaced)
            partial.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise QembedError(
                    f"{target}: could not be written: {error.strerror or error}; nothing was left there"
                ) from error
            raise


def save_part(folder: Path, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of one part (a layer, or what stands outside the layers) into a file of its own.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"part-{part}.safetensors")
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


def assemble(folder: Path) -> int:
    """Join the parts in `folder` into shards of at most SHARD_BYTES (or one part), named as the hub names them.

    Returns:
        The bytes of all tensors.
    """
    from safetensors.torch import load_file, save_file

    parts = sorted(folder.glob("part-*.safetensors"))
    groups: list[list[Path]] = [[]]
    for part in parts:
        if groups[-1] and sum(path.stat().st_size for path in [*groups[-1], part]) > SHARD_BYTES:
            groups.append([])
        groups[-1].append(part)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        tensors = {key: tensor for part in group for key, tensor in load_file(part).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        del tensors
        for part in group:
            part.unlink()
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    return total


def copy_companions(source: Checkpoint, folder: Path, *, without: Collection[str] = ()) -> None:
    """Copy the tokenizer, pooling and prompts beside the weights, as they are, except for the files named in `without`."""
    for pattern in COPIED:
        for path in sorted(source.folder.glob(pattern)):
            if path.name in without:
                continue
            place = folder / path.relative_to(source.folder)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def int4_config(config: Mapping[str, Any], group_size: int, token_table: str = "float16") -> dict[str, Any]:
    """`config` of the source, with the quantization that vLLM, SGLang and transformers read, and float16 for the rest.

    With an INT8 `token_table` the method has a name of its own, so that what cannot read the table refuses the checkpoint.
    transformers 4 reads `rope_theta` from the top level, transformers 5 from `rope_parameters`: both get it.
    """
    made = dict(config)
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    made.update(dict.fromkeys(dtype_keys, "float16"))
    parameters = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    if theta is not None:
        made["rope_theta"] = theta
        made["rope_parameters"] = {
            "rope_type": "default",
            **(config.get("rope_scaling") or {}),
            **parameters,
            "rope_theta": theta,
        }
    made["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    if token_table == INT8:
        made["quantization_config"].update(quant_method=QUANT_METHOD, token_table=INT8)
    return made


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _lock(lock: IO[str], target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BadInput(f"{target}: another qembed quantize is writing it") from error


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
