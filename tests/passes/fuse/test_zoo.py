"""The rules on the transformers that people compile: what is fused, and that it changes nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from programs import context_of, operators
from zoo import FLUX, QWENIMAGE, SD3, WAN, ZooModel

from stepfold.ir.probe import outputs_drift, probe_outputs
from stepfold.ir.program import Program
from stepfold.passes.fuse.fuse import Fuse, FuseOptions

pytestmark = pytest.mark.slow

MASKED = ("attention", "it has a mask")


def fused(model: ZooModel) -> tuple[Program, Program, dict[str, int], Counter]:
    """The program before and after, the counts of the rules, and why what is not fused was refused."""
    before = model.program
    result = Fuse(FuseOptions()).run(before, context_of(before, Path("unused")))
    refused = Counter((refusal.site.partition(":")[0], refusal.reason) for refusal in result.refused)
    return before, result.program, result.details["rules"], refused


CASES: list[tuple[ZooModel, dict[str, int], dict[tuple[str, str], int]]] = [
    (FLUX, {"rms_norm": 0, "rotary": 8, "attention": 4}, {}),
    (QWENIMAGE, {"rms_norm": 9, "rotary": 8, "attention": 0}, {MASKED: 2}),
    (SD3, {"rms_norm": 14, "rotary": 0, "attention": 4}, {}),
    (WAN, {"rms_norm": 0, "rotary": 4, "attention": 4}, {}),
]


@pytest.mark.parametrize(("model", "counts", "reasons"), CASES, ids=str)
def test_what_is_fused(model: ZooModel, counts: dict[str, int], reasons: dict[tuple[str, str], int]) -> None:
    before, after, found, refused = fused(model)
    assert (found, refused) == (counts, reasons)
    assert len(operators(after.step)) < len(operators(before.step))
    assert outputs_drift(probe_outputs(after), probe_outputs(before)) < 1e-5
