"""Turns, medians, memory of a process, and functions that run in a process of their own."""

from __future__ import annotations

import os
import signal

import pytest

from data_prep.common.errors import UserError
from data_prep.common.measuring import alternate, in_new_process, memory_field, spread


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str) -> int:
        order.append(name)
        return len(order)

    found = alternate(3, {"a": lambda: side("a"), "b": lambda: side("b")})
    assert order == list("ababab") and found == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_spread_keeps_its_values() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "values": [3.0, 1.0, 2.0]}


def _growth() -> int:
    before = memory_field("VmRSS")
    ballast = bytearray(b"x") * 50_000_000
    return memory_field("VmRSS", os.getpid()) - before if ballast else 0


@pytest.mark.launch
def test_memory_of_a_process() -> None:
    # In a new process: one with free memory would not grow.
    assert 45e6 < in_new_process(_growth) < 60e6
    assert memory_field("VmNothing") == 0


@pytest.mark.launch
def test_a_function_in_a_process_of_its_own() -> None:
    assert in_new_process(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="-1 is wrong"):
        in_new_process(_refuse, -1)
    with pytest.raises(UserError, match="was killed"):
        in_new_process(_end)


def _refuse(value: int) -> None:
    raise UserError(f"{value} is wrong")


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
