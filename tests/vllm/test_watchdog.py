"""When an engine that lives counts as hung."""

from __future__ import annotations

import os

from qembed.vllm import machine
from qembed.vllm.watchdog import BUSY_FACTOR, SIGNS, Look, Watchdog, look

TIMEOUT = 100.0
STEP = 10.0


def seconds_until_hung(moments: object, most: int = 2000) -> float | None:
    """After how many seconds of a look every ten, `moments` of which say how it is at each second, the dog barks."""
    now = [0.0]
    dog = Watchdog(TIMEOUT, lambda: now[0])
    for _ in range(most):
        if dog.hung(moments(now[0])) is not None:  # type: ignore[operator]
            return now[0]
        now[0] += STEP
    return None


def test_texts_that_wait_while_nothing_is_computed() -> None:
    assert seconds_until_hung(lambda _: Look(3, (1, 2), 7.0)) == TIMEOUT


def test_nobody_waits() -> None:
    assert seconds_until_hung(lambda _: Look(0, (1, 2), 7.0)) is None


def test_an_engine_that_goes_on_is_well_however_slow() -> None:
    assert seconds_until_hung(lambda now: Look(3, (now // (TIMEOUT - STEP), 2), 7.0)) is None


def test_a_busy_engine_has_longer() -> None:
    assert seconds_until_hung(lambda now: Look(3, (1, 2), now)) == BUSY_FACTOR * TIMEOUT
    assert seconds_until_hung(lambda _: Look(3, (1, 2), None)) == BUSY_FACTOR * TIMEOUT


def test_texts_that_come_and_go_do_not_hide_it() -> None:
    assert seconds_until_hung(lambda now: Look(1 + int(now) % 7, (1, 2), 7.0)) == TIMEOUT


def test_a_server_that_does_not_answer() -> None:
    assert seconds_until_hung(lambda _: Look(None, (), 7.0)) == TIMEOUT
    assert seconds_until_hung(lambda now: Look(None if now % 90 else 0, (), 7.0)) is None


def test_a_machine_that_slept_is_not_an_engine_that_hangs() -> None:
    now = [0.0]
    dog = Watchdog(TIMEOUT, lambda: now[0])
    assert dog.hung(Look(3, (1,), 7.0)) is None
    now[0] += 100 * TIMEOUT
    assert dog.hung(Look(3, (1,), 7.0)) is None
    now[0] += STEP
    assert dog.hung(Look(3, (2,), 7.0)) is None


def test_what_the_metrics_say() -> None:
    text = 'qembed_texts_in_flight 5.0\nvllm:prompt_tokens_total{engine="0"} 3.0\nvllm:prompt_tokens_total{engine="1"} 4.0\n'
    seen = look(text, 1.5)
    assert (seen.texts, seen.cpu) == (5, 1.5)
    assert dict(zip(SIGNS, seen.signs, strict=True))["vllm:prompt_tokens_total"] == 7
    assert look("", None) == Look(0, (None,) * len(SIGNS), None)


def test_the_cpu_time_of_processes() -> None:
    before = machine.cpu_seconds([os.getpid()])
    assert before is not None
    while (now := machine.cpu_seconds([os.getpid()])) is not None and now < before + 0.05:
        sum(range(10_000))
    assert machine.cpu_seconds([2**30]) is None
