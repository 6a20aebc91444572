"""What can go wrong, as the user sees it: one line, and an exit code that scripts can rely on."""

from __future__ import annotations


class QembedError(Exception):
    """Something failed that was not the input's fault. The message is one line: what, where, what to do."""

    exit_code = 1


class BadInput(QembedError):
    """What the user gave cannot be used. Nothing was written."""

    exit_code = 2


class MissingExtra(QembedError):
    """A command needs a package that is not installed. The message names the extra that brings it."""

    exit_code = 3


class Interrupted(QembedError):
    """Ctrl-C or the like ended it. The message says what is left and how to go on."""

    exit_code = 130
