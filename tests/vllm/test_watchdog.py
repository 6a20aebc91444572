"""When an engine counts as hung."""

from __future__ import annotations

import os

from qembed.vllm import machine
from qembed.vllm.watchdog import BUSY_FACTOR, PROGRESS, Observation, Watchdog, observe

TIMEOUT = 100.0
STEP = 10.0


def seconds_until_hung(observation_at: object, steps: int = 2000) -> float | None:
    """When the watchdog reports a hang, checked every ten seconds; `observation_at` maps seconds to observations."""
    now = [0.0]
    dog = Watchdog(TIMEOUT, lambda: now[0])
    for _ in range(steps):
        if dog.check(observation_at(now[0])) is not None:  # type: ignore[operator]
            return now[0]
        now[0] += STEP
    return None


def test_waiting_texts_without_progress_are_a_hang() -> None:
    assert seconds_until_hung(lambda _: Observation(3, (1, 2), 7.0)) == TIMEOUT


def test_an_idle_engine_does_not_hang() -> None:
    assert seconds_until_hung(lambda _: Observation(0, (1, 2), 7.0)) is None


def test_a_slow_engine_with_progress_does_not_hang() -> None:
    assert seconds_until_hung(lambda now: Observation(3, (now // (TIMEOUT - STEP), 2), 7.0)) is None


def test_a_busy_engine_gets_more_time() -> None:
    assert seconds_until_hung(lambda now: Observation(3, (1, 2), now)) == BUSY_FACTOR * TIMEOUT
    assert seconds_until_hung(lambda _: Observation(3, (1, 2), None)) == BUSY_FACTOR * TIMEOUT


def test_new_and_cancelled_texts_do_not_hide_a_hang() -> None:
    assert seconds_until_hung(lambda now: Observation(1 + int(now) % 7, (1, 2), 7.0)) == TIMEOUT


def test_a_server_that_does_not_answer_hangs() -> None:
    assert seconds_until_hung(lambda _: Observation(None, (), 7.0)) == TIMEOUT
    assert seconds_until_hung(lambda now: Observation(None if now % 90 else 0, (), 7.0)) is None


def test_a_suspended_machine_is_not_a_hang() -> None:
    now = [0.0]
    dog = Watchdog(TIMEOUT, lambda: now[0])
    assert dog.check(Observation(3, (1,), 7.0)) is None
    now[0] += 100 * TIMEOUT
    assert dog.check(Observation(3, (1,), 7.0)) is None
    now[0] += STEP
    assert dog.check(Observation(3, (2,), 7.0)) is None


def test_observations_are_read_from_metrics() -> None:
    text = 'qembed_texts_in_flight 5.0\nvllm:prompt_tokens_total{engine="0"} 3.0\nvllm:prompt_tokens_total{engine="1"} 4.0\n'
    observation = observe(text, 1.5)
    assert (observation.texts, observation.cpu) == (5, 1.5)
    assert dict(zip(PROGRESS, observation.progress, strict=True))["vllm:prompt_tokens_total"] == 7
    assert observe("", None) == Observation(0, (None,) * len(PROGRESS), None)


def test_cpu_time_of_processes() -> None:
    before = machine.cpu_seconds([os.getpid()])
    assert before is not None
    while (now := machine.cpu_seconds([os.getpid()])) is not None and now < before + 0.05:
        sum(range(10_000))
    assert machine.cpu_seconds([2**30]) is None
