"""Small stages for tests of TensorRT, also with symmetric int8 activations, the form it takes; plans take a second."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from graphs import traced
from torch import fx

from stepfold.backends.tensorrt.options import TensorrtOptions
from stepfold.backends.tensorrt.provider import RTX
from stepfold.frontend.repairs import repair
from stepfold.ir import operators  # noqa: F401  (registers the stepfold:: operators)
from stepfold.ir.edit import add_buffer, copy_graph, finish
from stepfold.ir.program import Stage, attribute
from stepfold.ir.shapes import port
from stepfold.loop.ports import Rate

needs_rtx = pytest.mark.skipif(not RTX.is_installed, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx")
LEVELS = 127
WEIGHT_LEVELS = 64
"""Two neighbours add up to 128, so that ONNX Runtime, in the place of TensorRT, is exact on all processors."""
SM89 = TensorrtOptions(capability="SM89")


class Block(torch.nn.Module):
    """A modulated block of attention and feed-forward: x [B, T, 32], shift [B, 32], t [B] -> [B, T, 32]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32)
        self.up = torch.nn.Linear(32, 64)
        self.down = torch.nn.Linear(64, 32)
        self.norm = torch.nn.LayerNorm(32, elementwise_affine=False)

    def forward(self, x: torch.Tensor, shift: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = torch.sin(t[:, None] * torch.linspace(1, 0.01, 32))
        h = self.norm(x) * (1 + angle[:, None]) + shift[:, None]
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(h).chunk(3, -1))
        x = x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


@cache
def block() -> Stage:
    """A stage of one `Block`, captured once a process."""
    generator = torch.Generator().manual_seed(1)
    x, shift = torch.randn(2, 8, 32, generator=generator), torch.randn(2, 32, generator=generator)
    return stage_of(Block(), x, shift, torch.tensor([700.5, 33.0]))


def stage_of(model: Any, *examples: torch.Tensor, name: str = "step") -> Stage:
    """A stage of a function or module; its outputs are called y0, y1, ..."""
    before = traced(model, *examples)
    repair(before.graph, before.inputs)
    graph = fx.GraphModule(before.graph, before.graph.graph)
    results = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = tuple(port(node, f"y{i}") for i, node in enumerate(results))
    return Stage(name, Rate.STEP, graph, before.inputs, outputs)


def symmetric_int8(stage: Stage, largest: float = 4.0) -> Stage:
    """The stage with int8 weights per channel and activations of one scale, those up to `largest` not saturated."""
    graph = copy_graph(stage)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = attribute(graph, str(node.args[1].target)).detach()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / WEIGHT_LEVELS
        codes = torch.round(weight / scale[:, None]).to(torch.int8).T.contiguous()
        values = (torch.tensor(largest / LEVELS), torch.tensor(0, dtype=torch.int8), codes, scale)
        with graph.graph.inserting_before(node):
            names = [add_buffer(graph, f"{node.name}_{i}", value) for i, value in enumerate(values)]
            step, zero, weight_node, scale_node = (graph.graph.get_attr(name) for name in names)
            q = graph.graph.call_function(torch.ops.stepfold.quantize_static.default, (node.args[0], step, zero))
            bias = node.args[2] if len(node.args) > 2 else None
            arguments = (q, step, zero, weight_node, scale_node, bias)
            new = graph.graph.call_function(torch.ops.stepfold.qlinear.default, arguments)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    return finish(stage, graph)
