"""The files that a graph reads: found wherever a tensor can stand, and compared with those that were checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from stepfold.backends.onnxruntime.external import external_files
from stepfold.backends.registry import get
from stepfold.bundle import read, write_manifest
from stepfold.bundle.reader import read_manifest
from stepfold.bundle.verify import verify
from stepfold.loop.errors import BundleError
from stepfold.loop.held import HeldFile, StageFiles
from stepfold.loop.ports import Port
from stepfold.runtime.engine import load, open_stage
from stepfold.runtime.reduction import reduce_bundle

PORTS = (Port("x", (None, 2), "float32"),), (Port("y", (None, 2), "float32"),)


def external(name: str, *, shuffled: bool = False) -> TensorProto:
    """A tensor [2] of float32 in a file of this name."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    entries = [("location", name), ("offset", "0"), ("length", "8")]
    for key, value in reversed(entries) if shuffled else entries:
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def graph(initializers: list[TensorProto], nodes: list | None = None) -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in "xy")
    return helper.make_graph(nodes or [helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], initializers)


def model(body: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def in_an_attribute() -> onnx.ModelProto:
    return model(graph([], [helper.make_node("Constant", [], ["w"], value=external("f"))]))


def in_a_branch() -> onnx.ModelProto:
    inner = model(graph([external("f")])).graph
    return model(graph([], [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]))


def in_a_sparse_tensor() -> onnx.ModelProto:
    made = model(graph([]))
    made.graph.sparse_initializer.add().values.CopyFrom(external("f"))
    return made


def in_a_function() -> onnx.ModelProto:
    made = model(graph([]))
    node = helper.make_node("Constant", [], ["w"], value=external("f"))
    made.functions.append(helper.make_function("d", "F", [], ["w"], [node], [helper.make_opsetid("", 21)]))
    return made


PLACES: dict[str, Callable[[], onnx.ModelProto]] = {
    "initializer": lambda: model(graph([external("f")])),
    "value before key": lambda: model(graph([external("f", shuffled=True)])),
    "attribute": in_an_attribute,
    "branch": in_a_branch,
    "sparse tensor": in_a_sparse_tensor,
    "function": in_a_function,
}


@pytest.mark.parametrize("place", PLACES)
def test_files_are_found_wherever_a_tensor_can_stand(place: str) -> None:
    assert external_files(PLACES[place]().SerializeToString()) == {"f"}


def test_the_word_alone_is_no_file() -> None:
    made = model(graph([helper.make_tensor("w", TensorProto.UINT8, [8], b"location", raw=True)]))
    made.graph.doc_string = "location"
    assert external_files(made.SerializeToString()) == set()


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_bytes_that_are_no_model(cut: int) -> None:
    content = PLACES["initializer"]().SerializeToString()
    with pytest.raises(ValueError, match="it ends in the middle of a"):
        external_files(content[:-cut])


@pytest.mark.parametrize("name", ["other.data", "../secret.data", "/etc/hostname", "a/../weights.data", ""])
def test_a_file_that_was_not_checked_is_not_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "stages"
    folder.mkdir()
    for place in (folder / "weights.data", folder / "other.data", tmp_path / "secret.data"):
        place.write_bytes(np.ones(2, np.float32).tobytes())
    (folder / "step.onnx").write_bytes(model(graph([external(name)])).SerializeToString())
    files = StageFiles(folder, {file: HeldFile(folder / file) for file in ("step.onnx", "weights.data")})
    with pytest.raises(
        BundleError, match=r"step\.onnx: expected weights in the files of the bundle beside it; it reads"
    ):
        get("onnxruntime").open_session(folder / "step.onnx", *PORTS, files=files)


def test_a_bundle_that_reads_a_file_outside(bundle_folder: Path) -> None:
    """Its digests are right; loading, checking and reducing it refuse the graph all the same."""
    (bundle_folder.parent / "secret.data").write_bytes(bytes(16))
    stage = bundle_folder / "stages" / "step.onnx"
    stage.write_bytes(stage.read_bytes().replace(b"step.onnx.data", b"../secret.data"))
    write_manifest(bundle_folder, read_manifest(bundle_folder))
    assert external_files(stage.read_bytes()) == {"../secret.data"}
    for use in (load, lambda path: reduce_bundle(path, bundle_folder.parent)):
        with pytest.raises(BundleError, match=r"step\.onnx: expected weights in the files of the bundle beside it"):
            use(bundle_folder)
    (problem,), _ = verify(bundle_folder, open_stage)
    assert problem.startswith("stage step: ") and "reads '../secret.data'" in problem


def test_a_graph_that_is_replaced_behind_the_check(bundle_folder: Path) -> None:
    bundle = read(bundle_folder)
    stage = bundle.manifest.stages[0]
    (bundle_folder / stage.file).unlink()
    (bundle_folder / stage.file).write_bytes(b"something else")
    call = open_stage(bundle, stage)
    (shift,) = call({"class_labels": np.array([1]), "timestep": np.array([1000], np.float32)})
    np.testing.assert_allclose(shift, [[0.2]])


def replaced_by_another(weights: Path) -> None:
    weights.rename(weights.with_suffix(".old"))
    weights.write_bytes(np.zeros(2, np.float32).tobytes())


def moved_and_put_back(weights: Path) -> None:
    replaced_by_another(weights)
    weights.with_suffix(".old").replace(weights)


def written_in_place(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.write(np.zeros(2, np.float32).tobytes())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced_by_another, r"weights\.data: expected the file that was checked"),
        (moved_and_put_back, r"weights\.data: expected the file that was checked"),
        (written_in_place, r"weights\.data: expected the file that was checked"),
        (Path.unlink, r"step\.onnx: ONNX Runtime .* cannot load it"),
    ],
)
def test_weights_that_change_after_the_check(tmp_path: Path, change: Callable[[Path], None], reason: str) -> None:
    """ONNX Runtime reads them by their path: what it has read counts only if the checked file lay there all the time."""
    (tmp_path / "weights.data").write_bytes(np.ones(2, np.float32).tobytes())
    (tmp_path / "step.onnx").write_bytes(model(graph([external("weights.data")])).SerializeToString())
    files = StageFiles(tmp_path, {name: HeldFile(tmp_path / name) for name in ("step.onnx", "weights.data")})
    change(tmp_path / "weights.data")
    with pytest.raises(BundleError, match=reason):
        get("onnxruntime").open_session(tmp_path / "step.onnx", *PORTS, files=files)
