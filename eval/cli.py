"""`qembed eval`."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qembed.checkpoint.find import DEFAULT_MODEL
from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted, QembedError

sides = section("What to compare")
reading = section("Texts")
tasking = section("Tasks")
gates = section("As a gate")
writing = section("What to write")


def _share(_: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """A share given as a percentage ("0.5%") or a number ("0.005")."""
    if value is None:
        return None
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise BadInput(f"{option.opts[0]} {value}: not a share such as 0.5% or 0.005")
    return number


@click.command("eval", cls=SectionedCommand, short_help="Tell what INT4 costs against FP16.")
@sides("--model", envvar="QEMBED_MODEL", show_envvar=True, metavar="MODEL",
       help="INT4 checkpoint: its folder, or the model that `qembed quantize` made it from in this directory.  "
            f"[default: what it made of {DEFAULT_MODEL}]")  # fmt: skip
@sides("--baseline", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True,
       help="fp16: the original checkpoint as published, computed in float16 on a GPU and in float32 on a CPU. "
            "fp32: the same weights, computed in float32 everywhere.")  # fmt: skip
@sides("--baseline-model", metavar="MODEL", help="Original checkpoint: hub id, folder, or 'sample'.  "
       "[default: what the INT4 checkpoint was made from]")  # fmt: skip
@sides("--engine", type=click.Choice(["vllm", "transformers"]),
       help="What runs the INT4 side: vLLM, or transformers with the weights dequantized.  "
            "[default: vllm where it is installed]")  # fmt: skip
@sides(
    "--baseline-engine", type=click.Choice(["vllm", "transformers"]), help="What runs the baseline.  [default: transformers]"
)
@sides("--url", metavar="URL", help="Running server of the INT4 side (OpenAI-compatible), instead of starting one.")
@sides("--baseline-url", metavar="URL", help="Running server of the baseline, instead of transformers.")
@sides("--vectors", type=click.Path(path_type=Path), metavar="FILE",
       help="Stored vectors of the INT4 side: .npy, a row for each text of --data, or .parquet with a column 'vector' "
            "(matched by its column 'id' or 'text', if it has one).")  # fmt: skip
@sides("--baseline-vectors", type=click.Path(path_type=Path), metavar="FILE", help="Stored vectors of the baseline.")
@reading("--data", type=click.Path(path_type=Path), metavar="FILE",
         help="Texts: .txt with one a line, or .jsonl with one object a line: text, and if you like id, kind "
              "(query, document, code), language, instruction.  [default: the built-in held-out texts]")  # fmt: skip
@reading("--cache", type=click.Path(path_type=Path, file_okay=False), envvar="QEMBED_EVAL_CACHE", show_envvar=True,
         metavar="FOLDER", help="Where vectors are kept, so that a run that was broken off goes on where it was.  "
         "[default: qembed/eval in the user's cache folder]")  # fmt: skip
@reading("--no-cache", is_flag=True, help="Compute every vector anew, and keep none.")
@tasking("--task", multiple=True, metavar="NAME",
         help="retrieval, classification, sts, all (these three), speed, or mteb:NAME for a task of the mteb package; several "
              "if you like. Without data of your own a small built-in set is taken, in four languages.")  # fmt: skip
@tasking("--retrieval", multiple=True, metavar="PATH",
         help="Queries, passages and relevance: a folder as BEIR has it (corpus.jsonl, queries.jsonl, qrels/test.tsv), or "
              "SQuAD's JSON; XQuAD's files of several languages, or a folder of them, are searched across them.")  # fmt: skip
@tasking("--classification", metavar="PATH",
         help="Labelled texts: .csv, .tsv or .jsonl with text, label and if you like language and split (train, test), or a "
              "folder with train.csv and test.csv. FILE:COLUMN,COLUMN names other columns for text and label.")  # fmt: skip
@tasking("--classifier", type=click.Choice(["logistic", "lightgbm"]), default="logistic", show_default=True,
         help="What is trained on the vectors: logistic regression (scikit-learn) or LightGBM.")  # fmt: skip
@tasking("--sts", metavar="FILE",
         help="Scored pairs: .csv, .tsv or .jsonl with sentence1, sentence2, score and if you like language. "
              "FILE:COLUMN,COLUMN,COLUMN names other columns.")  # fmt: skip
@tasking("--instruction", metavar="TEXT",
         help="What the tasks' queries, labelled texts and pairs are for, in place of the model's own query prompt. "
              "Without it labelled texts and pairs go in bare.")  # fmt: skip
@tasking("--speed-batches", default="1,8,32", show_default=True, metavar="N,N", help="Texts a request, for --task speed.")
@tasking("--speed-lengths", default="16,128,512", show_default=True, metavar="N,N", help="Tokens a text, for --task speed.")
@tasking("--rerank", metavar="MODEL", help="Put a Qwen3-Reranker behind the top 50 of --task retrieval: hub id, folder, or URL "
         "of a vLLM server that runs one.")  # fmt: skip
@gates("--min-cosine", type=float, metavar="X", help="Exit with 1 if the mean cosine at full dimension is below X (−1 to 1).")
@gates("--min-p1", type=float, metavar="X", help="Exit with 1 if 1% of the texts have a cosine below X.")
@gates("--max-task-drop", callback=_share, metavar="X%",
       help="Exit with 1 if a task's main number is lower than the baseline's by more than X% of it. Without a task "
            "all are run.")  # fmt: skip
@writing("--report", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
         help="Write the result to FILE.html (one page that needs nothing else), FILE.json or FILE.md.")  # fmt: skip
@writing("--force", is_flag=True, help="Replace reports that exist.")
@writing("--card", is_flag=True, help="Put the numbers into the model card (README.md) of the INT4 checkpoint.")
@writing("--compare", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json",
         help="Measure nothing; tell two results apart, and which differences are within noise.")  # fmt: skip
@writing("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on standard output.")
def command(**options: Any) -> None:
    """Tell what INT4 costs against FP16: the cosine between both vectors of the same text.

    The INT4 checkpoint runs through vLLM, which is started for it, and the original through transformers. Queries go in with
    their prompt. Texts longer than the context are cut at the same place for both sides, and counted.

    \b
    qembed eval --baseline fp16                      what `qembed quantize` wrote
    qembed eval --model sample --min-cosine 0.95     as a gate
    qembed eval --url http://127.0.0.1:8000 --json   a server that runs already
    qembed eval --task all --report page.html        all tasks, as a page
    qembed eval --compare before.json after.json     two earlier results

    Exit codes: 0 done, 1 a threshold was missed or a vector is unusable, 2 bad input, or a side that could not be measured, 3 a
    package is missing, 130 interrupted.
    """  # noqa: D301 - click wants the character \b
    from qembed.eval import targets
    from qembed.eval.report import card
    from qembed.eval.report import files as report_files
    from qembed.report import files

    if options["compare"]:
        _compare(options)
        return
    for path in options["report"]:
        files.check(path)
    targets.check(options)
    with _measuring(options):
        found, folder = _measured(options)
    # What was measured is shown even where a report cannot be written.
    with _measuring(options), contextlib.ExitStack() as stack:
        for path in options["report"]:
            stack.callback(report_files.write, path, found)
        if options["card"] and folder:
            stack.callback(lambda: click.echo(f"numbers written into {card.write(folder, found)}", err=True))
        _show(found, folder, options)
        for line in found["verdict"]["failures"]:
            click.echo(f"qembed: {line}", err=True)
    if not found["verdict"]["passed"]:
        raise SystemExit(1)


def _show(found: dict[str, Any], folder: Path | None, options: dict[str, Any]) -> None:
    """Print the result."""
    if options["as_json"]:
        click.echo(json.dumps(found, allow_nan=False, indent=2))
    else:
        from rich.console import Console

        from qembed.eval.report import terminal

        terminal.print_tables(Console(), found)
        if folder and not options["card"]:
            click.echo(f"--card puts these numbers into {folder / 'README.md'}.")


def _measured(options: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The result, and the folder of the INT4 checkpoint if known; everything is read and checked before anything starts."""
    from rich.console import Console

    from qembed.eval import choose, evaluation
    from qembed.eval.tasks import speed
    from qembed.eval.thresholds import Thresholds

    for name in ("min_cosine", "min_p1"):
        value = options[name]
        if value is not None and not (math.isfinite(value) and -1 <= value <= 1):
            raise BadInput(f"--{name.replace('_', '-')} {value}: not within -1…1")
    choose.check(options)
    data = choose.data(options)
    progress = Console(stderr=True)
    folder = choose.cache_folder(options, progress)
    tasks, scored, timed = choose.tasks(options, folder, progress)
    candidate, baseline, reader = choose.sides(options)
    checkpoint = choose.card_folder(options)
    timing = choose.speed(options, candidate, baseline) if timed else None
    thresholds = Thresholds(options["min_cosine"], options["min_p1"], options["max_task_drop"])
    settings = evaluation.EvaluationSettings(options["baseline"], thresholds, folder)
    found = evaluation.compare(candidate, baseline, reader, data, settings, progress, tasks, scored)
    if timing is not None:
        pool = " ".join(text.text for text in data.texts).split()
        left, right, shapes, notes = timing
        found["speed"] = speed.measure(left, right, shapes, pool, reader.tokenizer, progress, notes)
    return found, checkpoint


def _compare(options: dict[str, Any]) -> None:
    """Print the differences between two results."""
    from qembed.eval import difference, result

    context = click.get_current_context()
    given = {name for name in options if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if other := sorted(given - {"compare", "as_json"}):
        raise BadInput(f"--compare measures nothing; leave --{other[0].replace('_', '-')} out")
    first, second = map(result.read, options["compare"])
    for one, path in ((first, options["compare"][0]), (second, options["compare"][1])):
        difference.check(one, path)
    found = difference.compare(first, second)
    if options["as_json"]:
        click.echo(json.dumps(found, allow_nan=False, indent=2))
        return
    from rich.console import Console

    from qembed.eval.report import terminal

    terminal.print_differences(Console(), found, *map(str, options["compare"]))


@contextmanager
def _measuring(options: dict[str, Any]) -> Iterator[None]:
    """Reserve exit code 1 for thresholds: a side that fails is distinguished from a side that is not good enough."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "" if options["no_cache"] else "; vectors that were computed are kept: the same command goes on from there"
        raise Interrupted(f"interrupted{kept}") from error
    except QembedError as error:
        if error.exit_code != QembedError.exit_code:
            raise
        raise BadInput(str(error)) from error
    except (click.ClickException, click.exceptions.Exit, BrokenPipeError, ModuleNotFoundError):
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"unexpected: {said} (a fault of qembed's; `qembed --debug …` shows where)") from error
