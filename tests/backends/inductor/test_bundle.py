"""Bundles of Inductor: packed, loaded, verified and sampled, with and without model code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import MODEL_CODE, command
from programs import modulated, samples_of

import stepfold
from stepfold.backends.inductor.capability import capability
from stepfold.bundle.verify import verify
from stepfold.ir.program import Program, reference
from stepfold.loop.metrics import drift
from stepfold.loop.noise import noise
from stepfold.runtime.engine import open_stage

pytestmark = pytest.mark.skipif(not capability().can_build, reason=capability().reason or "it builds here")

EVALUATION = 1e-4  # relative, of one evaluation against eager PyTorch


@pytest.mark.slow
def test_samples_are_those_of_the_reference(tmp_path: Path) -> None:
    program, _ = stepfold.apply(modulated(), {"passes": ["hoist"]}, backend="inductor")
    folder = stepfold.lower(program, "inductor", out=tmp_path / "bundle")
    engine = stepfold.load(folder, threads=1)
    assert {stage.file for stage in engine.manifest.stages} == {f"stages/{stage.name}.so" for stage in program.stages}
    assert engine.manifest.backend.options == {"precision": "fp32"} and engine.manifest.batch_invariant
    latents = noise(3, (5, 3, 5))
    samples = engine.sample(latents, c=np.resize(program.example["c"].numpy(), 5))
    assert drift(samples, samples_of(program)) < EVALUATION
    again = stepfold.load(folder, threads=1).sample(latents, c=np.resize(program.example["c"].numpy(), 5))
    np.testing.assert_array_equal(samples, again)
    assert verify(folder, open_stage) == ([], [])


@pytest.mark.slow
def test_the_step_stage_of_the_reference_checkpoint(reference_program: Program, tmp_path: Path) -> None:
    program, _ = stepfold.apply(reference_program, {"passes": ["hoist"]}, backend="inductor")
    folder = stepfold.lower(program, "inductor", out=tmp_path / "bundle")
    engine = stepfold.load(folder, threads=1)
    step = next(stage for stage in engine.program.stages if stage.name == program.step.name)
    generator = np.random.default_rng(0)
    for batch in (1, 4, 2):
        values = {
            port.name: generator.standard_normal([size or batch for size in port.shape]).astype(port.dtype)
            for port in program.step.inputs
        }
        (received,), (wanted,) = step.call(values), reference(program.step)(values)
        assert drift(received, wanted) < EVALUATION
        np.testing.assert_array_equal(step.call(values)[0], received)

    assert json.loads(command("verify", folder, "--json", blocked=MODEL_CODE))["ok"]
    words = ("generate", folder, "--npy", tmp_path / "a.npy", "--out", tmp_path / "a.png", "--count", 3, "--seed", 7)
    command(*words, blocked=MODEL_CODE)
    assert drift(np.load(tmp_path / "a.npy"), engine.generate(3, seed=7)) < 1e-3
