"""`qembed index`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qembed.command import failures
from qembed.command.options import JSON_HELP
from qembed.command.sections import SectionedCommand, section
from qembed.errors import BadInput, Interrupted
from qembed.targets import Target, check_targets
from qembed.text import strict_json

if TYPE_CHECKING:
    from qembed.search.recall import Recall

building = section("What to build")
measuring = section("Recall")
writing = section("What to write")


@click.command("index", cls=SectionedCommand, short_help="Put vectors into a FAISS index, and measure what it misses.")
@click.argument("vectors", type=click.Path(path_type=Path), metavar="VECTORS.parquet")
@building("--kind", type=click.Choice(["flat", "ivf-flat", "hnsw"]), default="flat", show_default=True,
          help="flat compares with every vector; ivf-flat with those of the nearest clusters; hnsw walks a graph.")  # fmt: skip
@building("--nlist", type=click.IntRange(1, 1 << 22), metavar="N", help="Clusters of ivf-flat.  [default: 4 × √vectors]")
@building("--m", "m", type=click.IntRange(2, 256), metavar="N", help="Links of a node of hnsw.  [default: 32]")
@building("--ef-construction", type=click.IntRange(1, 10_000), metavar="N",
          help="Candidates that hnsw links a node from.  [default: 200]")  # fmt: skip
@measuring("--recall", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="X",
           help="What `qembed search` is to find of the ten nearest: the least setting that does is noted.")  # fmt: skip
@measuring("--queries", type=click.Path(path_type=Path), metavar="FILE.parquet",
           help="Vectors of real queries (qembed embed --prompt query) to measure with, the first 1,000.  "
                "[default: 200 of the indexed vectors]")  # fmt: skip
@writing("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.faiss",
         help="The index. Ids and kept columns go beside it, into FILE.faiss.ids.parquet.")  # fmt: skip
@writing("--force", is_flag=True, help="Replace an index and reports that exist.")
@writing("--report", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
         help="Write what was measured to FILE.html (recall against time, as a plot) or FILE.json.")  # fmt: skip
@writing("--json", "as_json", is_flag=True, help=JSON_HELP)
def command(**options: Any) -> None:
    """Put the vectors that `qembed embed` wrote into a FAISS index, to look at them with `qembed search`.

    VECTORS.parquet may also be a folder of such parts. Vectors are scaled to unit length, so scores are cosines. What ivf-flat
    and hnsw miss of the true nearest is measured, and the least setting that finds enough is noted for `qembed search`.

    \b
    qembed index vectors.parquet -o index.faiss                exact
    qembed index vectors.parquet -o index.faiss --kind hnsw    approximate

    An index lives in memory: 4 bytes × dimensions a vector. To serve, load into a database: docs/vector-databases.md.

    Exit codes: 0 done, 1 failed, 2 bad input, 3 a package is missing, 130 interrupted.
    """  # noqa: D301 - click wants the character \b
    from qembed.report import files
    from qembed.search import report

    try:
        result = _build_index(options)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {options['output']} is as it was") from error
    try:
        with failures.keeping(result):
            files.write_all((f"report written to {path}", partial(report.write, path, result)) for path in options["report"])
    finally:  # what was measured is shown even if a report cannot be written
        if not options["as_json"]:
            _print(result)
    if options["as_json"]:
        click.echo(strict_json.dumps(result))


def _build_index(options: dict[str, Any]) -> dict[str, Any]:
    """Check, build, measure, and write the index; returns what --json prints."""
    from rich.console import Console

    from qembed.command.progress import reporter
    from qembed.search import build, corpus, recall, report, store
    from qembed.vectors import ivf

    output: Path = options["output"]
    for path in options["report"]:
        report.check(path)
    settings = _settings(options)
    ivf.library()
    vectors = corpus.read(options["vectors"])
    inputs = [*vectors.paths, *([options["queries"]] if options["queries"] else [])]
    outputs = (output, store.ids_path(output))
    reports = [Target(path, "--report") for path in options["report"]]
    check_targets([*(Target(path) for path in outputs), *reports], inputs, force=options["force"])
    store.check(output)
    applied_settings = settings.noted(vectors.rows)
    queries = _queries(options["queries"], vectors) if options["queries"] else None
    build.check_memory(vectors, settings)
    with reporter("reading", Console(stderr=True)) as progress:

        def on_stage(stage: str, rows: int) -> None:
            progress.steps(stage, rows, vectors.rows, "vectors")

        drawn = ivf.draw(vectors.rows, recall.QUERIES)
        index, sample = build.build(vectors, settings, drawn, on_stage)
        measured = None
        if settings.kind != "flat" and (queries is not None or vectors.rows > 1):
            measured = _recall(index, settings.kind, queries, sample, drawn, options, progress.stage)
        about = {
            "kind": settings.kind,
            "settings": applied_settings,
            "width": measured.chosen if measured else 1,
            "recall": measured.record() if measured else None,
        }
        store.write(output, index, vectors, about, on_stage)
    return {
        "index": str(output),
        "source": str(vectors.path),
        "model": vectors.model,
        "rows": vectors.rows,
        "dimensions": vectors.dimensions,
        "columns": list(vectors.other_columns),
        "bytes": output.stat().st_size,
        **about,
    }


def _recall(
    index: Any, kind: Any, queries: Any, sample: Any, drawn: Any, options: dict[str, Any], on_stage: Callable[[str], None]
) -> Recall:
    """Recall of `index` for `queries` of the user's, or else for the `sample` of indexed vectors at the rows `drawn`."""
    from qembed.search import recall

    source = "drawn from the indexed vectors, not looking for themselves" if queries is None else str(options["queries"])
    return recall.measure(
        index,
        kind,
        sample if queries is None else queries,
        drawn if queries is None else None,
        options["recall"],
        source,
        lambda width: on_stage(f"measuring recall at {width}"),
    )


def _settings(options: dict[str, Any]) -> Any:
    from qembed.search.build import EF_CONSTRUCTION, IndexSettings, M

    kind = options["kind"]
    for name, owner in (("nlist", "ivf-flat"), ("m", "hnsw"), ("ef_construction", "hnsw")):
        if options[name] is not None and kind != owner:
            raise BadInput(f"--{name.replace('_', '-')} is a setting of --kind {owner}, not of {kind}")
    return IndexSettings(kind, options["nlist"], options["m"] or M, options["ef_construction"] or EF_CONSTRUCTION)


def _queries(path: Path, corpus: Any) -> Any:
    """The vectors in `path` of real queries, which must have the model and length of `corpus`."""
    from itertools import islice

    import numpy as np

    from qembed.search import corpus as corpora
    from qembed.search.query import family

    queries = corpora.read(path)
    if queries.dimensions != corpus.dimensions:
        raise BadInput(f"--queries {path}: {queries.dimensions} dimensions, {corpus.path} has {corpus.dimensions}")
    if queries.model and corpus.model and family(queries.model) != family(corpus.model):
        raise BadInput(f"--queries {path}: vectors of {queries.model}, {corpus.path} has those of {corpus.model}")
    count = min(queries.rows, 1000)
    return np.concatenate(list(islice(corpora.vectors(queries), count)))[:count]


def _print(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from qembed.search import report
    from qembed.search.nearest import WIDTH
    from qembed.text.display import counted

    console = Console()
    size = f"{counted(result['rows'], 'vector')} of {counted(result['dimensions'], 'dimension')}"
    heading = f"{result['index']}: {size}, {result['kind']}"
    console.print(f"{escape(heading)}, {result['bytes'] / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    if result["recall"]:
        table = Table(box=None, pad_edge=False)
        for name in (WIDTH[result["kind"]], *report.COLUMNS):
            table.add_column(name, justify="right")
        for point in result["recall"]["points"]:
            style = "bold" if point["width"] == result["recall"]["chosen"] else None
            table.add_row(str(point["width"]), *report.cells(point), style=style)
        console.print(table)
    console.print(escape(report.words(result)), highlight=False, soft_wrap=True)
