"""Sessions of OpenVINO: outputs in port order, any batch, own outputs, and clear refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threads import at_once

from stepfold.backends import capability, get
from stepfold.backends.openvino import capability as openvino_capability
from stepfold.backends.openvino import session
from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.loop.errors import BundleError, StepfoldError, UsageError
from stepfold.loop.ports import Port

INPUTS = (Port("x", (None, 2), "float32"), Port("nested.index", (None,), "int64"))
OUTPUTS = (Port("later", (None, 2), "float32"), Port("first", (None, 2), "float32"))
OPTIONS = OpenvinoOptions()
STATIC = OpenvinoOptions(shapes="static")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first = 2 x, later = x + index; the file declares them the other way round than the ports do."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")
    import openvino.opset13 as operations

    x = operations.parameter([-1, 2], np.float32)
    index = operations.parameter([-1], np.int64)
    first = operations.multiply(x, np.array([[2, 2]], np.float32))
    later = operations.add(x, operations.unsqueeze(operations.convert(index, "f32"), 1))
    for node, name in ((x, "x"), (index, "nested.index"), (first, "first"), (later, "later")):
        node.output(0).set_names({name})
    path = tmp_path_factory.mktemp("models") / "stage.xml"
    openvino.save_model(openvino.Model([first, later], [x, index], "stage"), path, compress_to_fp16=False)
    return path


def opened(file: Path, inputs: Any = INPUTS, outputs: Any = OUTPUTS, **more: Any) -> Any:
    return session.open_session(file, inputs, outputs, **{"threads": 1, "options": OPTIONS, **more})


def request(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(2 * batch, dtype=np.float32).reshape(batch, 2), "nested.index": np.full(batch, 5)}


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_come_in_port_order(file: Path, batch: int) -> None:
    later, first = opened(file)({**request(batch), "unused": np.zeros(1)})
    np.testing.assert_array_equal(first, 2 * request(batch)["x"])
    np.testing.assert_array_equal(later, request(batch)["x"] + 5)


def test_outputs_of_a_call_stay_when_the_next_one_is_made(file: Path) -> None:
    call = opened(file)
    later, first = call(request(2))
    kept = later.copy(), first.copy()
    call({"x": np.full((2, 2), 9, np.float32), "nested.index": np.full(2, 7)})
    np.testing.assert_array_equal(later, kept[0])
    np.testing.assert_array_equal(first, kept[1])


def test_inputs_may_be_strided_or_read_only(file: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)[:, ::2]
    frozen = np.ascontiguousarray(x)
    frozen.flags.writeable = False
    for value in (x, frozen):
        np.testing.assert_array_equal(opened(file)({"x": value, "nested.index": np.zeros(2, np.int64)})[1], 2 * x)


@pytest.mark.parametrize("options", [OPTIONS, STATIC], ids=["dynamic", "static"])
def test_the_batch_may_change_from_call_to_call(file: Path, options: OpenvinoOptions) -> None:
    call = opened(file, options=options)
    for batch in (3, 1, 5, 3):
        later, first = call(request(batch))
        np.testing.assert_array_equal(first, 2 * request(batch)["x"])
        np.testing.assert_array_equal(later, request(batch)["x"] + 5)


def test_static_shapes_are_those_of_the_batch_and_the_last_few_batches_are_kept(file: Path) -> None:
    call = opened(file, options=STATIC)
    for batch in (1, 2, 3, 4, 1, 5):
        call(request(batch))
    assert list(call._sessions) == [3, 4, 1, 5]
    for batch, kept in call._sessions.items():
        assert {tuple(port.shape) for port in kept._compiled.inputs} == {(batch, 2), (batch,)}
    kept = call._sessions[4]
    call(request(4))
    assert call._sessions[4] is kept


def test_a_stage_without_a_batch_has_no_other_shapes(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")
    import openvino.opset13 as operations

    x = operations.parameter([2], np.float32)
    y = operations.multiply(x, np.array([2], np.float32))
    x.output(0).set_names({"x"})
    y.output(0).set_names({"y"})
    openvino.save_model(openvino.Model([y], [x], "m"), tmp_path / "m.xml", compress_to_fp16=False)
    ports = (Port("x", (2,), "float32"),), (Port("y", (2,), "float32"),)
    call = opened(tmp_path / "m.xml", *ports, options=STATIC)
    assert call({"x": np.ones(2, np.float32)})[0].tolist() == [2, 2]


@pytest.mark.parametrize("options", [OPTIONS, STATIC], ids=["dynamic", "static"])
def test_threads_that_share_a_session_take_turns(file: Path, options: OpenvinoOptions) -> None:
    call, wrong = opened(file, options=options), []

    def work(value: int) -> None:
        for _ in range(50):
            x = np.full((value, 2), value, np.float32)
            later, first = call({"x": x, "nested.index": np.zeros(value, np.int64)})
            if not (np.array_equal(first, 2 * x) and np.array_equal(later, x)):
                wrong.append(value)

    at_once(work, (1, 2, 3))
    assert wrong == []


def test_properties_of_a_session(file: Path) -> None:
    compiled = opened(file, threads=1)._compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("PERFORMANCE_HINT") == "LATENCY"
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (INPUTS[:1], OUTPUTS, "expected the inputs x (float32, rank 2); received nested.index (int64, rank 1), x"),
        ((INPUTS[0], Port("nested.index", (None,), "int32")), OUTPUTS, "expected the inputs nested.index (int32"),
        ((INPUTS[0], Port("nested.index", (), "int64")), OUTPUTS, "expected the inputs nested.index (int64, rank 0)"),
        (INPUTS, OUTPUTS[:1], "expected the outputs later (float32, rank 2); received first"),
    ],
)
def test_other_ports_are_refused(file: Path, inputs: tuple[Port, ...], outputs: tuple[Port, ...], message: str) -> None:
    with pytest.raises(BundleError) as error:
        opened(file, inputs, outputs)
    assert message in str(error.value) and "stage.xml" in str(error.value)


def test_values_with_further_names(tmp_path: Path) -> None:
    """Compilation gives a value the names of others that it finds to be equal."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")
    import openvino.opset13 as operations

    x = operations.parameter([-1, 2], np.float32)
    y = operations.multiply(x, np.array([[2, 2]], np.float32))
    x.output(0).set_names({"x", "also_x"})
    y.output(0).set_names({"later", "first", "other"})
    openvino.save_model(openvino.Model([y], [x], "m"), tmp_path / "m.xml", compress_to_fp16=False)
    later, first = opened(tmp_path / "m.xml", INPUTS[:1])({"x": np.ones((1, 2), np.float32)})
    assert later.tolist() == first.tolist() == [[2, 2]]


@pytest.mark.parametrize("content", [b"", b"<net", None])
def test_a_file_that_is_no_model(file: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.xml").write_bytes(content)
    with pytest.raises(BundleError, match=r"x\.xml: OpenVINO [0-9.]+ cannot load it: \S") as caught:
        opened(tmp_path / "x.xml")
    assert len(str(caught.value).splitlines()) == 1 and "Exception from" not in str(caught.value)


@pytest.mark.parametrize("weights", [None, b"", b"1"], ids=["missing", "empty", "short"])
def test_weights_that_are_not_there(file: Path, tmp_path: Path, weights: bytes | None) -> None:
    (tmp_path / "stage.xml").write_bytes(file.read_bytes())
    if weights is not None:
        (tmp_path / "stage.bin").write_bytes(weights)
    with pytest.raises(BundleError, match=r"stage\.xml: OpenVINO [0-9.]+ cannot load it: "):
        opened(tmp_path / "stage.xml")


@pytest.mark.parametrize("options", [OPTIONS, STATIC], ids=["dynamic", "static"])
def test_a_run_that_fails_says_what_it_was_given_and_does_no_harm(file: Path, options: OpenvinoOptions) -> None:
    """A request of OpenVINO that failed goes on failing; the next call of a session has a new one."""
    call = opened(file, options=options)
    for _ in range(2):
        with pytest.raises(
            StepfoldError, match=r"stage\.xml: OpenVINO failed on x \[1, 3\] float32, nested\.index \[1\]"
        ):
            call({"x": np.zeros((1, 3), np.float32), "nested.index": np.zeros(1, np.int64)})
        assert len(call(request(3))[0]) == 3


@pytest.mark.parametrize(
    ("x", "rows"),
    [(np.zeros((1, 2)), 1), (np.zeros((3, 2), np.float32), 2), (np.zeros((2, 2), np.float32), 3)],
    ids=["float64", "fewer", "more"],
)
@pytest.mark.parametrize("options", [OPTIONS, STATIC], ids=["dynamic", "static"])
def test_other_types_and_batches_are_not_taken_in_silence(
    file: Path, x: np.ndarray, rows: int, options: OpenvinoOptions
) -> None:
    with pytest.raises(StepfoldError, match=r"stage\.xml: expected x \[B, 2\] float32, .* received x \[\d, 2\] float"):
        opened(file, options=options)({"x": x, "nested.index": np.zeros(rows, np.int64)})


def test_outputs_of_another_batch_are_an_error(file: Path) -> None:
    """What OpenVINO 2026.4 does with ONEDNN_VERBOSE set, for models whose batch is dynamic."""
    call = opened(file)
    real = call._request

    class Empty:
        def infer(self, *arguments: Any, **keywords: Any) -> None:
            real.infer(*arguments, **keywords)

        def get_output_tensor(self, position: int) -> Any:
            return type("Tensor", (), {"data": real.get_output_tensor(position).data[:0]})

    call._request = Empty()
    with pytest.raises(StepfoldError, match=r"expected outputs of batch 3; OpenVINO gave \[0\] and no error\. Unset"):
        call(request(3))


def test_a_device_that_this_backend_lacks(file: Path) -> None:
    with pytest.raises(UsageError, match=r"device: expected cpu, .* received 'cuda'"):
        opened(file, device="cuda")


def test_a_session_needs_no_torch(file: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "onnx_ir", "onnxscript")))
import numpy as np
from pathlib import Path
from stepfold.backends import get
from stepfold.loop.ports import Port
inputs = (Port("x", (None, 2), "float32"), Port("nested.index", (None,), "int64"))
outputs = (Port("later", (None, 2), "float32"), Port("first", (None, 2), "float32"))
call = get("openvino").open_session(Path({str(file)!r}), inputs, outputs, threads=1)
print(call({{"x": np.ones((1, 2), np.float32), "nested.index": np.zeros(1, np.int64)}})[1].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.stdout == "[[2.0, 2.0]]\n", done.stderr


# -- capability


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    find = capability.importlib.util.find_spec
    monkeypatch.setattr(
        capability.importlib.util, "find_spec", lambda name: None if name in modules else find(name) or object()
    )


def test_a_missing_engine_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without(monkeypatch, "openvino")
    found = openvino_capability.capability()
    assert (found.can_build, found.can_run, found.version) == (False, False, None)
    with pytest.raises(UsageError) as caught:
        get("openvino").open_session(tmp_path / "x.xml", INPUTS, OUTPUTS)
    assert str(caught.value) == (
        "backend 'openvino' cannot run here: openvino is not installed. Install it: pip install 'stepfold[openvino]'"
    )


def test_a_missing_compiler_leaves_running(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", "onnx")
    found = openvino_capability.capability()
    assert (found.can_build, found.can_run, found.reason) == (False, True, "building needs torch, onnx")


def test_everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    found = openvino_capability.capability()
    assert (found.can_build, found.can_run, found.reason) == (True, True, "")
    assert found.install == "pip install 'stepfold[compile,openvino]'"
