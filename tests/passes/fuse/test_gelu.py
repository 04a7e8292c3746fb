"""The tanh form of GELU, and the pass that applies the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import component, context_of, operators, samples_of
from torch.nn import functional as F

from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program, Refusal
from stepfold.loop.errors import StepfoldError
from stepfold.loop.metrics import drift
from stepfold.passes.base import PassResult
from stepfold.passes.fuse.onnxruntime import RULES, FuseOnnxRuntime, FuseOptions
from stepfold.passes.manager import Step, run_passes
from stepfold.passes.schedule.hoist import Hoist, HoistOptions

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
EXACT_FORM = Refusal("gelu: gelu", "the exact form has no faster kernel")


def fuse(program: Program, **options: Any) -> PassResult:
    return FuseOnnxRuntime(FuseOptions.model_validate(options)).run(program, context_of(program, Path("unused")))


def test_before_and_expected() -> None:
    before = component(lambda x: F.gelu(x * 2, approximate="tanh") + 1, X)
    result = fuse(before)
    assert operators(result.program.step) == ["mul.Tensor", "stepfold.fast_gelu.default", "add.Tensor"]
    assert (result.changed, result.refused) == (1, ())
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < 1e-6
    assert fuse(result.program).identity


def test_the_exact_form_is_kept() -> None:
    result = fuse(component(lambda x: F.gelu(x), X))
    assert (result.changed, result.identity, result.refused) == (0, False, (EXACT_FORM,))


def test_one_of_each() -> None:
    result = fuse(component(lambda x: F.gelu(F.gelu(x), approximate="tanh"), X))
    assert operators(result.program.step) == ["gelu.default", "stepfold.fast_gelu.default"]
    assert (result.changed, result.refused) == (1, (EXACT_FORM,))


def test_the_tiny_dit(tiny_program: Program) -> None:
    """One block: one attention, one GELU; the samples are the same."""
    result = fuse(tiny_program)
    assert (
        result.details == {"rules": {"rms_norm": 0, "rotary": 0, "attention": 1, "gelu": 1, "modulate": 3}}
        and result.changed == 5
    )
    assert result.refused == ()
    assert drift(samples_of(result.program), samples_of(tiny_program)) < 1e-5


def test_every_stage_is_rewritten(tiny_program: Program) -> None:
    """GELU in a stage of lower rate."""
    context = context_of(tiny_program, Path("unused"))
    hoisted = Hoist(HoistOptions()).run(tiny_program, context).program
    assert fuse(hoisted).changed == 5 and [s.name for s in fuse(hoisted).program.stages] == [
        s.name for s in hoisted.stages
    ]


@pytest.mark.parametrize(
    ("rules", "counts"), [(["gelu"], {"gelu": 1}), (["attention"], {"attention": 1}), (["modulate"], {"modulate": 3})]
)
def test_chosen_rules_only(tiny_program: Program, rules: list[str], counts: dict[str, int]) -> None:
    result = fuse(tiny_program, rules=rules)
    assert result.details == {"rules": counts} and result.changed == sum(counts.values())


def test_no_rules_is_no_change(tiny_program: Program) -> None:
    steps = [Step(FuseOnnxRuntime(FuseOptions(rules=())))]
    (record,) = run_passes(tiny_program, steps, context_of(tiny_program, Path("unused"))).records
    assert record.outcome == "identity"


def test_only_near_misses_fail_with_their_reasons() -> None:
    program = component(lambda x: F.gelu(x), X)
    with pytest.raises(
        StepfoldError, match=r"pass fuse: expected to change something.*gelu: gelu: the exact form has no"
    ):
        run_passes(program, [Step(FuseOnnxRuntime(FuseOptions()))], context_of(program, Path("unused")))


def test_nothing_of_the_kind_is_not_applicable() -> None:
    program = component(torch.nn.Linear(4, 4), X)
    assert (
        FuseOnnxRuntime(FuseOptions()).not_applicable(program) == "the program has neither attention nor GELU nor norm"
    )


def test_the_options_name_every_rule() -> None:
    assert FuseOptions().rules == tuple(rule.name for rule in RULES)
    assert all((rule.__doc__ or "").splitlines()[0].count("->") == 1 for rule in RULES)  # the equation
