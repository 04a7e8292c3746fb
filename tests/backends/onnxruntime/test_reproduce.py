"""The smallest part that ONNX Runtime gets wrong, and what `verify --reduce` makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from stepfold.backends.onnxruntime import reproduce
from stepfold.backends.onnxruntime.reproduce import node_by_node, smallest_failure
from stepfold.bundle import write_manifest
from stepfold.bundle.reader import read_manifest
from stepfold.cli import main
from stepfold.loop.errors import UsageError
from stepfold.runtime.reduction import reduce_bundle

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)


def chain(folder: Path, *operators: str) -> Path:
    names = ["x", *(f"v{i}" for i in range(len(operators)))]
    nodes = [helper.make_node(op, [names[i]], [names[i + 1]], name=f"n{i}") for i, op in enumerate(operators)]
    value = helper.make_tensor_value_info
    ports = [value(name, TensorProto.FLOAT, ["B", 2]) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:])
    file = folder / "stage.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    return file


def kinds(model: onnx.ModelProto | None) -> list[str]:
    return [] if model is None else [node.op_type for node in model.graph.node]


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """An engine whose optimized form of one operator is off by a percent."""
    real = reproduce._session

    def of(operator: str) -> None:
        def opened(model: onnx.ModelProto, *, optimized: bool) -> Any:
            session = real(model, optimized=optimized)
            if not optimized or operator not in kinds(model):
                return session

            class Off:
                def run(self, names: Any, feed: Any) -> list[np.ndarray]:
                    return [output * 1.01 for output in session.run(names, feed)]

            return Off()

        monkeypatch.setattr(reproduce, "_session", opened)

    return of


def test_a_sound_stage_has_no_failing_part(tmp_path: Path) -> None:
    file = chain(tmp_path, "Exp", "Sqrt", "Neg")
    np.testing.assert_allclose(node_by_node(file, {"x": X})["v2"], -np.sqrt(np.exp(X)), rtol=1e-6)
    assert smallest_failure(file, {"x": X}, 1e-4) is None


def test_one_operator_that_is_computed_wrongly(tmp_path: Path, wrong: Callable[[str], None]) -> None:
    wrong("Sqrt")
    part = smallest_failure(chain(tmp_path, "Exp", "Neg", "Abs", "Sqrt", "Neg"), {"x": X}, 1e-4)
    assert kinds(part) == ["Sqrt"] and part is not None
    assert [value.name for value in part.graph.input] == ["v2"]
    assert smallest_failure(tmp_path / "stage.onnx", {"x": X}, 0.1) is None, "within the tolerance"


def test_one_operator_that_the_engine_does_not_have(tmp_path: Path) -> None:
    part = smallest_failure(chain(tmp_path, "Exp", "Neg", "Nonexistent", "Neg"), {"x": X}, 1e-4)
    assert kinds(part) == ["Nonexistent"]


def test_a_stage_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "LARGEST_BYTES", 10)
    with pytest.raises(UsageError, match="expected at most 10 bytes of weights"):
        smallest_failure(chain(tmp_path, "Exp"), {"x": X}, 1e-4)


# -- the command


def test_verify_writes_the_part(
    read_only_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that an engine of this version cannot open; the others are not touched."""
    copy = tmp_path / "copy"
    shutil.copytree(read_only_bundle, copy)
    file = copy / "stages" / "step.onnx"
    model = onnx.load(file, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Mul").op_type = "Nonexistent"
    onnx.save(model, file)
    write_manifest(copy, read_manifest(copy))
    monkeypatch.chdir(tmp_path)
    assert main(["verify", str(copy), "--reduce"]) == 1
    told = capsys.readouterr().out
    target = tmp_path / "copy-step-reduced.onnx"
    assert f"stage step: 1 of its {len(model.graph.node)} nodes fail alone: {target}" in told
    assert kinds(onnx.load(target)) == ["Nonexistent"]


def test_verify_of_a_sound_bundle_reduces_nothing(
    read_only_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", str(read_only_bundle), "--reduce", "--json"]) == 0
    assert '"reduced": []' in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert reduce_bundle(read_only_bundle, tmp_path) == []


def test_other_engines_are_refused(read_only_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(read_only_bundle, copy)
    manifest = read_manifest(copy)
    backend = manifest.backend.model_copy(update={"name": "inductor"})
    write_manifest(copy, manifest.model_copy(update={"backend": backend}))
    with pytest.raises(UsageError, match="--reduce: expected a bundle of onnxruntime"):
        reduce_bundle(copy, tmp_path)
