"""Finds texts that end the engine, so that none of them keeps a job from finishing.

The engine computes in the command's own process: a native crash ends the command, and a resumed run reaches the same batch.
So a file says which batch is in the engine (without fsync: it must survive the process, not the machine). A run that finds a
batch there counts a crash:

- No crash: the batch is computed together.
- One crash: each text is first computed alone, and rejected if that is the second crash. Then the others are computed together,
  because a vector's last bits depend on its batch: if it was SIGKILL that ended the run, the output is still byte-identical.
- Two crashes together, although no text crashes alone: each text's vector is the one computed alone.

If the engine raises an error and still works, the texts are computed alone in the same run. If it no longer works, the error
ends the run and counts as a crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qembed.embed.engine import Engine, EngineFailed
from qembed.embed.spool import Result
from qembed.embed.windows import Item
from qembed.errors import QembedError
from qembed.text.display import counted

FILE = "in-engine.json"
CRASHED = "the engine ended twice while it computed this text"
MAX_CRASHES = 2

BatchKey = tuple[int, int]
"""A window's number, and the number of a batch in it."""


@dataclass
class Suspect:
    """A batch that ended the engine: its crashes as a whole, and the reasons for rejected texts by their index."""

    crashes: int = 0
    rejected: dict[int, str] = field(default_factory=dict)


class Suspects:
    """The batch in the engine and the suspect batches, in the file `path`. `on_note` gets a line for the user."""

    def __init__(self, path: Path, on_note: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._on_note = path, on_note
        state = _read(path)
        self._batches = {
            (window, batch): Suspect(crashes, {int(place): reason for place, reason in rejected.items()})
            for window, batch, crashes, rejected in state.get("suspects", ())
        }
        if state.get("in_engine"):
            window, batch, place = state["in_engine"]
            suspect = self._batches.setdefault((window, batch), Suspect())
            if place is None:
                suspect.crashes += 1
            else:
                suspect.rejected[place] = CRASHED

    def __contains__(self, key: BatchKey) -> bool:
        """Whether the batch has ended the engine. Its result must be on disk before the next batch is computed."""
        return key in self._batches

    def embed(self, engine: Engine, window: int, batches: Mapping[int, Sequence[Item]]) -> Iterator[tuple[int, Result]]:
        """As `engine.embed`, for batches of one window.

        Raises:
            QembedError: the engine failed and no longer works.
        """
        for number, items in batches.items():
            yield number, self._result(engine, (window, number), items)

    def _result(self, engine: Engine, key: BatchKey, items: Sequence[Item]) -> Result:
        if key not in self._batches:
            try:
                return self._compute(engine, key, None, items)
            except EngineFailed:
                self._batches[key] = Suspect(MAX_CRASHES)
        suspect = self._batches[key]
        self._on_note(
            f"the engine failed on a batch of {counted(len(items), 'text')}: each is computed alone, to find the cause"
        )
        if suspect.crashes < MAX_CRASHES:
            self._alone(engine, key, items, max(suspect.rejected, default=-1) + 1)  # those before it have not crashed
            try:
                return self._together(engine, key, items)
            except EngineFailed:
                suspect.crashes = MAX_CRASHES
        return self._alone(engine, key, items, 0)

    def _alone(self, engine: Engine, key: BatchKey, items: Sequence[Item], begin: int) -> Result:
        """The vectors of the texts from `begin` on, computed one at a time; texts that the engine fails on are rejected."""
        rejected = self._batches[key].rejected
        vectors, reasons = _no_vectors(engine, len(items)), {}
        for place in range(begin, len(items)):
            if place not in rejected:
                try:
                    single, own_reasons = self._compute(engine, key, place, [items[place]])
                except EngineFailed as error:
                    rejected[place] = str(error)
                    continue
                vectors[place] = single[0]
                reasons.update(dict.fromkeys([place], own_reasons[0]) if own_reasons else {})
        return vectors, reasons | rejected

    def _together(self, engine: Engine, key: BatchKey, items: Sequence[Item]) -> Result:
        """The vectors of all texts that are not rejected."""
        rejected = self._batches[key].rejected
        places = [place for place in range(len(items)) if place not in rejected]
        vectors, reasons = _no_vectors(engine, len(items)), dict(rejected)
        if places:
            vectors[places], own_reasons = self._compute(engine, key, None, [items[place] for place in places])
            reasons |= {places[index]: reason for index, reason in own_reasons.items()}
        return vectors, reasons

    def _compute(self, engine: Engine, key: BatchKey, place: int | None, items: Sequence[Item]) -> Result:
        """The vectors of `items`, which the file says to be in the engine meanwhile; `place`: the index of a single one.

        Raises:
            EngineFailed: the engine failed, and still works.
            QembedError: the engine failed, and no longer works.
        """
        self._write((*key, place))
        works = True
        try:
            ((_, result),) = engine.embed({key[1]: items})
        except EngineFailed as error:
            works = _works(engine, items[0])
            if not works:
                raise QembedError(f"{error}; the same command resumes, and finds the text that is the cause") from error
            raise
        finally:
            if works:
                self._write(None)
        return result

    def _write(self, in_engine: tuple[int, int, int | None] | None) -> None:
        suspects = [[*key, suspect.crashes, suspect.rejected] for key, suspect in self._batches.items()]
        self._path.write_text(json.dumps({"in_engine": in_engine, "suspects": suspects}), encoding="utf-8")


def has_record(path: Path) -> bool:
    """Whether the file `path` has anything that the next run must know."""
    return any(_read(path).values())


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or the process was killed as it wrote it
        return {}
    return state if isinstance(state, dict) else {}


def _works(engine: Engine, item: Item) -> bool:
    """Whether the engine still computes: the last token of a text, which the model itself appends."""
    tokens = None if item.tokens is None else item.tokens[-1:]
    try:
        list(engine.embed({0: [Item("", "", "", 1, tokens, {})]}))
    except EngineFailed:
        return False
    return True


def _no_vectors(engine: Engine, count: int) -> Any:
    import numpy as np

    return np.zeros((count, engine.dimensions), np.float32)
