"""The table of texts in flight, which survives the gate's process."""

from __future__ import annotations

import tempfile

from qembed.serve.gate.suspects import SLOT, Suspects


def test_texts_in_flight_at_a_death_are_suspects_in_the_next_process() -> None:
    with tempfile.TemporaryFile() as file:
        first = Suspects(4, file.fileno())
        with first.in_flight(["answered"]) as flight:
            flight.answered = True
        with first.in_flight(["killed", [1, 2]]):
            second = Suspects(4, file.fileno())  # the first process was killed inside the block
        assert [second.deaths(text) for text in ("answered", "killed", [1, 2], [1, 3])] == [0, 1, 1, 0]
        with second.in_flight(["killed"]) as flight:
            flight.died = True
        assert Suspects(4, file.fileno()).deaths("killed") == 2


def test_a_failure_without_a_death_does_not_change_the_suspects() -> None:
    suspects = Suspects(4)
    with suspects.in_flight(["a"]):
        pass
    assert suspects.deaths("a") == 0
    with tempfile.TemporaryFile() as file:
        with Suspects(4, file.fileno()).in_flight(["a"]) as flight:
            flight.died = True
        second = Suspects(4, file.fileno())
        with second.in_flight(["a"]):
            pass
        assert second.deaths("a") == 1


def test_a_text_in_flight_twice_stays_noted_until_both_ends() -> None:
    with tempfile.TemporaryFile() as file:
        suspects = Suspects(4, file.fileno())
        with suspects.in_flight(["a"]):
            with suspects.in_flight(["a"]) as flight:
                flight.answered = True
            assert Suspects(4, file.fileno()).deaths("a") == 1


def test_the_table_has_a_fixed_size_and_new_texts_replace_suspects() -> None:
    with tempfile.TemporaryFile() as file:
        with Suspects(3, file.fileno()).in_flight(["a", "b", "c", "d"]) as flight:
            flight.died = True
        second = Suspects(3, file.fileno())
        assert sum(second.deaths(text) for text in "abcd") == 3
        with second.in_flight(["x"]) as flight:
            flight.died = True
        assert Suspects(3, file.fileno()).deaths("x") == 1
        assert file.seek(0, 2) == SLOT * 4
