"""Turns rows into windows of texts as the model reads them: chunked, cleaned, prompted, and counted in tokens.

A window is the unit that is sorted by length, computed and written. Window borders depend on the rows alone, so a resumed run
has the same windows as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qembed.embed import documents
from qembed.embed.documents import Document
from qembed.embed.rows import Reject, Row
from qembed.errors import BadInput
from qembed.text.chunking import Span, chunks
from qembed.text.cleaning import has_surrogate
from qembed.text.rows.values import storable
from qembed.text.texts import model_input

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ROWS = 4096
"""Maximum texts of a window."""
TOKENS = 2**20
"""Tokens after which a window ends; without a tokenizer, a quarter of the bytes count as tokens."""
CHARACTERS = 2**23
"""Characters after which a window ends, including kept columns."""
BATCH_TEXTS = 256
BATCH_CHARACTERS = 2**20
"""Maximum texts and characters per call of the tokenizer."""
CHARACTERS_PER_TOKEN = 32
"""Characters per token of the limit that are tokenized to see that a text is too long; the rest is not read."""
LONGEST_TOKEN = 256
"""Upper bound on the characters of a token; the longest tokens are white space."""


@dataclass(frozen=True)
class Texts:
    """How rows become texts.

    Attributes:
        tokenizer: counts tokens; None if only a server has one.
        limit: tokens per text, including those that the model appends; None if only a server knows.
        prompt: goes before each text.
        cleaned: whether texts are cleaned like on the server.
        truncate: whether texts that are too long are cut at the end.
        chunk_tokens, overlap: maximum tokens of a chunk, and of what two chunks share; None: rows are not split.
        keep_text: whether the text of each row or chunk, as in the input but without NUL, is among the columns.
        rows: maximum texts per window.
        table_rows: rows of the model's token table; a text with a token beyond them is rejected. None: no token is beyond.
    """

    tokenizer: Tokenizer | None = None
    limit: int | None = None
    prompt: str = ""
    cleaned: bool = True
    truncate: bool = False
    chunk_tokens: int | None = None
    overlap: int = 0
    keep_text: bool = False
    rows: int = ROWS
    table_rows: int | None = None

    @cached_property
    def cutting(self) -> Tokenizer:
        """The tokenizer that truncates at the limit and still appends the model's own tokens."""
        from tokenizers import Tokenizer

        assert self.tokenizer is not None
        assert self.limit is not None
        other = Tokenizer.from_str(self.tokenizer.to_str())
        other.enable_truncation(self.limit)
        return other

    def count(self, texts: Sequence[str]) -> list[int]:
        """Token counts of `texts` including appended tokens, without the prompt."""
        assert self.tokenizer is not None
        inputs = [model_input(text, cleaned=self.cleaned) for text in texts]
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch_fast(inputs)]


@dataclass(frozen=True, slots=True)
class Item:
    """A text to embed: a row, or a chunk of one.

    `text` includes the prompt; `tokens` are its ids if there is a tokenizer; `length` is the sort key.
    """

    id: str
    place: str
    text: str
    length: int
    tokens: array[int] | None
    columns: dict[str, Any]


@dataclass(frozen=True)
class Position:
    """Progress in the input: complete rows, and chunks of the row after them; `digest` covers the complete rows."""

    rows: int = 0
    chunks: int = 0
    digest: str = hashlib.sha256().hexdigest()


@dataclass
class Window:
    """Texts that are computed together, and rows between them without a vector. `end` is where the next window starts.

    `tokens` and `size` (characters, including kept columns) are totals over its texts. `share_read` is the share of the
    input read so far, from 0 to 1.
    """

    number: int
    items: list[Item] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    tokens: int = 0
    size: int = 0
    end: Position = field(default_factory=Position)
    share_read: float = 0.0


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A text of `row` before cleaning and counting; `last`: the last of its row; `reason`: why it will not be embedded."""

    row: Row
    id: str
    text: str
    columns: dict[str, Any]
    last: bool
    reason: str | None = None


def windows(rows: Iterator[Row], texts: Texts, begin: Position, number: int) -> Iterator[Window]:
    """The windows of `rows` from `begin` on, the first numbered `number`. Rows before `begin` are read and compared.

    Raises:
        BadInput: these are not the rows that the run started with.
    """
    digest = hashlib.sha256()
    for _ in range(begin.rows):
        row = next(rows, None)
        if row is None:
            break
        digest.update(row.identity)
    if digest.hexdigest() != begin.digest:
        raise BadInput(
            f"the first {begin.rows} rows are not those of the interrupted run: the input has changed; give the same "
            "input, or --force to start over"
        )
    complete, part = begin.rows, begin.chunks
    window = Window(number)
    for candidate, outcome in _outcomes(_candidates(rows, texts, part), texts):
        if isinstance(outcome, Item):
            window.items.append(outcome)
            window.tokens += outcome.length
            window.size += len(outcome.text) + sum(len(value) for value in outcome.columns.values() if isinstance(value, str))
        else:
            window.rejects.append(outcome)
        part += 1
        if candidate.last:
            digest.update(candidate.row.identity)
            complete, part = complete + 1, 0
        if len(window.items) + len(window.rejects) >= texts.rows or window.tokens >= TOKENS or window.size >= CHARACTERS:
            window.end = Position(complete, part, digest.hexdigest())
            yield window
            window = Window(window.number + 1)
    if window.items or window.rejects:
        window.end = Position(complete, part, digest.hexdigest())
        yield window


def _candidates(rows: Iterable[Row], texts: Texts, skip: int) -> Iterator[_Candidate]:
    """The texts of each row; of the first row, all but the first `skip`."""
    for row in rows:
        document, reason = _text_of(row)
        columns = dict(row.columns)
        if texts.chunk_tokens is None:
            if texts.keep_text:
                columns["text"] = storable(row.text if document is None else document.text)
            yield _Candidate(row, row.id, "" if document is None else document.text, columns, True, reason)
        elif document is None or not document.text.strip():
            yield _Candidate(row, row.id, "", columns, True, reason)
        else:
            yield from _chunked(row, document, texts, columns, skip)
        skip = 0


def _text_of(row: Row) -> tuple[Document | None, str | None]:
    if row.reason is not None:
        return (None if row.text is None else Document(row.text)), row.reason
    if row.document is None:
        assert row.text is not None
        return Document(row.text), None
    try:
        return documents.read(row.document, row.kind), None
    except documents.NotReadable as error:
        return None, str(error)


def _chunked(row: Row, document: Document, texts: Texts, columns: dict[str, Any], skip: int) -> Iterator[_Candidate]:
    if row.reason is not None:
        yield _Candidate(row, row.id, document.text, columns, True, row.reason)
        return
    assert texts.chunk_tokens is not None

    def candidate(number: int, span: Span, last: bool) -> _Candidate:
        position = {"start": span.start, "end": span.end, "page": document.page(span.start)}
        text = document.text[span.start : span.end]
        text_column = {"text": storable(text)} if texts.keep_text else {}
        return _Candidate(row, f"{row.id}#{number}", text, {**columns, **position, **text_column}, last)

    previous: Span | None = None
    number = -1
    for number, span in enumerate(chunks(document.text, texts.chunk_tokens, texts.overlap, texts.count)):
        if previous is not None and number > skip:
            yield candidate(number - 1, previous, False)
        previous = span
    if previous is not None:
        yield candidate(number, previous, True)


def _outcomes(candidates: Iterable[_Candidate], texts: Texts) -> Iterator[tuple[_Candidate, Item | Reject]]:
    """Each candidate with its item or reject, in order. Texts are tokenized in batches."""
    batch: list[_Candidate] = []
    characters = 0
    for candidate in candidates:
        batch.append(candidate)
        characters += len(candidate.text)
        if len(batch) == BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            yield from _batch_outcomes(batch, texts)
            batch, characters = [], 0
    yield from _batch_outcomes(batch, texts)


def _batch_outcomes(candidates: Sequence[_Candidate], texts: Texts) -> Iterator[tuple[_Candidate, Item | Reject]]:
    model_inputs = [
        model_input(candidate.text, texts.prompt, cleaned=texts.cleaned) if candidate.reason is None else texts.prompt
        for candidate in candidates
    ]
    cleaned = [text[len(texts.prompt) :] for text in model_inputs]
    reasons = [candidate.reason or _unusable(candidate.text, text) for candidate, text in zip(candidates, cleaned, strict=True)]
    encoding_by_index: dict[int, Encoding] = {}
    if texts.tokenizer is not None:
        accepted = [index for index, reason in enumerate(reasons) if reason is None]
        tokenizer, characters = texts.tokenizer, None if texts.limit is None else CHARACTERS_PER_TOKEN * texts.limit
        if texts.truncate and texts.limit is not None:
            tokenizer, characters = texts.cutting, LONGEST_TOKEN * texts.limit
        encodings = tokenizer.encode_batch_fast([model_inputs[index][:characters] for index in accepted])
        if texts.truncate:
            model_inputs = [text[:characters] for text in model_inputs]
        encoding_by_index = dict(zip(accepted, encodings, strict=True))
    for index, (candidate, text, reason) in enumerate(zip(candidates, model_inputs, reasons, strict=True)):
        encoding = encoding_by_index.get(index)
        if reason is None and encoding is not None and not texts.truncate:
            encoding, reason = _check_length(text, encoding, texts)
        if reason is None and encoding is not None:
            reason = _unknown_token(encoding, texts)
        if reason is not None:
            yield candidate, Reject(candidate.row.place, candidate.id, reason, candidate.text[: Reject.SHOWN] or None)
        elif encoding is None:
            yield candidate, Item(candidate.id, candidate.row.place, text, -(-len(text.encode()) // 4), None, candidate.columns)
        else:
            yield (
                candidate,
                Item(candidate.id, candidate.row.place, text, len(encoding.ids), array("i", encoding.ids), candidate.columns),
            )


def _unusable(text: str, cleaned: str) -> str | None:
    if has_surrogate(text):
        return "holds half of a surrogate pair, which is not a character"
    if cleaned.strip():
        return None
    return "empty" if not text.strip() else "empty after invisible characters are removed"


def _unknown_token(encoding: Encoding, texts: Texts) -> str | None:
    """The reason if a text has a token beyond the model's token table, which would crash the engine."""
    if texts.table_rows is None or max(encoding.ids, default=0) < texts.table_rows:
        return None
    assert texts.tokenizer is not None
    token = texts.tokenizer.id_to_token(max(encoding.ids))  # encode_batch_fast does not return the tokens' texts
    return f"has the token {token!r}, which is beyond the {texts.table_rows} rows of the model's token table"


def _check_length(text: str, encoding: Encoding, texts: Texts) -> tuple[Encoding, str | None]:
    """The tokens of a text of which a beginning has been tokenized, and the reason if there are too many."""
    if texts.limit is None:
        return encoding, None
    complete = len(text) <= CHARACTERS_PER_TOKEN * texts.limit
    if not complete and len(encoding.ids) <= texts.limit:
        assert texts.tokenizer is not None
        encoding, complete = texts.tokenizer.encode(text), True
    if len(encoding.ids) <= texts.limit:
        return encoding, None
    return encoding, (
        f"too long: {'' if complete else 'more than '}{len(encoding.ids)} tokens, the limit is {texts.limit}; cut it with "
        "--truncate, or into chunks with --chunk-tokens"
    )
