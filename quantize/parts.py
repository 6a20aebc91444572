"""Writes tensors to disk: one part file per layer during the run, joined into shards at its end.

A part is a safetensors file. It is written under a temporary name, synced and then renamed, so a killed run leaves only
complete parts. Parts are joined by copying their bytes, so no shard is ever held in memory.
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
REPORT = "report.json"
"""The file that stores the report of a run, as JSON, once all layers are finished."""
REFINED = "refined"
"""The part that holds the refined tensors of all layers until each layer's part contains its own. It goes into no shard."""


@dataclass(frozen=True)
class Blocks:
    """A float16 tensor of `shape`, read through `rows()` in blocks of rows, so that it is never held in memory at once."""

    shape: Sequence[int]
    rows: Callable[[], Iterator[torch.Tensor]]


class Parts:
    """The finished parts of a run, in a folder. Part names: "rest" (tensors outside the layers), "layer-000", …"""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    @property
    def layers(self) -> int:
        """Number of finished layers."""
        return sum(1 for _ in self.folder.glob("part-layer-*.safetensors"))

    def write(self, name: str, tensors: Mapping[str, torch.Tensor | Blocks], notes: Mapping[str, Any]) -> None:
        """Store a part: its tensors (on the CPU) and `notes` about it (JSON types).

        Raises:
            OSError: the file cannot be written.
        """
        pieces = {key: _piece(tensor) for key, tensor in tensors.items()}
        write_tensors(self._path(name), pieces, {"notes": json.dumps(notes)})

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and notes of a part, or None if it is not finished."""
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
    """Join the parts in `parts` into shards of at most SHARD_BYTES (or one part) in `folder`, with the hub's file names.

    Deletes each part once its shard is complete. After a kill, calling this again continues.

    Returns:
        The size of all tensors in bytes.

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
    """A tensor to write: safetensors dtype name, shape, size in bytes, and its little-endian bytes, chunk by chunk."""

    dtype: str
    shape: Sequence[int]
    size: int
    chunks: Callable[[], Iterator[bytes | memoryview]]


def write_tensors(path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with the tensor order and padding of the safetensors library.

    The library's own writer needs all tensors in memory at once, and writes metadata in no fixed order.

    Raises:
        OSError: the file cannot be written; no partial file is left behind.
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


def _plan(parts: Sequence[Path]) -> dict[str, list[str]]:
    """The names of the parts that go into each shard, by shard name."""
    groups: list[list[str]] = [[]]
    size = 0
    for part in parts:
        part_size = part.stat().st_size
        if groups[-1] and size + part_size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part.name)
        size += part_size
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
    """The header entries of a safetensors file written by `write_tensors`, by tensor, and the offset of its data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
    del entries["__metadata__"]
    return entries, 8 + length


def _reader(path: Path, start: int, size: int) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(start)
            remaining = size
            while remaining:
                chunk = file.read(min(remaining, CHUNK_BYTES))
                if not chunk:
                    raise OSError(None, f"{path}: file is truncated")
                remaining -= len(chunk)
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
    dense = tensor
    return Piece(names[dense.dtype], dense.shape, dense.numel() * dense.element_size(), lambda: iter([_bytes(dense)]))


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
