"""What is read: rows, in their order, each with its text or with the reason why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        place: where it stands, for messages: "FILE, line 3".
        id: what the user calls it; else its line or row, after the file's name if there are several files.
        text: the text; None if the row is a whole document, or has no text.
        reason: why it cannot be embedded; None if it can.
        columns: the values to be kept, by name.
        document: the bytes of a document that is still to be read by a reader of its `kind` (".pdf").
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
        """What tells this row from another in its place, when a run goes on and reads it again."""
        said = f"{self.id}\0{self.text}\0{self.reason}\0".encode(errors="surrogatepass")
        return said if self.document is None else said + self.document


@dataclass(frozen=True)
class Reject:
    """A row, or a chunk of one, that has no vector."""

    place: str
    id: str
    reason: str
    text: str | None = None

    SHOWN: ClassVar[int] = 200

    @property
    def record(self) -> dict[str, Any]:
        """As it stands in the rejects file: its text is there only as far as it helps to find it."""
        shown = None if self.text is None else self.text[: self.SHOWN].encode("utf-8", "replace").decode()
        return {"id": self.id, "place": self.place, "reason": self.reason, "text": shown}
