"""A tiny DiT checkpoint, a bundle of it, and hand-written reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parents[1]


def zoo() -> Any:
    """The module `tests/zoo.py`, once."""
    if "stepfold_zoo" not in sys.modules:
        specification = importlib.util.spec_from_file_location("stepfold_zoo", TESTS / "zoo.py")
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules["stepfold_zoo"] = module
        specification.loader.exec_module(module)
    return sys.modules["stepfold_zoo"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a DiT with two blocks; 8 Euler steps, guidance 2."""
    return zoo().DIT.save(tmp_path_factory.mktemp("checkpoints") / "dit")


@pytest.fixture(scope="session")
def loop_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that checkpoint: the whole denoiser on ONNX Runtime, every second of the 8 calls evaluated."""
    from stepfold.bundle import Manifest, Probe, Tables, write_manifest, write_probe, write_tables, writing
    from stepfold.frontend.load import load_checkpoint
    from stepfold.frontend.sampler import probe
    from stepfold.loop.table import fold
    from stepfold.report.baselines.onnx_engines import export

    loaded = load_checkpoint(checkpoint)
    assert loaded.loop is not None
    recurrence = probe(loaded.loop.sampler)
    inputs = {name: np.ascontiguousarray(loaded.kwargs[name].numpy()) for name in loaded.loop.inputs}
    ports = [
        {"name": name, "shape": [None, *value.shape[1:]], "dtype": str(value.dtype)} for name, value in inputs.items()
    ]
    roles = {"hidden_states": "state", "timestep": "timestep", "class_labels": "condition"}
    sample = {"name": "sample", "shape": [None, *loaded.loop.latent.shape], "dtype": "float32"}
    out = tmp_path_factory.mktemp("bundles") / "half"
    with writing(out) as folder:
        stages = folder / "stages"
        stages.mkdir()
        export(checkpoint, loaded.loop, stages)
        (stages / "model.onnx").rename(stages / "step.onnx")
        write_tables(folder, Tables(recurrence, {2.0: fold(recurrence, 2.0, range(0, 8, 2))}))
        recorded = {"sample": np.zeros((2, *loaded.loop.latent.shape), np.float32)}
        write_manifest(
            folder,
            Manifest.model_validate(
                {
                    "stepfold_version": "0.1.0",
                    "model": {"class": loaded.class_name, "weights_sha256": loaded.weights_sha256},
                    "recipe": {"name": "half", "passes": []},
                    "loop": loaded.loop.model_dump(mode="json"),
                    "backend": {"name": "onnxruntime", "version": "1", "device": "cpu"},
                    "batch_invariant": True,
                    "inputs": [
                        {**port, "role": roles[port["name"]]}
                        | ({"cardinality": 11} if port["name"] == "class_labels" else {})
                        for port in ports
                    ],
                    "outputs": ["sample"],
                    "probe": write_probe(folder, Probe(inputs, recorded, 1e-4)),
                    "stages": [
                        {
                            "name": "step",
                            "rate": "step",
                            "file": "stages/step.onnx",
                            "inputs": ports,
                            "outputs": [sample],
                        }
                    ],
                }
            ),
        )
    return out
