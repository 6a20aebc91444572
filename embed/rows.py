"""Rows of the input in order, each with its text or the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        place: its location for messages: "FILE, line 3".
        id: its id, or line or row number, after the file's name if there are several files.
        text: None if the row is a whole document, or has no text.
        reason: why it cannot be embedded; None if it can.
        columns: kept values by name.
        document: bytes of a document that a reader of `kind` (".pdf") has still to parse.
    """

    place: str
    id: str
    text: str | None = None
    reason: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    document: bytes | None = field(default=None, repr=False)
    kind: str = ""

    @property
    def identity(self) -> bytes:
        """What distinguishes this row when a resumed run reads it again."""
        text = f"{self.id}\0{self.text}\0{self.reason}\0".encode(errors="surrogatepass")
        return text if self.document is None else text + self.document


@dataclass(frozen=True)
class Reject:
    """A row, or a chunk of one, without a vector."""

    place: str
    id: str
    reason: str
    text: str | None = None

    SHOWN: ClassVar[int] = 200

    @property
    def record(self) -> dict[str, Any]:
        """The entry in the rejects file; the text is shortened to what helps to find it."""
        text = None if self.text is None else self.text[: self.SHOWN].encode("utf-8", "replace").decode()
        return {"id": self.id, "place": self.place, "reason": self.reason, "text": text}
