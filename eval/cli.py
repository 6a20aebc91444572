"""`qembed eval`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from qembed.checkpoint import model_card
from qembed.checkpoint.find import DEFAULT_MODEL
from qembed.command import failures
from qembed.command.options import JSON_HELP, api_key_file_option
from qembed.command.row_options import row_options
from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted, QembedError

UNDECIDED = 5
"""Exit code where there are too few texts to tell whether --max-task-drop is met."""

LARGEST_BARE_SHARE = 0.1
"""A greater number without a percent sign is more likely a percentage: a gate at 100% would pass whatever happens."""

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
    if number > LARGEST_BARE_SHARE and not value.endswith("%"):
        raise BadInput(f"{option.opts[0]} {value}: write {value}%, or {number:.0%} if that is what you mean")
    return number


@click.command("eval", cls=SectionedCommand, short_help="Measure what INT4 costs against FP16.")
@sides("--model", envvar="QEMBED_MODEL", show_envvar=True, metavar="MODEL",
       help="INT4 checkpoint: its folder, or the model that `qembed quantize` made it from in this directory.  "
            f"[default: that of {DEFAULT_MODEL}]")  # fmt: skip
@sides("--baseline", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True,
       help="fp16: the original checkpoint as published, computed in float16 on a GPU and in float32 on a CPU. "
            "fp32: the same weights, computed in float32 everywhere.")  # fmt: skip
@sides("--baseline-model", metavar="MODEL", help="Original checkpoint: hub id, folder, or 'sample'.  "
       "[default: what the INT4 checkpoint was made from]")  # fmt: skip
@sides("--engine", type=click.Choice(["vllm", "transformers"]),
       help="What runs the INT4 side: vLLM, or transformers with dequantized weights.  "
            "[default: vllm if it is installed]")  # fmt: skip
@sides(
    "--baseline-engine", type=click.Choice(["vllm", "transformers"]), help="What runs the baseline.  [default: transformers]"
)
@sides("--url", metavar="URL", help="Running server of the INT4 side (OpenAI-compatible), instead of starting one.")
@sides("--baseline-url", metavar="URL", help="Running server of the baseline, instead of transformers.")
@api_key_file_option(sides)
@sides("--vectors", type=click.Path(path_type=Path), metavar="FILE",
       help="Stored vectors of the INT4 side, in any format of `qembed embed`: .parquet, .jsonl and .csv are matched by their "
            "column 'id' or 'text', .npy and .fvecs by OUT.ids.jsonl; without ids, the rows are those of --data.")  # fmt: skip
@sides("--baseline-vectors", type=click.Path(path_type=Path), metavar="FILE", help="Stored vectors of the baseline.")
@reading("--data", type=click.Path(path_type=Path), metavar="FILE",
         help="Texts: .txt with one a line, or .jsonl, .csv, .tsv or .parquet with text, and if you like id, kind "
              "(query, document, code), language, instruction.  [default: the built-in held-out texts]")  # fmt: skip
@reading("--text-column", metavar="NAME", help="Column or field of --data with the text.  [default: text]")
@reading("--id-column", metavar="NAME", help="Column or field of --data with the id, by which --vectors are matched.  "
         "[default: id or _id if there is one, else the row's number]")  # fmt: skip
@row_options(reading, " of --data, --classification and --sts")
@reading("--cache", type=click.Path(path_type=Path, file_okay=False), envvar="QEMBED_EVAL_CACHE", show_envvar=True,
         metavar="FOLDER", help="Cache of computed vectors, from which an interrupted run continues.  "
         "[default: qembed/eval in the user's cache folder]")  # fmt: skip
@reading("--no-cache", is_flag=True, help="Compute every vector again, and cache none.")
@tasking("--task", multiple=True, metavar="NAME",
         help="retrieval, classification, sts, all (these three), speed, or mteb:NAME for a task of the mteb package. Can be "
              "repeated. Without your own data, a small built-in set in four languages is used. rerank, alone, compares an "
              "INT4 reranker with its original, on the pairs of --retrieval.")  # fmt: skip
@tasking("--retrieval", multiple=True, metavar="PATH",
         help="Queries, passages and relevance: a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/test.tsv), or "
              "SQuAD's JSON. Several files of XQuAD, or a folder of them, are searched across languages.")  # fmt: skip
@tasking("--classification", metavar="PATH",
         help="Labelled texts: .csv, .tsv, .parquet or .jsonl with text, label and if you like language and split (train, "
              "test), or a folder with train.csv and test.csv. FILE:COLUMN,COLUMN names other columns.")  # fmt: skip
@tasking("--classifier", type=click.Choice(["logistic", "lightgbm"]), default="logistic", show_default=True,
         help="What is trained on the vectors: logistic regression (scikit-learn) or LightGBM.")  # fmt: skip
@tasking("--sts", metavar="FILE",
         help="Scored pairs: .csv, .tsv, .parquet or .jsonl with sentence1, sentence2, score and if you like language. "
              "FILE:COLUMN,COLUMN,COLUMN names other columns.")  # fmt: skip
@tasking("--instruction", metavar="TEXT",
         help="Task description for the tasks' queries, labelled texts and pairs, in place of the model's query prompt. "
              "Without it, labelled texts and pairs get no prompt.")  # fmt: skip
@tasking("--speed-batches", default="1,8,32", show_default=True, metavar="N,N", help="Texts per request, for --task speed.")
@tasking("--speed-lengths", default="16,128,512", show_default=True, metavar="N,N", help="Tokens per text, for --task speed.")
@tasking("--rerank", metavar="MODEL", help="Reorder the top 50 of --task retrieval by a Qwen3-Reranker: hub id, folder, or URL "
         "of a vLLM server that runs one.")  # fmt: skip
@gates("--min-cosine", type=float, metavar="X", help="Exit with 1 if the mean cosine at full dimension is below X (−1 to 1).")
@gates("--min-p1", type=float, metavar="X", help="Exit with 1 if 1% of the texts have a cosine below X.")
@gates("--max-task-drop", callback=_share, metavar="X%",
       help="Exit with 1 if a task's main number is lower than the baseline's by more than X% of it, with 5 if the texts are "
            "too few to tell: its 95% interval reaches across X%. Without a task all are run.")  # fmt: skip
@writing("--report", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
         help="Write the result to FILE.html (one self-contained page), FILE.json or FILE.md. Can be repeated.")  # fmt: skip
@writing("--force", is_flag=True, help="Replace reports that exist.")
@writing("--card", is_flag=True, help="Write the numbers into the model card (README.md) of the INT4 checkpoint.")
@writing("--compare", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json",
         help="Measure nothing; compare two results, and tell which differences are within noise.")  # fmt: skip
@writing("--json", "as_json", is_flag=True, help=JSON_HELP)
def command(**options: Any) -> None:
    """Measure what INT4 costs against FP16: the cosine between both vectors of each text.

    The INT4 checkpoint runs through vLLM, started for the purpose, and the original through transformers. Queries get their
    prompt, documents none. Texts longer than the context are cut at the same place for both sides, and counted.

    \b
    qembed eval --baseline fp16                      what `qembed quantize` wrote
    qembed eval --model sample --min-cosine 0.95     as a gate
    qembed eval --url http://127.0.0.1:8000 --json   a running server
    qembed eval --task all --report page.html        all tasks, as a page
    qembed eval --task rerank --model RERANKER       a reranker: scores and order
    qembed eval --compare before.json after.json     two earlier results

    Exit codes: 0 done, 1 a threshold was missed or a vector is unusable, 2 bad input, or a side that could not be measured, 3 a
    package is missing, 5 too few texts to tell whether --max-task-drop is met, 130 interrupted.
    """  # noqa: D301 - click wants the character \b
    from qembed.eval import rerankers, targets
    from qembed.report import files

    if options["compare"]:
        _compare(options)
        return
    if rerankers.TASK in options["task"]:
        _compare_rerankers(options)
        return
    for path in options["report"]:
        files.check(path)
    targets.check(options)
    with _exit_code_1_reserved(options):
        result, folder = _measure(options)
    try:
        with failures.keeping(result), _exit_code_1_reserved(options):
            files.write_all(_writes(result, options, folder))
    finally:  # what was measured is shown even if a report cannot be written
        if not options["as_json"]:
            _print(result)
        _show_verdict(result)
    _end(result, options)


def _compare_rerankers(options: dict[str, Any]) -> None:
    """Compare the scores of two rerankers, and print the result."""
    from rich.console import Console

    from qembed.eval import choose, rerankers
    from qembed.eval.thresholds import Thresholds

    with _exit_code_1_reserved(options):
        rerankers.check(options)
        progress = Console(stderr=True)
        collection = choose.collection(options)
        candidate, baseline = rerankers.sides(options)
        thresholds = Thresholds(max_task_drop=options["max_task_drop"])
        cache = choose.cache_folder(options, progress)
        result = rerankers.compare(candidate, baseline, collection, options["instruction"], thresholds, cache, progress)
    if not options["as_json"]:
        for line in rerankers.lines(result):
            click.echo(line)
    _show_verdict(result)
    _end(result, options)


def _show_verdict(result: dict[str, Any]) -> None:
    for line in (*result["verdict"]["failures"], *result["verdict"]["undecided"]):
        click.echo(f"qembed: {line}", err=True)


def _end(result: dict[str, Any], options: dict[str, Any]) -> None:
    """Print the result as JSON if asked to, and exit with the code of its verdict."""
    if options["as_json"]:
        click.echo(json.dumps(result, allow_nan=False))
    if result["verdict"]["failures"]:
        raise SystemExit(1)
    if result["verdict"]["undecided"]:
        raise SystemExit(UNDECIDED)


def _writes(result: dict[str, Any], options: dict[str, Any], folder: Path | None) -> Iterator[tuple[str, Callable[[], object]]]:
    """The reports and the model card to write: a line that announces each, and a function that writes it."""
    from qembed.eval.report import card
    from qembed.eval.report import files as reports

    if options["card"] and folder:
        yield f"numbers written into {folder / model_card.FILE}", partial(card.write, folder, result)
    for path in options["report"]:
        yield f"report written to {path}", partial(reports.write, path, result)


def _print(result: dict[str, Any]) -> None:
    """Print the result as tables."""
    from rich.console import Console

    from qembed.eval.report import terminal

    terminal.print_tables(Console(), result)


def _measure(options: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
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
    tasks, self_scoring, measures_speed = choose.tasks(options, folder, progress)
    explicit = _explicit()
    candidate, baseline, reader = choose.sides(options, explicit)
    checkpoint = choose.card_folder(options, explicit)
    timing = choose.speed(options, candidate, baseline) if measures_speed else None
    thresholds = Thresholds(options["min_cosine"], options["min_p1"], options["max_task_drop"])
    settings = evaluation.EvaluationSettings(options["baseline"], thresholds, folder)
    result = evaluation.compare(candidate, baseline, reader, data, settings, progress, tasks, self_scoring)
    if timing is not None:
        words = " ".join(text.text for text in data.texts).split()
        left, right, shapes, notes = timing
        result["speed"] = speed.measure(left, right, shapes, words, reader.tokenizer, progress, notes)
    return result, checkpoint


def _compare(options: dict[str, Any]) -> None:
    """Print the differences between two results."""
    from qembed.eval import difference, result

    if other := sorted(_explicit() - {"compare", "as_json"}):
        raise BadInput(f"--compare measures nothing; leave --{other[0].replace('_', '-')} out")
    first, second = map(result.read, options["compare"])
    for read, path in zip((first, second), options["compare"], strict=True):
        difference.check(read, path)
    differences = difference.compare(first, second)
    if options["as_json"]:
        click.echo(json.dumps(differences, allow_nan=False))
        return
    from rich.console import Console

    from qembed.eval.report import terminal

    terminal.print_differences(Console(), differences, *map(str, options["compare"]))


def _explicit() -> frozenset[str]:
    """Names of the options that stand on the command line; not those with a default or from the environment."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) is source)


@contextmanager
def _exit_code_1_reserved(options: dict[str, Any]) -> Iterator[None]:
    """Reserve exit code 1 for thresholds: a side that fails is distinguished from a side that is not good enough."""
    try:
        yield
    except KeyboardInterrupt as error:
        advice = "" if options["no_cache"] else "; computed vectors are in the cache: run the same command to continue"
        raise Interrupted(f"interrupted{advice}") from error
    except QembedError as error:
        if error.exit_code != QembedError.exit_code:
            raise
        raise BadInput(str(error)) from error
    except (click.ClickException, click.exceptions.Exit, BrokenPipeError, ModuleNotFoundError):
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"unexpected: {message} (a bug in qembed; `qembed --debug …` shows where)") from error
