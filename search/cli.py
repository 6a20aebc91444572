"""`qembed search`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted
from qembed.text import strict_json

DEPTH = 10
CANDIDATES = 50

asking = section("Who embeds the question")
looking = section("How to look")
writing = section("What to write")


@click.command("search", cls=SectionedCommand, short_help="Ask an index for what is nearest to a text.")
@click.argument("texts", nargs=-1, metavar="TEXT…")
@looking("--index", required=True, type=click.Path(path_type=Path), metavar="FILE.faiss", help="What `qembed index` wrote.")
@looking("-k", "--top", "top", type=click.IntRange(1, 10_000), metavar="N", help="How many to find.  [default: 10]")
@looking("--nprobe", type=click.IntRange(1), metavar="N",
         help="Clusters of an ivf-flat index to look into.  [default: what `qembed index` found to be enough]")  # fmt: skip
@looking("--ef-search", type=click.IntRange(1), metavar="N",
         help="Candidates of a walk through an hnsw index.  [default: as for --nprobe]")  # fmt: skip
@looking("--exact", is_flag=True, help="Compare with every vector, whatever the index is.")
@looking("--rerank", metavar="MODEL",
         help="Let a Qwen3-Reranker put the nearest into order: hub id, folder, or URL of a vLLM server that runs one. "
              "It needs the texts: embed with them kept.")  # fmt: skip
@looking("--candidates", type=click.IntRange(1, 10_000), metavar="N",
         help="How many of the nearest the reranker reads.  [default: 50]")  # fmt: skip
@looking("--text-column", metavar="NAME", help="The column with the texts.  [default: text, or the only one of strings]")
@asking("--url", metavar="URL", help="Running server (OpenAI-compatible) of the index's model.")
@asking("--model", metavar="MODEL", help="Hub id, folder, or 'sample'.  [default: the model that the index notes]")
@asking("--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True,
        help="What runs the model where no --url is given. vLLM takes longer to start than a question is worth.")  # fmt: skip
@asking("--prompt", metavar="NAME", help="Which of the model's prompts stands before the question.  [default: query]")
@asking(
    "--instruction", metavar="TEXT", help="What the question is for, in place of the model's prompt; the reranker gets it, too."
)
@asking("--any-model", is_flag=True, help="Do not compare the model's name with the one that the index notes.")
@writing("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else, on standard output.")
def command(**options: Any) -> None:
    """Ask an index for the texts that are nearest to TEXT, by cosine.

    TEXT may be several; a single - reads one a line from standard input. Each is embedded with the model's query prompt, by the
    model that the index's vectors came from.

    \b
    qembed search "music player" --index index.faiss
    qembed search "music player" --index index.faiss --url http://b:8000 --json
    qembed search "player" --index index.faiss --rerank ./Qwen3-Reranker-0.6B

    Exit codes: 0 done, 1 failed, 2 bad input, 3 a package is missing, 130 interrupted.
    """  # noqa: D301 - click wants the character \b
    try:
        found = _found(options)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted") from error
    if options["as_json"]:
        click.echo(strict_json.dumps(found, indent=2))
        return
    from rich.console import Console

    _print(Console(), found)


def _found(options: dict[str, Any]) -> dict[str, Any]:
    """Open the index, embed the questions, look; what there is to tell of it."""
    from rich.console import Console

    from qembed.search import answer, query, store

    texts = _texts(options["texts"])
    if options["candidates"] and not options["rerank"]:
        raise BadInput("--candidates is how many the reranker reads; name it with --rerank")
    if options["prompt"] and options["instruction"]:
        raise BadInput("--prompt and --instruction both say what stands before the question: leave one out")
    if options["url"] and options["engine"] != "transformers":
        raise BadInput("--engine says what runs the model here; with --url a server does: leave one out")
    progress = Console(stderr=True)
    with progress.status(f"reading {options['index']}"):
        opened = store.read(options["index"])
    top, depth = _depths(options, opened.rows, opened.path)
    look = answer.width(opened, options["nprobe"], options["ef_search"], exact=options["exact"])
    column = answer.text_column(opened, options["text_column"])
    if options["rerank"] and column is None:
        kept = (
            f"keeps {', '.join(opened.texts)}: name one with --text-column"
            if opened.texts
            else "keeps none: embed with them kept"
        )
        raise BadInput(f"--rerank reads texts, and {opened.path} {kept}")
    model = answer.reranker(options["rerank"]) if options["rerank"] else None
    who = query.Asking(
        options["url"], options["model"], options["engine"], options["prompt"], options["instruction"], options["any_model"]
    )
    vectors = query.vectors(texts, opened, who, progress)
    answers = answer.hits(opened, vectors, depth, look)
    if model is not None and column is not None:
        answers = answer.reranked(answers, texts, column, model, options["instruction"], progress)
    return {
        "index": str(opened.path),
        "kind": opened.kind,
        "width": look,
        "model": opened.model,
        "reranker": model.name if model else None,
        "text_column": column,
        "queries": [
            {"text": text, "hits": [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits[:top], 1)]}
            for text, hits in zip(texts, answers, strict=True)
        ],
    }


def _texts(given: tuple[str, ...]) -> list[str]:
    """The questions, as arguments or from standard input; cleaned, as `qembed embed` does it with the texts."""
    from qembed.text import cleaning

    texts = list(given)
    if texts == ["-"]:
        try:
            texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise BadInput(f"standard input is not UTF-8: {error}") from error
    if not texts:
        raise BadInput('nothing to search for: qembed search "text" --index FILE.faiss')
    if number := next((number for number, text in enumerate(texts, 1) if cleaning.has_surrogate(text)), None):
        raise BadInput(f"question {number} is not UTF-8")
    cleaned = [cleaning.clean(text) for text in texts]
    if number := next((number for number, text in enumerate(cleaned, 1) if not text.strip()), None):
        raise BadInput(f"question {number} is empty")
    return cleaned


def _depths(options: dict[str, Any], rows: int, path: Path) -> tuple[int, int]:
    """How many are told, and how many are looked for."""
    for option, name in (("top", "-k"), ("candidates", "--candidates")):
        if options[option] and options[option] > rows:
            raise BadInput(f"{name} {options[option]}: {path} has only {rows:,} vectors")
    top = min(options["top"] or DEPTH, rows)
    if not options["rerank"]:
        return top, top
    candidates = options["candidates"] or min(max(CANDIDATES, top), rows)
    if candidates < top:
        raise BadInput(f"--candidates {candidates}: fewer than the {top} to be told (-k)")
    return top, candidates


def _print(console: Any, found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from qembed.text.display import one_line

    column = found["text_column"]
    for number, question in enumerate(found["queries"]):
        if len(found["queries"]) > 1:
            console.print(f"{chr(10) if number else ''}{escape(one_line(question['text']))}", style="bold", highlight=False)
        table = Table(box=None, pad_edge=False)
        table.add_column("", justify="right")
        if found["reranker"]:
            table.add_column("rerank", justify="right")
        table.add_column("cosine", justify="right")
        table.add_column("id", overflow="fold", max_width=40)
        if column:
            table.add_column(escape(column), no_wrap=True, overflow="ellipsis")
        for hit in question["hits"]:
            cells = [f"{hit['rerank']:.4f}"] if found["reranker"] else []
            cells += [f"{hit['score']:.4f}", escape(one_line(hit["id"]))]
            text = hit["columns"].get(column) if column else None
            table.add_row(str(hit["rank"]), *cells, *([escape(one_line(str(text or "")))] if column else []))
        console.print(table)
