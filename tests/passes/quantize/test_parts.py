"""Two precisions by step: parts of the loop are quantized by themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import component, context_of, operators, samples_of
from quantizing import quantize
from safetensors.numpy import load_file, save_file

import stepfold
from stepfold.bundle import read, write_manifest
from stepfold.bundle.reader import read_manifest
from stepfold.bundle.verify import verify
from stepfold.ir.program import Program, Stage
from stepfold.ir.verify import verify as verify_program
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.base import PassResult
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.manager import Step, run_passes
from stepfold.passes.quantize.algebra import buckets
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize
from stepfold.passes.recipe import load_recipe
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.engine import open_stage
from stepfold.runtime.unoptimized import load_unoptimized

CALLS = 8
EARLY, LATE = [0.0, 0.5], [0.5, 1.0]


@pytest.fixture(scope="module")
def late(hoisted: Program) -> PassResult:
    return quantize(hoisted, part=LATE, smooth=0.7)


def formats(stage: Stage) -> set[str]:
    return {name for name in operators(stage) if name.startswith("stepfold")}


def evaluation(program: Program, call: int) -> np.ndarray:
    assert program.loop is not None and program.recurrence is not None
    inputs = {name: value.numpy().copy() for name, value in program.example.items()}
    inputs[program.loop.timestep][:] = program.recurrence.timesteps[call]
    return program.bind().evaluate(inputs, call)[0]


def test_only_the_part_is_quantized(hoisted: Program, late: PassResult) -> None:
    verify_program(late.program)
    (slot,) = late.program.computing
    first, second = slot.variants
    assert slot.by_call == (0, 0, 0, 0, 1, 1, 1, 1)
    assert not formats(first) and "stepfold.qlinear.default" in formats(second)
    assert late.changed == 6 and late.details["part"] == (0.5, 1.0)
    errors = [drift(evaluation(late.program, call), evaluation(hoisted, call)) for call in range(CALLS)]
    assert errors[:4] == [0.0] * 4, "smoothing of the late part does not reach the early one"
    assert all(1e-5 < error < 0.05 for error in errors[4:])


def test_the_late_part_is_what_the_whole_would_be(hoisted: Program, late: PassResult) -> None:
    """But for modulations, which both parts read, so that they are divided in the stage and not before it."""
    whole = quantize(hoisted, smooth=0.7).program
    for call in range(4, CALLS):
        assert drift(evaluation(late.program, call), evaluation(whole, call)) < 5e-3


def test_another_pass_treats_the_other_part(hoisted: Program, late: PassResult) -> None:
    both = quantize(late.program, part=EARLY, scheme="int4", group=16)
    verify_program(both.program)
    assert [formats(stage) for stage in both.program.steps] == [
        {"stepfold.blocked_linear.default"},
        formats(late.program.steps[1]),
    ]
    assert both.program.steps[1].graph is late.program.steps[1].graph
    assert drift(samples_of(both.program), samples_of(hoisted)) < 0.2


def test_without_a_part_every_stage_is_quantized(late: PassResult) -> None:
    rest = quantize(late.program)
    assert rest.changed == 6 and all("stepfold.qlinear.default" in formats(stage) for stage in rest.program.steps)


def test_a_second_run_changes_nothing(late: PassResult) -> None:
    again = quantize(late.program, part=LATE, smooth=0.7)
    assert (again.changed, again.identity) == (0, True)


def test_static_scales_of_two_parts_have_tables_of_their_own(hoisted: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that drift at all are taken as ranges that need a scale for each bucket of timesteps."""
    monkeypatch.setattr(buckets, "STEADY", 1.0)
    first = quantize(hoisted, part=EARLY, activations="static")
    both = quantize(first.program, part=LATE, activations="static")
    verify_program(both.program)
    tables = {name.split(".")[0] for name in set(both.program.tables) - set(hoisted.tables)}
    assert tables == {"step", "step_1"}
    assert drift(samples_of(both.program), samples_of(hoisted)) < 0.05


def test_hoist_comes_first(late: PassResult) -> None:
    with pytest.raises(UsageError, match="Put hoist before quantize"):
        Hoist(HoistOptions()).requires(late.program)


def test_a_part_that_matches_nothing_fails(hoisted: Program) -> None:
    steps = [Step(Quantize(QuantizeOptions(part=(0.5, 1.0), skip=("*",))))]
    with pytest.raises(StepfoldError, match="expected to change something"):
        run_passes(hoisted, steps, context_of(hoisted, Path("unused")))


@pytest.mark.parametrize("part", [[0.5, 0.5], [0.7, 0.2], [-0.1, 0.5], [0.5, 1.1], [0.5]])
def test_what_is_no_part_is_refused(part: list[float]) -> None:
    with pytest.raises(UsageError, match="option 'part'"):
        load_recipe({"passes": [{"quantize": {"part": part}}]}).steps()


def test_a_part_without_a_call_is_refused(hoisted: Program) -> None:
    with pytest.raises(UsageError, match=r"at least one of the 8 calls of the loop between 0 and 0\.05"):
        quantize(hoisted, part=[0.0, 0.05])


def test_a_component_has_no_parts() -> None:
    program = component(torch.nn.Linear(4, 4), torch.randn(2, 3, 4))
    with pytest.raises(UsageError, match="expected a model with a loop; received a component"):
        quantize(program, part=LATE)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Int8 late, 4 bits early, and all eight calls."""
    recipe = {
        "passes": [
            "hoist",
            {"quantize": {"part": LATE}},
            {"quantize": {"part": EARLY, "scheme": "int4", "group": 16}},
            {"fuse": {}, "optional": True},
        ]
    }
    out = tmp_path_factory.mktemp("parts") / "bundle"
    optimize(Job(tiny_checkpoint, out, recipe=recipe), lambda task, done, total: None)
    return out


@pytest.mark.slow
def test_a_bundle_runs_each_part_on_its_own_stage(bundle: Path, tiny_checkpoint: Path) -> None:
    slot = read(bundle).manifest.slots[-1]
    assert (slot.variants, slot.by_call) == (("step", "step_1"), (0, 0, 0, 0, 1, 1, 1, 1))
    assert verify(bundle, open_stage) == ([], [])
    engine, plain = stepfold.load(bundle), load_unoptimized(tiny_checkpoint)
    noise = np.random.default_rng(0).standard_normal((4, *plain.loop.latent.shape)).astype(np.float32)
    conditions = {"class_labels": np.arange(4)}
    made = engine.sample(noise, conditions=conditions)
    assert 1e-4 < drift(made, plain.sample(noise, conditions=conditions)) < 0.2


@pytest.mark.slow
def test_both_stages_are_replayed_by_verify(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    arrays = load_file(copy / "probe_1.safetensors")
    arrays["outputs/sample"] = arrays["outputs/sample"] + 1
    save_file(arrays, copy / "probe_1.safetensors")
    write_manifest(copy, read_manifest(copy))
    problems, _ = verify(copy, open_stage)
    assert len(problems) == 1 and "probe: expected sample" in problems[0]
