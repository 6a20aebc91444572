"""The AutoAWQ library (0.2.9, archived) as an alternative engine: same calibration rows in, same parts out.

AutoAWQ holds the whole model in memory and runs each layer again for every point of its scale search, so it needs a multiple of
the native engine's memory and time. It serves users who want exactly AutoAWQ's weights, and as a baseline for the bench.

AutoAWQ's treatment of calibration rows (`awq.utils.calib_data.get_calib_dataset`): it drops rows longer than a block,
concatenates the others, cuts the result into blocks of equal length, and drops the remainder. A block therefore begins in the
middle of one text and continues into others, which attend to each other. Here AutoAWQ gets the same rows as the native engine
and a block length (`block_length`) that drops no row and next to no token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qembed.checkpoint.description import Checkpoint
from qembed.errors import BadInput, MissingExtra
from qembed.installation import how_to_install
from qembed.quantize import layerwise
from qembed.quantize.blocks import LINEARS, NOT_STORED, Architecture, model_config
from qembed.quantize.calibration import Calibration
from qembed.quantize.parts import Parts
from qembed.quantize.settings import QuantizationSettings, Report
from qembed.quantize.table import half

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 512
"""AutoAWQ's default calibration block length, in tokens (`max_calib_seq_len`)."""

OUTPUT_MULTIPLE = 32
"""AutoAWQ packs 32 outputs at a time (`WQLinear_GEMM.from_linear`); the layout itself only needs multiples of 8."""

INSTALL_HINT = (
    "--engine autoawq needs autoawq 0.2.9 with transformers 4.51.3, which cannot share an environment with a current vLLM; "
    "create a separate one"
)


def check_installed() -> None:
    """Check that AutoAWQ can be imported.

    Raises:
        MissingExtra: AutoAWQ cannot be imported; the message describes the environment that it needs.
    """
    try:
        _library()
    except (ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingExtra(f"AutoAWQ cannot be imported ({reason}). {INSTALL_HINT}: {how_to_install('autoawq')}") from error


def quantize(
    checkpoint: Checkpoint,
    shape: Architecture,
    calibration: Calibration,
    settings: QuantizationSettings,
    device: torch.device,
    parts: Parts,
    on_layer: Callable[[int], None] = lambda _: None,
) -> Report:
    """Quantize with AutoAWQ; counterpart of `qembed.quantize.layerwise.quantize`.

    Of `settings`, only `group_size`, `clip` and `token_table` apply. AutoAWQ quantizes all layers before any is written. Then
    the native engine runs as if it resumed: it skips the finished layers, writes the tensors outside the layers, and measures
    the loss.

    Raises:
        MissingExtra: AutoAWQ cannot be imported.
        BadInput: AutoAWQ cannot pack the width of a linear layer; AutoAWQ would compute on another device than `device`; or a
            tensor is missing, damaged, not finite, or exceeds the range of float16.
    """
    check_installed()
    for name in LINEARS:
        if (outputs := shape.linear(name)[0]) % OUTPUT_MULTIPLE:
            raise BadInput(f"{checkpoint.folder}: {name} has {outputs} outputs; AutoAWQ packs multiples of {OUTPUT_MULTIPLE}")
    autoawq_device = _library().utils.utils.get_best_device()
    if not autoawq_device.startswith(device.type):
        raise BadInput(f"--device {device}: AutoAWQ picks its own device, here {autoawq_device}; leave --device out")
    names = [f"layer-{number:03d}" for number in range(shape.layers)]
    if not all(name in parts for name in names):
        model = load_model(checkpoint)
        rows = [row for number, row in enumerate(calibration.rows) if number not in calibration.check]
        quantize_linears(model, rows, settings, fixed_quantizer(on_layer))
        for number, (name, layer) in enumerate(zip(names, model.model.layers, strict=True)):
            prefix = f"{checkpoint.prefix}layers.{number}."
            tensors = {f"{prefix}{key}": tensor.cpu() for key, tensor in layer.state_dict().items()}
            parts.write(name, {key: _storable(key, tensor) for key, tensor in tensors.items()}, {})
    native_settings = replace(settings, target="layer", inputs="quantized", prefixes=0, mixed=0)
    return layerwise.quantize(checkpoint, shape, calibration, native_settings, device, parts)


def load_model(checkpoint: Checkpoint) -> Any:
    """Load the causal language model of `checkpoint` for AutoAWQ: float32, without an output head, without remote code.

    Most CPUs have no fast float16 arithmetic, hence float32.
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


def quantize_linears(model: Any, rows: Sequence[Sequence[int]], settings: QuantizationSettings, quantizer: Any) -> None:
    """Let AutoAWQ replace the linear layers of `model` by its INT4 layers, in place, using the quantizer class `quantizer`."""
    library = _library()
    family = model.config.model_type
    awq_model = library.models.auto.AWQ_CAUSAL_LM_MODEL_MAP[family](model, family, False, model.config, None, None)
    awq_model.quantize(
        tokenizer=None,
        quant_config={"zero_point": True, "q_group_size": settings.group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=[list(row) for row in rows],
        max_calib_samples=len(rows),
        max_calib_seq_len=block_length(rows),
        apply_clip=settings.clip,
        quantizer_cls=quantizer,
    )


def block_length(rows: Sequence[Sequence[int]]) -> int:
    """The block length, between the longest of `rows` and BLOCK_TOKENS, that drops fewest tokens; ties go to the longest."""
    tokens, longest = sum(map(len, rows)), max(map(len, rows))
    return min(range(min(longest, tokens), max(longest, min(BLOCK_TOKENS, tokens)) + 1), key=lambda n: (tokens % n, -n))


def fixed_quantizer(on_layer: Callable[[int], None] = lambda _: None) -> Any:
    """AutoAWQ's quantizer class with its CPU bug fixed; calls `on_layer(n)` when n layers are done.

    `AwqQuantizer._compute_best_scale` saves `{k: v.cpu() for k, v in module.state_dict().items()}` to restore the weights after
    each grid point. On a CPU `.cpu()` does not copy, so the first grid point's `weight.mul_(scales)` also changes the saved
    state, and its scales stay in the weights. The fix: during the search, `state_dict()` returns copies.
    """
    stock = _library().quantize.quantizer.AwqQuantizer

    class Quantizer(stock):  # type: ignore[misc, valid-type]
        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, linears2scale: Any, fp16_output: Any, kwargs: Any
        ) -> Any:
            with _state_dict_copies(module2inspect):
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, linears2scale, fp16_output, kwargs)

        def _apply_quant(self, module: Any, named_linears: Any) -> None:
            super()._apply_quant(module, named_linears)
            on_layer([module is layer for layer in self.modules].index(True) + 1)

    return Quantizer


@contextmanager
def _state_dict_copies(module: Any) -> Iterator[None]:
    """Inside the block `module.state_dict()` returns copies of the tensors."""
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
    """The package `awq`, without its deprecation message and its progress bars."""
    with warnings.catch_warnings(record=True):  # a filter "ignore" has no effect: awq resets the filters during its import
        import awq
        import awq.models.auto
        import awq.quantize.quantizer
        import awq.utils.utils
    awq.quantize.quantizer.tqdm = lambda items, **_: items
    return awq
