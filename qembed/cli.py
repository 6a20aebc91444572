"""The `qembed` command. Each sub-command is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from typing import Any

import click

from qembed.command import failures
from qembed.installation import version
from qembed.text import strict_json

AS_JSON = "qembed.as_json"
"""Key of the context's `meta`: whether the command line has --json."""

COMMANDS = {
    "quantize": ("qembed.quantize.cli", "Turn an FP16 checkpoint into an AWQ INT4 one."),
    "serve": ("qembed.serve.cli", "Serve a checkpoint through vLLM behind the OpenAI embeddings API."),
    "top": ("qembed.serve.top", "Watch a running server: memory, requests, speed, latencies."),
    "index": ("qembed.search.index_cli", "Put vectors into a FAISS index, and measure what it misses."),
    "search": ("qembed.search.cli", "Ask an index for what is nearest to a text."),
    "embed": ("qembed.embed.cli", "Turn texts into vectors, from a file to a file."),
    "eval": ("qembed.eval.cli", "Measure what INT4 costs against FP16."),
    "doctor": ("qembed.serve.doctor", "Tell what this machine can do, and what is missing."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command runs, and prints a QembedError as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names of all commands, without importing any."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the module of `cmd_name` and return its command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command named by `args`; an unknown name gets the nearest one as a suggestion."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no such command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands in `--help`, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in COMMANDS.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the options before the command; remembers whether errors are to be JSON."""
        as_json = failures.wants_json(args)
        try:
            context = super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            sys.exit(failures.report(error, as_json=as_json))
        context.meta[AS_JSON] = as_json
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error is printed as one line, with --json as an object too, and becomes the exit code."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            is_expected = isinstance(error, click.ClickException | click.Abort | KeyboardInterrupt)
            if ctx.params.get("debug") and not is_expected:
                raise
            exit_code = failures.report(error, as_json=ctx.meta[AS_JSON])
            if exit_code is None:
                raise
            ctx.exit(exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback where something fails.")
@click.version_option(version(), prog_name="qembed")
def group(debug: bool) -> None:
    """Run embedding models in a fraction of the memory: quantize to AWQ INT4, serve through vLLM, measure the loss.

    \b
    qembed quantize                Qwen/Qwen3-Embedding-0.6B →
                                   ./Qwen3-Embedding-0.6B-AWQ-INT4
    qembed serve --int4            serves that folder on 127.0.0.1:8000
    qembed embed TEXTS -o OUT      texts to vectors, file to file
    qembed eval --baseline fp16    compares that folder with its source

    \b
    Exit codes: 0 done, 1 failed or a threshold was missed, 2 bad input,
    3 a package is missing, 4 done, but rows were rejected (embed),
    5 too few texts to tell whether --max-task-drop is met (eval).
    Shell completion: eval "$(_QEMBED_COMPLETE=bash_source qembed)", or
    zsh_source, fish_source.
    """  # noqa: D301 - click wants the real backspace character


def main() -> None:
    """Entry point of the `qembed` script."""
    if sys.stdin is None:  # closed by whoever started qembed: an empty input
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without "±" is no reason to show nothing
        sys.stdout.reconfigure(errors=strict_json.ESCAPED if failures.wants_json(sys.argv) else "replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors=strict_json.ESCAPED)
    try:
        group.main(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
