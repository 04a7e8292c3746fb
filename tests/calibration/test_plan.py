"""What a run will do, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import CALLS, WIDTH, network_program, standard
from programs import component, context_of, modulated

from stepfold.calibration.collect import collect_shard
from stepfold.calibration.document import bucket_of
from stepfold.calibration.memory import memory, peak_bytes, resident_bytes
from stepfold.calibration.plan import SAMPLES, SHARD_SAMPLES, CalibrationPlan, Settings, make_plan
from stepfold.calibration.run import prepare
from stepfold.ir.program import Program, slots_of
from stepfold.loop.errors import UsageError
from stepfold.loop.ports import Rate
from stepfold.passes.hoist.hoist import Hoist, HoistOptions

FLOAT = 4


def plan(program: Program | None = None, **settings: Any) -> CalibrationPlan:
    return make_plan(program or standard(), Settings(**settings))


def test_defaults() -> None:
    made = plan()
    assert (made.samples, made.buckets) == (SAMPLES, CALLS)  # fewer calls than the usual buckets: one each
    assert made.branches == ("conditional", "unconditional") and made.evaluations == CALLS
    assert made.timesteps == (1000.0, 750.0, 500.0, 250.0)


def test_shards_cover_the_samples() -> None:
    shards = plan(samples=2 * SHARD_SAMPLES + 3).shards
    assert shards == ((0, SHARD_SAMPLES), (SHARD_SAMPLES, 2 * SHARD_SAMPLES), (16, 19))


def test_without_guidance_there_is_one_branch() -> None:
    assert plan(network_program(guided=False)).branches == ("conditional",)
    assert plan(network_program(guidance={"scale": 1.0, "unconditional": {"c": 0}})).branches == ("conditional",)


def test_a_component_runs_on_its_example() -> None:
    made = plan(component(torch.nn.Linear(4, 2), torch.randn(3, 4)))
    assert (made.samples, made.buckets, made.evaluations, made.shards) == (3, 1, 1, ((0, 3),))
    assert made.timesteps == () and made.branches == ("conditional",)


@pytest.mark.parametrize(
    ("program", "settings", "message"),
    [
        (standard, {"samples": 0}, "expected at least one sample; received 0"),
        (standard, {"buckets": 5}, "expected between 1 and 4 buckets, the calls of the loop; received 5"),
        (standard, {"buckets": 0}, "received 0"),
        (
            lambda: component(torch.nn.Linear(4, 2), torch.randn(3, 4)),
            {"samples": 8},
            "example of 3; received 8 samples",
        ),
        (lambda: component(lambda x: torch.tanh(x), torch.randn(3, 4)), {}, "expected a model with linear layers"),
    ],
)
def test_settings_that_do_not_fit(program: Callable[[], Program], settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(program(), **settings)


@pytest.mark.parametrize(("calls", "buckets"), [(50, 8), (8, 8), (5, 2), (1, 1)])
def test_buckets_are_equal_parts(calls: int, buckets: int) -> None:
    sizes = np.bincount([bucket_of(call, calls, buckets) for call in range(calls)], minlength=buckets)
    assert sizes.max() - sizes.min() <= 1 and sizes.sum() == calls
    document = prepare(standard(), Settings(samples=1)).document
    document = document.model_copy(
        update={"timesteps": tuple(np.arange(calls * 1.0)), "parts": {**document.parts, "buckets": buckets}}
    )
    listed = [call for bucket in range(buckets) for call in document.calls_of(bucket)]
    assert listed == list(range(calls))
    assert all(bucket_of(c, calls, buckets) == bucket for bucket in range(buckets) for c in document.calls_of(bucket))


# -- memory


def test_arrays_of_a_shard_are_those_of_the_plan() -> None:
    made = plan(samples=20)
    planned = memory(made)
    largest = max(
        (collect_shard(made, i, lambda *_: None) for i in range(3)),
        key=lambda arrays: sum(a.nbytes for a in arrays.values()),
    )
    sizes: dict[str, int] = dict.fromkeys(("accumulators", "gram", "rows"), 0)
    for name, array in largest.items():
        part = name.rpartition(".")[2]
        if part not in ("seen", "gram_count"):
            sizes[part if part == "gram" else "rows" if part.startswith("rows") else "accumulators"] += array.nbytes
    assert (planned.accumulators, planned.gram) == (sizes["accumulators"], sizes["gram"])
    assert sizes["rows"] <= planned.rows <= 1.5 * sizes["rows"]  # a value of one token has fewer rows to choose from
    assert planned.planned == planned.accumulators + planned.gram + planned.rows + planned.activations


def test_weights_are_counted_once() -> None:
    program = standard()
    assert memory(plan(program)).weights == FLOAT * program.parameters()
    doubled = replace(program, slots=slots_of(*program.stages, *program.stages))
    assert memory(replace(plan(program), program=doubled)).weights == FLOAT * program.parameters()


def test_gram_matrices_up_to_a_width() -> None:
    channels = [WIDTH, WIDTH, 1]
    assert memory(plan(gram_width=WIDTH)).gram == 8 * sum(width**2 for width in channels)
    assert memory(plan(gram_width=0)).gram == 0


def test_peak_of_a_chain_counts_what_is_alive() -> None:
    """x [rows, 8] -> tanh -> relu -> sum: the input, two values at a time, and room for one more."""
    program = component(lambda x: torch.relu(torch.tanh(x)).sum(dim=1, keepdim=True), torch.randn(2, 8))
    row = 8 * FLOAT
    assert peak_bytes(program.step, 10) == 10 * (3 * row + row)


def test_views_share_their_storage() -> None:
    program = component(lambda x: torch.tanh(x).reshape(-1, 4, 2).transpose(1, 2), torch.randn(2, 8))
    assert peak_bytes(program.step, 10) == 10 * 8 * FLOAT * (2 + 1)


def test_more_samples_at_once_take_more() -> None:
    one, eight = (memory(plan(samples=samples)).activations for samples in (1, 8))
    assert one < eight


def test_values_of_lower_rates_are_held_for_every_call(tmp_path: Path) -> None:
    """gain(c, t) [4 calls x 16 rows, 5] is computed once and stays; shift(t) is a table and counts as weights."""
    program = modulated()
    hoisted = Hoist(HoistOptions()).run(program, context_of(program, tmp_path)).program
    (stage,) = [stage for stage in hoisted.stages if stage.rate is Rate.ONCE_TIMESTEP]
    rows, made = 2 * SHARD_SAMPLES, plan(hoisted, samples=SHARD_SAMPLES)
    held = CALLS * rows * FLOAT * sum(port.shape[-1] or 0 for port in stage.outputs)
    assert memory(made).activations > held + peak_bytes(stage, CALLS * rows) > held > 0
    tables = sum(table.nbytes for table in hoisted.tables.values())
    assert memory(made).weights == FLOAT * hoisted.parameters() + tables and tables > 0


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = np.ones(1 << 24)
    assert resident_bytes() - before > held.nbytes / 2
