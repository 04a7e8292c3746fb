"""modelopt's worker as a child process: with a modelopt that copies the model, and with children that misbehave."""

from __future__ import annotations

import json
import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from qdq import Builder, per_channel

from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.passes.quantize.modelopt import run
from stepfold.passes.quantize.modelopt.environment import create
from stepfold.passes.quantize.modelopt.run import Quantizer, quantize_onnx

BATCHES = [{"x": np.full((2, 3, 4), float(i), np.float32)} for i in range(3)]
FAKE = '''
import json, sys
from pathlib import Path
import onnx

def quantize(model, output_path, calibration_data_reader, use_external_data_format, **settings):
    """Copies the model; what it was given is left beside the test's model."""
    print("a library that prints")
    reader, means = calibration_data_reader, []
    for _ in range(2):
        reader.rewind()
        while (batch := reader.get_next()) is not None:
            means.append(float(batch["x"].mean()))
    first = float(reader.get_first()["x"].mean())
    seen = {"means": means, "first": first, "length": len(reader), "external": use_external_data_format, **settings}
    loaded = onnx.load(model)
    loaded.doc_string = json.dumps(seen)
    if "fail" in settings["nodes_to_exclude"]:
        sys.stderr.write("line of a log\\n" * 30)
        raise RuntimeError("the reason")
    save = {"save_as_external_data": True, "location": Path(output_path).name + "_data", "size_threshold": 0}
    onnx.save(loaded, output_path, **(save if use_external_data_format else {}))
'''


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the packages of this one and a modelopt that does nothing."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    python = create(folder, requirements=(), check="pass")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (packages / "here.pth").write_text("\n".join(dict.fromkeys(here)))
    module = packages / "modelopt" / "onnx" / "quantization"
    module.mkdir(parents=True)
    for parent in (module.parent.parent, module.parent):
        (parent / "__init__.py").touch()
    (module / "__init__.py").write_text(FAKE)
    return python


@pytest.fixture
def model(tmp_path: Path) -> Path:
    builder = Builder()
    weight = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    pair = builder.pair(builder.store("w", weight), per_channel(weight), np.zeros(6, np.int8), axis=1)
    builder.node("MatMul", ["x", pair], "y")
    return builder.save(tmp_path / "float.onnx", ["y"])


def test_the_worker_gets_everything(python: Path, model: Path, tmp_path: Path) -> None:
    out, calls = tmp_path / "out.onnx", []
    before = model.read_bytes()
    quantizer = Quantizer("int4", "awq_lite", excluded=("y", "z"))
    quantize_onnx(model, out, BATCHES, python, quantizer, lambda *call: calls.append(call))
    seen = json.loads(onnx.load(str(out)).doc_string)
    assert seen["means"] == [0.0, 1.0, 2.0] * 2 and seen["first"] == 0.0 and seen["length"] == 3
    assert (seen["quantize_mode"], seen["calibration_method"]) == ("int4", "awq_lite")
    assert seen["nodes_to_exclude"] == ["y", "z"] and seen["calibration_eps"] == ["cpu"]
    assert seen["high_precision_dtype"] == "fp32" and seen["external"] is False
    assert calls == [("modelopt int4", i, 3) for i in (1, 2, 3)] * 2
    assert model.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "out.onnx"]


@pytest.mark.parametrize("mode", ["int8", "fp8", "int4"])
def test_the_first_method_is_the_default(python: Path, model: Path, tmp_path: Path, mode: run.Mode) -> None:
    quantize_onnx(model, tmp_path / "out.onnx", BATCHES, python, Quantizer(mode))
    seen = json.loads(onnx.load(str(tmp_path / "out.onnx")).doc_string)
    assert seen["calibration_method"] == run.METHODS[mode][0]


def test_external_data(python: Path, model: Path, tmp_path: Path) -> None:
    loaded = onnx.load(str(model))
    onnx.save(loaded, str(model), save_as_external_data=True, location="float.onnx.data", size_threshold=0)
    out = tmp_path / "out.onnx"
    quantize_onnx(model, out, BATCHES, python)
    assert (tmp_path / "out.onnx.data").stat().st_size > 0
    received = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(str(out)).graph.initializer}
    for item in onnx.load(str(model)).graph.initializer:
        np.testing.assert_array_equal(received[item.name], onnx.numpy_helper.to_array(item))


def test_a_failure_ends_with_what_modelopt_said(python: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"the old one")
    with pytest.raises(StepfoldError) as caught:
        quantize_onnx(model, out, BATCHES, python, Quantizer(excluded=("fail",)))
    message = str(caught.value)
    assert message.startswith("modelopt int8 on float.onnx: its process ended with code 1. It said:\n")
    assert message.endswith("RuntimeError: the reason") and len(message.splitlines()) == 1 + run.TAIL
    assert out.read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "out.onnx"]


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """Let another script stand in for the worker."""
    script = folder / "other.py"
    script.write_text(source)
    monkeypatch.setattr(run, "WORKER", script)


SLEEPER = """
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({file!r}, "w").write(f"{{os.getpid()}} {{other.pid}}")
print('{{"progress": [1, 2]}}', flush=True)
time.sleep(600)
"""


def gone(file: Path) -> bool:
    """Whether the child and its own child are no more; a zombie that waits for its new parent is none."""
    for _ in range(100):
        if not any(_alive(int(number)) for number in file.read_text().split()):
            return True
        time.sleep(0.1)
    return False


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


@pytest.mark.skipif(os.name == "nt", reason="process groups are those of POSIX")
def test_an_interruption_ends_the_child(
    python: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    child(monkeypatch, tmp_path, SLEEPER.format(file=str(pids)))

    def interrupt(task: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_onnx(model, tmp_path / "out.onnx", BATCHES, python, progress=interrupt)
    assert gone(pids)
    assert not list(tmp_path.glob(".modelopt-*")) and not (tmp_path / "out.onnx").exists()


@pytest.mark.skipif(os.name == "nt", reason="process groups are those of POSIX")
def test_a_child_that_takes_too_long(
    python: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    child(monkeypatch, tmp_path, SLEEPER.format(file=str(pids)))
    started = []  # the limit counts from the first word of the child, so that a slow machine gets there
    follow = run._follow

    def from_the_start(process: Any, deadline: float, task: str, progress: run.Progress) -> None:
        while not pids.exists() or len(pids.read_text().split()) < 2:
            time.sleep(0.05)
        started.append(True)
        return follow(process, time.monotonic() + 0.5, task, progress)

    monkeypatch.setattr(run, "_follow", from_the_start)
    with pytest.raises(StepfoldError, match=r"it was not done after 7 s. It said:\n\(nothing on standard error\)"):
        quantize_onnx(model, tmp_path / "out.onnx", BATCHES, python, Quantizer(timeout=7))
    assert started and gone(pids)


def test_a_child_that_is_killed(python: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StepfoldError, match="its process killed by SIGKILL"):
        quantize_onnx(model, tmp_path / "out.onnx", BATCHES, python)


def test_a_child_that_prints_anything_and_writes_nothing(
    python: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, tmp_path, "print('hello'); print('[1]'); print('{}')")
    with pytest.raises(StepfoldError, match="it wrote no model"):
        quantize_onnx(model, tmp_path / "out.onnx", BATCHES, python)


def test_a_python_that_does_not_start(model: Path, tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match="modelopt: expected to start"):
        quantize_onnx(model, tmp_path / "out.onnx", BATCHES, tmp_path / "no-python")


def test_wrong_use(python: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one calibration batch"):
        quantize_onnx(model, tmp_path / "out.onnx", [], python)
    with pytest.raises(UsageError, match="mode: expected one of int8, fp8, int4; received 'int2'"):
        Quantizer("int2")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="method: expected one of max, entropy for fp8; received 'awq_lite'"):
        Quantizer("fp8", "awq_lite")
