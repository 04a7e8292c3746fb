"""From a model to samples in Python: capture, apply, lower, load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import QUICK
from folders import hashes
from programs import Modulated, modulated_example, samples_of

import stepfold
from stepfold.backends.onnxruntime.backend import Onnxruntime
from stepfold.ir.program import Program
from stepfold.loop.errors import UsageError
from stepfold.loop.metrics import drift
from stepfold.loop.noise import noise
from stepfold.runtime.workshop import workshop

pytestmark = pytest.mark.usefixtures("each_stage_once")
EVALUATION = 1e-4  # relative, of one evaluation in ONNX Runtime against eager PyTorch
FP32 = {"passes": ["hoist", {"fuse": {}, "optional": True}]}


@pytest.fixture(scope="session")
def hoisted(captured: Program) -> Program:
    return stepfold.apply(captured, FP32)[0]


def eager_loop(model: Modulated, latents: np.ndarray, labels: np.ndarray, scale: float) -> np.ndarray:
    """Four Euler steps of a quarter, guided by class 3, without any of our code."""
    x = torch.from_numpy(latents)
    with torch.no_grad():
        for timestep in (1000.0, 750.0, 500.0, 250.0):
            t = torch.full((len(x),), timestep)
            conditional, unconditional = (model(x, t, torch.from_numpy(c)) for c in (labels, np.full_like(labels, 3)))
            x = x - (unconditional + scale * (conditional - unconditional)) / 4
    return x.numpy()


@pytest.mark.parametrize("passes", [False, True], ids=["captured", "hoisted"])
@pytest.mark.parametrize("scale", [None, 3.5])
def test_samples_of_a_model_are_those_of_an_eager_loop(
    captured: Program, hoisted: Program, model: Modulated, tmp_path: Path, passes: bool, scale: float | None
) -> None:
    program = hoisted if passes else captured
    engine = stepfold.load(stepfold.lower(program, out=tmp_path / "bundle"))
    latents, labels = noise(7, (5, 3, 5)), np.array([0, 1, 2, 1, 0])
    received = engine.sample(noise=latents, guidance=scale, c=labels)
    assert received.shape == (5, 3, 5) and received.dtype == np.float32
    assert drift(received, eager_loop(model, latents, labels, scale or 2.0)) < EVALUATION


def test_one_evaluation_takes_the_arguments_of_the_model(
    captured: Program, hoisted: Program, model: Modulated, tmp_path: Path
) -> None:
    """Tensors or arrays, of any batch; after hoisting the timestep is one of the grid."""
    for name, built in {"captured": captured, "hoisted": hoisted}.items():
        engine = stepfold.load(stepfold.lower(built, "onnxruntime", out=tmp_path / name))
        x, _, c = modulated_example(3)
        t = torch.full((3,), 750.0)
        with torch.no_grad():
            wanted = model(x, t, c).numpy()
        for kwargs in ({"x": x, "t": t, "c": c}, {"x": x.numpy(), "t": t.numpy(), "c": c.numpy()}):
            (received,) = engine.run(**kwargs)
            assert drift(received, wanted) < EVALUATION


def test_a_component(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    program = stepfold.capture(model, {"input": torch.randn(2, 4)})
    program, records = stepfold.apply(program, {"passes": ["hoist", {"quantize": {}, "optional": True}, "schedule"]})
    assert [record.outcome for record in records][::2] == ["not_applicable", "not_applicable"]
    engine = stepfold.load(stepfold.lower(program, out=tmp_path / "bundle"))
    x = torch.randn(5, 4)
    assert drift(engine.run(input=x)[0], model(x).detach().numpy()) < 0.05
    assert engine.manifest.loop is None and engine.manifest.schedule is None and engine.manifest.seeds == {}


def test_apply_returns_its_own_records(captured: Program) -> None:
    first, records = stepfold.apply(captured, {"passes": ["hoist"]})
    assert [record.name for record in records] == ["hoist"] and captured.records == ()
    second, more = stepfold.apply(first, {"passes": [{"fuse": {}, "optional": True}]})
    assert [record.name for record in more] == ["fuse"] and len(second.records) == 2


def test_a_schedule_fitted_in_python_is_the_one_that_is_shipped(fitted: Program, tmp_path: Path) -> None:
    engine = stepfold.load(stepfold.lower(fitted, out=tmp_path / "bundle"))
    assert fitted.schedule is not None and engine.manifest.schedule is not None
    assert (engine.manifest.schedule.evaluations, engine.manifest.schedule.grid_steps) == (2, 4)
    for name, value in fitted.schedule.fitted[2.0].arrays().items():
        np.testing.assert_array_equal(engine.plan().arrays()[name], value)
    assert engine.manifest.seeds == {}  # they were apply's; lower does not know them


def test_batch_invariance_in_the_manifest(captured: Program, tmp_path: Path) -> None:
    for activations, invariant in {"dynamic": False, "static": True}.items():
        program, _ = stepfold.apply(captured, {"passes": [{"quantize": {"activations": activations}}]})
        engine = stepfold.load(stepfold.lower(program, out=tmp_path / activations))
        assert engine.manifest.batch_invariant is invariant


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, out: stepfold.apply(p, "defalt"), "did you mean 'default'"),
        (
            lambda p, out: stepfold.apply(p, FP32, calibration="none"),
            "none: expected a calibration store; there is no store.json",
        ),
        (lambda p, out: stepfold.apply(p, FP32, backend="onnxrt"), "did you mean 'onnxruntime'"),
        (lambda p, out: stepfold.lower(p, "onnxrt", out=out / "new"), "did you mean 'onnxruntime'"),
        (lambda p, out: stepfold.lower(p, out=out), "already exists"),
    ],
)
def test_wrong_use(captured: Program, tmp_path: Path, call: Callable, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(captured, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lower_replaces_a_bundle_when_asked(captured: Program, hoisted: Program, tmp_path: Path) -> None:
    out = stepfold.lower(captured, out=str(tmp_path / "bundle"))
    before = hashes(out)
    assert stepfold.lower(hoisted, out=out, overwrite=True) == out
    assert hashes(out) != before and "once" in {stage.name for stage in stepfold.load(out).manifest.stages}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_backend_that_cannot_build_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepfold.backends.capability import Capability

    lacking = Capability("onnxruntime", False, True, "1", "building needs torch", "pip install 'stepfold[compile]'")
    monkeypatch.setattr(Onnxruntime, "capability_here", lambda self: lacking)
    with pytest.raises(UsageError) as caught, workshop("onnxruntime"):
        pass
    assert str(caught.value) == (
        "backend 'onnxruntime' cannot build here: building needs torch. Install it: pip install 'stepfold[compile]'"
    )


def test_another_seed_gives_other_tables(hoisted: Program) -> None:
    recipe = {"passes": [{"schedule": {**QUICK, "evaluations": 2}}]}
    schedules = [stepfold.apply(hoisted, recipe, seed=seed)[0].schedule for seed in (0, 1)]
    first, other = (schedule.fitted[2.0].conditional for schedule in schedules if schedule is not None)
    assert (first != other).any()


def test_the_engine_is_the_reference(captured: Program) -> None:
    """What the schedule is fitted on computes what verification ran."""
    with workshop("onnxruntime") as shop:
        assert drift(samples_of(captured, shop.open(captured)), samples_of(captured)) < EVALUATION
        folder = shop.folder
        assert folder.is_dir()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: stepfold.capture("model", {}), "model: expected a PyTorch module; received str 'model'"),
        (lambda p: stepfold.capture(torch.nn.Linear(1, 1), [1]), "kwargs: expected a mapping from names to values"),
        (lambda p: stepfold.capture(torch.nn.Linear(1, 1), {}, {"inputs": {}}), "loop: expected a LoopSpec or None"),
        (
            lambda p: stepfold.capture(torch.nn.Linear(1, 1), {}, method="decode"),
            "method: Linear has no method 'decode'",
        ),
        (lambda p: stepfold.capture(torch.nn.Linear(1, 1), {}, method=5), "method: expected a text; received int 5"),
        (lambda p: stepfold.apply(5, "fp32"), "program: expected what stepfold.capture returns; received int 5"),
        (lambda p: stepfold.apply(p, 5), "recipe: expected a name or a file; received 5"),
        (lambda p: stepfold.apply(p, "fp32", seed="1"), "seed: expected a whole number, 0 or more; received str '1'"),
        (lambda p: stepfold.apply(p, FP32, calibration=5), "calibration: expected a path; received int 5"),
        (lambda p: stepfold.apply(p, FP32, backend=5), "backend: expected a text; received int 5"),
        (lambda p: stepfold.apply(p, FP32, options=[1]), "options: expected a mapping from names to values"),
        (lambda p: stepfold.lower(5, out="o"), "program: expected what stepfold.capture returns; received int 5"),
        (lambda p: stepfold.lower(p, out=5), "out: expected a path; received int 5"),
        (lambda p: stepfold.lower(p, 5, out="o"), "backend: expected a text; received int 5"),
    ],
)
def test_wrong_types_name_the_argument(captured: Program, tmp_path: Path, monkeypatch, call, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        call(captured)
    assert str(caught.value).startswith(message) and list(tmp_path.iterdir()) == []
