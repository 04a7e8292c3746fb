"""Sessions of the workshop: opened once for a stage, let go when another program is opened."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest

from stepfold.backends import Backend
from stepfold.ir.program import Program, slots_of
from stepfold.runtime.workshop import Workshop, workshop


@pytest.fixture
def shop() -> Iterator[Workshop]:
    with workshop("onnxruntime") as found:
        yield found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Every session that is opened."""
    sessions: list[weakref.ref] = []
    real = Backend.open_session

    def spied(*arguments, **options):
        session = real(*arguments, **options)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(Backend, "open_session", spied)
    return sessions


def test_a_session_is_opened_once_and_let_go_with_its_program(
    shop: Workshop, tiny_program: Program, opened: list[weakref.ref]
) -> None:
    """The engine rearranges weights into copies of its own, so a session that nobody uses holds a model."""
    first, second = shop.open(tiny_program), shop.measured(tiny_program)
    assert len(opened) == 1 and first.stages[0].call is second.stages[0].call
    other = replace(tiny_program, slots=slots_of(replace(tiny_program.step)))
    gc.disable()
    try:
        del first, second
        shop.open(other)
        assert [session() is not None for session in opened] == [False, True]
    finally:
        gc.enable()


def test_a_session_in_use_outlives_the_next_program(
    shop: Workshop, tiny_program: Program, opened: list[weakref.ref]
) -> None:
    bound = shop.open(tiny_program)
    shop.open(replace(tiny_program, slots=slots_of(replace(tiny_program.step))))
    assert len(opened) == 2 and opened[0]() is bound.stages[0].call
