"""Every stepfold:: operator compiled by Inductor equals its reference; what the written files are like."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blocks import block, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import component, modulated, modulated_example
from stages import STAGES, arrays
from torch import fx

from stepfold.backends.export import lowered
from stepfold.backends.inductor.capability import capability
from stepfold.backends.inductor.description import ObjectDescription
from stepfold.backends.inductor.lower import LOWERINGS, lower, prepare, refuse_calls_back
from stepfold.backends.inductor.options import InductorOptions
from stepfold.backends.inductor.session import open_session
from stepfold.ir.operators import RECORDS
from stepfold.ir.program import Stage, reference
from stepfold.ir.shapes import port, propagate
from stepfold.loop.errors import StepfoldError
from stepfold.loop.metrics import drift
from stepfold.loop.ports import Rate

pytestmark = pytest.mark.skipif(not capability().can_build, reason=capability().reason or "it builds here")

FLOAT = 1e-4  # relative; kernels choose the order of their sums
FEW = settings(max_examples=10)
OPTIONS = InductorOptions()
Run = Callable[[str, dict[str, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]


def opened(stage: Stage, folder: Path, options: InductorOptions = OPTIONS) -> Any:
    folder.mkdir(exist_ok=True)
    return open_session(lower(stage, folder, options=options), stage.inputs, stage.outputs, threads=1, options=options)


def side_by_side(stages: list[Stage]) -> Stage:
    """One stage of them all; their inputs and outputs have the number of their stage behind their names."""
    root, graph = torch.nn.Module(), fx.Graph()
    inputs, outputs = [], []
    for i, stage in enumerate(stages):
        root.add_module(f"stage{i}", stage.graph)
        results = copied(stage.graph.graph, graph, i)
        inputs += [replace(item, name=f"{item.name}_{i}") for item in stage.inputs]
        outputs += [(node, f"{item.name}_{i}") for node, item in zip(results, stage.outputs, strict=True)]
    graph.output(tuple(node for node, _ in outputs))
    module = fx.GraphModule(root, graph)
    propagate(module, inputs)
    return Stage("all", Rate.STEP, module, tuple(inputs), tuple(port(node, name) for node, name in outputs))


def copied(source: fx.Graph, target: fx.Graph, number: int) -> list[fx.Node]:
    """Copy the nodes of a stage, and return those that are its outputs."""
    made: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if node.op == "output":
            return [made[result] for result in node.args[0]]
        if node.op == "placeholder":
            made[node] = target.placeholder(f"{node.target}_{number}")
        else:
            made[node] = target.node_copy(node, made.__getitem__)
        if node.op == "get_attr":
            made[node].target = f"stage{number}.{node.target}"
    raise AssertionError("a graph ends with its output")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Outputs of a stage in Inductor beside those of its reference.

    All stages are compiled as one, because the compiler takes its ten seconds however little there is to compile.
    """
    together = side_by_side([stage for _, stage in STAGES.values()])
    call = opened(together, tmp_path_factory.mktemp("stage"))

    def run(name: str, inputs: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        number, stage = list(STAGES).index(name), STAGES[name][1]
        batch = len(next(iter(inputs.values())))
        shapes = {item: [batch if size is None else size for size in item.shape] for item in together.inputs}
        values = {item.name: np.zeros(shape, item.dtype) for item, shape in shapes.items()}
        outputs = call(values | {f"{key}_{number}": value for key, value in inputs.items()})
        found = zip(together.outputs, outputs, strict=True)
        received = [value for item, value in found if item.name.endswith(f"_{number}")]
        return list(zip(received, reference(stage)(inputs), strict=True))

    return run


def test_every_operator_is_lowered() -> None:
    assert all(operator in LOWERINGS or record.portable for operator, record in RECORDS.items())


@pytest.mark.parametrize("name", STAGES)
@FEW
@given(data=st.data(), batch=st.integers(1, 4))
def test_what_is_compiled_computes_what_the_operator_does(name: str, data: st.DataObject, batch: int) -> None:
    """Run by PyTorch, without compiling it."""
    stage = STAGES[name][1]
    inputs = {item.name: arrays(item, batch, data) for item in stage.inputs}
    results = reference(replace(stage, graph=lowered(stage, LOWERINGS)))(inputs)
    for received, wanted in zip(results, reference(stage)(inputs), strict=True):
        assert_same(received, wanted)


def assert_same(received: np.ndarray, wanted: np.ndarray) -> None:
    assert received.dtype == wanted.dtype and received.shape == wanted.shape
    if wanted.dtype == np.uint8:  # a value between two levels may go either way
        assert np.abs(received.astype(int) - wanted).max(initial=0) <= 1
        assert (received != wanted).mean() <= 0.2
    else:
        np.testing.assert_allclose(received, wanted, rtol=FLOAT, atol=FLOAT * max(1, np.abs(wanted).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
@FEW
@given(data=st.data(), batch=st.integers(1, 4))
def test_operators_equal_their_reference(both: Run, name: str, data: st.DataObject, batch: int) -> None:
    inputs = {item.name: arrays(item, batch, data) for item in STAGES[name][1].inputs}
    for received, wanted in both(name, inputs):
        assert_same(received, wanted)


@pytest.mark.slow
def test_one_object_serves_any_batch(tmp_path: Path) -> None:
    stage = modulated().step
    call = opened(stage, tmp_path)
    for batch in (1, 5, 2, 1):
        values = {item.name: value.numpy() for item, value in zip(stage.inputs, modulated_example(batch), strict=True)}
        np.testing.assert_allclose(call(values)[0], reference(stage)(values)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_transformer_block(tmp_path: Path, precision: str) -> None:
    stage, options = block().step, InductorOptions.model_validate({"precision": precision})
    call = opened(stage, tmp_path, options)
    for batch in (1, 3):
        values = {stage.inputs[0].name: tokens(batch)}
        (received,) = call(values)
        (exact,), (prepared,) = reference(stage)(values), reference(prepare(stage, options))(values)
        if precision == "fp32":
            assert drift(received, exact) < FLOAT
        else:
            assert drift(received, prepared) < 1e-2 and 1e-4 < drift(received, exact) < 2e-2


@pytest.mark.slow
def test_files_and_description(tmp_path: Path) -> None:
    stage = modulated().step
    values = {item.name: value.numpy() for item, value in zip(stage.inputs, modulated_example(3), strict=True)}
    results = []
    for name in "ab":
        (tmp_path / name).mkdir()
        file = lower(stage, tmp_path / name, options=OPTIONS)
        assert sorted(path.name for path in file.parent.iterdir()) == ["step.so", "step.so.description.json"]
        session = open_session(file, stage.inputs, stage.outputs, threads=1, options=OPTIONS)
        results.append(session(values)[0])
    first, second = results
    np.testing.assert_array_equal(first, second)  # though the files hold names of temporary folders
    found = ObjectDescription.read(tmp_path / "a" / "step.so")
    assert (found.input_ports(), found.output_ports()) == (stage.inputs, stage.outputs)
    assert found.torch == torch.__version__
    able = torch.cpu.get_capabilities()
    assert all(able[name] for name in found.instructions)


@pytest.mark.slow
def test_outputs_that_are_one_value_an_input_or_a_weight(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.arange(3.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x * 2
            return x, y, y, self.table.expand(x.shape[0], 3)

    stage = component(Odd(), torch.randn(2, 3)).step
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    call = opened(stage, tmp_path)
    for _ in range(2):
        outputs = call({stage.inputs[0].name: x})
        for received, wanted in zip(outputs, (x, 2 * x, 2 * x, np.tile(np.arange(3.0), (2, 1))), strict=True):
            np.testing.assert_array_equal(received, wanted)
            received[:] = 9  # outputs are the caller's own
    np.testing.assert_array_equal(x, np.arange(6).reshape(2, 3))


# -- what has no form


def test_a_batch_that_the_exporter_fixes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = component(lambda x: x.relu(), torch.randn(2, 3)).step
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, dynamic_shapes, **more: export(*a, **more))
    with pytest.raises(StepfoldError, match=r"stage forward: expected a dynamic batch; .* 'x' with batch 2 only"):
        lower(stage, tmp_path, options=OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listed", [True, False])
def test_a_list_of_operators_to_call_back(tmp_path: Path, listed: bool) -> None:
    stage = component(torch.nn.Linear(4, 3), torch.randn(2, 4)).step
    nodes = [{"name": "n", "node": {"target": "mine.twice"}}] if listed else []
    (tmp_path / "a.wrapper.json").write_text(json.dumps({"nodes": nodes}))
    (tmp_path / "a.wrapper_metadata.json").write_text(json.dumps({"AOTI_DEVICE_KEY": "cpu"}))
    if not listed:
        return refuse_calls_back(stage, tmp_path / "forward.so")
    with pytest.raises(StepfoldError, match=r"that Inductor has in C\+\+; mine\.twice would be called back by name"):
        refuse_calls_back(stage, tmp_path / "forward.so")
    return None


@pytest.mark.slow
def test_an_operator_that_would_be_called_back_is_refused(tmp_path: Path) -> None:
    @torch.library.custom_op("stepfold_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    stage = component(lambda x: twice(x) + 1, torch.randn(2, 3)).step
    with pytest.raises(StepfoldError, match=r"stage forward: expected operators that Inductor has in C\+\+; .*twice"):
        lower(stage, tmp_path, options=OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_what_the_compiler_says_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import exc

    def fails(*_: Any, **__: Any) -> None:
        raise exc.CppCompileError(["g++", "x.cpp"], "x.cpp:1: error: expected ';'")

    monkeypatch.setattr(torch._inductor, "aot_compile", fails)
    stage = component(torch.nn.Linear(4, 3), torch.randn(2, 4)).step
    with pytest.raises(StepfoldError, match="stage forward: Inductor cannot compile it: ") as caught:
        lower(stage, tmp_path, options=OPTIONS)
    assert len(str(caught.value).splitlines()) == 1
