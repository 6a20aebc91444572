"""What a model reads of a text, the same in every command: cleaned, behind the prompt of its kind.

Documents take the model's default prompt (default_prompt_name), if it has one, as the server gives it to a request asking for
none. A checkpoint's prompt "document" is used where the user names it (`qembed embed --prompt document`,
`"prompt_name": "document"`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qembed.text.cleaning import clean
from qembed.text.prompts import instruct

KINDS = ("query", "document", "code")


def model_input(text: str, prompt: str = "", *, cleaned: bool = True) -> str:
    """`text` as the model reads it: behind `prompt`, and cleaned (`qembed.text.cleaning`) unless the user wants it as it is."""
    return prompt + (clean(text) if cleaned else text)


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

    def model_input(self, prompts: Mapping[str, str], default: str = "") -> str:
        """The text as the model reads it, with `prompts` by name and the `default` prompt of what is no query.

        A query's own instruction goes before the prompt "query".
        """
        if self.kind != "query":
            return model_input(self.text, default)
        if self.instruction is not None:
            return model_input(self.text, instruct(clean(self.instruction)))
        return model_input(self.text, prompts.get("query", ""))
