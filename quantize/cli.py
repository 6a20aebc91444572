"""`qembed quantize`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click
from click.core import ParameterSource

from qembed.checkpoint.find import DEFAULT_MODEL, INT4_SUFFIX
from qembed.command import signals
from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted
from qembed.quantize.calibration_texts import COUNT, LEAST
from qembed.text import strict_json

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512
"""Where calibration texts are cut: attention costs grow with the square, and no built-in text is much longer."""


io = section("What to read and write")
method = section("How to quantize")
fitted = section("Calibration")
computing = section("Where to compute")


class Rounding(click.Choice[str]):
    """The ways to round, also by the names that they had before."""

    ALIASES: ClassVar = {"compensated": "gptq", "nearest": "rtn"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """One of the choices."""
        return super().convert(self.ALIASES.get(value, value), param, ctx)


@click.command("quantize", cls=SectionedCommand)
@io(
    "--model",
    envvar="QEMBED_MODEL",
    show_envvar=True,
    default=DEFAULT_MODEL,
    show_default=True,
    help="What to quantize: a hub id, a folder, or 'sample' for the checkpoint inside qembed.",
)
@io(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder to write.  [default: ./NAME{INT4_SUFFIX}]",
)
@io("--force", is_flag=True, help="Replace a checkpoint that qembed wrote there before.")
@io(
    "--resume",
    is_flag=True,
    help="Go on after the last finished layer of a run that was broken off, with the same options. Same bytes in the end.",
)
@io(
    "--verify",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Quantize nothing; check a finished checkpoint: hashes, tensors, and vectors against its source, if that is at hand.",
)
@io("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@method(
    "--engine",
    type=click.Choice(["native", "autoawq"]),
    default="native",
    show_default=True,
    help="Who computes: qembed, or the AutoAWQ library, which needs an environment of its own (README, Install).",
)
@method(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="128",
    show_default=True,
    help="Inputs that share a scale and a zero point. Smaller is nearer to FP16 and larger on disk.",
)
@method(
    "--scales",
    type=click.Choice(["awq", "none"]),
    default="awq",
    show_default=True,
    help="Search a scale for each input channel, or leave the weights as they are.",
)
@method("--clip/--no-clip", default=True, show_default=True, help="Shrink each group's range where that costs less.")
@method(
    "--rounding",
    type=Rounding(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="gptq pushes each rounding error into the weights not yet rounded; rtn rounds each weight to its nearest level.",
)
@method(
    "--target",
    type=click.Choice(["original", "layer"]),
    default="original",
    show_default=True,
    help="Fit each layer to what the original model has there, taking back what was lost before it, or to its own outputs.",
)
@method(
    "--inputs",
    type=click.Choice(["quantized", "original"]),
    default="quantized",
    show_default=True,
    help="Fit each layer to what it reads behind quantized layers, or to what it reads in the original model (only with "
    "--target layer).",
)
@method(
    "--prefixes",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="Of each calibration text, how many prefixes count as texts of their own (a token each).",
)
@method(
    "--mixed",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    metavar="TOKENS",
    help="Use each calibration text once more, cut there, with half of its tokens drawn from the other texts; 0 for not.",
)
@method(
    "--last-share",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="What the last tokens of texts and prefixes, which become the vectors, count of all; 0 counts every token alike.  "
    "[default: 0.5 where the tokenizer appends a last token, otherwise 0]",
)
@method(
    "--refine",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="In the end tune scales and norms by gradient to the original's vectors, seeing each text N times. Slow, and brings "
    "little on 256 texts (bench/RESULTS.md).",
)
@method(
    "--token-table",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    show_default=True,
    help="int8 halves the token table (26% of the 0.6B's parameters); such a checkpoint needs qembed's vLLM plugin to load.",
)
@fitted(
    "--calibration",
    metavar="FILE[:COLUMN]",
    help="Your own texts: .txt (one a line), .jsonl, .csv, .tsv or .parquet, of any size. COLUMN (or field) is 'text' unless "
    "named; rows whose 'kind' is 'query' get a prompt: their 'instruction', or the model's own.  "
    "[default: texts that ship with qembed]",
)
@fitted(
    "--calibration-texts",
    type=click.IntRange(min=LEAST),
    default=COUNT,
    show_default=True,
    metavar="N",
    help="How many to draw; one in nine of them (10 to 32) are kept apart to measure on.",
)
@fitted(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=MAX_TOKENS,
    show_default=True,
    metavar="N",
    help="Cut longer texts there. A text longer than the model's own context is refused.",
)
@fitted("--seed", type=int, default=0, show_default=True, help="Draws the texts, and those kept apart to measure on.")
@computing("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:N. auto: a GPU if there is one.")
@computing("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: all cores]")
def command(
    model: str,
    output: Path | None,
    force: bool,
    resume: bool,
    verify: Path | None,
    as_json: bool,
    calibration: str | None,
    calibration_texts: int,
    max_tokens: int,
    seed: int,
    device: str,
    threads: int | None,
    **method: Any,
) -> None:
    """Turn an FP16 checkpoint into an AWQ INT4 one.

    \b
    The folder that it writes is read by vLLM, SGLang and transformers:
      linear layers in 4 bits, everything else in float16 (--token-table);
      tokenizer, pooling and prompts as in the source;
      README.md (the model card) and qembed.json (settings, seed, hashes).

    The target appears when it is whole. Calibration texts ship with qembed; nothing is sent anywhere.

    \b
    qembed quantize --model sample                    the checkpoint inside qembed
    qembed quantize --calibration mine.jsonl:body     fitted to texts of your own
    qembed quantize --resume                          after Ctrl-C or a crash
    qembed quantize --verify sample-AWQ-INT4          is it whole?

    Exit codes: 0 done, 1 writing failed or --verify found something, 2 bad input, 3 a package is missing, 130 or 143
    interrupted.
    """  # noqa: D301 - click wants the character \b
    from qembed.checkpoint.find import default_output
    from qembed.quantize import calibration_texts as texts
    from qembed.quantize.run import run
    from qembed.quantize.settings import QuantizationSettings

    if verify is not None:
        _verify(verify, device, threads, as_json)
        return
    if method["inputs"] == "original" and method["target"] == "original":
        raise BadInput("--inputs original: takes back nothing of earlier layers' losses; add --target layer")
    target = output or default_output(model)
    if method["engine"] == "autoawq":
        _refuse_what_autoawq_lacks(set(method))
    settings = QuantizationSettings(**{**method, "group_size": int(method["group_size"])})
    place = _device(device, threads)
    start = time.monotonic()

    def say(what: str, done: int, total: int) -> None:
        if what == "refining" and done % 10 == 0 and not sys.stderr.isatty():
            click.echo(f"refining, step {done} of {total}, {time.monotonic() - start:.0f} s", err=True)
        if what == "layers" and not sys.stderr.isatty():
            click.echo(f"layer {done} of {total}, {time.monotonic() - start:.0f} s", err=True)

    with _progress("reading the checkpoint", say) as on_step, _interruptible():
        if calibration is None:
            found = texts.built_in(calibration_texts, seed)
        else:
            found = texts.read(calibration, calibration_texts, seed)
        result = run(
            model,
            target,
            settings,
            found,
            max_tokens=max_tokens,
            check=texts.kept_apart(len(found.texts)),
            device=place,
            seed=seed,
            force=force,
            resume=resume,
            on_step=on_step,
        )
    result["seconds"] = round(time.monotonic() - start, 1)
    if as_json:
        click.echo(strict_json.dumps(result, indent=2))
    else:
        _show(result)


def _verify(folder: Path, device: str, threads: int | None, as_json: bool) -> None:
    """Print what is wrong with `folder`, a line each, and end with 1 if anything is."""
    from qembed.quantize.verify import verify

    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if other := sorted(given - {"verify", "model", "device", "threads", "as_json"}):
        raise BadInput(f"--verify writes nothing; leave --{other[0].replace('_', '-')} out")
    place = _device(device, threads)
    with _progress("hashing files") as on_step:
        found = verify(folder, context.params["model"] if "model" in given else None, place, on_step)
    if as_json:
        click.echo(strict_json.dumps(found, indent=2))
    else:
        for line in found["findings"]:
            click.echo(line)
        if fidelity := found["fidelity"]:
            cosines = f"mean {fidelity['mean_cosine']:.4f}, least {fidelity['min_cosine']:.4f}"
            click.echo(f"cosine to {found['source']}, {fidelity['texts']} texts: {cosines}")
        else:
            click.echo(found["source"])
        click.echo(f"{folder}: {len(found['findings']) or 'nothing'} wrong, {found['files']} files hashed")
    if found["findings"]:
        context.exit(1)


@contextmanager
def _progress(first: str, say: Callable[[str, int, int], None] = lambda *_: None) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal, fed by (what is being done, how many are done, how many there are); `say` is told too."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(first, total=None)

        def on_step(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)
            say(what, done, total)

        yield on_step


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within it SIGTERM interrupts as Ctrl-C does; the exit code is that of a shell after the signal."""
    interrupts = signals.Interrupts()
    try:
        with interrupts.raised():
            yield
    except (KeyboardInterrupt, Interrupted) as error:
        ended = error if isinstance(error, Interrupted) else Interrupted("interrupted before anything was written")
        ended.exit_code = 128 + interrupts.signal
        raise ended from error.__cause__


def _refuse_what_autoawq_lacks(names: set[str]) -> None:
    context = click.get_current_context()
    for name in sorted(names - {"engine", "group_size", "clip", "token_table"}):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise BadInput(f"--{name.replace('_', '-')}: AutoAWQ has no such setting; leave it out, or use --engine native")


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
    calibration = result["calibration"]
    cut = f", {calibration['cut']} cut at {calibration['max_tokens']}" if calibration["cut"] else ""
    table.add_row("calibration", f"{calibration['texts']} texts, {calibration['tokens']:,} tokens{cut}")
    fidelity = result["fidelity"]
    table.add_row(
        f"cosine to the source, {fidelity['texts']} texts apart",
        f"mean {fidelity['mean_cosine']:.4f}, least {fidelity['min_cosine']:.4f}",
    )
    table.add_row("time", f"{result['seconds']:.0f} s")
    if result["error"]:
        console.print(losses)
    console.print(table)
