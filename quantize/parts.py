"""Tensors on their way to disk: one part a layer while the run goes on, joined into shards at its end.

A part is a safetensors file that appears by a rename when it is whole and synced, so that a run that is killed leaves finished
parts alone. They are joined by copying their bytes: no shard is ever in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed import files
from qembed.checkpoint.description import INDEX
from qembed.checkpoint.dtypes import BYTES

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 1_000_000_000
CHUNK_BYTES = 16 * 2**20
PLAN = "shards.json"
DONE = "report.json"
"""What a run notes, as JSON, when all layers are finished."""
REFINED = "refined"
"""The part that holds what the last stage tuned, by layer, until all layers have it. It goes into no shard."""


@dataclass(frozen=True)
class Blocks:
    """A float16 tensor of `shape` that `rows()` gives in blocks of rows, so that it is never in memory as a whole."""

    shape: Sequence[int]
    rows: Callable[[], Iterator[torch.Tensor]]


class Parts:
    """The finished parts of a run, in a folder. Names: "rest" (what stands outside the layers), "layer-000" …"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    @property
    def layers(self) -> int:
        """How many layers are finished."""
        return sum(1 for _ in self.folder.glob("part-layer-*.safetensors"))

    def write(self, name: str, tensors: Mapping[str, torch.Tensor | Blocks], notes: Mapping[str, Any]) -> None:
        """Store the tensors of a part (on the CPU) and what is to be remembered of it (JSON types).

        Raises:
            OSError: it cannot be written.
        """
        pieces = {key: _piece(tensor) for key, tensor in tensors.items()}
        write_tensors(self._path(name), pieces, {"notes": json.dumps(notes)})

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and notes of a part as they were written, or None if it is not finished."""
        from safetensors import safe_open

        path = self._path(name)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as opened:
            notes: dict[str, Any] = json.loads(opened.metadata()["notes"])
            return {key: opened.get_tensor(key) for key in opened.keys()}, notes  # noqa: SIM118 - a handle is no dict

    def _path(self, name: str) -> Path:
        return self.folder / (f"{name}.safetensors" if name == REFINED else f"part-{name}.safetensors")


def assemble(parts: Path, folder: Path) -> int:
    """Join the parts in `parts` into shards in `folder` of at most SHARD_BYTES (or one part), named as the hub names them.

    Each part is deleted when its shard is whole. A run killed here is resumed by calling this again.

    Returns:
        The bytes of all tensors.

    Raises:
        OSError: a shard cannot be written.
    """
    plan_path = parts / PLAN
    if not plan_path.exists():
        files.write_atomically(plan_path, json.dumps(_plan(sorted(parts.glob("part-*.safetensors")))))
    plan: dict[str, list[str]] = json.loads(plan_path.read_text(encoding="utf-8"))
    weight_map: dict[str, str] = {}
    total = 0
    for name, members in plan.items():
        if not (folder / name).exists():
            _join([parts / member for member in members], folder / name)
        for member in members:
            (parts / member).unlink(missing_ok=True)
        header, _ = _header(folder / name)
        weight_map.update(dict.fromkeys(header, name))
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return total


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its safetensors dtype, its shape, and its little-endian bytes, chunk by chunk."""

    dtype: str
    shape: Sequence[int]
    size: int
    chunks: Callable[[], Iterator[bytes | memoryview]]


def write_tensors(path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which appears when it is whole. Order and padding are those of the safetensors library.

    The library's own writer wants all tensors in memory at once, and writes metadata in no fixed order.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(pieces, key=lambda name: (-BYTES[pieces[name].dtype], name))
    offset = 0
    for name in names:
        piece = pieces[name]
        header[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [offset, offset + piece.size]}
        offset += piece.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with files.appearing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for chunk in pieces[name].chunks():
                file.write(chunk)
        files.sync(file)


def _plan(found: Sequence[Path]) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for part in found:
        bytes_ = part.stat().st_size
        if groups[-1] and size + bytes_ > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part.name)
        size += bytes_
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def _join(members: Sequence[Path], path: Path) -> None:
    pieces: dict[str, Piece] = {}
    for member in members:
        header, start = _header(member)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            pieces[name] = Piece(entry["dtype"], entry["shape"], end - first, _reader(member, start + first, end - first))
    write_tensors(path, pieces, {"format": "pt"})


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file that we wrote, by tensor, and where its data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
    del entries["__metadata__"]
    return entries, 8 + length


def _reader(path: Path, start: int, size: int) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            left = size
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise OSError(None, f"{path} is shorter than it was written")
                left -= len(chunk)
                yield chunk

    return chunks


def _piece(tensor: torch.Tensor | Blocks) -> Piece:
    import torch

    if isinstance(tensor, Blocks):
        blocks = tensor

        def rows() -> Iterator[memoryview]:
            for block in blocks.rows():
                yield _bytes(block)

        return Piece("F16", blocks.shape, 2 * math.prod(blocks.shape), rows)
    names = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}
    whole = tensor
    return Piece(names[whole.dtype], whole.shape, whole.numel() * whole.element_size(), lambda: iter([_bytes(whole)]))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
