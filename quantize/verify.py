"""`qembed quantize --verify`: checks a finished checkpoint, with at most one layer of a model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.awq_layout import PACK
from qembed.checkpoint.description import MANIFEST, Checkpoint
from qembed.checkpoint.files import check_file, unsafe_files
from qembed.checkpoint.find import find, source_of
from qembed.checkpoint.head import Head
from qembed.checkpoint.int8_table import BLOCK_ROWS, TENSORS, dequantize
from qembed.checkpoint.reranker import LABEL_HEAD
from qembed.errors import BadInput
from qembed.files import sha256
from qembed.quantize import batches, calibration_pairs, calibration_texts
from qembed.quantize import calibration as calibration_of_texts
from qembed.quantize.blocks import LINEARS, Architecture, DecoderLayer
from qembed.quantize.checks import sizes_of
from qembed.quantize.hidden import Stream
from qembed.quantize.layerwise import BATCH_TOKENS, dequantize_layer
from qembed.quantize.table import Rows, gather, half
from qembed.quantize.verify_files import OnStep, check_files
from qembed.text.display import counted, one_line

if TYPE_CHECKING:
    import torch

TEXTS = 10
"""Number of texts whose vectors are compared."""
MAX_TOKENS = 512
COSINE_TOLERANCE = 0.01
"""How far a cosine may fall below the recorded minimum: many times the effect of another machine's arithmetic."""
MOST_TEXTS, MOST_TOKENS = 10**7, 2**27
"""Largest numbers of texts, and of tokens of a text, that a manifest is believed."""
DEFAULT_MIN_COSINE = 0.5
"""The smallest acceptable cosine where the manifest records none for these texts."""


def verify(folder: Path, model: str | None, device: torch.device, on_step: OnStep = lambda *_: None) -> dict[str, Any]:
    """Check the INT4 checkpoint in `folder`; returns the problems ("findings", one line each) and what was checked.

    Compares hashes with qembed.json and tensors with config.json, and checks that values are finite and scales positive. If
    nothing is wrong so far and the source is available (`model`, or the one that qembed.json names; nothing is downloaded),
    also compares the vectors of TEXTS texts with the source's. Damage of any file is a finding: no library gets a config or a
    tokenizer whose hash differs. The result has JSON types only.

    Raises:
        BadInput: `folder` is not an INT4 checkpoint, or `model` is given and cannot be read.
    """
    checkpoint = find(str(folder), check=False)
    has_manifest = (folder / MANIFEST).exists()
    config_findings = _check_config(checkpoint)
    if config_findings and not has_manifest:
        raise BadInput(config_findings[0])
    files = check_files(checkpoint.folder, on_step)
    damage = config_findings + (files.findings if has_manifest else [])
    damage += [problem for problem in unsafe_files(checkpoint.folder) if problem not in damage]
    shape = None
    if not config_findings:
        try:
            shape = sizes_of(checkpoint)
            Head.of(checkpoint.trunk)
            damage += _check_tensors(checkpoint, shape, on_step, trusted=not damage)
        except BadInput as error:
            damage.append(str(error))
        except OSError as error:
            damage.append(f"{folder}: cannot be read: {error.strerror or error}")
    findings = damage if has_manifest else files.findings + damage
    result: dict[str, Any] = {"checkpoint": str(folder), "files": files.hashed, "notes": _lines(files.notes)}
    result |= {"findings": _lines(findings), "source": "not compared: the checkpoint is damaged", "fidelity": None}
    if damage or shape is None:
        return result
    source = _source(checkpoint, files.manifest or {}, model)
    if isinstance(source, str):
        return result | {"source": source}
    result["source"] = source.name
    try:
        result["fidelity"] = fidelity = _fidelity(checkpoint, source, files.manifest or {}, shape, device, on_step)
    except BadInput as error:
        result["findings"].append(one_line(f"not compared with {source.name}: {error}"))
        return result
    if fidelity["min_cosine"] < fidelity["at_least"]:
        result["findings"].append(
            f"{folder}: cosine to {source.name} on {TEXTS} texts: minimum {fidelity['min_cosine']:.4f}, "
            f"expected at least {fidelity['at_least']:.4f}"
        )
    return result


def _lines(texts: Sequence[str]) -> list[str]:
    """`texts` without control characters and line breaks, which names in damaged files may have."""
    return [one_line(text) for text in texts]


def vectors(
    checkpoint: Checkpoint,
    shape: Architecture,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    on_layer: Callable[[], None],
) -> torch.Tensor:
    """Unit vectors [texts, hidden] of token `rows` from an INT4 or original checkpoint, with one layer in memory at a time.

    Vectors come in the order of the batches (by length), not in that of `rows`.
    """
    import torch

    block = DecoderLayer(checkpoint, device)
    ids = sorted({0, *(token for row in rows for token in row)})  # rows are padded with 0
    stream = Stream.start(_rows(checkpoint, ids), batches.plain(rows, range(len(rows)), BATCH_TOKENS))
    with torch.no_grad():
        for layer in range(shape.layers):
            prefix = f"{checkpoint.prefix}layers.{layer}."
            names = [name for name in checkpoint.files if name.startswith(prefix)]
            stored = {name.removeprefix(prefix): checkpoint.tensor(name) for name in names}
            halves = {name: tensor if tensor.dtype == torch.int32 else half(name, tensor) for name, tensor in stored.items()}
            tensors = dequantize_layer({name: tensor.to(device) for name, tensor in halves.items()})
            block.load({name: tensors[name] for name in block.module.state_dict()}, layer)
            stream.advance(block)
            on_layer()
    return stream.vectors(
        _half(checkpoint, "norm.weight").float(), checkpoint.config.get("rms_norm_eps", 1e-6), Head.of(checkpoint.trunk)
    )


def _computed(
    checkpoint: Checkpoint,
    shape: Architecture,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    on_layer: Callable[[], None],
) -> torch.Tensor:
    """As `vectors`; any error of the libraries for a config.json that they accepted becomes BadInput."""
    try:
        return vectors(checkpoint, shape, rows, device, on_layer)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{checkpoint.folder}: cannot be computed: {type(error).__name__}: {reason}") from error


@dataclass(frozen=True)
class _Recorded:
    """The entries of qembed.json about the texts that a checkpoint was made and measured with.

    Attributes:
        source, sha256: of the calibration texts.
        texts: number of texts that calibration saw.
        held_out: number of texts that fidelity was measured on.
        max_tokens: length that texts were cut to.
        seed: of the draw of the held-out texts.
        min_cosine: the smallest cosine of the held-out texts.
    """

    source: object
    sha256: object
    texts: int
    held_out: int
    max_tokens: int
    seed: int
    min_cosine: float


def _recorded(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> _Recorded:
    """The records of `manifest`, with defaults for missing ones.

    Raises:
        BadInput: a number is none, or one that no run can have written.
    """

    def number(section: str, name: str, default: float, least: float, most: float, kind: type = int) -> Any:
        value = _section(manifest, section).get(name, default)
        if type(value) not in (int, kind) or not least <= value <= most:
            raise BadInput(f"{checkpoint.folder / MANIFEST}: {section}: {name} is {str(value)[:60]!r}, which no run writes")
        return value

    calibration = _section(manifest, "calibration")
    return _Recorded(
        calibration.get("source"),
        calibration.get("sha256"),
        texts=number("calibration", "texts", TEXTS, 1, MOST_TEXTS),
        held_out=number("fidelity", "texts", TEXTS, 1, MOST_TEXTS),
        max_tokens=number("calibration", "max_tokens", MAX_TOKENS, 1, MOST_TOKENS),
        seed=number("settings", "seed", 0, -(2**63), 2**64),
        min_cosine=number("fidelity", "min_cosine", DEFAULT_MIN_COSINE, -1, 1, float),
    )


def _section(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of qembed.json; empty if it is missing or not an object."""
    value = manifest.get(name)
    return value if isinstance(value, dict) else {}


def _rows(checkpoint: Checkpoint, ids: Sequence[int]) -> Rows:
    """The rows of the token table for `ids` (ascending), as a server looks them up; reads the table in blocks of rows."""
    import torch

    stem, row_ids = f"{checkpoint.prefix}embed_tokens.", torch.tensor(ids)

    def rows(name: str) -> torch.Tensor:
        return gather(checkpoint.row_blocks(stem + name, BLOCK_ROWS), row_ids)

    if not checkpoint.has_int8_table:
        return Rows(row_ids, half(stem + "weight", rows("weight")))
    qweight, scales, column_scales = TENSORS
    return Rows(row_ids, dequantize(rows(qweight), rows(scales), checkpoint.tensor(stem + column_scales)))


def _half(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    full = checkpoint.prefix + name
    return half(full, checkpoint.tensor(full))


def _check_config(checkpoint: Checkpoint) -> list[str]:
    """The problem of config.json, if it cannot be read or does not describe an AWQ INT4 checkpoint."""
    try:
        if checkpoint.is_int4:
            return []
    except BadInput as error:
        return [str(error)]
    path = checkpoint.folder / "config.json"
    return [f"{checkpoint.folder}: not an AWQ INT4 checkpoint, according to quantization_config in {path.name}"]


def _check_tensors(checkpoint: Checkpoint, shape: Architecture, on_step: OnStep, *, trusted: bool) -> Iterator[str]:
    """Check names, shapes, dtypes and values of the tensors; yields problems.

    transformers is asked for the tensors besides the linear layers only if config.json can be `trusted`.
    """
    import torch

    quantization, config_path = checkpoint.config["quantization_config"], checkpoint.folder / "config.json"
    for key, expected in (("version", "gemm"), ("zero_point", True)):
        if (value := quantization.get(key)) != expected:
            yield f"{config_path}: quantization_config: {key} is {value!r}, not {expected!r}"
    group_size = quantization.get("group_size")
    if not isinstance(group_size, int) or group_size < 1 or any(shape.linear(name)[1] % group_size for name in LINEARS):
        yield f"{config_path}: quantization_config: group_size {group_size!r} does not divide the layers"
        return
    stored = checkpoint.shapes()
    if (layers := _layer_count(checkpoint)) != shape.layers:  # before anything loops over the layers of config.json
        yield f"{config_path}: num_hidden_layers is {shape.layers}, the tensors are those of {counted(layers, 'layer')}"
        return
    expected_tensors = _expected_linears(checkpoint, shape, group_size)
    sizes_agree = all(stored.get(name, (None,))[0] == size for name, (size, _) in expected_tensors.items())
    complete = trusted and sizes_agree  # transformers would allocate what a wrong size asks for
    if complete:
        expected_tensors |= _expected_others(checkpoint, shape)
    for name in sorted(expected_tensors.keys() - stored.keys()):
        yield f"{checkpoint.folder}: tensor {name} is missing"
    for number, name in enumerate(sorted(checkpoint.files), 1):
        location = f"{checkpoint.files[name]}: tensor {name}"
        if name not in stored:
            yield f"{location} is missing"
        elif complete and name not in expected_tensors:
            yield f"{location} is unexpected: config.json describes no such tensor"
        elif name in expected_tensors and stored[name] != expected_tensors[name]:
            (size, dtype), (expected_size, expected_dtype) = stored[name], expected_tensors[name]
            yield f"{location} is {dtype} {size}, config.json says {expected_dtype} {expected_size}"
        elif stored[name][1] in ("F16", "F32"):
            values = checkpoint.tensor(name)
            if not torch.isfinite(values).all():
                yield f"{location}: a value is NaN or infinite"
            elif name.endswith("scales") and not (values > 0).all():
                yield f"{location}: a scale is not positive"
        on_step("checking tensors", number, len(checkpoint.files))


def _layer_count(checkpoint: Checkpoint) -> int:
    """Number of layers that the names of the tensors tell of."""
    start = f"{checkpoint.prefix}layers."
    return len({name.removeprefix(start).partition(".")[0] for name in checkpoint.files if name.startswith(start)})


def _expected_linears(checkpoint: Checkpoint, shape: Architecture, group_size: int) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor whose shape the sizes in config.json tell: linear layers, token table, final norm."""
    prefix = checkpoint.prefix
    table = ([shape.vocabulary, shape.hidden], "F16")
    expected = {f"{prefix}embed_tokens.weight": table, f"{prefix}norm.weight": ([shape.hidden], "F16")}
    if checkpoint.has_int8_table:
        sizes = [(table[0], "I8"), ([shape.vocabulary, 1], "F32"), ([shape.hidden], "F32")]
        expected |= {f"{prefix}embed_tokens.{suffix}": size for suffix, size in zip(TENSORS, sizes, strict=True)}
        expected[f"{prefix}embed_tokens.weight"] = ([0], "F16")
    if "lm_head.weight" in checkpoint.files:
        expected["lm_head.weight"] = table
    if checkpoint.reranker is not None and checkpoint.reranker.form == "converted":
        expected[LABEL_HEAD] = ([1, shape.hidden], "F16")
    for layer in range(shape.layers):
        for linear in LINEARS:
            outputs, inputs = shape.linear(linear)
            full = f"{prefix}layers.{layer}.{linear}"
            expected[f"{full}.qweight"] = ([inputs, outputs // PACK], "I32")
            expected[f"{full}.qzeros"] = ([inputs // group_size, outputs // PACK], "I32")
            expected[f"{full}.scales"] = ([inputs // group_size, outputs], "F16")
    return expected


def _expected_others(checkpoint: Checkpoint, shape: Architecture) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of the layers' other tensors, norms and biases, of which transformers knows."""
    import torch

    block = DecoderLayer(checkpoint, torch.device("cpu")).module.state_dict()
    others = {name: list(tensor.shape) for name, tensor in block.items() if name.removesuffix(".weight") not in LINEARS}
    return {
        f"{checkpoint.prefix}layers.{layer}.{name}": (size, "F16")
        for layer in range(shape.layers)
        for name, size in others.items()
    }


def _source(checkpoint: Checkpoint, manifest: Mapping[str, Any], model: str | None) -> Checkpoint | str:
    """The source of `checkpoint`, or the reason why it is not available."""
    if model is not None:
        return find(model)
    try:
        source = find(source_of(checkpoint), download=False)
        for name, digest in _section(_section(manifest, "source"), "sha256").items():
            path = source.folder / name
            check_file(path, source.folder)
            if sha256(path) != digest:
                return f"not compared: source not available: {path} has changed"
    except BadInput as error:
        return f"not compared: source not available: {error}"
    except OSError as error:
        return f"not compared: source not available: {error.filename}: {error.strerror or error}"
    return source


def _fidelity(
    checkpoint: Checkpoint,
    source: Checkpoint,
    manifest: Mapping[str, Any],
    shape: Architecture,
    device: torch.device,
    on_step: OnStep,
) -> dict[str, Any]:
    """Cosines between INT4 and source vectors of TEXTS texts, and the smallest cosine to be expected.

    If the checkpoint was calibrated on this version's built-in texts, the held-out texts are drawn again, and the recorded
    minimum is the yardstick. Otherwise any built-in texts serve, and DEFAULT_MIN_COSINE is.
    """
    record = _recorded(manifest, checkpoint)
    module: Any = calibration_texts if checkpoint.reranker is None else calibration_pairs
    texts, check, least = module.built_in(), TEXTS, DEFAULT_MIN_COSINE
    if record.source == texts.source and record.sha256 == texts.sha256:
        check, least = record.held_out, record.min_cosine - COSINE_TOLERANCE
        texts = module.built_in(record.texts + check, record.seed)
    if check > len(texts):
        raise BadInput(f"{checkpoint.folder / MANIFEST}: fidelity: {check} texts, and there are {len(texts)}")
    prepare: Any = calibration_of_texts.prepare if checkpoint.reranker is None else calibration_pairs.prepare
    prepared = prepare(texts, checkpoint, max_tokens=record.max_tokens, check=check, seed=record.seed)
    rows = [prepared.rows[number] for number in sorted(prepared.check)[:TEXTS]]
    done = 0
    on_step("running layers", done, 2 * shape.layers)

    def on_layer() -> None:
        nonlocal done
        done += 1
        on_step("running layers", done, 2 * shape.layers)

    original, int4 = (_computed(side, shape, rows, device, on_layer) for side in (source, checkpoint))
    cosines = (original * int4).sum(-1).tolist()
    if not all(map(math.isfinite, cosines)):
        raise BadInput("its vectors hold NaN or infinity")
    return {
        "texts": len(rows),
        "mean_cosine": round(math.fsum(cosines) / len(cosines), 6),
        "min_cosine": round(min(cosines), 6),
        "at_least": round(least, 6),
    }
