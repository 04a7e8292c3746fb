"""Stages of one `stepfold::` operator each, and arrays for their inputs: what every engine is compared on."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from programs import component
from torch import fx

from stepfold.ir import operators  # noqa: F401  (registers them)
from stepfold.ir.program import Stage
from stepfold.ir.shapes import port, propagate
from stepfold.loop.ports import Port, Rate

stepfold = torch.ops.stepfold
M, N, T = 6, 5, 3
FINITE = st.one_of(
    st.just(0.0), st.floats(2**-20, 100, width=32), st.floats(-100, -(2**-20), width=32)
)  # no subnormals
LOGITS = st.integers(-16, 16).map(
    lambda value: value / 8
)  # what a softmax reads: it magnifies the rounding of large values
WEIGHT = torch.randint(-127, 128, (M, N), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
WEIGHT_SCALE = torch.linspace(0.001, 0.02, N)
BIAS = torch.linspace(-1, 1, N)


def one_call(operator: Callable, inputs: list[Port], weights: list[torch.Tensor | None], rest: tuple = ()) -> Stage:
    """A stage of one operator: its inputs, then weights, then plain numbers."""
    root = torch.nn.Module()
    graph = fx.Graph()
    arguments: list = [graph.placeholder(item.name) for item in inputs]
    for i, value in enumerate(weights):
        if value is not None:
            root.register_buffer(f"w{i}", value)
        arguments.append(None if value is None else graph.get_attr(f"w{i}"))
    call = graph.call_function(operator, (*arguments, *rest))
    parts = len(operator._schema.returns)  # type: ignore[attr-defined]
    results = [graph.call_function(python_operator.getitem, (call, i)) for i in range(parts)] if parts > 1 else [call]
    graph.output(tuple(results))
    module = fx.GraphModule(root, graph)
    propagate(module, inputs)
    outputs = tuple(port(node, f"y{i}") for i, node in enumerate(results))
    return Stage("one", Rate.STEP, module, tuple(inputs), outputs)


def floats(*shape: int | None, name: str = "x") -> Port:
    return Port(name, shape, "float32")


BYTES = Port("q", (None, T, M), "uint8")
ZERO = torch.tensor(100, dtype=torch.uint8)
LINEAR_WEIGHTS = [torch.tensor(0.02), ZERO, WEIGHT, WEIGHT_SCALE]
QKV = [floats(None, T, 8, name="q"), floats(None, 4, 8, name="k"), floats(None, 4, 8, name="v")]
ANGLES = torch.linspace(-3, 3, T * (M // 2)).reshape(T, M // 2)
TABLES = [ANGLES.cos(), ANGLES.sin()]
ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
BLOCKS = torch.randint(0, 256, (N, 2, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
STAGES: dict[str, tuple[Callable, Stage]] = {
    name: (arguments[0], one_call(*arguments))
    for name, arguments in {
        "quantize_dynamic": (stepfold.quantize_dynamic.default, [floats(None, T, M)], []),
        "quantize_dynamic of rows": (stepfold.quantize_dynamic.default, [floats(None, M)], []),
        "quantize_static": (stepfold.quantize_static.default, [floats(None, T, M)], [torch.tensor(0.3), ZERO]),
        "qlinear": (stepfold.qlinear.default, [BYTES], [*LINEAR_WEIGHTS, BIAS]),
        "qlinear without bias": (stepfold.qlinear.default, [BYTES], [*LINEAR_WEIGHTS, None]),
        "qlinear of rows": (stepfold.qlinear.default, [Port("q", (None, M), "uint8")], [*LINEAR_WEIGHTS, BIAS]),
        "attention": (stepfold.attention.default, [QKV[0]] * 1 + QKV[1:], [], (2, 0.5)),
        "rotary": (stepfold.rotary.default, [floats(None, T, 2, M)], TABLES, (False,)),
        "rotary, heads first": (stepfold.rotary.default, [floats(None, 2, T, M)], TABLES, (True,)),
        "block_sparse_attention": (
            stepfold.block_sparse_attention.default,
            [
                floats(None, 2, 11, 4, name=name) for name in "qkv"
            ],  # three words, then two by four tokens in four blocks
            [ORDER, ORDER.argsort(), torch.tensor([[[0, 2], [1, 3], [2, 0], [3, 1]]]), None],
            (3, 2, 0.5),
        ),
        "blocked_linear": (
            stepfold.blocked_linear.default,
            [floats(None, T, 32)],
            [BLOCKS, torch.linspace(0.1, 1, 2 * N).reshape(N, 2), None, BIAS],
            (4, 16, False),
        ),
        "round_fp8": (stepfold.round_fp8.default, [floats(None, T, M)], [torch.tensor(0.3)]),
        "round_nvfp4": (stepfold.round_nvfp4.default, [floats(None, T, 32)], [torch.tensor(0.04)]),
    }.items()
}


def decoded_layer(operator: Callable, weights: dict[str, torch.Tensor], wide: int) -> Stage:
    """`linear(x, decode(...))`, as `quantize` writes it."""
    root = torch.nn.Module()
    for name, value in weights.items():
        root.register_buffer(name, value)
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.call_function(operator, tuple(graph.get_attr(name) for name in weights))
    y = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    graph.output((y,))
    module, inputs = fx.GraphModule(root, graph), (floats(None, T, wide),)
    propagate(module, inputs)
    return Stage("decoded", Rate.STEP, module, inputs, (port(y, "y"),))


FP8 = torch.float8_e4m3fn
BLOCK_SCALES = torch.linspace(0.1, 1, 2 * N).reshape(N, 2)
DECODED = {
    "decode_fp8": ({"codes": torch.linspace(-9, 9, N * M).reshape(N, M).to(FP8), "scale": WEIGHT_SCALE}, M),
    "decode_nvfp4": ({"packed": BLOCKS.flatten(1), "scales": BLOCK_SCALES.to(FP8), "unit": torch.tensor(0.02)}, 32),
    "decode_codebook": (
        {"indices": BLOCKS[:, 0] % 5, "codebook": torch.linspace(-2, 3, 20).reshape(5, 4), "scale": WEIGHT_SCALE},
        32,
    ),
}
for _name, (_weights, _wide) in DECODED.items():
    _operator = getattr(stepfold, _name).default
    STAGES[_name] = (_operator, decoded_layer(_operator, _weights, _wide))


def static_pair(shape: tuple[int | None, ...], bias: torch.Tensor | None, from_input: bool = False) -> Stage:
    """`qlinear(quantize_static(x))`, as `quantize` writes it; its scale is stored, or comes in for each timestep."""
    root = torch.nn.Module()
    weights = {"scale": torch.tensor(0.3), "zero": ZERO, "weight": WEIGHT, "weight_scale": WEIGHT_SCALE}
    for name, value in (weights if bias is None else {**weights, "bias": bias}).items():
        root.register_buffer(name, value)
    graph = fx.Graph()
    x = graph.placeholder("x")
    scale, zero = graph.get_attr("scale"), graph.get_attr("zero")
    inputs = (floats(*shape),)
    if from_input:
        inputs = (*inputs, floats(None, name="by_timestep"))
        scale = graph.call_function(torch.ops.aten.select.int, (graph.placeholder("by_timestep"), 0, 0))
    q = graph.call_function(stepfold.quantize_static.default, (x, scale, zero))
    rest = (graph.get_attr("weight"), graph.get_attr("weight_scale"), None if bias is None else graph.get_attr("bias"))
    y = graph.call_function(stepfold.qlinear.default, (q, scale, zero, *rest))
    graph.output((y,))
    module = fx.GraphModule(root, graph)
    propagate(module, inputs)
    return Stage("pair", Rate.STEP, module, inputs, (port(y, "y"),))


def arrays(item: Port, batch: int, data: st.DataObject) -> np.ndarray:
    shape = tuple(batch if size is None else size for size in item.shape)
    if item.dtype == "uint8":
        return data.draw(hnp.arrays(np.uint8, shape))
    elements = LOGITS if item in QKV else FINITE
    return data.draw(hnp.arrays(np.float32, shape, elements=elements))


MASKS = {
    "of keys": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)[:, None, None],
    "of queries and keys": torch.ones(T, 4, dtype=torch.bool).tril().expand(2, 1, T, 4).clone(),
    "of heads": torch.ones(2, 2, T, 4, dtype=torch.bool).triu(diagonal=-1),
    "added": torch.linspace(-3, 3, 2 * T * 4).reshape(2, 1, T, 4),
}


@cache
def masked_attention() -> tuple[Stage, dict[str, np.ndarray]]:
    """Attention with each mask, with its own scale and another: a stage of one output for each, and its inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, size, 4, generator=generator) for size in (T, 4, 4))
    attend = torch.nn.functional.scaled_dot_product_attention

    def all_of_them(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        keys: torch.Tensor, queries: torch.Tensor, heads: torch.Tensor, added: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        masks = (keys, queries, heads, added)
        return tuple(attend(q, k, v, mask, scale=scale) for mask in masks for scale in (None, 0.3))

    examples = (q, k, v, *MASKS.values())
    stage = component(all_of_them, *examples).step
    return stage, {item.name: value.numpy() for item, value in zip(stage.inputs, examples, strict=True)}
