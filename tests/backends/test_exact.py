"""Codes that saturate without VNNI get forms that are exact on every processor; all others stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import needs_emulator
from programs import operators
from stages import WEIGHT_SCALE, N, floats
from torch import fx

import stepfold
from stepfold.backends.exact import in_two_layers, saturating_layers, with_unsigned_weights
from stepfold.backends.registry import get
from stepfold.ir import operators as registered  # noqa: F401  (registers the stepfold:: operators)
from stepfold.ir.edit import copy_graph, finish
from stepfold.ir.pairs import LARGEST_SUM, pair_sums
from stepfold.ir.program import InputPort, ModelIdentity, Program, Stage, reference, slots_of
from stepfold.ir.shapes import port, propagate
from stepfold.loop.ports import Rate
from stepfold.report.emulation import without_vnni

M, T = 65, 3  # an odd width: the last code has no neighbour
UNSIGNED, SIGNED = torch.tensor(0, dtype=torch.uint8), torch.tensor(0, dtype=torch.int8)
SAFE = torch.full((M, N), 64, dtype=torch.int8)
WORST = torch.full((M, N), 127, dtype=torch.int8)
LOWEST = torch.full((M, N), -128, dtype=torch.int8)
MIXED = torch.randint(-128, 128, (M, N), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
CODES = {"worst": WORST, "lowest": LOWEST, "random": MIXED, "safe": SAFE}


def layers(*codes: torch.Tensor, zero: torch.Tensor = UNSIGNED) -> Stage:
    """Integer layers that read one value under a stored scale of 1."""
    root, graph = torch.nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    for name, value in {"scale": torch.tensor(1.0), "zero": zero, "weight_scale": WEIGHT_SCALE}.items():
        root.register_buffer(name, value)
    scale, zero_point = graph.get_attr("scale"), graph.get_attr("zero")
    q = graph.call_function(torch.ops.stepfold.quantize_static.default, (x, scale, zero_point))
    results = []
    for i, value in enumerate(codes):
        root.register_buffer(f"codes{i}", value)
        arguments = (q, scale, zero_point, graph.get_attr(f"codes{i}"), graph.get_attr("weight_scale"), None)
        results.append(graph.call_function(torch.ops.stepfold.qlinear.default, arguments))
    graph.output(tuple(results))
    module, inputs = fx.GraphModule(root, graph), (floats(None, T, M),)
    propagate(module, inputs)
    return Stage("step", Rate.STEP, module, inputs, tuple(port(node, f"y{i}") for i, node in enumerate(results)))


def largest(zero: torch.Tensor) -> np.ndarray:
    """Activations [2, T, M] that add up to most."""
    x = np.full((2, T, M), 255 if zero.dtype is torch.uint8 else 127, np.float32)
    x[1, :, ::3] = 0 if zero.dtype is torch.uint8 else -127
    return x


def test_only_what_saturates_is_found() -> None:
    stage = layers(SAFE, WORST, MIXED, SAFE)
    assert [str(node.args[3].target) for node in saturating_layers(stage)] == ["codes1", "codes2"]  # type: ignore[union-attr]


@pytest.mark.parametrize("form", [with_unsigned_weights, in_two_layers])
def test_safe_codes_stay_as_they_are(form) -> None:
    stage = layers(SAFE, SAFE)
    assert form(stage) is stage


def test_unsigned_weights() -> None:
    stage = layers(SAFE, LOWEST)
    exact = with_unsigned_weights(stage)
    weights = [exact.tensors()[str(n.args[3].target)] for n in exact.graph.graph.nodes if "qlinear" in str(n.target)]
    assert torch.equal(weights[0], SAFE) and torch.equal(weights[1], torch.zeros(M, N, dtype=torch.uint8))
    assert with_unsigned_weights(exact) is exact
    for wanted, received in zip(*(reference(s)({"x": largest(UNSIGNED)}) for s in (stage, exact)), strict=True):
        np.testing.assert_array_equal(received, wanted)


def test_layers_of_equal_codes_stay_equal() -> None:
    """An engine that makes equal layers once finds them."""
    stage = layers(WORST)
    graph = copy_graph(stage)
    (layer,) = graph.graph.find_nodes(op="call_function", target=torch.ops.stepfold.qlinear.default)
    with graph.graph.inserting_after(layer):
        twin = graph.graph.call_function(layer.target, layer.args)
    with graph.graph.inserting_after(twin):
        total = graph.graph.call_function(torch.ops.aten.add.Tensor, (layer, twin))
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    for form in (with_unsigned_weights, in_two_layers):
        exact = form(finish(stage, graph))
        weights = [str(n.args[3].target) for n in exact.graph.graph.nodes if "qlinear" in str(n.target)]
        assert len(set(weights)) == len(weights) / 2


def test_signed_activations_keep_signed_weights() -> None:
    exact = with_unsigned_weights(layers(WORST, zero=SIGNED))
    assert all(tensor.dtype is not torch.uint8 for tensor in exact.tensors().values())


@pytest.mark.parametrize("codes", CODES.values(), ids=list(CODES))
def test_two_layers(codes: torch.Tensor) -> None:
    stage = layers(codes, SAFE)
    exact = in_two_layers(stage)
    halves = [tensor for name, tensor in exact.tensors().items() if "codes" in name]
    assert all(int(pair_sums(half.T).max()) <= LARGEST_SUM for half in halves)
    assert operators(exact).count("stepfold.qlinear.default") == (2 if codes is SAFE else 3)
    assert in_two_layers(exact) is exact
    for wanted, received in zip(*(reference(s)({"x": largest(UNSIGNED)}) for s in (stage, exact)), strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-6)


RUN = """
import json, sys
import numpy as np
import stepfold
for path, array in json.loads(sys.argv[1]):
    np.savez(array + ".out.npz", *stepfold.load(path, threads=1).run(x=np.load(array)))
"""


@needs_emulator
def test_engines_are_exact_without_vnni(tmp_path: Path) -> None:
    """Every kind of codes and activations on both engines, in a bundle whose manifest says what was written otherwise."""
    jobs = []
    for engine in ("onnxruntime", "openvino"):
        if not get(engine).capability().can_run:
            continue
        for zero in (UNSIGNED, SIGNED):
            stage, out = layers(*CODES.values(), zero=zero), tmp_path / f"{engine}-{zero.dtype}"
            program = Program(
                slots=slots_of(stage),
                inputs=(InputPort(stage.inputs[0], "condition"),),
                outputs=tuple(item.name for item in stage.outputs),
                example={"x": torch.from_numpy(largest(zero))},
                model=ModelIdentity("Layers", ""),
            )
            (entry,) = stepfold.load(stepfold.lower(program, engine, out=out)).manifest.stages
            assert len(entry.exact_forms) == 3
            np.save(f"{out}.npy", largest(zero))
            jobs.append((str(out), f"{out}.npy", reference(stage)({"x": largest(zero)})))
    without_vnni("-c", RUN, json.dumps([job[:2] for job in jobs]))
    for path, array, wanted in jobs:
        received = np.load(f"{array}.out.npz")
        for i, value in enumerate(wanted):
            np.testing.assert_allclose(received[f"arr_{i}"], value, rtol=1e-5, err_msg=f"{path} {list(CODES)[i]}")


@needs_emulator
def test_the_emulated_processor_saturates(tmp_path: Path) -> None:
    """Without the forms above the same layer is wrong there, so the tests above can fail."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["q", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("q", TensorProto.UINT8, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [4, 16])],
        [numpy_helper.from_array(np.full((64, 16), 127, np.int8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "one.onnx")
    program = (
        "import sys, numpy as np, onnxruntime; print(onnxruntime.InferenceSession(sys.argv[1])"
        ".run(None, {'q': np.full((4, 64), 255, np.uint8)})[0][0, 0])"
    )
    assert int(without_vnni("-c", program, str(tmp_path / "one.onnx"))) == 64 // 2 * 32767 < 64 * 255 * 127
