"""Errors as the user sees them: one line, and an exit code for scripts."""

from __future__ import annotations

import errno


class QembedError(Exception):
    """A failure that is not the input's fault. The message is one line: what, where, what to do."""

    exit_code = 1


class BadInput(QembedError):
    """The user's input cannot be used. Nothing was written."""

    exit_code = 2


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def unwritable(message: str, error: OSError) -> QembedError:
    """The error for an output that cannot be written: a full disk is no bad input, all else is. `message` gets the reason."""
    kind = QembedError if error.errno in NO_SPACE else BadInput
    return kind(f"{message}: {error.strerror or error}")


class MissingExtra(QembedError):
    """A package is missing. The message names the extra that installs it."""

    exit_code = 3


class Interrupted(QembedError):
    """Interrupted by a signal. The message says what is left and how to continue."""

    exit_code = 130
