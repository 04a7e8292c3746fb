"""ONNX files with weights in common refer to one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepfold.backends.onnx.share import share
from stepfold.backends.shared import LARGE_BYTES, SHARED

N = 32  # 4 KiB a matrix of floats: as small as what is shared
RANDOM = np.random.default_rng(0)
COMMON, EARLY, LATE, LARGE = (
    RANDOM.standard_normal(shape).astype(np.float32) for shape in ((N, N), (N, N), (N, N), (LARGE_BYTES // 4 // N, N))
)
SMALL = np.ones(N, np.float32)


def save(folder: Path, name: str, weights: Mapping[str, np.ndarray], external: bool = False) -> Path:
    """`y = x * sum(w0) * sum(w1)...`: the names differ from one file to another."""
    nodes = []
    for i, key in enumerate(weights):
        nodes += [helper.make_node("ReduceSum", [key], [f"sum_{i}"], keepdims=0)]
        nodes += [helper.make_node("Mul", [f"x_{i}" if i else "x", f"sum_{i}"], [f"x_{i + 1}"])]
    nodes += [helper.make_node("Identity", [f"x_{len(weights)}"], ["y"])]
    value = [helper.make_tensor_value_info(port, TensorProto.FLOAT, [None]) for port in "xy"]
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, name, value[:1], value[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    file = folder / f"{name}.onnx"
    onnx.save(model, file, save_as_external_data=external, location=f"{file.name}.data", size_threshold=0)
    return file


def run(file: Path) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(str(file)).run(None, {"x": np.array([0.25, 3.0], np.float32)})[0])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=[False, True], ids=["inside", "external"])
def external(request: pytest.FixtureRequest) -> bool:
    """Whether the weights lie beside the files before."""
    return request.param


def test_common_weights_are_stored_once(tmp_path: Path, external: bool) -> None:
    early = save(tmp_path, "early", {"a": COMMON, "b": EARLY, "s": SMALL}, external)
    late = save(tmp_path, "late", {"t": SMALL, "c": LATE, "d": COMMON}, external)
    outputs, size = [run(early), run(late)], sum(map(len, contents(tmp_path).values()))
    shared = share([early, late])
    assert shared is not None and (shared.file, shared.readers) == (tmp_path / SHARED, (early, late))
    assert shared.file.read_bytes() == COMMON.tobytes() and shared.saved_bytes == COMMON.nbytes
    assert [run(early).tobytes(), run(late).tobytes()] == [output.tobytes() for output in outputs]
    after = contents(tmp_path)
    assert sum(map(len, after.values())) < size - COMMON.nbytes + 256  # two references
    assert after.keys() == {"early.onnx", "late.onnx", SHARED, *(["early.onnx.data", "late.onnx.data"] * external)}
    for content in (value for name, value in after.items() if name != SHARED):
        assert COMMON.tobytes() not in content
    for file in (early, late):
        onnx.checker.check_model(str(file))


def test_a_file_of_external_data_that_is_all_shared_goes(tmp_path: Path) -> None:
    files = [save(tmp_path, name, {"a": COMMON, "b": LARGE}, external=True) for name in ("early", "late")]
    before = run(files[0])
    shared = share(files)
    assert shared is not None and shared.saved_bytes == COMMON.nbytes + LARGE.nbytes
    assert contents(tmp_path).keys() == {"early.onnx", "late.onnx", SHARED}
    assert [run(file).tobytes() for file in files] == [before.tobytes()] * 2


def test_types_and_shapes_stay_with_the_stage(tmp_path: Path) -> None:
    """Equal bytes are stored once, whatever each stage takes them for."""
    files = [save(tmp_path, "early", {"a": COMMON}), save(tmp_path, "late", {"b": COMMON.reshape(N // 2, 2 * N)})]
    assert share(files) is not None
    shapes = [list(onnx.load(file, load_external_data=False).graph.initializer[0].dims) for file in files]
    assert shapes == [[N, N], [N // 2, 2 * N]]
    np.testing.assert_array_equal(
        numpy_helper.to_array(onnx.load(files[1]).graph.initializer[0]).ravel(), COMMON.ravel()
    )


def test_files_with_nothing_in_common_stay(tmp_path: Path, external: bool) -> None:
    early = save(tmp_path, "early", {"a": EARLY, "s": SMALL}, external)
    late = save(tmp_path, "late", {"a": LATE, "s": SMALL}, external)
    before = contents(tmp_path)
    assert share([early, late]) is None and contents(tmp_path) == before


def test_a_third_file_stays(tmp_path: Path) -> None:
    early, late = (save(tmp_path, name, {"a": COMMON}) for name in ("early", "late"))
    other = save(tmp_path, "other", {"a": EARLY})
    before = other.read_bytes()
    shared = share([other, early, late])
    assert shared is not None and shared.readers == (early, late) and other.read_bytes() == before


def test_the_same_files_give_the_same_bytes(tmp_path: Path, external: bool) -> None:
    made = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        weights = ({"a": COMMON, "l": LARGE, "b": EARLY}, {"l": LARGE, "c": LATE, "d": COMMON})
        share([save(folder, f"stage_{i}", held, external) for i, held in enumerate(weights)])
        made.append(contents(folder))
    assert made[0] == made[1]


def test_what_is_read_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that was written half would be one that nobody can open."""

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    files = [save(tmp_path, name, {"a": COMMON}) for name in ("early", "late")]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr("stepfold.backends.onnx.share.onnx.save", full)
    with pytest.raises(OSError, match="No space left"):
        share(files)
    assert [file.read_bytes() for file in files] == before
