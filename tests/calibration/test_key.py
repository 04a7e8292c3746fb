"""The key of a run, and what is said about two that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from analytic import analytic_program, euler, loop
from calibrated import standard
from programs import component

from stepfold.calibration.key import differences, key_of, program_parts, run_parts
from stepfold.calibration.plan import Settings, make_plan
from stepfold.ir.program import ModelIdentity, PassRecord, Program
from stepfold.loop.ports import InputPort, Port
from stepfold.loop.spec import LoopSpec


def parts(program: Program, **settings: Any) -> dict[str, Any]:
    return run_parts(make_plan(program, Settings(samples=settings.pop("samples", 4), **settings)))


def record(name: str = "quantize", outcome: str = "changed", **more: Any) -> PassRecord:
    numbers = dict.fromkeys(("parameters_before", "parameters_after", "flops_before", "flops_after"), 0)
    return PassRecord(name, outcome, 1, (), 0.0, 0.0, **numbers, seconds=more.pop("seconds", 1.0), **more)


def with_records(*records: PassRecord) -> Program:
    return replace(standard(), records=records)


def with_loop(**changes: Any) -> Program:
    assert standard().loop is not None
    document = standard().loop.model_dump() | changes  # type: ignore[union-attr]
    return replace(standard(), loop=LoopSpec.model_validate(document))


def test_the_same_run_has_the_same_key() -> None:
    assert key_of(parts(standard())) == key_of(parts(standard()))
    assert len(key_of(parts(standard()))) == 64


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "seed": lambda: parts(standard(), seed=1),
    "samples": lambda: parts(standard(), samples=5),
    "buckets": lambda: parts(standard(), buckets=2),
    "gram_width": lambda: parts(standard(), gram_width=3),
    "weights": lambda: parts(replace(standard(), model=ModelIdentity("Network", "1" * 64))),
    "model": lambda: parts(replace(standard(), model=ModelIdentity("Other", standard().model.weights_sha256))),
    "loop": lambda: parts(with_loop(constants={"size": 4})),
    "recurrence": lambda: parts(replace(standard(), recurrence=euler(standard().recurrence.calls, stretch=1.01))),  # type: ignore[union-attr]
    "conditions": lambda: parts(replace(standard(), constants={"size": 4})),
    "passes": lambda: parts(with_records(record())),
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_a_run_depends_on_is_in_its_key(name: str) -> None:
    before, after = parts(standard()), OTHERS[name]()
    assert key_of(before) != key_of(after)
    named = {text.partition(":")[0].partition(".")[0] for text in differences(before, after)}
    assert named - {"sites"} == {name}  # fewer Gram matrices are other sites too


@pytest.mark.parametrize(
    "kept",
    [
        record("hoist", keeps_activations=True),
        record(outcome="identity"),
        record(outcome="not_applicable"),
    ],
)
def test_passes_that_keep_what_layers_read_do_not_count(kept: PassRecord) -> None:
    assert program_parts(with_records(kept)) == program_parts(standard())


def test_passes_are_told_apart_by_what_they_did_not_by_how_long() -> None:
    first = program_parts(with_records(record(details={"alpha": 0.5})))
    assert first == program_parts(with_records(record(details={"alpha": 0.5}, seconds=2.0)))
    assert first != program_parts(with_records(record(details={"alpha": 0.6})))


def test_conditions_are_those_of_the_example() -> None:
    """A text [B, 2, 3] beside a class: rows of the example are cycled."""
    base = loop(None)
    document = base.model_dump()
    document["inputs"]["text"] = {"role": "condition"}
    program = analytic_program(euler(4), LoopSpec.model_validate(document))
    text = InputPort(Port("text", (None, 2, 3), "float32"), "condition")
    found = [
        replace(
            program, inputs=(*program.inputs, text), example={**program.example, "text": torch.full((2, 2, 3), value)}
        )
        for value in (0.0, 0.0, 1.0)
    ]
    keys = [key_of(program_parts(item)) for item in found]
    assert keys[0] == keys[1] != keys[2]


def test_a_class_of_the_example_does_not_count() -> None:
    program = analytic_program(euler(4), loop(2.0))
    other = replace(program, example={**program.example, "c": torch.ones(2, dtype=torch.int64)})
    assert program_parts(program) == program_parts(other)


def test_the_example_of_a_component_counts() -> None:
    program = component(torch.nn.Linear(3, 3), torch.zeros(2, 3))
    other = replace(program, example={"input": torch.ones(2, 3)})
    assert program_parts(program)["conditions"] != program_parts(other)["conditions"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_constant_tensors_of_any_type(dtype: torch.dtype) -> None:
    zero, one = (replace(standard(), constants={"ids": torch.full((2,), v, dtype=dtype)}) for v in (0, 1))
    assert program_parts(zero) != program_parts(one)


def test_differences_say_where_and_what() -> None:
    stored = {"loop": {"sampler": {"steps": 50}, "guidance": None}, "weights": "a" * 64, "seed": 0, "passes": []}
    here = {
        "loop": {"sampler": {"steps": 8}, "guidance": 2.0},
        "weights": "b" * 64,
        "seed": 0,
        "passes": [{"pass": "quantize", "sha256": "c" * 64}],
    }
    assert differences(stored, here) == [
        "loop.sampler.steps: 50 in the store, 8 here",
        "loop.guidance: none in the store, 2.0 here",
        f"weights: {'a' * 12} in the store, {'b' * 12} here",
        f"passes: none in the store, quantize {'c' * 12} here",
    ]


def test_a_part_that_only_one_side_has() -> None:
    assert differences({"a": 1}, {}) == ["a: 1 in the store, none here"]
    assert differences({"loop": None}, {"loop": {"steps": 1}}) == ['loop: none in the store, {"steps": 1} here']
