"""`qembed quantize`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qembed.checkpoint.find import DEFAULT_MODEL, INT4_SUFFIX
from qembed.command import signals
from qembed.command.options import JSON_HELP, threads_option
from qembed.command.row_options import row_options as add_row_options
from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted
from qembed.quantize.calibration_texts import DEFAULT_COUNT, MIN_TEXTS
from qembed.text import strict_json

if TYPE_CHECKING:
    from qembed.checkpoint.description import Checkpoint
    from qembed.checkpoint.reranker import Task
    from qembed.quantize.calibration_pairs import Pairs
    from qembed.quantize.calibration_texts import Texts
    from qembed.text.rows.options import RowOptions

MAX_TOKENS = 512
"""Default length limit of calibration texts: attention costs grow with its square, and few built-in texts are longer."""
TOKEN_BUDGET = 32_000
"""Default of --calibration-tokens."""


class RoundingChoice(click.Choice[str]):
    """The methods of rounding; their former names are accepted too, but not shown in the help."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The current name of `value`."""
        from qembed.quantize.settings import ROUNDING_ALIASES

        return super().convert(ROUNDING_ALIASES.get(value, value), param, ctx)


io = section("Input and output")
method = section("Quantization")
fitted = section("Calibration")
computing = section("Device")


@click.command("quantize", cls=SectionedCommand)
@io(
    "--model",
    envvar="QEMBED_MODEL",
    show_envvar=True,
    default=DEFAULT_MODEL,
    show_default=True,
    help="The FP16 checkpoint: a hub id, a folder, or 'sample' for the checkpoint bundled with qembed.",
)
@io(
    "--task",
    type=click.Choice(["embed", "rerank"]),
    help="What the model is for, where its files do not say: 'rerank' for a Qwen3-Reranker, 'embed' for an embedder.",
)
@io(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The folder to write.  [default: ./NAME{INT4_SUFFIX}]",
)
@io("--force", is_flag=True, help="Replace an existing output that qembed wrote.")
@io(
    "--resume",
    is_flag=True,
    help="Continue an interrupted run after its last finished layer, with the same options. The output is byte-identical to "
    "that of an uninterrupted run.",
)
@io(
    "--verify",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Check a finished checkpoint instead of quantizing: hashes, tensors, and vectors if its source is available.",
)
@io("--json", "as_json", is_flag=True, help=JSON_HELP)
@method(
    "--engine",
    type=click.Choice(["native", "autoawq"]),
    default="native",
    show_default=True,
    help="native: qembed's own quantizer; autoawq: the AutoAWQ library, in a separate environment (docs/quantize.md).",
)
@method(
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="128",
    show_default=True,
    help="Number of inputs that share a scale and a zero point. Smaller groups are more accurate, and larger on disk.",
)
@method(
    "--scales",
    type=click.Choice(["awq", "none"]),
    default="awq",
    show_default=True,
    help="awq: search an activation-aware scale for each input channel; none: leave the weights unscaled.",
)
@method(
    "--clip/--no-clip",
    default=True,
    show_default=True,
    help="Search a smaller weight range for each group, where clipping lowers the error.",
)
@method(
    "--rounding",
    type=RoundingChoice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="gptq: push each rounding error into the weights not yet rounded; rtn: round each weight to its nearest level.",
)
@method(
    "--target",
    type=click.Choice(["original", "layer"]),
    default="original",
    show_default=True,
    help="What each layer is fitted to. original: the original model's outputs, which corrects errors of earlier layers; "
    "layer: the layer's own outputs.",
)
@method(
    "--inputs",
    type=click.Choice(["quantized", "original"]),
    default="quantized",
    show_default=True,
    help="Which inputs each layer is fitted on. quantized: those in the quantized model; original: those in the original "
    "model, only with --target layer.",
)
@method(
    "--prefixes",
    type=click.IntRange(min=0),
    metavar="N",
    help="Number of prefixes of each calibration text that count as additional texts; each costs one token.  [default: 8 if "
    "attention is causal and the last token's state is the vector, otherwise 0]",
)
@method(
    "--mixed",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    metavar="TOKENS",
    help="Add a copy of each calibration text, cut to this many tokens, with half of them replaced by tokens of random texts; "
    "0 adds none.",
)
@method(
    "--last-share",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="SHARE",
    help="Total weight (0 to 1) of the last tokens of texts and prefixes, whose hidden states become vectors; 0 weights all "
    "tokens equally.  [default: 0.5 if the tokenizer appends a last token, whose state is the vector, otherwise 0]",
)
@method(
    "--refine",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Epochs of a last stage that tunes scales and norm weights by gradient towards the original vectors; 0 skips it. "
    "Slow, with little gain on the texts that ship with qembed (bench/RESULTS.md).",
)
@method(
    "--token-table",
    type=click.Choice(["float16", "int8"]),
    default="float16",
    show_default=True,
    help="Type of the token table, 26% of the 0.6B's parameters. int8 halves its size, but needs qembed's vLLM plugin to load.",
)
@fitted(
    "--calibration",
    metavar="FILE[:COLUMN]",
    help="Your own texts: .txt (one per line), .jsonl, .csv, .tsv or .parquet, of any size. COLUMN (or JSON field) defaults "
    "to 'text'. Rows whose 'kind' is 'query' get a prompt: their 'instruction', or the model's own. For a reranker: columns "
    "'query', 'document' (or COLUMN) and perhaps 'instruction'.  "
    "[default: texts that ship with qembed]",
)
@add_row_options(fitted, " of --calibration")
@fitted("--text-column", metavar="NAME", help="Column or field with the text, the same as FILE:COLUMN.  [default: text]")
@fitted(
    "--calibration-texts",
    type=click.IntRange(min=MIN_TEXTS),
    default=DEFAULT_COUNT,
    show_default=True,
    metavar="N",
    help="Number of texts (of a reranker: pairs) to draw. One in nine (10 to 32) is held out to measure fidelity.",
)
@fitted(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=MAX_TOKENS,
    show_default=True,
    metavar="N",
    help="Cut longer texts to N tokens. A text of your own that exceeds the model's context is refused.",
)
@fitted(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    default=TOKEN_BUDGET,
    show_default=True,
    metavar="N",
    help="Shorten the longest texts, except every fourth, until all have at most N tokens together. Time grows with N; many "
    "short texts show more than few long ones.",
)
@fitted("--seed", type=int, default=0, show_default=True, help="Random seed; draws the texts and those held out.")
@computing("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N. auto is a GPU if there is one.")
@threads_option(computing)
def command(
    model: str,
    task: Task | None,
    output: Path | None,
    force: bool,
    resume: bool,
    verify: Path | None,
    as_json: bool,
    calibration: str | None,
    delimiter: str | None,
    encoding: str | None,
    no_header: bool,
    text_column: str | None,
    calibration_texts: int,
    max_tokens: int,
    calibration_tokens: int,
    seed: int,
    device: str,
    threads: int | None,
    **method: Any,
) -> None:
    """Turn an FP16 checkpoint into an AWQ INT4 one.

    \b
    Writes a folder that vLLM, SGLang and transformers load without qembed:
      linear layers in 4 bits, everything else in float16 (see --token-table);
      tokenizer, pooling and prompts of the source;
      README.md (the model card) and qembed.json (settings, seed, hashes).

    The method: AWQ scales and clipping, then GPTQ rounding, layer by layer. Each layer is also corrected towards the
    original model's outputs. Each step can be switched off.

    The folder appears once it is complete. Calibration texts ship with qembed; nothing is sent anywhere.

    \b
    qembed quantize --model sample                   quantize the bundled model
    qembed quantize --calibration mine.jsonl:body    calibrate on your own texts
    qembed quantize --resume                         after Ctrl-C or a crash
    qembed quantize --verify sample-AWQ-INT4         check a finished checkpoint
    qembed quantize --model Qwen/Qwen3-Reranker-0.6B  a reranker

    Exit codes: 0 done, 1 writing failed or --verify found a problem, 2 bad input, 3 a package is missing, 130 or 143
    interrupted.
    """  # noqa: D301 - click needs the character \b
    from qembed.checkpoint.find import default_output, find
    from qembed.quantize import summary
    from qembed.quantize.calibration_texts import held_out_count
    from qembed.quantize.device import torch_device
    from qembed.quantize.run import run
    from qembed.quantize.settings import QuantizationSettings
    from qembed.text.rows.options import parse as parse_row_options

    if verify is not None:
        _verify(verify, device, threads, as_json)
        return
    if method["inputs"] == "original" and method["target"] == "original":
        raise BadInput("--inputs original: cannot correct errors of earlier layers; add --target layer")
    target = output or default_output(model)
    if method["engine"] == "autoawq":
        _reject_native_options(set(method))
    calibration = _calibration_argument(calibration, text_column, target)
    settings = QuantizationSettings(**{**method, "group_size": int(method["group_size"])})
    row_options = parse_row_options(delimiter, encoding, no_header)
    if calibration is None:
        row_options.check(())
    device_of_torch = torch_device(device, threads)
    start = time.monotonic()

    with _progress("reading the checkpoint") as on_step, _interruptible():
        source = replace(find(model), task=task)
        sample = _sample(source, calibration, calibration_texts, seed, row_options)
        result = run(
            source,
            target,
            settings,
            sample,
            max_tokens=max_tokens,
            token_budget=calibration_tokens,
            check=held_out_count(len(sample)),
            device=device_of_torch,
            seed=seed,
            force=force,
            resume=resume,
            on_step=on_step,
            warn=lambda message: click.echo(f"qembed: warning: {message}", err=True),
        )
    result["seconds"] = round(time.monotonic() - start, 1)
    if as_json:
        click.echo(strict_json.dumps(result))
    else:
        summary.show(result)


def _calibration_argument(calibration: str | None, column: str | None, target: Path) -> str | None:
    """FILE or FILE:COLUMN from --calibration and --text-column; None: the built-in texts.

    Raises:
        BadInput: --text-column without --calibration or beside FILE:COLUMN, or a file inside the folder that --force replaces.
    """
    if calibration is None:
        if column is not None:
            raise BadInput("--text-column names a column of --calibration; add --calibration FILE")
        return None
    file = Path(calibration).expanduser()
    if column is not None:
        if not file.exists() and ":" in calibration:
            raise BadInput(f"--calibration {calibration} and --text-column {column} both name a column; leave one out")
        calibration = f"{calibration}:{column}"
    if not file.exists():
        file = Path(calibration.rpartition(":")[0]).expanduser()
    if target.expanduser().resolve() in file.resolve().parents:
        raise BadInput(f"{target}: holds the calibration texts {file}, which would be lost; choose another --output")
    return calibration


def _sample(source: Checkpoint, calibration: str | None, count: int, seed: int, row_options: RowOptions) -> Texts | Pairs:
    """`count` texts, or pairs for a reranker, of the file `calibration` or of those that ship with qembed."""
    from qembed.quantize import calibration_pairs, calibration_texts

    kind: Any = calibration_texts if source.reranker is None else calibration_pairs
    if calibration is None:
        return kind.built_in(count, seed)
    return kind.read(calibration, count, seed, row_options, lambda note: click.echo(note, err=True))


def _verify(folder: Path, device: str, threads: int | None, as_json: bool) -> None:
    """Verify `folder` and print the problems, one per line; exits with 1 if there are any."""
    from qembed.quantize.device import torch_device
    from qembed.quantize.verify import verify

    context = click.get_current_context()
    options = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if unsupported := sorted(options - {"verify", "model", "device", "threads", "as_json"}):
        raise BadInput(f"--verify writes nothing; leave --{unsupported[0].replace('_', '-')} out")
    device_of_torch = torch_device(device, threads)
    with _progress("hashing files") as on_step:
        result = verify(folder, context.params["model"] if "model" in options else None, device_of_torch, on_step)
    if as_json:
        click.echo(strict_json.dumps(result))
    else:
        for line in [*result["findings"], *result["notes"]]:
            click.echo(line)
        if fidelity := result["fidelity"]:
            cosines = f"mean {fidelity['mean_cosine']:.4f}, minimum {fidelity['min_cosine']:.4f}"
            click.echo(f"cosine to {result['source']}, {fidelity['texts']} texts: {cosines}")
        else:
            click.echo(result["source"])
        click.echo(f"{folder}: problems: {len(result['findings']) or 'none'}; files hashed: {result['files']}")
    if result["findings"]:
        context.exit(1)


@contextmanager
def _progress(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr; yields the function that updates it with (stage, steps done, steps in all)."""
    from rich.console import Console

    from qembed.command.progress import reporter

    with reporter(description, Console(stderr=True)) as shown:
        yield shown.steps


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM interrupt the block as Ctrl-C does. The exit code is 128 + signal number, as in a shell."""
    interrupts = signals.Interrupts()
    try:
        with interrupts.raised():
            yield
    except (KeyboardInterrupt, Interrupted) as error:
        interrupted = error if isinstance(error, Interrupted) else Interrupted("interrupted before anything was written")
        interrupted.exit_code = 128 + interrupts.signal
        raise interrupted from error.__cause__


def _reject_native_options(names: set[str]) -> None:
    """Raise BadInput if the command line has one of the options `names` that AutoAWQ does not support."""
    context = click.get_current_context()
    for name in sorted(names - {"engine", "group_size", "clip", "token_table"}):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise BadInput(f"--{name.replace('_', '-')}: AutoAWQ has no such option; leave it out, or use --engine native")
