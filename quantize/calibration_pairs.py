"""Calibration of a reranker: pairs of a query and a document, in its own template.

The built-in pairs are queries in several languages, each with a relevant document, with one on the same subject that does not
answer it, and with others drawn from the built-in texts. A file of the user has the columns `query` and `document`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qembed.checkpoint.description import Checkpoint
from qembed.checkpoint.rerank_template import Template
from qembed.checkpoint.reranker import body, head
from qembed.checkpoint.vocabulary import panics
from qembed.errors import BadInput
from qembed.files import sha256
from qembed.quantize import calibration_texts
from qembed.quantize.calibration import SHORTEST, Calibration, shorten
from qembed.quantize.calibration_texts import SOURCE
from qembed.text.cleaning import clean
from qembed.text.rows.options import RowOptions
from qembed.text.rows.reader import DEFAULT, format_of
from qembed.text.texts import model_input

BUILT_IN = Path(__file__).parent / "data" / "pairs.jsonl"
QUERY, DOCUMENT = "query", "document"
"""Columns of a file; that of the documents can be named otherwise."""
UNRELATED = 4
"""Documents on other subjects for each built-in query: most of what a reranker gets in use is not relevant."""


@dataclass(frozen=True)
class Pair:
    """A query and a document; `id` names them in messages, `instruction` is the task in place of the model's default."""

    id: str
    query: str
    document: str
    instruction: str | None = None


@dataclass(frozen=True)
class Pairs:
    """Pairs, the name of their source ("built-in", or a file name), and the SHA-256 of what they come from."""

    pairs: list[Pair]
    source: str
    sha256: str

    def __len__(self) -> int:
        return len(self.pairs)


def built_in(count: int = calibration_texts.DEFAULT_COUNT, seed: int = 0) -> Pairs:
    """Draw `count` of the pairs that ship with qembed (all, if there are fewer), by `seed`."""
    others = [text.text for text in calibration_texts.built_in(10**6).texts if text.kind != QUERY]
    draw = random.Random(seed)
    pairs: list[Pair] = []
    for line in BUILT_IN.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        documents = [row["relevant"], row["negative"], *draw.sample(others, UNRELATED)]
        pairs += [Pair(row["id"], row["query"], document, row.get("instruction")) for document in documents]
    digest = hashlib.sha256(f"{sha256(BUILT_IN)} {sha256(calibration_texts.BUILT_IN)}".encode()).hexdigest()
    return Pairs(calibration_texts.sample(pairs, count, seed), SOURCE, digest)


def read(
    argument: str,
    count: int,
    seed: int,
    options: RowOptions = DEFAULT,
    on_note: Callable[[str], None] = lambda _: None,
) -> Pairs:
    """Draw `count` pairs (all, if there are fewer) by `seed` from the file that `argument` names as FILE or FILE:COLUMN.

    As `calibration_texts.read`, with a column `query`; COLUMN is that of the documents. The optional column `instruction` names
    a query's task.

    Raises:
        BadInput: the file cannot be read, has too few pairs, or has an invalid row (the message names its line).
        MissingExtra: the file is Parquet, and pyarrow is not installed.
    """
    path, column = calibration_texts.file_and_column(argument)
    pairs, digest = calibration_texts.drawn(path, _rows(path, column or DOCUMENT, options, on_note), count, seed, "pairs")
    return Pairs(pairs, path.name, digest)


def _rows(path: Path, column: str, options: RowOptions, on_note: Callable[[str], None]) -> Iterator[Pair]:
    format = format_of(path)  # noqa: A001
    options.check({format})
    if format == "txt":
        raise BadInput(f"{path}: plain text has no columns; a reranker is calibrated on the columns {QUERY} and {DOCUMENT}")
    wanted = {QUERY: "", "instruction": "", column: f"{path.name}:COLUMN"}
    for record in calibration_texts.valid_records(path, format, options, wanted, (QUERY, column), on_note):
        query, document, instruction = (
            calibration_texts.string_of(record.values, name, record.place) for name in (QUERY, column, "instruction")
        )
        for name, text in ((QUERY, query), (column, document)):
            if text is None or not text.strip():
                raise BadInput(f"{record.place}: no {name}; a reranker is calibrated on the columns {QUERY} and {DOCUMENT}")
        yield Pair(record.place, query or "", document or "", instruction or None)


def prepare(
    pairs: Pairs, checkpoint: Checkpoint, *, max_tokens: int, check: int, seed: int, token_budget: int | None = None
) -> Calibration:
    """Tokenize `pairs` in the template of the reranker `checkpoint`, each document cut so that a pair has `max_tokens` tokens.

    Both `max_tokens` and `token_budget` (see `calibration.prepare`) count instruction, query and document, without the
    template. The query is never cut. `check` pairs are held out, those of a query together, so that orders can be compared.

    Raises:
        BadInput: a text has only invisible characters, an id is outside the token table, or a query leaves no room.
    """
    reranker = checkpoint.reranker
    assert reranker is not None, f"{checkpoint.folder} is no reranker"
    template = Template(checkpoint.tokenizer(), reranker.trunk.context)
    for pair in pairs.pairs:
        if not (clean(pair.query).strip() and clean(pair.document).strip()):
            raise BadInput(f"{pair.id}: a text is empty once invisible characters are removed")
    texts = [(model_input(pair.query), model_input(pair.document), pair.instruction) for pair in pairs.pairs]
    with panics(str(checkpoint.folder)):
        heads = template.encode([head(query, instruction) for query, _, instruction in texts])
        bodies = template.encode([body(*text) for text in texts])
    rows, documents, cut = checkpoint.config["vocab_size"], [], 0
    for pair, first, ids in zip(pairs.pairs, heads, bodies, strict=True):
        if (largest := max(ids)) >= rows:
            raise BadInput(f"{checkpoint.folder}: the tokenizer gives id {largest}, the token table has {rows} rows")
        if len(first) >= template.room:
            raise BadInput(f"{pair.id}: the query leaves no room for a document: a pair may have {template.room} tokens")
        length = min(template.room, max(max_tokens, len(first) + SHORTEST))
        cut += len(ids) > length
        documents.append(ids[len(first) : length])
    held_out = _held_out(pairs.pairs, check, seed)
    whole = documents
    if token_budget is not None:
        seen = [number for number in range(len(documents)) if number not in held_out]
        documents = shorten(documents, seen, token_budget - sum(len(heads[number]) for number in seen))
    numbers: dict[tuple[str, str | None], int] = {}
    return Calibration(
        [template.prompt(ids[: len(first)] + document) for first, ids, document in zip(heads, bodies, documents, strict=True)],
        held_out,
        pairs.source,
        pairs.sha256,
        cut,
        max_tokens,
        seed,
        sum(len(document) != len(longer) for document, longer in zip(documents, whole, strict=True)),
        tuple(numbers.setdefault((pair.query, pair.instruction), len(numbers)) for pair in pairs.pairs),
    )


def _held_out(pairs: Sequence[Pair], check: int, seed: int) -> frozenset[int]:
    """The numbers of `check` pairs, query by query in an order drawn by `seed`."""
    by_query: dict[tuple[str, str | None], list[int]] = {}
    for number, pair in enumerate(pairs):
        by_query.setdefault((pair.query, pair.instruction), []).append(number)
    queries = list(by_query)
    random.Random(seed).shuffle(queries)
    return frozenset([number for query in queries for number in by_query[query]][:check])
