"""Nothing that runs reports home: no file beside what was asked for, no connection."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import forbidden
import pytest
from folders import hashes

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from forbidden import forbid_connections
forbid_connections()
{body}
time.sleep(0.5)  # libraries report from threads of their own
print("done")
"""
CONNECTING = "import socket\nsocket.socket(socket.AF_INET).connect(('127.0.0.1', 9))"
BUNDLE = "from stepfold.cli import main\nassert main(['generate', sys.argv[2], '--npy', sys.argv[3]]) == 0"
BASELINES = """
import numpy as np
from pathlib import Path
from stepfold.report.baselines.openvino_engines import convert, without_telemetry
without_telemetry()
import nncf, openvino
source = Path(sys.argv[2]) / "stages"
(Path(sys.argv[3]) / "model.onnx").write_bytes((source / "embed.onnx").read_bytes())
convert(Path(sys.argv[3]), Path(sys.argv[3]))
nncf.quantize(openvino.Core().read_model(Path(sys.argv[3]) / "model.xml"), nncf.Dataset(
    [{"class_labels": np.zeros(1, np.int64), "timestep": np.ones(1, np.float32)}]))
"""
CHECKPOINT = "from stepfold.cli import main\nassert main(['inspect', sys.argv[2]]) == 0"

needs_filter = pytest.mark.skipif(
    not forbidden.available(), reason="needs Linux to forbid connections of all libraries"
)


def run(body: str, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A program in a home of its own, without a network."""
    home.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = kept | {"HOME": str(home), "TMPDIR": str(home), "USER": "nobody", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROGRAM.format(body=body), TESTS, *words]
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, check=False)


def early(source: str) -> list[str]:
    """The imports of ONNX Runtime that run before anything of stepfold can switch its telemetry off."""
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import)]
    return [alias.name for node in imports for alias in node.names if alias.name.split(".")[0] == "onnxruntime"]


def test_programs_import_stepfold_first() -> None:
    programs = [path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert programs and {path.name: early(path.read_text()) for path in programs if early(path.read_text())} == {}
    assert early("import numpy\nimport onnxruntime\nimport stepfold") == ["onnxruntime"]


@needs_filter
def test_a_connection_would_be_noticed(tmp_path: Path) -> None:
    assert run(CONNECTING, tmp_path / "home").returncode == -31  # SIGSYS


@needs_filter
def test_a_bundle_runs_without_a_file_or_a_connection(read_only_bundle: Path, tmp_path: Path) -> None:
    done = run(BUNDLE, tmp_path / "home", read_only_bundle, tmp_path / "out.npy")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("done\n")
    assert hashes(tmp_path / "home") == {} and (tmp_path / "out.npy").is_file()


@needs_filter
@pytest.mark.slow
def test_a_checkpoint_is_looked_into_without_a_connection(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run(CHECKPOINT, tmp_path / "home", tiny_checkpoint)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "home") == {}


@needs_filter
@pytest.mark.slow
def test_baselines_are_made_without_a_file_or_a_connection(read_only_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    out = tmp_path / "out"
    out.mkdir()
    done = run(BASELINES, tmp_path / "home", read_only_bundle, out)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "home") == {}
