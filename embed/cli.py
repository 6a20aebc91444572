"""`qembed embed`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qembed.command.options import MODEL_HELP, Size, api_key_file_option, threads_option
from qembed.command.row_options import row_options
from qembed.command.sections import SectionedCommand, section
from qembed.command.signals import Interrupts
from qembed.errors import Interrupted
from qembed.text import strict_json
from qembed.text.display import counted

if TYPE_CHECKING:
    from rich.console import Console

    from qembed.embed.engine import Engine
    from qembed.embed.job import Job
    from qembed.embed.journal import Done
    from qembed.embed.run import Finished
    from qembed.embed.writer import Progressed

DTYPES = ("float32", "float16", "int8", "binary")

reading, texts, chunking, storing = map(section, ("Input", "Texts", "Long documents", "Output"))
computing, cluster = map(section, ("What computes", "On a Ray cluster"))


@click.command("embed", cls=SectionedCommand, short_help="Turn texts into vectors, from a file to a file.")
@click.argument("source", metavar="INPUT", type=click.Path(allow_dash=True))
@storing("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="OUT",
         help="The file to make, its format by its name: .npy (to be memory-mapped; ids beside it in OUT.ids.jsonl), .parquet, "
              ".csv, .jsonl, .fvecs (ids as for .npy).")  # fmt: skip
@reading("--text-column", metavar="NAME", help="Column or field with the text.  [default: text]")
@reading(
    "--id-column",
    metavar="NAME",
    help="Column or field with the id.  [default: id or _id if there is one, else the row's number]",
)
@reading("--keep", multiple=True, metavar="NAME", help="Column or field to keep beside the vector; several if you like. 'text' "
         "keeps the text of the row, or of the chunk.")  # fmt: skip
@row_options(reading)
@reading("--input-format", type=click.Choice(["txt", "jsonl", "csv", "tsv", "parquet"]),
         help="Format of a file whose name does not tell, or of standard input.  [default for -: txt]")  # fmt: skip
@reading("--txt", "text_is", type=click.Choice(["lines", "document"]),
         help="What a .txt file holds: a text a line, or one document.  [default: lines; with --chunk-tokens "
              "document]")  # fmt: skip
@texts("--prompt", metavar="NAME", help="The model's prompt to put before each text, such as query.  [default: none, as for "
       "documents]")  # fmt: skip
@texts("--instruction", metavar="TEXT", help="A task to put before each text, in place of a prompt of the model's.")
@texts("--clean/--no-clean", default=True, show_default=True,
       help="Turn texts to Unicode NFC, and take control and zero-width characters out, as the server does.")  # fmt: skip
@texts("--truncate", is_flag=True, help="Cut texts that are too long.  [default: they go to the rejects]")
@chunking("--chunk-tokens", type=click.IntRange(4), metavar="N",
          help="Cut texts into chunks of at most N tokens, on the borders of paragraphs and sentences; ids become id#0, "
               "id#1, …; start, end (characters) and page are kept.")  # fmt: skip
@chunking("--overlap", type=click.IntRange(0), default=0, metavar="N", help="Tokens that two adjacent chunks share, at most.  "
          "[default: 0]")  # fmt: skip
@storing("--output-dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
         help="What the vectors are stored as; int8 and binary (one bit a dimension) are for searching first and rescoring "
              "then.")  # fmt: skip
@storing("--dimensions", type=click.IntRange(1), metavar="N", help="Cut the vectors to N numbers (Matryoshka), and normalise "
         "them again.  [default: the model's own]")  # fmt: skip
@storing("--rejects", type=click.Path(path_type=Path), metavar="FILE", help="Where rows go that have no vector, with the "
         "reason.  [default: OUT.rejects.jsonl]")  # fmt: skip
@storing("--strict", is_flag=True, help="Stop at the first row that cannot be embedded, with exit code 2.")
@storing("--force", is_flag=True, help="Replace files that exist, and a run of other options that was broken off.")
@storing("--json", "as_json", is_flag=True, help="Print one JSON object about the run on standard output.")
@computing("--int4/--fp16", default=True, show_default=True, help="Use the INT4 checkpoint, or the original it came from.")
@computing("--model", envvar="QEMBED_MODEL", show_envvar=True, metavar="MODEL", help=MODEL_HELP)
@computing("--url", "urls", multiple=True, metavar="URL",
           help="A running server in place of an engine in this process; several share the work.")  # fmt: skip
@api_key_file_option(computing)
@computing("--timeout", type=click.FloatRange(1), default=300.0, show_default=True, help="Seconds that a request to a server "
           "may take.")  # fmt: skip
@computing("--dtype", type=click.Choice(["auto", "float16", "bfloat16", "float32"]), default="auto", show_default=True,
           help="What to compute in, as `qembed serve` has it.")  # fmt: skip
@computing("--memory", type=Size(), help="All that may be taken, as 3GiB: chooses the longest context that fits, then the "
           "most sequences.")  # fmt: skip
@computing("--max-model-len", type=click.IntRange(1), metavar="N", help="Longest text, in tokens.  [default: the model's "
           "own limit, or what fits of it]")  # fmt: skip
@computing("--max-num-seqs", type=click.IntRange(1), metavar="N", help="Texts computed at once, at most.  [default: 32; on "
           "a GPU 256]")  # fmt: skip
@computing("--max-num-batched-tokens", type=click.IntRange(1), metavar="N", help="Tokens computed at once, at most.  "
           "[default: 2048; on a GPU 8192]")  # fmt: skip
@computing("--token-table", type=click.Choice(["int8"]), help="Turn the token table to INT8 while it is loaded.")
@threads_option(computing)
@computing("--tensor-parallel-size", type=click.IntRange(1), default=1, help="Devices that share one model.")
@computing(
    "--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE", help="Any other setting of vLLM, by its own name."
)
@computing("--verbose", is_flag=True, help="Show what vLLM prints, on stderr.")
@cluster("--ray", is_flag=False, flag_value="auto", metavar="[ADDRESS]",
         help="Run on a Ray cluster (extra `ray`): the one of this machine, the one at ADDRESS, or `local` for one that lasts "
              "as long as the job. OUT becomes a folder of Parquet parts with a manifest. INPUT, model and OUT must be "
              "reachable from every node.")  # fmt: skip
@cluster("--ray-workers", type=click.IntRange(1), metavar="N", help="Engines, each an actor.  [default: one for each GPU, or "
         "for each share of cores]")  # fmt: skip
@cluster("--ray-cpus", type=click.FloatRange(0, min_open=True), metavar="N", help="Cores of an engine.  [default: 4 where "
         "there is no GPU]")  # fmt: skip
@cluster("--ray-gpus", type=click.FloatRange(0, min_open=True), metavar="N", help="GPUs of an engine, also a part of one.  "
         "[default: 1 where there are any]")  # fmt: skip
def command(source: str, as_json: bool, **options: Any) -> None:
    """Turn the texts of INPUT into vectors in the file OUT, in the order of the input.

    INPUT is a file (.txt with a text a line, .jsonl, .csv, .tsv, .parquet; .pdf, .docx, .html, .md with the extra `docs`), a
    folder of them with all below it, or - for standard input.

    \b
    qembed embed texts.jsonl -o vectors.parquet --keep title
    qembed embed docs/ -o docs.parquet --chunk-tokens 512 --overlap 64 --keep text
    qembed embed queries.txt -o queries.npy --prompt query --dimensions 256
    qembed embed texts.csv -o vectors.npy --url http://a:8000 --url http://b:8000

    What is finished is kept in .OUT.partial beside OUT. Whatever ends a run, the same command goes on from there, and the files
    are then the same, byte for byte, as without the interruption.

    Exit codes: 0 done, 4 done but rows were rejected, 1 failed, 2 bad input (with --strict a bad row), 3 a package is missing,
    130 or 143 interrupted.
    """  # noqa: D301 - click wants the real backspace character
    from qembed.embed import job_options, run

    job: Job | None = None
    interrupts = Interrupts()
    with _console() as console:
        try:
            with interrupts.raised():
                job, dimensions = job_options.job(source, options, lambda what: console.print(what, style="dim", markup=False))
                if options["ray"]:
                    assert dimensions is not None
                    said = _on_cluster(job, options, dimensions, console)
                else:
                    said = run.summary(job, _with_progress(job, console))
        except KeyboardInterrupt as error:
            kept = job is not None and job.partial.exists()
            where = (
                f"what is finished is kept in {job.partial}: the same command goes on" if job and kept else "nothing was begun"
            )
            interrupted = Interrupted(f"interrupted; {where}")
            interrupted.exit_code = 128 + interrupts.signal
            raise interrupted from error
    click.echo(strict_json.dumps(said) if as_json else _line(said))
    if not as_json and said["vectors"] and options["prompt"] is None and Path(said["output"]).suffix.lower() == ".parquet":
        index = Path(said["output"]).with_suffix(".faiss")
        click.echo(f"next: {shlex.join(['qembed', 'index', said['output'], '-o', str(index)])}", err=True)
    if said["rejected"]:
        empty = "" if said["vectors"] else f"; {said['output']} holds no vector"
        rows = f"{counted(said['rejected'], 'row')} {'was' if said['rejected'] == 1 else 'were'} rejected"
        click.echo(f"qembed: {rows}{empty}; {said['rejects']} has the reasons", err=True)
        raise SystemExit(run.REJECTED)


@contextmanager
def _console() -> Iterator[Console]:
    """A console on a copy of stderr: while vLLM runs, stderr itself is redirected."""
    from rich.console import Console

    try:
        copy = os.dup(sys.stderr.fileno())
    except (OSError, ValueError):  # no file of the system's, as in tests
        yield Console(stderr=True, highlight=False, soft_wrap=True)
        return
    with open(copy, "w", encoding="utf-8") as file:
        yield Console(file=file, highlight=False, soft_wrap=True)


def _with_progress(job: Job, console: Console) -> Finished:
    from qembed.command.progress import reporter
    from qembed.embed import run

    with reporter("reading", console) as shown:

        @contextmanager
        def engine() -> Iterator[Engine]:
            shown.update("starting")
            with job.engine() as opened:
                shown.update("embedding")
                yield opened

        def tell(progress: Progressed) -> None:
            rejected = f", {progress.done.rejected:,} rejected" if progress.done.rejected else ""
            tokens = f", {progress.tokens_per_second:,.0f} tokens/s" if job.texts.tokenizer else ""
            speed = f"{progress.rows_per_second:,.1f}/s{tokens}"
            shown.update(fraction=progress.fraction, detail=f"{counted(progress.done.vectors, 'vector')}{rejected}, {speed}")

        return run.run(replace(job, engine=engine), tell, lambda note: console.print(note, style="dim", markup=False))


def _on_cluster(job: Job, options: dict[str, Any], dimensions: int, console: Console) -> dict[str, Any]:
    import time

    from qembed.embed import ray_pipeline
    from qembed.embed.ray_cluster import Share

    began = time.monotonic()
    share = Share(options["ray"], options["ray_workers"], options["ray_cpus"], options["ray_gpus"])
    with console.status("starting the engines") as status:

        def tell(done: Done) -> None:
            rejected = f", {done.rejected:,} rejected" if done.rejected else ""
            speed = done.vectors / max(time.monotonic() - began, 1e-9)
            status.update(
                f"{counted(done.windows, 'part')}, {counted(done.vectors, 'vector')}{rejected}, {speed:,.1f}/s with the start"
            )

        manifest = ray_pipeline.run(job, share, dimensions, tell, lambda note: console.print(note, style="dim", markup=False))
    rejects = str(job.output / manifest["rejects"]) if manifest["rejects"] else None
    said = {name: value for name, value in manifest.items() if name not in ("parts", "columns", "qembed")}
    return {
        "output": str(job.output),
        "ids": None,
        "resumed": 0,
        **said,
        "rejects": rejects,
        "parts": len(manifest["parts"]),
        "seconds": round(time.monotonic() - began, 3),
    }


def _line(said: dict[str, Any]) -> str:
    ids = f", ids in {said['ids']}" if said["ids"] else ""
    resumed = f", {said['resumed']:,} of them by the run before" if said["resumed"] else ""
    return (
        f"{said['output']}: {counted(said['vectors'], 'vector')} of {said['dimensions']} ({said['dtype']}){resumed}{ids}; "
        f"{said['seconds']:.1f} s"
    )
