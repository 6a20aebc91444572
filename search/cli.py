"""`qembed search`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from qembed.command.options import JSON_HELP, api_key_file_option
from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted
from qembed.text import strict_json
from qembed.text.display import counted

if TYPE_CHECKING:
    from qembed.search.query import QuestionSettings
    from qembed.search.session import Search

DEPTH = 10
CANDIDATES = 50
OTHER_WIDTH = 40
"""Characters of a kept column that does not hold the texts."""

NO_TEXTS = "The index keeps ids alone; `qembed embed --keep COLUMN` keeps texts beside the vectors."

embedding = section("Embedding the question")
searching = section("Search")
output = section("Output")


@click.command("search", cls=SectionedCommand, short_help="Search an index for the texts nearest to a text.")
@click.argument("texts", nargs=-1, metavar="TEXT…")
@searching("--index", required=True, type=click.Path(path_type=Path), metavar="FILE.faiss", help="Index of `qembed index`.")
@searching("-k", "--top", "top", type=click.IntRange(1, 10_000), metavar="N", help="Number of results.  [default: 10]")
@searching("--nprobe", type=click.IntRange(1), metavar="N",
         help="Clusters of an ivf-flat index to search.  [default: what `qembed index` measured as enough]")  # fmt: skip
@searching("--ef-search", type=click.IntRange(1), metavar="N",
         help="Candidates of an hnsw search.  [default: as for --nprobe]")  # fmt: skip
@searching("--exact", is_flag=True, help="Compare with every vector, whatever the kind of index.")
@searching("--rerank", metavar="MODEL",
         help="Reorder the nearest by a Qwen3-Reranker: hub id, folder, or URL of a server. "
              "Needs the texts in the index: qembed embed --keep text.")  # fmt: skip
@searching("--candidates", type=click.IntRange(1, 10_000), metavar="N",
         help="Number of nearest texts that the reranker reads.  [default: 50]")  # fmt: skip
@searching("--text-column", metavar="NAME", help="Column with the texts.  [default: text, or the only column of strings]")
@embedding("--url", metavar="URL", help="Running server (OpenAI-compatible) with the index's model.")
@api_key_file_option(embedding)
@embedding("--model", metavar="MODEL", help="Hub id, folder, or 'sample'.  [default: the model recorded in the index]")
@embedding("--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True,
        help="What runs the model without --url. vLLM answers faster but takes longer to start.")  # fmt: skip
@embedding("--prompt", metavar="NAME", help="Name of the model's prompt for the question; '' for none.  [default: query]")
@embedding("--instruction", metavar="TEXT", help="Task description in place of the model's prompt; the reranker gets it too.")
@embedding("--any-model", is_flag=True, help="Do not check the model's name against the one recorded in the index.")
@searching("-i", "--interactive", is_flag=True,
         help="Answer questions from standard input, one per line, until Ctrl-D; --json prints a line for each.")  # fmt: skip
@output("--json", "as_json", is_flag=True, help=JSON_HELP)
def command(**options: Any) -> None:
    """Search an index for the texts nearest to each TEXT, by cosine similarity.

    A single - reads one TEXT per line from standard input. Each is embedded with the query prompt of the model that the index's
    vectors came from. --interactive answers each line of standard input at once, and keeps the models between them.

    \b
    qembed search "music player" --index index.faiss
    qembed search "music player" --index index.faiss --url http://b:8000 --json
    qembed search "player" --index index.faiss --rerank ./Qwen3-Reranker-0.6B
    qembed search --interactive --index index.faiss

    Exit codes: 0 done, 1 failed, 2 bad input, 3 a package is missing, 130 interrupted.
    """  # noqa: D301 - click wants the character \b
    try:
        _run(options)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted") from error


def _run(options: dict[str, Any]) -> None:
    """Open the index and the models, and answer the questions."""
    from rich.console import Console

    from qembed.search.session import answer_once, opened

    interactive, as_json = options["interactive"], options["as_json"]
    if interactive and options["texts"]:
        raise BadInput("--interactive reads the questions from standard input: leave TEXT out")
    texts = [] if interactive else _texts(options["texts"])
    progress = Console(stderr=True)
    search, settings = _settings(options, progress)
    if not interactive:
        _show(answer_once(search, texts, settings, progress), as_json=as_json)
        if not (as_json or search.store.columns):
            click.echo(NO_TEXTS, err=True)
        return
    with opened(search, settings, progress) as ask:
        if not search.store.columns:
            click.echo(NO_TEXTS, err=True)
        for text in _questions(sys.stdin):
            try:
                _show(ask(_cleaned([text])), as_json=as_json)
            except BadInput as error:
                click.echo(f"error: {error}", err=True)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    """Print `result`: as a line of JSON, or as a table."""
    if as_json:
        click.echo(strict_json.dumps(result))
        return
    from rich.console import Console

    _print(Console(), result)


def _settings(options: dict[str, Any], progress: Any) -> tuple[Search, QuestionSettings]:
    """Open the index, and check the options against it."""
    from qembed.command.progress import reporter
    from qembed.search import answer, query, store
    from qembed.search.session import Search
    from qembed.vllm import api_keys

    if options["candidates"] and not options["rerank"]:
        raise BadInput("--candidates needs --rerank: it is the number of texts that the reranker reads")
    if options["prompt"] and options["instruction"]:
        raise BadInput("--prompt and --instruction both say what stands before the question: leave one out")
    if options["url"] and options["engine"] != "transformers":
        raise BadInput("--engine says what runs the model here; with --url a server does: leave one out")
    if options["api_key_file"] and not (options["url"] or "://" in (options["rerank"] or "")):
        raise BadInput("--api-key-file is for running servers: name one with --url or --rerank")
    api_key = api_keys.first(options["api_key_file"])
    with reporter(f"reading {options['index']}", progress):
        opened = store.read(options["index"])
    top, depth = _depths(options, opened.rows, opened.path)
    width = answer.width(opened, options["nprobe"], options["ef_search"], exact=options["exact"])
    column = answer.text_column(opened, options["text_column"])
    if options["rerank"] and column is None:
        advice = (
            f"keeps {', '.join(opened.texts)}: name one with --text-column"
            if opened.texts
            else "keeps none: make its vectors with qembed embed --keep text"
        )
        raise BadInput(f"--rerank reads texts, and {opened.path} {advice}")
    model = answer.reranker(options["rerank"], api_key) if options["rerank"] else None
    settings = query.QuestionSettings(
        options["url"],
        options["model"],
        options["engine"],
        options["prompt"],
        options["instruction"],
        options["any_model"],
        api_key,
    )
    return Search(opened, top, depth, width, column, model), settings


def _questions(lines: TextIO) -> Iterator[str]:
    """The lines with a question, as they come, until the end of the input; on a terminal each is asked for."""
    asks = lines.isatty()
    while True:
        if asks:
            click.echo("> ", nl=False, err=True)
        try:
            line = lines.readline()
        except UnicodeDecodeError as error:
            raise BadInput(f"standard input is not UTF-8: {error}") from error
        if not line:
            if asks:
                click.echo(err=True)
            return
        if line.strip():
            yield line.strip()


def _texts(arguments: tuple[str, ...]) -> list[str]:
    """The questions from the arguments or standard input, cleaned like the texts of `qembed embed`."""
    texts = list(arguments)
    if texts == ["-"]:
        try:
            texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise BadInput(f"standard input is not UTF-8: {error}") from error
    if not texts:
        raise BadInput('nothing to search for: qembed search "text" --index FILE.faiss')
    return _cleaned(texts)


def _cleaned(texts: Sequence[str]) -> list[str]:
    from qembed.text import cleaning

    if number := next((number for number, text in enumerate(texts, 1) if cleaning.has_surrogate(text)), None):
        raise BadInput(f"question {number} is not UTF-8")
    cleaned = [cleaning.clean(text) for text in texts]
    if number := next((number for number, text in enumerate(cleaned, 1) if not text.strip()), None):
        raise BadInput(f"question {number} is empty")
    return cleaned


def _depths(options: dict[str, Any], rows: int, path: Path) -> tuple[int, int]:
    """(number of results to show, number of nearest to search for)."""
    for option, name in (("top", "-k"), ("candidates", "--candidates")):
        if options[option] and options[option] > rows:
            raise BadInput(f"{name} {options[option]}: {path} has only {counted(rows, 'vector')}")
    top = min(options["top"] or DEPTH, rows)
    if not options["rerank"]:
        return top, top
    candidates = options["candidates"] or min(max(CANDIDATES, top), rows)
    if candidates < top:
        raise BadInput(f"--candidates {candidates}: fewer than the {top} to be told (-k)")
    return top, candidates


def _print(console: Any, result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from qembed.text.display import one_line

    text_column = result["text_column"]
    others = [name for name in result["columns"] if name != text_column]
    for number, question in enumerate(result["queries"]):
        if len(result["queries"]) > 1:
            console.print(f"{chr(10) if number else ''}{escape(one_line(question['text']))}", style="bold", highlight=False)
        table = Table(box=None, pad_edge=False)
        table.add_column("", justify="right")
        if result["reranker"]:
            table.add_column("rerank", justify="right")
        table.add_column("cosine", justify="right")
        table.add_column("id", overflow="fold", max_width=40)
        for name in others:
            table.add_column(escape(name), no_wrap=True, overflow="ellipsis", max_width=OTHER_WIDTH)
        if text_column:
            table.add_column(escape(text_column), no_wrap=True, overflow="ellipsis")
        for hit in question["hits"]:
            cells = [f"{hit['rerank']:.4f}"] if result["reranker"] else []
            cells += [f"{hit['score']:.4f}", escape(one_line(hit["id"]))]
            cells += [_cell(hit["columns"].get(name)) for name in (*others, *([text_column] if text_column else []))]
            table.add_row(str(hit["rank"]), *cells)
        console.print(table)


def _cell(value: Any) -> str:
    """`value` of a kept column on one line, without markup; nothing for a missing value."""
    from rich.markup import escape

    from qembed.text.display import one_line

    return "" if value is None else escape(one_line(str(value)))
