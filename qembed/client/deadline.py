"""A limit of time for a whole step of an exchange, when a library only limits the time between two bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Answer = TypeVar("Answer", bound=Any)


def within(seconds: float | None, receive: Callable[[], Answer]) -> Answer:
    """What `receive` returns, an answer that can be closed; None: without a limit.

    Headers that come byte by byte, or one `100 Continue` after another, keep a library waiting for ever. So `receive` is called
    in a thread of its own, which is abandoned after `seconds`: its answer is closed if it ever comes.

    Raises:
        TimeoutError: it takes longer than `seconds`.
        BaseException: what `receive` raises.
    """
    if seconds is None:
        return receive()
    result: Future[Answer] = Future()

    def work() -> None:
        try:
            answer = receive()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            if result.set_running_or_notify_cancel():
                result.set_exception(error)
            return
        if result.set_running_or_notify_cancel():
            result.set_result(answer)
        else:
            with contextlib.suppress(Exception):
                answer.close()

    threading.Thread(target=work, name="answer", daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.cancel():
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        raise
    except BaseException:  # such as a signal's KeyboardInterrupt, which must reach the command
        result.cancel()
        raise
