"""The AutoAWQ library (0.2.9, archived) as another engine: the same calibration rows in, the same parts out.

AutoAWQ holds the whole model and runs each layer again for every point of its search, so it costs a multiple of the memory and
time of our own engine. It is here for those who want its very weights, and for the bench to measure against.

What it does with the calibration rows (`awq.utils.calib_data.get_calib_dataset`): rows longer than a block are dropped, the
others are joined end to end, the whole is cut into blocks of equal length, and what is left over at the end is dropped. So a
block begins in the middle of one text and goes on into others, which attend to each other. It gets the rows of our own engine,
and a block length (`block_length`) with which no row is dropped and next to no token is left over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput, MissingExtra
from qembed.quantize import stream
from qembed.quantize.blocks import LINEARS, NOT_STORED, Architecture, model_config
from qembed.quantize.calibration import Calibration
from qembed.quantize.parts import Parts
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 512
"""AutoAWQ's own length of a calibration block (`max_calib_seq_len`)."""

PACKED_TOGETHER = 32
"""AutoAWQ packs 32 outputs at a time (`WQLinear_GEMM.from_linear`), though the layout asks for 8."""

NEEDED = (
    "--engine autoawq needs autoawq 0.2.9 with transformers 4.51.3, which no current vLLM can share; make an environment of "
    "its own: python3 -m venv autoawq && autoawq/bin/pip install '.[autoawq]'"
)


def check_installed() -> None:
    """Look whether AutoAWQ can be imported.

    Raises:
        MissingExtra: it cannot; the message says which environment it needs.
    """
    try:
        _library()
    except (ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingExtra(f"AutoAWQ cannot be imported ({reason}). {NEEDED}") from error


def quantize(
    checkpoint: Checkpoint,
    shape: Architecture,
    calibration: Calibration,
    settings: QuantizationSettings,
    device: torch.device,
    parts: Parts,
    on_layer: Callable[[int], None] = lambda _: None,
) -> Report:
    """What `qembed.quantize.stream.quantize` does, by AutoAWQ; of `settings` it knows `group_size`, `clip` and `token_table`.

    AutoAWQ makes all layers before any is written. Our own engine then finds them finished: it writes what stands outside the
    layers and measures what is lost, as it does for a run that is resumed.

    Raises:
        MissingExtra: AutoAWQ cannot be imported.
        BadInput: a linear's width is one that AutoAWQ cannot pack; it would compute on another device than `device`; or a
            tensor is missing, damaged, not finite, or greater than float16 holds.
    """
    check_installed()
    for name in LINEARS:
        if (outputs := shape.linear(name)[0]) % PACKED_TOGETHER:
            raise BadInput(f"{checkpoint.folder}: {name} has {outputs} outputs; AutoAWQ packs multiples of {PACKED_TOGETHER}")
    chosen = _library().utils.utils.get_best_device()
    if not chosen.startswith(device.type):
        raise BadInput(f"--device {device}: AutoAWQ chooses the device by itself, here {chosen}; leave --device out")
    names = [f"layer-{number:03d}" for number in range(shape.layers)]
    if not all(name in parts for name in names):
        model = load(checkpoint)
        rows = [row for number, row in enumerate(calibration.rows) if number not in calibration.check]
        run(model, rows, settings, fixed_quantizer(on_layer))
        for number, (name, layer) in enumerate(zip(names, model.model.layers, strict=True)):
            prefix = f"{checkpoint.prefix}layers.{number}."
            tensors = {f"{prefix}{key}": tensor.cpu() for key, tensor in layer.state_dict().items()}
            parts.write(name, {key: _storable(key, tensor) for key, tensor in tensors.items()}, {})
    plain = replace(settings, target="layer", inputs="quantized", prefixes=0, mixed=0)
    return stream.quantize(checkpoint, shape, calibration, plain, device, parts)


def load(checkpoint: Checkpoint) -> Any:
    """The causal language model of `checkpoint` as AutoAWQ wants it, in float32, with no output head and no remote code.

    float32 because float16 has no fast arithmetic on most CPUs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(checkpoint)
    config.use_cache = False
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    state = {
        name.removeprefix(checkpoint.prefix): half(name, checkpoint.tensor(name)).float()
        for name in checkpoint.files
        if not name.startswith("lm_head.") and not name.endswith(NOT_STORED)
    }
    model.model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.lm_head = torch.nn.Identity()
    return model.eval()


def run(model: Any, rows: Sequence[Sequence[int]], settings: QuantizationSettings, quantizer: Any) -> None:
    """Let AutoAWQ replace the linears of `model` by its own INT4 ones, through the class `quantizer`."""
    library = _library()
    family = model.config.model_type
    wrapped = library.models.auto.AWQ_CAUSAL_LM_MODEL_MAP[family](model, family, False, model.config, None, None)
    wrapped.quantize(
        tokenizer=None,
        quant_config={"zero_point": True, "q_group_size": settings.group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=[list(row) for row in rows],
        max_calib_samples=len(rows),
        max_calib_seq_len=block_length(rows),
        apply_clip=settings.clip,
        quantizer_cls=quantizer,
    )


def block_length(rows: Sequence[Sequence[int]]) -> int:
    """The block length, from the longest of `rows` to BLOCK_TOKENS, that leaves fewest tokens over; the longest such."""
    tokens, longest = sum(map(len, rows)), max(map(len, rows))
    return min(range(min(longest, tokens), max(longest, min(BLOCK_TOKENS, tokens)) + 1), key=lambda n: (tokens % n, -n))


def fixed_quantizer(on_layer: Callable[[int], None] = lambda _: None) -> Any:
    """AutoAWQ's quantizer class, mended for CPUs; `on_layer(n)` is called when n layers are done.

    `AwqQuantizer._compute_best_scale` keeps `{k: v.cpu() for k, v in module.state_dict().items()}` to restore the weights after
    each grid point. On a CPU `.cpu()` copies nothing, so the first point's `weight.mul_(scales)` changes what was kept, and its
    scales stay in the weights for good. Here the module hands out a copy.
    """
    stock = _library().quantize.quantizer.AwqQuantizer

    class Quantizer(stock):  # type: ignore[misc, valid-type]
        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, linears2scale: Any, fp16_output: Any, kwargs: Any
        ) -> Any:
            with _state_is_a_copy(module2inspect):
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, linears2scale, fp16_output, kwargs)

        def _apply_quant(self, module: Any, named_linears: Any) -> None:
            super()._apply_quant(module, named_linears)
            on_layer([module is layer for layer in self.modules].index(True) + 1)

    return Quantizer


@contextmanager
def _state_is_a_copy(module: Any) -> Iterator[None]:
    stock = module.state_dict
    module.state_dict = lambda *arguments, **options: {
        name: tensor.clone() for name, tensor in stock(*arguments, **options).items()
    }
    try:
        yield
    finally:
        del module.state_dict


def _storable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return half(name, tensor) if tensor.is_floating_point() else tensor


def _library() -> Any:
    """The package `awq`, with its farewell message and its own progress bars silenced."""
    with warnings.catch_warnings(record=True):  # "ignore" would not do: it resets the filters while it is imported
        import awq
        import awq.models.auto
        import awq.quantize.quantizer
        import awq.utils.utils
    awq.quantize.quantizer.tqdm = lambda items, **_: items
    return awq
