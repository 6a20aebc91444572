"""Admission and 503: which requests are admitted, and what Retry-After says to the others."""

from __future__ import annotations

import pytest

from qembed.serve.gate.errors import Refused
from qembed.serve.gate.overload import SMALL, Load


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_batch_is_admitted_completely_or_not_at_all() -> None:
    load = Load(10, 100)
    with load.admitted(7):
        with pytest.raises(Refused) as caught, load.admitted(4):
            pass
        assert caught.value.status == 503
        assert int(caught.value.headers["retry-after"]) >= 1
        with load.admitted(3):
            assert load.texts == 10
    assert load.texts == load.requests == 0
    with load.admitted(10):
        pass


def test_a_failed_request_frees_its_places() -> None:
    load = Load(10, 100)
    with pytest.raises(ValueError, match="broken"), load.admitted(5):
        raise ValueError("broken")
    assert load.texts == 0


def test_retry_after_is_the_admitted_texts_at_the_recent_rate() -> None:
    clock = Clock()
    load = Load(1000, 100, clock=clock)
    assert load.seconds_until_room() == 1
    with load.admitted(100):
        clock.now += 5  # 20 texts a second
    with load.admitted(300):
        assert load.seconds_until_room() == 15
        assert load.seconds_until_room(760) == 3  # 60 texts must finish first
        assert load.seconds_until_room(701) == 1
        clock.now += 100  # an old rate is better than none
        assert load.seconds_until_room() == 15
    with load.admitted(1000):
        assert load.seconds_until_room() == 60


def test_large_bodies_in_memory_are_limited_and_small_ones_are_not() -> None:
    load = Load(10, 100)
    with load.body() as first, load.body() as second, load.body() as third:
        first(SMALL)
        first(100)
        second(SMALL + 300)
        with pytest.raises(Refused, match="too many large requests"):
            third(SMALL + 1)
        for _ in range(100):
            with load.body() as small:
                small(50_000)
                small(10_000)
    assert load.body_bytes == 0


def test_retry_after_of_large_bodies_is_the_timeout_of_the_oldest() -> None:
    clock = Clock()
    load = Load(10, 100, seconds=30, clock=clock)
    with load.body() as first:
        first(SMALL + 400)
        clock.now += 12.5
        with pytest.raises(Refused) as caught, load.body() as second:
            second(SMALL + 1)
        assert caught.value.headers["retry-after"] == "18"
        clock.now += 30  # it has arrived and is in computation
        with pytest.raises(Refused) as caught, load.body() as second:
            second(SMALL + 1)
        assert caught.value.headers["retry-after"] == "1"


def test_answers_in_memory_are_limited_but_two_of_the_largest_fit() -> None:
    load = Load(10, 100, max_answer=1000)
    with load.answer(1000), load.answer(1000):
        assert load.requests == 2
        with pytest.raises(Refused, match="too many large answers") as caught, load.answer(1):
            pass
        assert int(caught.value.headers["retry-after"]) >= 1
    load = Load(10, 100)
    with load.answer(399), load.answer(1):
        assert load.answer_bytes == 400
    assert load.answer_bytes == load.requests == 0


def test_a_stopping_server_admits_nothing() -> None:
    load = Load(10, 100)
    load.draining = True
    with pytest.raises(Refused, match="being stopped") as caught, load.admitted(1):
        pass
    assert caught.value.status == 503
