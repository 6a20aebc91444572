"""Further names of a served model, one for each prompt: for programs that can set a model's name, but no prompt."""

from __future__ import annotations

from qembed.vllm.settings import ServerSettings

LONGEST = 128
"""Characters of a prompt's name that becomes part of a model's."""


def prompt_models(settings: ServerSettings) -> dict[str, str]:
    """The prompt's name for each further name of the model, such as NAME-query; empty with --no-prompt-names.

    A reranker has none: its template takes an instruction instead.
    A prompt whose name is empty, long or not printable has none: it could not be typed, or be an argument of a command.
    """
    if not settings.prompt_names or settings.checkpoint.reranker is not None:
        return {}
    prompts = settings.checkpoint.prompts
    return {f"{settings.name}-{name}": name for name in prompts if 0 < len(name) <= LONGEST and name.isprintable()}
