"""Running servers as an engine: batches are spread over them, and retried elsewhere if one does not answer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from qembed.client import embeddings
from qembed.client.about import as_it_is, with_model_prompt
from qembed.embed.engine import NOT_FINITE, Engine, sorted_batches
from qembed.embed.spool import Result
from qembed.embed.windows import Item
from qembed.errors import BadInput, QembedError

if TYPE_CHECKING:
    import numpy as np
    import openai
    from numpy.typing import NDArray

BATCH = 64
BATCH_TOKENS = 16384
IN_FLIGHT = 2
"""Concurrent requests per server: the next one has arrived when the first is computed."""
PATIENCE = 600.0
"""Seconds without an answer from any server after which the run ends."""
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
TRIES = 3
"""Answers with status 500 to a batch, after which its texts are sent in ever smaller batches."""
PROBE = "qembed"
ZERO = "its vector is all zeros"


@dataclass
class Server:
    """A server, the fields that its requests have beside OpenAI's, and its number of consecutive failures."""

    url: str
    api: openai.OpenAI
    model: str
    fields: Mapping[str, Any]
    failures: int = 0
    since: float = 0.0


class Servers:
    """All servers as one engine. Only the servers decide which texts are too long."""

    in_process = False

    def __init__(self, servers: Sequence[Server], cut: int | None, truncate: bool, on_wait: Callable[[str], None]) -> None:
        self.servers, self.cut, self.truncate, self.on_wait = servers, cut, truncate, on_wait
        self._last_answer = time.monotonic()
        lengths = {server.url: len(_request(self, server, [PROBE])[0]) for server in servers}
        if len(set(lengths.values())) > 1:
            raise BadInput(f"the servers' vectors differ in length: {', '.join(f'{u} {n}' for u, n in lengths.items())}")
        self.dimensions = next(iter(lengths.values()))
        if cut is not None and self.dimensions != cut:
            raise BadInput(f"{servers[0].url}: its vectors have {self.dimensions} numbers, so it ignores --dimensions {cut}")

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """Longest first."""
        return sorted_batches(items, BATCH, BATCH_TOKENS)

    def embed(self, batches: Mapping[int, Sequence[Item]]) -> Iterator[tuple[int, Result]]:
        """Batches in the order in which any server answers them.

        Raises:
            BadInput: a server rejects more than single texts.
            QembedError: no server has answered for PATIENCE seconds.
        """
        requests: Queue[tuple[int, Sequence[Item], int]] = Queue()
        answers: Queue[tuple[int, Result] | BaseException] = Queue()
        for number, items in batches.items():
            requests.put((number, items, 0))
        stop = threading.Event()
        self._last_answer = time.monotonic()
        threads = [
            threading.Thread(target=self._work, args=(server, requests, answers, stop), daemon=True)
            for server in self.servers
            for _ in range(IN_FLIGHT)
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in batches:
                answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            stop.set()

    def _work(
        self,
        server: Server,
        requests: Queue[tuple[int, Sequence[Item], int]],
        answers: Queue[tuple[int, Result] | BaseException],
        stop: threading.Event,
    ) -> None:
        while not stop.is_set():
            try:
                number, items, failures = requests.get(timeout=0.1)
            except Empty:
                continue
            try:
                answers.put((number, self._result(server, items, failures >= TRIES)))
                server.failures, self._last_answer = 0, time.monotonic()
            except _Busy as busy:
                requests.put((number, items, failures + busy.failed))
                if time.monotonic() - self._last_answer > PATIENCE:
                    answers.put(QembedError(f"no server has answered for {PATIENCE:.0f} s; {server.url}: {busy}"))
                    return
                pause = max(busy.seconds, PAUSES[min(server.failures, len(PAUSES) - 1)])
                server.failures += 1
                self.on_wait(f"{server.url}: {busy}; next try in {pause:g} s")
                stop.wait(pause)
            except BaseException as error:  # noqa: BLE001 - re-raised by `embed`
                answers.put(error)
                return

    def _result(self, server: Server, items: Sequence[Item], last: bool) -> Result:
        """The vectors of `items`. A rejected batch is halved until the responsible texts are found.

        With `last` a server error (status 500) counts as a rejection.
        """
        import numpy as np

        try:
            vectors = _request(self, server, [item.text for item in items], last)
        except _Refused as error:
            if len(items) == 1:
                return np.zeros((1, self.dimensions), np.float32), {0: str(error)}
            half = len(items) // 2
            first, second = (self._result(server, part, last) for part in (items[:half], items[half:]))
            reasons = first[1] | {half + place: reason for place, reason in second[1].items()}
            return np.concatenate([first[0], second[0]]), reasons
        if vectors.shape[1] != self.dimensions:
            raise QembedError(f"{server.url}: vectors of {vectors.shape[1]} numbers, where it had {self.dimensions} before")
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        zero = np.flatnonzero(~vectors.any(axis=1))
        vectors[bad] = 0
        return vectors, {**dict.fromkeys(map(int, bad), NOT_FINITE), **dict.fromkeys(map(int, zero), ZERO)}


class _Busy(Exception):
    """The server does not answer now but may later. `seconds`: requested wait; `failed`: it tried and failed."""

    def __init__(self, reason: str, seconds: float = 0.0, failed: bool = False) -> None:
        super().__init__(reason)
        self.seconds, self.failed = seconds, failed


class _Refused(Exception):
    """The server answers, and rejects these texts."""


def _request(servers: Servers, server: Server, texts: list[str], last: bool = False) -> NDArray[np.float32]:
    """The vectors [texts, d] of a server.

    Raises:
        _Busy: it may answer later.
        _Refused: it rejects the texts.
        BadInput: it rejects the request.
        QembedError: its answer is not one vector for each text.
    """
    import openai

    from qembed.client import bounded

    fields = {**server.fields, **({"truncate_prompt_tokens": -1} if servers.truncate else {})}
    try:
        answer = server.api.embeddings.create(
            model=server.model,
            input=texts,
            dimensions=openai.omit if servers.cut is None else servers.cut,
            extra_body=fields or None,
        )
    except openai.APIConnectionError as error:  # a timeout, too
        raise _Busy("no answer") from error
    except openai.APIStatusError as error:
        message = embeddings.message_of(error)
        if error.status_code in (400, 413, 422) or (last and error.status_code == 500):
            raise _Refused(message) from error
        if error.status_code in (401, 403, 404):
            raise BadInput(f"{server.url}: HTTP status {error.status_code}: {message}") from error
        raise _Busy(f"HTTP status {error.status_code}", embeddings.retry_after(error), error.status_code == 500) from error
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        if reason := bounded.unreadable(error):
            raise QembedError(f"{server.url}: {reason}") from error
        raise _Busy(f"no OpenAI-compatible answer ({type(error).__name__})") from error
    return embeddings.vectors(answer, len(texts), server.url)


@contextmanager
def opened(
    models: Mapping[str, str],
    cut: int | None,
    truncate: bool,
    timeout: float,
    on_wait: Callable[[str], None],
    api_key: str | None = None,
    *,
    prompted: bool = True,
) -> Iterator[Engine]:
    """The servers in `models` (model names by URL) for the duration of the block; requests time out after `timeout` seconds.

    `api_key` None: a required key comes from the environment. `prompted`: whether the texts have the prompt that they need;
    otherwise the servers put the model's default prompt before them, if it has one.

    Raises:
        BadInput: a server rejects --dimensions or a first text.
        QembedError: a server does not answer.
    """
    from qembed.client import bounded

    with contextlib.ExitStack() as stack:
        servers = []
        fields = as_it_is if prompted else with_model_prompt
        for url, model in models.items():
            api = bounded.client(url, api_key, timeout, max_retries=0)
            servers.append(Server(url, stack.enter_context(api), model, fields(url, api_key)))
        try:
            yield Servers(servers, cut, truncate, on_wait)
        except _Refused as error:
            raise BadInput(f"{', '.join(models)}: {error}") from error
        except _Busy as error:
            raise QembedError(f"{', '.join(models)}: {error}") from error
