"""What a deployed bundle needs imports and runs where PyTorch and the compiler are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BLOCKED = ("torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "transformers", "accelerate", "scipy")

PRELUDE = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(f"{{name}} is blocked by this test")
sys.meta_path.insert(0, Blocker())
"""

IMPORTS = """
import pkgutil, importlib
import stepfold
names = []
for package in ("loop", "bundle", "runtime", "backends"):
    module = importlib.import_module(f"stepfold.{package}")
    if package != "backends":  # the lowerings need torch
        names += [item.name for item in pkgutil.walk_packages(module.__path__, f"stepfold.{package}.")]
for engine in ("onnxruntime", "openvino", "inductor"):
    names += [f"stepfold.backends.{engine}.capability", f"stepfold.backends.{engine}.session"]
for name in names:
    importlib.import_module(name)
print(len(names))
"""

SAMPLE = """
import json
from pathlib import Path
import numpy as np
from stepfold.backends import backends
from stepfold.bundle import verify
from stepfold.runtime import load
from stepfold.runtime.engine import open_stage
path = Path(sys.argv[1])
engine = load(path, threads=1)
print(json.dumps({
    "samples": engine.generate(3, seed=5).tolist(),
    "outputs": [array.shape for array in engine.run(
        hidden_states=np.zeros((2, 1, 2, 2), "float32"), timestep=np.ones(2, "float32"), class_labels=[0, 1])],
    "verify": verify(path, lambda bundle, stage: open_stage(bundle, stage, threads=1)),
    "can_build": [backend.can_build for backend in backends() if backend.name == "onnxruntime"],
}))
"""


def blocked(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", BLOCKED)
def test_the_block_works(name: str) -> None:
    with pytest.raises(AssertionError, match=f"{name} is blocked by this test"):
        blocked(f"import {name}")


def test_everything_that_runs_a_bundle_imports() -> None:
    assert int(blocked(IMPORTS)) > 20


def test_a_bundle_is_loaded_verified_and_sampled(tiny, read_only_bundle: Path) -> None:
    result = json.loads(blocked(SAMPLE, str(read_only_bundle)))
    noise = np.random.default_rng(5).standard_normal((3, 1, 2, 2)).astype("float32")
    expected = tiny.sample(noise, np.arange(3), 2.0, (0, 2))
    np.testing.assert_allclose(np.array(result["samples"], np.float32), expected, atol=1e-6)
    assert result["outputs"] == [[2, 1, 2, 2]]
    assert result["verify"] == [[], []]
    assert result["can_build"] == [False]
