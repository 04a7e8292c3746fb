"""Every registered pass: its name, its documentation, a second run, and what it does not apply to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import component, run

from stepfold.ir.program import Program
from stepfold.loop.errors import UsageError
from stepfold.passes.base import Pass
from stepfold.passes.registry import PASSES, pass_named

SETTINGS: dict[str, dict[str, Any]] = {
    "sparsify_attention": {"tile": (1, 2, 2), "force": True},
    "schedule": {"evaluations": 2, "samples": 4, "search_samples": 2, "moves": 0, "min_psnr": None},
}


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_a_pass_is_named_once_and_documented(kind: type[Pass[Any]]) -> None:
    assert pass_named(kind.name) is kind
    assert kind.family and kind.source and kind.summary().endswith((".", ";", ","))
    assert kind.options_type.model_config.get("frozen") and kind.options_type.model_config.get("extra") == "forbid"
    undocumented = [
        name for name in kind.options_type.model_fields if f"{name}:" not in (kind.options_type.__doc__ or "")
    ]
    assert undocumented == []


def test_an_unknown_pass_has_a_neighbour() -> None:
    with pytest.raises(UsageError, match=r"unknown pass 'hoists'; did you mean 'hoist'\?"):
        pass_named("hoists")


ELSEWHERE = ("cut",)  # the tiny DiT has one block, and a cut needs several: tests/passes/cut


@pytest.mark.parametrize(
    "kind", [kind for kind in PASSES if kind.idempotent and kind.name not in ELSEWHERE], ids=lambda kind: kind.name
)
def test_a_second_run_changes_nothing(tiny_program: Program, tmp_path: Path, kind: type[Pass[Any]]) -> None:
    options = kind.options_type.model_validate(SETTINGS.get(kind.name, {}))
    result = run(tiny_program, kind(options), kind(options), cache=tmp_path)
    first, second = result.records
    assert first.outcome == "changed" and first.changed > 0
    assert (second.outcome, second.changed, second.drift) == ("identity", 0, 0.0)
    again = run(tiny_program, kind(options), cache=tmp_path)
    for once, twice in zip(again.stages, result.stages, strict=True):
        assert str(once.graph.graph) == str(twice.graph.graph)


def test_every_pass_names_its_phase() -> None:
    """In the order in which the registry lists them."""
    phases = [kind.phase for kind in PASSES]
    assert None not in phases and phases == sorted(phase for phase in phases if phase is not None)


def test_which_passes_are_not_idempotent() -> None:
    """A second prune removes a share of what the first one left, a second search starts from what was good enough."""
    assert [kind.name for kind in PASSES if not kind.idempotent] == ["prune", "schedule"]


@pytest.mark.parametrize("name", ["hoist", "prune", "schedule"])
def test_passes_on_the_loop_do_not_apply_to_a_component(tmp_path: Path, name: str) -> None:
    program = component(torch.nn.Linear(3, 4), torch.randn(2, 3))
    kind = pass_named(name)
    (record,) = run(program, kind(kind.options_type()), cache=tmp_path).records
    assert (record.outcome, record.details) == ("not_applicable", {"reason": "the program has no loop"})


def test_quantize_and_fuse_do_not_apply_to_a_program_of_other_operators(tmp_path: Path) -> None:
    program = component(lambda x: x.softmax(-1), torch.randn(2, 3))
    for name, reason in {"quantize": "no linear layer", "fuse": "neither attention nor rotary"}.items():
        kind = pass_named(name)
        (record,) = run(program, kind(kind.options_type()), cache=tmp_path).records
        assert record.outcome == "not_applicable" and reason in record.details["reason"]
