"""Commands whose `--help` groups options under headings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from qembed.command.completion import model_names

MODEL_OPTIONS = frozenset({"--model", "--baseline-model", "--rerank"})
FILES = ("FILE", "PATH")
"""Beginnings of metavars of options that take a file, perhaps with more in the same value (FILE:COLUMN)."""
Function = TypeVar("Function", bound=Callable[..., Any])


class Option(click.Option):
    """An option under the heading `section`, which shows its default unless its help does."""

    def __init__(self, *arguments: Any, section: str = "Other options", **settings: Any) -> None:
        settings.setdefault("show_default", "[default: " not in (settings.get("help") or ""))
        super().__init__(*arguments, **settings)
        self.section = section

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of the value: of models those that are here, and files wherever the metavar names one."""
        if MODEL_OPTIONS.intersection(self.opts):
            return [CompletionItem(name) for name in model_names(incomplete)]
        if isinstance(self.type, click.types.StringParamType) and (self.metavar or "").startswith(FILES):
            return [CompletionItem(incomplete, type="file")]
        return super().shell_complete(ctx, incomplete)


class SectionedCommand(click.Command):
    """A command whose options are grouped by heading, in the order in which headings first appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one table of options per heading; options without a heading come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        plain: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            # click 8.5 has a record for arguments, too; the usage line tells of them already.
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                rows = sections.setdefault(parameter.section, []) if isinstance(parameter, Option) else plain
                rows.append(record)
        for heading, rows in [*sections.items(), ("Other options", plain)]:
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def section(heading: str) -> Callable[..., Callable[[Function], Function]]:
    """`click.option` for options under `heading`."""

    def option(*names: str, **settings: Any) -> Callable[[Function], Function]:
        return click.option(*names, cls=Option, section=heading, **settings)

    return option
