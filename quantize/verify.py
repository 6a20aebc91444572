"""`qembed quantize --verify`: whether a finished checkpoint is what it says, without ever holding a whole model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.awq_layout import PACK
from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.find import find, source_of
from qembed.checkpoint.int8_table import BLOCK_ROWS, TENSORS, dequantize
from qembed.errors import BadInput
from qembed.files import sha256
from qembed.quantize import batches, calibration_texts
from qembed.quantize.blocks import LINEARS, Architecture, DecoderLayer
from qembed.quantize.calibration import prepare
from qembed.quantize.checks import sizes_of
from qembed.quantize.hidden import Stream
from qembed.quantize.stream import BATCH_TOKENS, as_computed
from qembed.quantize.table import Rows, half

if TYPE_CHECKING:
    import torch

TEXTS = 10
MAX_TOKENS = 512
SLACK = 0.01
"""How far below the least cosine noted at the time one may be: what another machine's arithmetic does, many times over."""
RESEMBLES = 0.5
"""The least mean cosine for texts on which nothing was noted."""

OnStep = Callable[[str, int, int], None]


def verify(folder: Path, model: str | None, device: torch.device, on_step: OnStep = lambda *_: None) -> dict[str, Any]:
    """What is wrong with the INT4 checkpoint in `folder` ("findings", one line each), and what was looked at (JSON types).

    Hashes against qembed.json, tensors against config.json, scales against what can be a scale; and, where the model that it
    was made from is at hand (`model`, or what qembed.json names; nothing is downloaded), the vectors of TEXTS texts.

    Raises:
        BadInput: `folder` is no INT4 checkpoint, or `model` is named and cannot be read.
    """
    checkpoint = find(str(folder))
    if not checkpoint.is_int4:
        raise BadInput(f"{folder}: not an AWQ INT4 checkpoint")
    found: dict[str, Any] = {"checkpoint": str(folder), "findings": [], "fidelity": None, "source": None}
    findings: list[str] = found["findings"]
    try:
        found["files"] = len(_noted(checkpoint, "files"))
    except BadInput as error:
        return found | {"findings": [str(error)], "files": 0, "source": f"not compared: {MANIFEST} cannot be read"}
    findings += _hashes(checkpoint, on_step)
    try:
        shape = sizes_of(checkpoint)
        broken = list(_tensors(checkpoint, shape, on_step))
    except BadInput as error:
        broken = [str(error)]
    findings += broken
    if broken:
        found["source"] = "not compared: the tensors are not whole"
        return found
    source = _source(checkpoint, model)
    if isinstance(source, str):
        found["source"] = source
        return found
    found["source"] = source.name
    try:
        found["fidelity"] = fidelity = _fidelity(checkpoint, source, shape, device, on_step)
    except BadInput as error:
        findings.append(f"not compared with {source.name}: {error}")
        return found
    if fidelity["min_cosine"] < fidelity["at_least"]:
        findings.append(
            f"{folder}: cosine to {source.name} on {TEXTS} texts: least {fidelity['min_cosine']:.4f}, "
            f"at least {fidelity['at_least']:.4f} was to be expected"
        )
    return found


def vectors(
    checkpoint: Checkpoint,
    shape: Architecture,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    on_layer: Callable[[], None],
) -> torch.Tensor:
    """Unit vectors [texts, hidden] of token `rows`, INT4 or original, one layer in memory at a time; rows by length."""
    import torch

    block = DecoderLayer(checkpoint, device)
    ids = sorted({0, *(token for row in rows for token in row)})  # rows are padded with 0
    stream = Stream.start(_rows(checkpoint, ids), batches.plain(rows, range(len(rows)), BATCH_TOKENS))
    with torch.no_grad():
        for layer in range(shape.layers):
            prefix = f"{checkpoint.prefix}layers.{layer}."
            wanted = [name for name in checkpoint.files if name.startswith(prefix)]
            stored = {name.removeprefix(prefix): checkpoint.tensor(name) for name in wanted}
            kept = {name: tensor if tensor.dtype == torch.int32 else half(name, tensor) for name, tensor in stored.items()}
            tensors = as_computed({name: tensor.to(device) for name, tensor in kept.items()})
            block.load({name: tensors[name] for name in block.module.state_dict()}, layer)
            stream.advance(block)
            on_layer()
    return stream.vectors(_half(checkpoint, "norm.weight").float(), checkpoint.config.get("rms_norm_eps", 1e-6))


def _noted(checkpoint: Checkpoint, section: str) -> dict[str, Any]:
    """A section of qembed.json; empty where there is none."""
    found = checkpoint.manifest.get(section)
    return found if isinstance(found, dict) else {}


def _rows(checkpoint: Checkpoint, ids: Sequence[int]) -> Rows:
    """The rows of the token table for `ids`, which ascend, as they are served; the table is never in memory as a whole."""
    import torch

    stem, wanted = f"{checkpoint.prefix}embed_tokens.", torch.tensor(ids)

    def rows(name: str) -> torch.Tensor:
        start, found = 0, []
        for block in checkpoint.row_blocks(stem + name, BLOCK_ROWS):
            found.append(block[wanted[(wanted >= start) & (wanted < start + len(block))] - start])
            start += len(block)
        return torch.cat(found)

    if not checkpoint.has_int8_table:
        return Rows(wanted, half(stem + "weight", rows("weight")))
    qweight, scales, columns = TENSORS
    return Rows(wanted, dequantize(rows(qweight), rows(scales), checkpoint.tensor(stem + columns)))


def _half(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    full = checkpoint.prefix + name
    return half(full, checkpoint.tensor(full))


def _hashes(checkpoint: Checkpoint, on_step: OnStep) -> Iterator[str]:
    folder, noted = checkpoint.folder, _noted(checkpoint, "files")
    if not noted:
        yield f"{folder / MANIFEST}: missing or without hashes: made by something else than qembed quantize?"
    for number, (name, digest) in enumerate(sorted(noted.items()), 1):
        path = folder / name
        if not path.is_file():
            yield f"{path}: missing"
        elif sha256(path) != digest:
            yield f"{path}: changed since it was written (SHA-256 differs from {MANIFEST})"
        on_step("hashing files", number, len(noted))
    for path in sorted(folder.glob("*.safetensors")):
        if noted and path.name not in noted:
            yield f"{path}: not part of the checkpoint"


def _tensors(checkpoint: Checkpoint, shape: Architecture, on_step: OnStep) -> Iterator[str]:
    """What is wrong with names, shapes, dtypes and values of the tensors."""
    import torch

    quantization = checkpoint.config["quantization_config"]
    for key, expected in (("version", "gemm"), ("zero_point", True)):
        if (value := quantization.get(key)) != expected:
            yield f"{checkpoint.folder / 'config.json'}: quantization_config: {key} is {value!r}, not {expected!r}"
    group_size = quantization.get("group_size")
    if not isinstance(group_size, int) or group_size < 1 or any(shape.linear(name)[1] % group_size for name in LINEARS):
        yield f"{checkpoint.folder / 'config.json'}: quantization_config: group_size {group_size!r} does not divide the layers"
        return
    expected_tensors = _expected(checkpoint, shape, group_size)
    stored = checkpoint.shapes()
    for name in sorted(expected_tensors.keys() - stored.keys()):
        yield f"{checkpoint.folder}: tensor {name} is missing"
    for number, name in enumerate(sorted(checkpoint.files), 1):
        where = f"{checkpoint.files[name]}: tensor {name}"
        if name not in stored:
            yield f"{where} is missing"
        elif name not in expected_tensors:
            yield f"{where} is none that config.json speaks of"
        elif stored[name] != expected_tensors[name]:
            (found, dtype), (size, wanted) = stored[name], expected_tensors[name]
            yield f"{where} is {dtype} {found}, config.json says {wanted} {size}"
        elif stored[name][1] in ("F16", "F32"):
            values = checkpoint.tensor(name)
            if not torch.isfinite(values).all():
                yield f"{where}: a value is NaN or infinite"
            elif name.endswith("scales") and not (values > 0).all():
                yield f"{where}: a scale is not positive"
        on_step("checking tensors", number, len(checkpoint.files))


def _expected(checkpoint: Checkpoint, shape: Architecture, group_size: int) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor that the checkpoint is to have."""
    import torch

    prefix = checkpoint.prefix
    table = ([shape.vocabulary, shape.hidden], "F16")
    expected = {f"{prefix}embed_tokens.weight": table, f"{prefix}norm.weight": ([shape.hidden], "F16")}
    if checkpoint.has_int8_table:
        sizes = [(table[0], "I8"), ([shape.vocabulary, 1], "F32"), ([shape.hidden], "F32")]
        expected |= {f"{prefix}embed_tokens.{part}": size for part, size in zip(TENSORS, sizes, strict=True)}
        expected[f"{prefix}embed_tokens.weight"] = ([0], "F16")
    if "lm_head.weight" in checkpoint.files:
        expected["lm_head.weight"] = table
    block = {
        name: list(tensor.shape) for name, tensor in DecoderLayer(checkpoint, torch.device("cpu")).module.state_dict().items()
    }
    for layer in range(shape.layers):
        for name, size in block.items():
            full = f"{prefix}layers.{layer}.{name}"
            linear = name.removesuffix(".weight")
            if linear not in LINEARS:
                expected[full] = (size, "F16")
                continue
            outputs, inputs = shape.linear(linear)
            full = full.removesuffix(".weight")
            expected[f"{full}.qweight"] = ([inputs, outputs // PACK], "I32")
            expected[f"{full}.qzeros"] = ([inputs // group_size, outputs // PACK], "I32")
            expected[f"{full}.scales"] = ([inputs // group_size, outputs], "F16")
    return expected


def _source(checkpoint: Checkpoint, model: str | None) -> Checkpoint | str:
    """The model that `checkpoint` was made from, or why it is not at hand."""
    if model is not None:
        return find(model)
    try:
        source = find(source_of(checkpoint), download=False)
        for name, digest in (_noted(checkpoint, "source").get("sha256") or {}).items():
            path = source.folder / name
            if not path.is_file() or sha256(path) != digest:
                return f"source not at hand: {path} is not what it was"
    except BadInput as error:
        return f"source not at hand: {error}"
    return source


def _fidelity(
    checkpoint: Checkpoint, source: Checkpoint, shape: Architecture, device: torch.device, on_step: OnStep
) -> dict[str, Any]:
    """Cosines on TEXTS of the texts that quantization did not see, and what is the least to be expected of them."""
    calibration, noted = _noted(checkpoint, "calibration"), _noted(checkpoint, "fidelity")
    found = calibration_texts.built_in()
    same = calibration.get("source") == found.source and calibration.get("sha256") == found.sha256 and "min_cosine" in noted
    seed, check = _noted(checkpoint, "settings").get("seed", 0) if same else 0, noted.get("texts", TEXTS) if same else TEXTS
    if same:
        found = calibration_texts.built_in(calibration["texts"] + check, seed)
    prepared = prepare(found, checkpoint, max_tokens=calibration.get("max_tokens", MAX_TOKENS), check=check, seed=seed)
    rows = [prepared.rows[number] for number in sorted(prepared.check)[:TEXTS]]
    done = 0

    def on_layer() -> None:
        nonlocal done
        done += 1
        on_step("running layers", done, 2 * shape.layers)

    pairs = [vectors(one, shape, rows, device, on_layer) for one in (source, checkpoint)]
    cosines = (pairs[0] * pairs[1]).sum(-1).tolist()
    least = noted["min_cosine"] - SLACK if same else RESEMBLES
    return {
        "texts": len(rows),
        "mean_cosine": round(math.fsum(cosines) / len(cosines), 6),
        "min_cosine": round(min(cosines), 6),
        "at_least": round(least, 6),
    }
