"""`qembed quantize`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qembed.checkpoint import DEFAULT_MODEL, INT4_SUFFIX
from qembed.errors import BadInput

if TYPE_CHECKING:
    import torch

CHECK_TEXTS = 32


@click.command("quantize")
@click.option(
    "--model",
    envvar="QEMBED_MODEL",
    show_envvar=True,
    default=DEFAULT_MODEL,
    show_default=True,
    help="What to quantize: a hub id, a folder, or 'sample' for the checkpoint inside qembed.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder to write.  [default: ./NAME{INT4_SUFFIX}]",
)
@click.option("--force", is_flag=True, help="Replace a checkpoint that qembed wrote there before.")
@click.option(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="128",
    show_default=True,
    help="Inputs that share a scale and a zero point. Smaller is nearer to FP16 and larger on disk.",
)
@click.option(
    "--scales",
    type=click.Choice(["awq", "none"]),
    default="awq",
    show_default=True,
    help="Search a scale for each input channel, or leave the weights as they are.",
)
@click.option("--clip/--no-clip", default=True, show_default=True, help="Shrink each group's range where that costs less.")
@click.option(
    "--rounding",
    type=click.Choice(["compensated", "nearest"]),
    default="compensated",
    show_default=True,
    help="Push each rounding error into the weights not yet rounded (GPTQ), or round each to its nearest level.",
)
@click.option(
    "--token-table",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    show_default=True,
    help="int8 halves the token table (26% of the 0.6B's parameters); such a checkpoint needs qembed's vLLM plugin to load.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the calibration texts kept apart to measure on.")
@click.option("--device", default="auto", show_default=True, help="Where to compute: auto, cpu, cuda, or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    model: str,
    output: Path | None,
    force: bool,
    group_size: str,
    scales: str,
    clip: bool,
    rounding: str,
    token_table: str,
    seed: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    r"""Turn an FP16 checkpoint into an AWQ INT4 one.

    \b
    The folder that it writes is read by vLLM, SGLang and transformers:
      weights of the linear layers in 4 bits, everything else in float16 (--token-table);
      tokenizer, pooling and prompts as in the source;
      README.md (the model card) and qembed.json (settings, seed, hashes).

    The target appears when it is whole. Calibration texts ship with qembed; nothing is sent anywhere.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from qembed import checkpoint as checkpoints
    from qembed.quantize.run import run
    from qembed.quantize.stream import Settings

    console = Console(stderr=True)
    target = output or checkpoints.default_output(model)
    settings = Settings(group_size=int(group_size), scales=scales, clip=clip, rounding=rounding, token_table=token_table)
    place = _device(device, threads)
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading the checkpoint", total=None)

        def on_layer(done: int, total: int) -> None:
            progress.update(task, description="layers", completed=done, total=total)
            if not sys.stderr.isatty():
                click.echo(f"layer {done} of {total}, {time.monotonic() - start:.0f} s", err=True)

        result = run(model, target, settings, device=place, seed=seed, force=force, check=CHECK_TEXTS, on_layer=on_layer)
    result["seconds"] = round(time.monotonic() - start, 1)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _show(result)


def _device(name: str, threads: int | None) -> torch.device:
    import torch

    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name}: no such device; choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BadInput(f"--device {name}: torch finds no such CUDA device")
    return device


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    losses = Table(title="Output error by kind of layer, relative, root mean square")
    losses.add_column("layer")
    losses.add_column("error", justify="right")
    for name, error in result["error"].items():
        losses.add_row(name, f"{error:.2%}")
    table = Table(title=f"{result['model']} → {result['output']}", show_header=False)
    before, after = result["bytes"]["before"], result["bytes"]["after"]
    table.add_row("tensors before", f"{before / 1e6:,.1f} MB")
    table.add_row("tensors after", f"{after / 1e6:,.1f} MB  ({after / before:.0%})")
    table.add_row("  of them linear layers", f"{result['bytes']['linears']['after'] / 1e6:,.1f} MB, "
                  f"before {result['bytes']['linears']['before'] / 1e6:,.1f} MB")  # fmt: skip
    if (error := result["token_table"]["relative_error"]) is not None:
        size = result["bytes"]["token_table"]
        table.add_row("  of them token table", f"{size['after'] / 1e6:,.1f} MB, before {size['before'] / 1e6:,.1f} MB")
        table.add_row("relative error of the token table", f"{error:.2%}")
    table.add_row("calibration", f"{result['calibration']['texts']} texts, {result['calibration']['tokens']:,} tokens")
    fidelity = result["fidelity"]
    table.add_row(
        f"cosine to the source, {fidelity['texts']} texts apart",
        f"mean {fidelity['mean_cosine']:.4f}, least {fidelity['min_cosine']:.4f}",
    )
    table.add_row("time", f"{result['seconds']:.0f} s")
    console.print(losses)
    console.print(table)
