"""Bundles of OpenVINO: packed, loaded, verified and sampled, with and without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blocks import needs_vnni
from commands import NOT_OF_THE_CORE, command
from programs import modulated, samples_of

import stepfold
from stepfold.bundle.probe import TOLERANCE, Probe
from stepfold.bundle.verify import verify
from stepfold.loop.errors import UsageError
from stepfold.loop.metrics import drift
from stepfold.loop.noise import noise
from stepfold.passes.base import silent
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.engine import open_stage

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")

MNIST = Path(__file__).resolve().parents[3] / "examples" / "mnist_dit"
EVALUATIONS = 8
QUICK = {"evaluations": EVALUATIONS, "samples": 16, "search_samples": 8, "moves": 0}  # a schedule in a minute


@pytest.mark.parametrize("passes", [[], ["hoist"]], ids=["captured", "hoisted"])
def test_samples_are_those_of_the_reference(tmp_path: Path, passes: list[str]) -> None:
    program = modulated()
    if passes:
        program, _ = stepfold.apply(program, {"passes": passes}, backend="openvino")
    folder = stepfold.lower(program, "openvino", out=tmp_path / "bundle")
    files = {path.name for path in (folder / "stages").iterdir()}
    assert files == {f"{stage.name}{suffix}" for stage in program.stages for suffix in (".xml", ".bin")}
    engine = stepfold.load(folder, threads=1)
    assert (
        engine.manifest.backend.options == {"precision": "fp32", "shapes": "dynamic"}
        and engine.manifest.batch_invariant
    )
    latents, labels = noise(3, (5, 3, 5)), np.arange(5) % 3
    assert drift(engine.sample(latents, c=np.resize(program.example["c"].numpy(), 5)), samples_of(program)) < 1e-4
    np.testing.assert_array_equal(engine.sample(latents, c=labels)[:1], engine.sample(latents[:1], c=labels[:1]))
    assert verify(folder, open_stage) == ([], [])


def test_a_bundle_in_bfloat16(tmp_path: Path) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    program = modulated()
    folder = stepfold.lower(program, "openvino", out=tmp_path / "bundle", options={"precision": "bf16"})
    engine = stepfold.load(folder, threads=1)
    assert engine.manifest.backend.options == {"precision": "bf16", "shapes": "dynamic"}
    probe = engine.bundle.probe()
    assert isinstance(probe, Probe) and probe.tolerance == TOLERANCE["bfloat16"]
    inputs = {name: value.numpy() for name, value in program.example.items()}
    assert 1e-4 < drift(engine.run(**inputs)[0], program.bind().evaluate(inputs)[0]) < 2e-2


def test_an_unknown_option(tmp_path: Path) -> None:
    program = modulated()
    with pytest.raises(UsageError, match="option 'precision': expected 'fp32' or 'bf16'; received 'fp16'"):
        stepfold.lower(program, "openvino", out=tmp_path / "bundle", options={"precision": "fp16"})


# -- the reference checkpoint


@pytest.mark.slow
@needs_vnni
def test_the_reference_checkpoint_end_to_end(tmp_path: Path) -> None:
    """int8 with stored scales, eight evaluations; then verify and generate."""
    out = tmp_path / "bundle"
    settings = [("schedule", name, value) for name, value in QUICK.items()]
    document = optimize(Job(MNIST, out, "default", settings, "openvino"), silent)
    assert document["schedule"]["evaluations"] == EVALUATIONS and document["schedule"]["fitted_on"] == "engine"
    assert document["quality"]["psnr_db"]["mean"] > 35  # Euler in eight steps: 31 dB

    assert json.loads(command("verify", out, "--json", blocked=NOT_OF_THE_CORE))["ok"]
    words = ("generate", out, "--npy", tmp_path / "a.npy", "--out", tmp_path / "a.png", "--count", 10, "--seed", 7)
    command(*words, blocked=NOT_OF_THE_CORE)
    samples = np.load(tmp_path / "a.npy")
    engine = stepfold.load(out)
    assert engine.manifest.batch_invariant, "its scales are stored"
    assert drift(samples[:3], engine.generate(3, seed=7)) < 1e-2
    assert json.loads(command("inspect", out, "--json", blocked=NOT_OF_THE_CORE))["backend"]["name"] == "openvino"
