"""Norms by the root of the mean square, as diffusers' RMSNorm is traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from programs import component, context_of, operators

from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program
from stepfold.passes.base import PassResult
from stepfold.passes.fuse.fuse import Fuse, FuseOptions

D = 6
X = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.linspace(0.5, 2, D)


def fuse(program: Program) -> PassResult:
    return Fuse(FuseOptions(rules=("rms_norm",))).run(program, context_of(program, Path("unused")))


def root(x: torch.Tensor, *dimensions: int) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(dimensions or (-1,), keepdim=True) + 1e-3)


def of_diffusers() -> torch.nn.Module:
    norm = RMSNorm(D, eps=1e-3)
    assert norm.weight is not None
    norm.weight.data = WEIGHT.clone()
    return norm


FORMS: dict[str, Callable | torch.nn.Module] = {
    "diffusers": of_diffusers(),
    "exchanged": lambda x: WEIGHT * (root(x) * x),
    "the dimension by number": lambda x: x * root(x, 2) * WEIGHT,
}


@pytest.mark.parametrize("form", FORMS)
def test_before_and_expected(form: str) -> None:
    before = component(FORMS[form], X)
    assert "rsqrt.default" in operators(before.step)
    result = fuse(before)
    assert operators(result.program.step) == ["rms_norm.default"]
    assert (result.changed, result.refused) == (1, ())
    assert outputs_drift(probe_outputs(result.program), probe_outputs(before)) < 1e-6
    assert fuse(result.program).identity


def test_in_double_precision() -> None:
    before, after = component(FORMS["diffusers"], X), fuse(component(FORMS["diffusers"], X)).program
    for program in (before, after):
        program.step.graph.double()
    wide = X.double()
    torch.testing.assert_close(after.step.graph(wide)[0], before.step.graph(wide)[0], rtol=1e-13, atol=1e-13)


REASON = "what the norm is multiplied by is not a stored weight [D]"


@pytest.mark.parametrize("other", [lambda x: x * root(x) * x, lambda x: x * root(x) * torch.ones(3, D)])
def test_near_misses(other: Callable) -> None:
    result = fuse(component(other, X))
    assert result.changed == 0 and [refusal.reason for refusal in result.refused] == [REASON]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x * root(x, 1) * WEIGHT,
        lambda x: x * root(x.flip(1)) * WEIGHT,
        lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-3) * WEIGHT,
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x) * WEIGHT,
    ],
)
def test_what_is_no_such_norm_does_not_begin(other: Callable) -> None:
    result = fuse(component(other, X))
    assert (result.changed, result.refused) == (0, ())
