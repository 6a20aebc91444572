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

from qembed.command.options import JSON_HELP, MODEL_HELP, Size, api_key_file_option, threads_option
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
    from qembed.embed.journal import Totals
    from qembed.embed.run import Outcome
    from qembed.embed.writer import Progress

DTYPES = ("float32", "float16", "int8", "binary")

reading, texts, chunking, storing = map(section, ("Input", "Texts", "Long documents", "Output"))
computing, cluster = map(section, ("Engine", "Ray cluster"))


@click.command("embed", cls=SectionedCommand, short_help="Turn texts into vectors, from a file to a file.")
@click.argument("source", metavar="INPUT", type=click.Path(allow_dash=True))
@storing("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="OUT",
         help="File to write; its suffix decides the format: .npy (for memory mapping; ids in OUT.ids.jsonl), .parquet, .csv, "
              ".jsonl, .fvecs (ids as for .npy).")  # fmt: skip
@reading("--text-column", metavar="NAME", help="Column or field with the text.  [default: text]")
@reading("--id-column", metavar="NAME",
         help="Column or field with the id.  [default: id or _id if there is one, else the row's number]")  # fmt: skip
@reading("--keep", multiple=True, metavar="NAME", help="Column or field to copy to the output; can be repeated. 'text' copies "
         "the text of the row, or of the chunk.")  # fmt: skip
@row_options(reading)
@reading("--input-format", type=click.Choice(["txt", "jsonl", "csv", "tsv", "parquet"]),
         help="Format of standard input, or of a file whose suffix names none.  [default for -: txt]")  # fmt: skip
@reading("--txt", "text_is", type=click.Choice(["lines", "document"]),
         help="Content of a .txt file: one text per line, or one document.  [default: lines; with --chunk-tokens "
              "document]")  # fmt: skip
@texts("--prompt", metavar="NAME", help="Name of the model's prompt to put before each text, such as query.  [default: the "
       "model's default_prompt_name, which few have; '' for none]")  # fmt: skip
@texts("--instruction", metavar="TEXT", help="Task to put before each text, instead of one of the model's prompts.")
@texts("--clean/--no-clean", default=True, show_default=True,
       help="Normalize texts to Unicode NFC, and remove control and zero-width characters, as the server does.")  # fmt: skip
@texts("--truncate", is_flag=True, help="Truncate texts that are too long.  [default: they are rejected]")
@chunking("--chunk-tokens", type=click.IntRange(4), metavar="N",
          help="Split texts into chunks of at most N tokens, at paragraph and sentence boundaries. Ids become id#0, id#1, …; "
               "columns start, end (characters) and page are added.")  # fmt: skip
@chunking("--overlap", type=click.IntRange(0), default=0, metavar="N", help="Maximum tokens that adjacent chunks share.  "
          "[default: 0]")  # fmt: skip
@storing("--output-dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
         help="Dtype of the stored vectors. int8 and binary (one bit per dimension) are for finding candidates, which are "
              "rescored.")  # fmt: skip
@storing("--dimensions", type=click.IntRange(1), metavar="N", help="Truncate vectors to N numbers (Matryoshka), and normalize "
         "them again if the model does.  [default: the model's own]")  # fmt: skip
@storing("--normalize", is_flag=True, help="Scale vectors to unit length, where the model has no Normalize module.")
@storing("--rejects", type=click.Path(path_type=Path), metavar="FILE", help="File for rows without a vector, with the reason.  "
         "[default: OUT.rejects.jsonl]")  # fmt: skip
@storing("--strict", is_flag=True, help="Stop at the first row that cannot be embedded, with exit code 2.")
@storing("--force", is_flag=True, help="Replace existing files, and discard an interrupted run with other options.")
@storing("--json", "as_json", is_flag=True, help=JSON_HELP)
@computing("--int4/--fp16", default=True, show_default=True, help="Use the INT4 checkpoint, or the original that it was made "
           "from.")  # fmt: skip
@computing("--model", envvar="QEMBED_MODEL", show_envvar=True, metavar="MODEL", help=MODEL_HELP)
@computing("--url", "urls", multiple=True, metavar="URL",
           help="Use a running server instead of an engine in this process; repeat it to use several.")  # fmt: skip
@api_key_file_option(computing)
@computing("--timeout", type=click.FloatRange(1), default=300.0, show_default=True, help="Seconds that a request to a server "
           "may take.")  # fmt: skip
@computing("--dtype", type=click.Choice(["auto", "float16", "bfloat16", "float32"]), default="auto", show_default=True,
           help="Dtype of the computation, as in `qembed serve`.")  # fmt: skip
@computing("--memory", type=Size(), help="Total memory to use, such as 3GiB: chooses the longest context that fits, then the "
           "most sequences.")  # fmt: skip
@computing("--max-model-len", type=click.IntRange(1), metavar="N", help="Longest text, in tokens.  [default: the model's "
           "context (max_seq_length), or what fits of it]")  # fmt: skip
@computing("--max-num-seqs", type=click.IntRange(1), metavar="N", help="Maximum texts computed at once.  [default: 32; on "
           "a GPU 256]")  # fmt: skip
@computing("--max-num-batched-tokens", type=click.IntRange(1), metavar="N", help="Maximum tokens computed at once.  "
           "[default: 2048; on a GPU 8192]")  # fmt: skip
@computing("--token-table", type=click.Choice(["int8"]), help="Convert the token table to INT8 while it loads.")
@threads_option(computing)
@computing("--tensor-parallel-size", type=click.IntRange(1), default=1, help="Devices that share one copy of the model.")
@computing("--engine-arg", "engine_args", multiple=True, metavar="KEY=VALUE",
           help="Any other setting of vLLM, by vLLM's name for it.")  # fmt: skip
@computing("--verbose", is_flag=True, help="Show vLLM's log on stderr.")
@cluster("--ray", is_flag=False, flag_value="auto", metavar="[ADDRESS]",
         help="Run on a Ray cluster (extra `ray`): that of this machine, the one at ADDRESS, or `local` for one that ends with "
              "the job. OUT becomes a folder of Parquet parts with a manifest. INPUT, model and OUT must have the same paths "
              "on all nodes.")  # fmt: skip
@cluster("--ray-workers", type=click.IntRange(1), metavar="N", help="Number of engines, each an actor.  [default: one per GPU, "
         "or per share of cores]")  # fmt: skip
@cluster("--ray-cpus", type=click.FloatRange(0, min_open=True), metavar="N", help="Cores per engine.  [default: 4 without a "
         "GPU]")  # fmt: skip
@cluster("--ray-gpus", type=click.FloatRange(0, min_open=True), metavar="N", help="GPUs per engine; may be a fraction.  "
         "[default: 1 if there are any]")  # fmt: skip
def command(source: str, as_json: bool, **options: Any) -> None:
    """Turn the texts of INPUT into vectors in the file OUT, in the order of the input.

    INPUT is a file (.txt with one text per line, .jsonl, .csv, .tsv, .parquet; .pdf, .docx, .html, .md with the extra `docs`),
    a folder with such files at any depth, or - for standard input.

    \b
    qembed embed texts.jsonl -o vectors.parquet --keep title
    qembed embed docs/ -o docs.parquet --chunk-tokens 512 --overlap 64 --keep text
    qembed embed queries.txt -o queries.npy --prompt query --dimensions 256
    qembed embed texts.csv -o vectors.npy --url http://a:8000 --url http://b:8000

    Finished work is kept in .OUT.partial beside OUT. Whatever interrupts a run, the same command resumes it, and the output is
    byte-identical to that of an uninterrupted run. A text that crashes the engine twice is rejected.

    Exit codes: 0 done, 4 done but rows were rejected, 1 failed, 2 bad input (with --strict a bad row), 3 a package is missing,
    130 or 143 interrupted.
    """  # noqa: D301 - click wants the real backspace character
    from qembed.embed import job_options, run

    job: Job | None = None
    interrupts = Interrupts()
    with _console() as console:
        try:
            with interrupts.raised():
                job, dimensions = job_options.job(
                    source, options, lambda stage: console.print(stage, style="dim", markup=False)
                )
                if options["ray"]:
                    assert dimensions is not None
                    summary = _on_cluster(job, options, dimensions, console)
                else:
                    summary = run.summary(job, _with_progress(job, console))
        except KeyboardInterrupt as error:
            is_kept = job is not None and job.partial.exists()
            state = (
                f"finished work is kept in {job.partial}: the same command resumes"
                if job and is_kept
                else "nothing was written"
            )
            interrupted = Interrupted(f"interrupted; {state}")
            interrupted.exit_code = 128 + interrupts.signal
            raise interrupted from error
    click.echo(strict_json.dumps(summary) if as_json else _summary_line(summary))
    if (
        not as_json
        and summary["vectors"]
        and options["prompt"] is None
        and Path(summary["output"]).suffix.lower() == ".parquet"
    ):
        index = Path(summary["output"]).with_suffix(".faiss")
        click.echo(f"next: {shlex.join(['qembed', 'index', summary['output'], '-o', str(index)])}", err=True)
    if summary["rejected"]:
        no_vector = "" if summary["vectors"] else f"; {summary['output']} holds no vector"
        rejected_rows = f"{counted(summary['rejected'], 'row')} {'was' if summary['rejected'] == 1 else 'were'} rejected"
        click.echo(f"qembed: {rejected_rows}{no_vector}; {summary['rejects']} has the reasons", err=True)
        raise SystemExit(run.REJECTED)


@contextmanager
def _console() -> Iterator[Console]:
    """A console on a copy of stderr: while vLLM runs, stderr itself is redirected."""
    from rich.console import Console

    try:
        copy = os.dup(sys.stderr.fileno())
    except (OSError, ValueError):  # not a file of the operating system, as in tests
        yield Console(stderr=True, highlight=False, soft_wrap=True)
        return
    with open(copy, "w", encoding="utf-8") as file:
        yield Console(file=file, highlight=False, soft_wrap=True)


def _with_progress(job: Job, console: Console) -> Outcome:
    from qembed.command.progress import reporter
    from qembed.embed import run

    with reporter("reading", console) as status:

        @contextmanager
        def engine() -> Iterator[Engine]:
            status.update("starting")
            with job.engine() as opened:
                status.update("embedding")
                yield opened

        def report(progress: Progress) -> None:
            rejected = f", {progress.totals.rejected:,} rejected" if progress.totals.rejected else ""
            tokens = f", {progress.tokens_per_second:,.0f} tokens/s" if job.texts.tokenizer else ""
            speed = f"{progress.rows_per_second:,.1f}/s{tokens}"
            status.update(fraction=progress.fraction, detail=f"{counted(progress.totals.vectors, 'vector')}{rejected}, {speed}")

        return run.run(replace(job, engine=engine), report, lambda note: console.print(note, style="dim", markup=False))


def _on_cluster(job: Job, options: dict[str, Any], dimensions: int, console: Console) -> dict[str, Any]:
    import time

    from qembed.embed import ray_pipeline
    from qembed.embed.ray_cluster import Share

    start = time.monotonic()
    share = Share(options["ray"], options["ray_workers"], options["ray_cpus"], options["ray_gpus"])
    with console.status("starting the engines") as status:

        def report(totals: Totals) -> None:
            rejected = f", {totals.rejected:,} rejected" if totals.rejected else ""
            speed = totals.vectors / max(time.monotonic() - start, 1e-9)
            counts = f"{counted(totals.windows, 'part')}, {counted(totals.vectors, 'vector')}{rejected}"
            status.update(f"{counts}, {speed:,.1f}/s with the start")

        manifest = ray_pipeline.run(job, share, dimensions, report, lambda note: console.print(note, style="dim", markup=False))
    rejects = str(job.output / manifest["rejects"]) if manifest["rejects"] else None
    summary = {name: value for name, value in manifest.items() if name not in ("parts", "columns", "qembed")}
    return {
        "output": str(job.output),
        "ids": None,
        "resumed": 0,
        **summary,
        "rejects": rejects,
        "parts": len(manifest["parts"]),
        "seconds": round(time.monotonic() - start, 3),
    }


def _summary_line(summary: dict[str, Any]) -> str:
    ids = f", ids in {summary['ids']}" if summary["ids"] else ""
    resumed = f", {summary['resumed']:,} of them from an earlier run" if summary["resumed"] else ""
    return (
        f"{summary['output']}: {counted(summary['vectors'], 'vector')} of {summary['dimensions']} ({summary['dtype']})"
        f"{resumed}{ids}; {summary['seconds']:.1f} s"
    )
