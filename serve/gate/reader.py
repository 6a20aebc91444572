"""Reads the bodies of requests without holding up others: small ones at once, larger ones in a thread, large ones elsewhere.

Parsing and cleaning hold Python's interpreter lock. So bodies of more than PROCESS_BYTES go to a process of its own, one after
the other. It starts at the first such body, ends after IDLE seconds without one, or when this process ends, and is the first
that the system kills when memory runs out.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from qembed.checkpoint.find import find
from qembed.serve.gate import request, rerank_request
from qembed.serve.gate.asgi import maybe_threaded
from qembed.serve.gate.errors import Refused
from qembed.serve.gate.long_texts import Count
from qembed.serve.gate.request import Batch, TokenBeyond
from qembed.serve.gate.rerank_prompts import Prompts
from qembed.serve.gate.rerank_request import PROMPT_BYTES, Pairs
from qembed.vllm import gate_rules
from qembed.vllm.gate_rules import Rules

PROCESS_BYTES = 2**17
"""A thread that reads so many bytes of the worst kind holds the lock for a tenth of a second."""
SECONDS = 60.0
"""How long one body may take. The slowest 32 MiB, of combining marks, take a third of that on a slow machine."""
IDLE = 60.0  # seconds
NICENESS = 5
TOKENIZER = "tokenizer.json"
LENGTH = struct.Struct("<Q")


class Reader:
    """Reads bodies by `rules`. The tokenizer's file is opened here, so that the folder may be moved afterwards."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = asyncio.Lock()
        self._token_beyond = find(rules.folder).vocabulary().token_beyond if rules.checks_ids else None
        path = Path(rules.folder, TOKENIZER)
        self._file = path.open("rb") if rules.folder and path.exists() else None
        load = loader(None if self._file is None else self._file.fileno())
        self._count = counter(load)
        self._prompts = Prompts(rules, load)

    async def read(self, raw: bytes, path: str = "", reserve: Callable[[int], object] = int) -> Batch:
        """The batch of the body `raw` of a request to `path`; `reserve` is called before more memory is taken.

        Raises:
            Refused: 400, it is invalid, or takes longer than SECONDS; 404, it names no model; 503, it could not be read.
        """
        batch = await self._parsed(raw, path)
        if not isinstance(batch, Pairs):
            return batch
        reserve(PROMPT_BYTES * batch.characters)
        return await maybe_threaded(batch.characters, self._prompts.put, batch)

    async def _parsed(self, raw: bytes, path: str) -> Batch:
        if len(raw) <= PROCESS_BYTES:
            return await maybe_threaded(len(raw), read, raw, path, self._rules, self._count, self._token_beyond)
        async with self._lock:
            given_up = threading.Event()
            reading = asyncio.ensure_future(asyncio.to_thread(self._ask, path.encode() + b"\n" + raw, given_up))
            try:
                batch = await asyncio.wait_for(asyncio.shield(reading), SECONDS)
            except (TimeoutError, asyncio.CancelledError) as error:
                given_up.set()
                self._end()
                with contextlib.suppress(Refused):
                    await reading
                if not isinstance(error, TimeoutError):
                    raise
                raise Refused(400, f"the request takes longer than {SECONDS:g} s to read; send less at once", "slow") from None
        if self._token_beyond is not None and not isinstance(batch, Pairs):
            await asyncio.to_thread(request.check_tokens, batch.inputs, self._token_beyond)
        return batch

    def _ask(self, raw: bytes, given_up: threading.Event) -> Batch:
        for _ in range(2):  # it may have ended just now, because it was idle
            if given_up.is_set():
                break
            with contextlib.suppress(OSError, EOFError):
                process = self._started()
                assert process.stdin is not None
                assert process.stdout is not None
                _write(process.stdin, raw)
                result = pickle.loads(_read(process.stdout))
                if isinstance(result, Batch):
                    return result
                raise Refused(*result)
            self._end()
        raise Refused(503, "the request could not be read: too little memory", "memory", None, {"retry-after": "10"})

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(-1 if self._file is None else self._file.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=() if self._file is None else (self._file.fileno(),),
            )
            assert self._process.stdin is not None
            _write(self._process.stdin, replace(self._rules, keys={}).dump())
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def read(raw: bytes, path: str, rules: Rules, count: Count, token_beyond: TokenBeyond | None = None) -> Batch:
    """The batch of the body `raw` of a request to `path`; pairs have no prompts yet.

    Raises:
        Refused: as `request.read` and `rerank_request.read`.
    """
    if rules.instruction is not None:
        return rerank_request.read(raw, rules, path)
    return request.read(raw, rules, count, token_beyond)


def loader(descriptor: int | None) -> Callable[[], Any]:
    """A function that returns the tokenizer in the open file `descriptor`, read when first needed."""

    @functools.cache
    def tokenizer() -> Any:
        from tokenizers import Tokenizer

        assert descriptor is not None, "no tokenizer"
        tokenizer = Tokenizer.from_buffer(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    return tokenizer


def counter(tokenizer: Callable[[], Any]) -> Count:
    """A function that counts the tokens of a text with what `tokenizer` returns."""
    return lambda text: len(tokenizer().encode(text).ids)


def main(descriptor: int) -> None:
    """Answer with a batch, or the arguments of a `Refused`, to each body on standard input until it closes."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    bodies, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # other output must not mix with the answers
    count = counter(loader(None if descriptor < 0 else descriptor))
    with contextlib.suppress(EOFError, BrokenPipeError):
        rules = gate_rules.load(_read(bodies))
        while select.select([bodies], [], [], IDLE)[0]:
            path, _, raw = _read(bodies).partition(b"\n")
            try:
                result: Any = read(raw, path.decode(), rules, count)
            except Refused as refused:
                result = (refused.status, refused.message, refused.reason, refused.param, refused.headers)
            del raw
            _write(answers, pickle.dumps(result, pickle.HIGHEST_PROTOCOL))
            del result


def _write(file: IO[bytes], content: bytes) -> None:
    file.write(LENGTH.pack(len(content)))
    file.write(content)
    file.flush()


def _read(file: IO[bytes]) -> bytes:
    size = file.read(LENGTH.size)
    content = file.read(LENGTH.unpack(size)[0]) if len(size) == LENGTH.size else b""
    if len(size) < LENGTH.size or len(content) < LENGTH.unpack(size)[0]:
        raise EOFError
    return content


if __name__ == "__main__":
    main(int(sys.argv[1]))
