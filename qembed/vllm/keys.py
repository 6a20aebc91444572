"""The API keys that a running server accepts: those at its start, or those of the key file after a change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qembed.errors import BadInput
from qembed.text.display import counted
from qembed.vllm import api_keys


class KeysInForce:
    """Keys that are read again when their file changes, and once in any case: the server was started with what it held earlier.

    Attributes:
        names: the name of each key.
        expired: set to have the file read even if it seems unchanged.
    """

    def __init__(self, names: Mapping[str, str], file: Path | None) -> None:
        self.names = names
        self.expired = False
        self._file = None if file is None else api_keys.KeyFile(file)

    def renewed(self, warn: Callable[[str], None]) -> bool:
        """Read the file again if it has changed; whether other keys are in force. A file that is invalid changes nothing."""
        if self._file is None or not (self._file.changed() or self.expired):
            return False
        before, on_demand, self.expired = self.names, self.expired, False
        try:
            self.names = api_keys.named(self._file.path, {})
        except BadInput as error:
            warn(f"{error}; the keys from before stay in force")
            return False
        if self.names == before and not on_demand:
            return False
        warn(f"{self._file.path}: read again, {counted(len(self.names), 'key')} in force")
        return True
