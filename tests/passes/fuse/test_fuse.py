"""The pass that applies the rules: which ones, to which stages, and what it says where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import component, context_of, denoiser, operators, samples_of
from torch.nn import functional as F

from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError
from stepfold.loop.metrics import drift
from stepfold.passes.base import PassResult
from stepfold.passes.fuse.fuse import RULES, Fuse, FuseOptions
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.manager import Step, run_passes

H, K, T = 2, 4, 3
D = H * K
X = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
FUSED = "stepfold.attention.default"
NOTHING = "the program has neither attention nor rotary embeddings nor norms to put together"


def fuse(program: Program, **options: Any) -> PassResult:
    return Fuse(FuseOptions.model_validate(options)).run(program, context_of(program, Path("unused")))


def outcome(program: Program, optional: bool = False, **options: Any) -> tuple[str, str | None]:
    """What the manager records, and the reason that it has for it."""
    step = Step(Fuse(FuseOptions.model_validate(options)), optional)
    (record,) = run_passes(program, [step], context_of(program, Path("unused"))).records
    return record.outcome, record.details.get("reason")


def split(x: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [B, T, H, K]."""
    return x.unflatten(-1, (H, K))


def attended(heads: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Attention of [B, T, H, K] to itself, [B, T, D]."""
    values = heads.transpose(1, 2)
    return F.scaled_dot_product_attention(values, values, values, is_causal=causal).transpose(1, 2).flatten(2)


def normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.linspace(0.5, 2, x.shape[-1])


def turned(heads: torch.Tensor) -> torch.Tensor:
    """Each token of [B, T, H, K] by angles of its own."""
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    angles = torch.linspace(0, 1, T * K // 2).reshape(1, T, 1, K // 2)
    c, s = angles.cos(), angles.sin()
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(3)


PATTERNS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "rms_norm": (normed, X),
    "rotary": (turned, split(X)),
    "attention": (lambda x: attended(split(x)), X),
}


def all_three(x: torch.Tensor) -> torch.Tensor:
    return attended(turned(split(normed(x))))


class Conditioned(torch.nn.Module):
    """Attention of the latent in each evaluation, and of the tokens of a class, which have the rate of the class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes = torch.nn.Embedding(4, T * D)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], t [B], c [B] -> [B, T, D]."""
        text = self.classes(c).unflatten(1, (T, D))
        return attended(split(x)) * (t / 1000)[:, None, None] + attended(split(text))


def test_the_tiny_dit(tiny_program: Program) -> None:
    """One block: one attention; the samples are the same."""
    result = fuse(tiny_program)
    assert result.details == {"rules": {"rms_norm": 0, "rotary": 0, "attention": 1}} and result.changed == 1
    assert result.refused == ()
    assert drift(samples_of(result.program), samples_of(tiny_program)) < 1e-5
    assert outcome(tiny_program)[0] == "changed" and outcome(result.program)[0] == "identity"


def test_every_stage_is_rewritten() -> None:
    """Attention in a stage of lower rate too."""
    program = denoiser(Conditioned(), X, torch.full((2,), 500.0), torch.arange(2))
    hoisted = Hoist(HoistOptions()).run(program, context_of(program, Path("unused"))).program
    assert [stage.name for stage in hoisted.stages] == ["once", "step"]
    result = fuse(hoisted)
    assert result.changed == 2 and all(operators(stage).count(FUSED) == 1 for stage in result.program.stages)
    assert [stage.name for stage in result.program.stages] == ["once", "step"]
    assert drift(samples_of(result.program), samples_of(program)) < 1e-5


@pytest.mark.parametrize("rule", PATTERNS)
def test_chosen_rules_only(rule: str) -> None:
    before = component(all_three, X)
    result = fuse(before, rules=[rule])
    assert result.details == {"rules": {rule: 1}} and result.changed == 1
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < 1e-6


def test_all_rules() -> None:
    result = fuse(component(all_three, X))
    assert result.details == {"rules": {"rms_norm": 1, "rotary": 1, "attention": 1}} and result.changed == 3


def test_no_rules_is_no_change(tiny_program: Program) -> None:
    assert outcome(tiny_program, rules=()) == ("identity", None)


def test_only_near_misses_fail_with_their_reasons() -> None:
    program = component(lambda x: attended(split(x), causal=True), X)
    with pytest.raises(StepfoldError, match=r"pass fuse: expected to change something.*attention: .*: it is causal or"):
        outcome(program)
    assert outcome(program, optional=True) == ("identity", None)


def test_a_norm_that_was_captured_as_one_hides_no_failure() -> None:
    """It has the form that a rule makes, and no rule made it."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (D,), torch.ones(D), 1e-5)

    assert outcome(component(norm, X)) == ("identity", None)
    with pytest.raises(StepfoldError, match=r"attention: .*: it is causal or"):
        outcome(component(lambda x: attended(split(norm(x)), causal=True), X))


def test_what_one_rule_made_is_not_what_another_looks_for() -> None:
    program = component(lambda x: attended(split(normed(x)), causal=True), X)
    fused = fuse(program).program
    assert outcome(fused) == outcome(fused, rules=["rms_norm"]) == ("identity", None)
    with pytest.raises(StepfoldError, match=r"attention: .*: it is causal or"):
        outcome(fused, rules=["attention"])


@pytest.mark.parametrize("name", PATTERNS)
def test_any_of_the_patterns_is_enough(name: str) -> None:
    program = component(*PATTERNS[name])
    assert outcome(program) == ("changed", None)
    assert fuse(program).details["rules"][name] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.gelu(x, approximate="tanh"),  # the engine's own fusions
        lambda x: F.layer_norm(x, (D,)) * (1 + x[:, :1]) + x[:, 1:2],
        lambda x: torch.rsqrt(x.exp()) * x,  # parts of the patterns
        lambda x: torch.stack([x, x * 2], -1).flatten(2),
    ],
)
def test_nothing_of_the_kind_is_not_applicable(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert outcome(component(function, X)) == ("not_applicable", NOTHING)


def test_the_options_name_every_rule() -> None:
    assert FuseOptions().rules == tuple(rule.name for rule in RULES)
    assert all((rule.__doc__ or "").splitlines()[0].count("->") == 1 for rule in RULES)  # the equation
