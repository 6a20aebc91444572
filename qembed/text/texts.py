"""A text with what decides how a model reads it: its kind and its instruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qembed.text.prompts import instruct

KINDS = ("query", "document", "code")


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        id: names the text in results and messages.
        text: without any prompt.
        kind: one of KINDS; decides which prompt it gets.
        language: a language code, if known.
        instruction: the task of a query, in place of the checkpoint's prompt for queries.
    """

    id: str
    text: str
    kind: str = "document"
    language: str | None = None
    instruction: str | None = None

    def prompted(self, prompts: Mapping[str, str]) -> str:
        """The text as the model reads it, with `prompts` by name: a query's own instruction comes before the prompt "query"."""
        if self.kind != "query":
            return prompts.get("document", "") + self.text
        if self.instruction is not None:
            return instruct(self.instruction) + self.text
        return prompts.get("query", "") + self.text
