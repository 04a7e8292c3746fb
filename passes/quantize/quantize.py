"""Quantize: linear layers in 8 bits."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import fx

from ...calibration.ranges import Range, observe_ranges
from ...calibration.read import Calibration
from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.edit import add_buffer, copy_graph, finish
from ...ir.names import module_path
from ...ir.program import Program, Refusal, Stage, attribute
from ...loop.ports import Rate
from ..base import Context, Options, Pass, PassResult
from .int8 import activation_range, quantize_weight
from .smooth import smooth

LINEAR = torch.ops.aten.linear.default


class QuantizeOptions(Options):
    """Options of `quantize`.

    Attributes:
        scheme: number format; `int8` is 8-bit weights and activations.
        weights: granularity of the weight scales.
        activations: `dynamic` scales are computed from each tensor at run time and couple the samples of a batch;
            `static` scales are calibrated and do not.
        smooth: SmoothQuant exponent of the layers that read a modulation, from 0 (activations keep the difficulty)
            to 1; null leaves activations as they are.
        include: module patterns to quantize.
        skip: module patterns to leave alone.
        min_tokens: a linear layer applied to fewer rows per sample gains nothing.
        max_drift: largest drift of this pass on the probe.
    """

    scheme: Literal["int8"] = "int8"
    weights: Literal["per_channel"] = "per_channel"
    activations: Literal["dynamic", "static"] = "dynamic"
    smooth: float | None = Field(default=None, ge=0, le=1)
    include: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    min_tokens: int = Field(default=2, ge=1)
    max_drift: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class LinearSite:
    """A linear layer of a stage: its node, module path and the value it reads."""

    node: fx.Node
    name: str
    source: fx.Node


class Quantize(Pass[QuantizeOptions]):
    """Replace linear layers of the step stage by integer ones; layers that read one value share its quantization.

    linear(x, W) + b -> s_x s_W (q(x) - z) W_q + b with W_q int8 per output channel and q(x) uint8.
    """

    name = "quantize"
    family = "quantize"
    source = "Q1 of the method cards; ONNX Runtime MatMulIntegerToFloat"
    options_type = QuantizeOptions

    def not_applicable(self, program: Program) -> str | None:
        """Whether the program has linear layers at all."""
        found = any(node.target is LINEAR for stage in program.stages for node in stage.graph.graph.nodes)
        already = any(_is_quantized(node) for stage in program.stages for node in stage.graph.graph.nodes)
        return None if found or already else "the program has no linear layer"

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every accepted site of the stage that computes the prediction."""
        stage = program.step
        sites, refused = self._sites(stage)
        if not sites:
            done = any(_is_quantized(node) for node in stage.graph.graph.nodes)
            return PassResult(program, 0, tuple(refused), identity=done)
        ranges: dict[str, Range] = {}
        if self.options.smooth is not None or self.options.activations == "static":
            ranges = _ranges_by_site(program, sites, context)
        if self.options.smooth is not None:
            program, ranges, unsmoothed = _smoothed(program, sites, ranges, self.options.smooth)
            refused += unsmoothed
            stage = program.step
            sites, _ = self._sites(stage)
        static = ranges if self.options.activations == "static" else {}
        quantized = _rewrite(stage, sites, static)
        details = {**self.options.model_dump(), "sites": [site.name for site in sites]}
        return PassResult(program.with_stage(quantized), len(sites), tuple(refused), details=details)

    def _sites(self, stage: Stage) -> tuple[list[LinearSite], list[Refusal]]:
        accepted, refused = [], []
        for node in stage.graph.graph.nodes:
            if node.target is not LINEAR:
                continue
            site = LinearSite(node, module_path(node), node.args[0])
            reason = self._refuse(stage, site)
            if reason is None:
                accepted.append(site)
            else:
                refused.append(Refusal(site.name, reason))
        return accepted, refused

    def _refuse(self, stage: Stage, site: LinearSite) -> str | None:
        if not any(fnmatch(site.name, pattern) for pattern in self.options.include):
            return "not included"
        if any(fnmatch(site.name, pattern) for pattern in self.options.skip):
            return "skipped by the recipe"
        weight = site.node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return "its weight is computed, not stored"
        shape = site.source.meta["shape"]
        tokens = 1
        for size in shape[1:-1]:
            tokens *= size or 1
        if stage.rate is Rate.STEP and tokens < self.options.min_tokens:
            return f"{tokens} row a sample: weights dominate, not arithmetic"
        if _feeds_output_only(site.node):
            return "the last layer: its error is not damped by anything behind it"
        return None


def _ranges_by_site(program: Program, sites: list[LinearSite], context: Context) -> dict[str, Range]:
    """The range of what each site reads over the real loop, by node name, which copies of a graph keep.

    Raises:
        UsageError: the calibration store that was given is of another program, or has no such site.
    """
    if context.calibration is not None:
        context.calibration.require(program)
        return {site.node.name: _stored_range(context.calibration, site) for site in sites}
    watched = {site.source for site in sites}
    ranges = observe_ranges(program, watched, context.seed, context.progress)
    return {site.node.name: ranges[site.source] for site in sites}


def _stored_range(calibration: Calibration, site: LinearSite) -> Range:
    statistics = calibration.site(site.name, site.node.name)
    return Range(*(torch.from_numpy(np.asarray(end, np.float32)) for end in (statistics.low(), statistics.high())))


def _smoothed(
    program: Program, sites: list[LinearSite], ranges: dict[str, Range], alpha: float
) -> tuple[Program, dict[str, Range], list[Refusal]]:
    """The smoothed program and its ranges, which follow from those before without another run."""
    groups: dict[fx.Node, list[LinearSite]] = {}
    for site in sites:
        groups.setdefault(site.source, []).append(site)
    layers = {source: [site.node for site in members] for source, members in groups.items()}
    largest = {source: ranges[members[0].node.name].largest() for source, members in groups.items()}
    program, scales, refused = smooth(program, layers, largest, alpha)
    names = {site.node.name: site.name for site in sites}
    divided = {
        site.node.name: ranges[site.node.name].divided(scales[source]) if source in scales else ranges[site.node.name]
        for source, members in groups.items()
        for site in members
    }
    return program, divided, [Refusal(names.get(refusal.site, refusal.site), refusal.reason) for refusal in refused]


def _is_quantized(node: fx.Node) -> bool:
    return node.target is torch.ops.stepfold.qlinear.default


def _feeds_output_only(node: fx.Node) -> bool:
    """Whether only layout operators stand between a layer and the prediction."""
    layout = ("view", "reshape", "permute", "transpose", "einsum", "clone", "_unsafe_view", "slice", "split", "getitem")
    seen, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user.op == "output" or user in seen:
                continue
            if not any(str(user.target).removeprefix("aten.").startswith(name) for name in layout):
                return False
            seen.add(user)
            stack.append(user)
    return True


def _rewrite(stage: Stage, sites: list[LinearSite], ranges: dict[str, Range]) -> Stage:
    graph = copy_graph(stage)
    twins = dict(zip(stage.graph.graph.nodes, graph.graph.nodes, strict=True))
    quantized: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}
    for site in sites:
        node, source = twins[site.node], twins[site.source]
        if source not in quantized:
            quantized[source] = _quantize_activation(graph, node, source, ranges.get(site.node.name), site.name)
        _replace_linear(graph, node, quantized[source], site.name)
    return finish(stage, graph)


def _quantize_activation(
    graph: fx.GraphModule, before: fx.Node, source: fx.Node, known: Range | None, name: str
) -> tuple[fx.Node, fx.Node, fx.Node]:
    with graph.graph.inserting_before(before):
        if known is None:
            triple = graph.graph.call_function(torch.ops.stepfold.quantize_dynamic.default, (source,))
            parts = [graph.graph.call_function(operator.getitem, (triple, i)) for i in range(3)]
            return parts[0], parts[1], parts[2]
        scale, zero = activation_range(float(known.low.min()), float(known.high.max()))
        scale_node = graph.graph.get_attr(add_buffer(graph, f"{name}.input_scale", scale))
        zero_node = graph.graph.get_attr(add_buffer(graph, f"{name}.input_zero", zero))
        q = graph.graph.call_function(torch.ops.stepfold.quantize_static.default, (source, scale_node, zero_node))
        return q, scale_node, zero_node


def _replace_linear(
    graph: fx.GraphModule, node: fx.Node, quantized: tuple[fx.Node, fx.Node, fx.Node], name: str
) -> None:
    weight = attribute(graph, str(node.args[1].target))  # type: ignore[union-attr]
    q, scale = quantize_weight(weight.detach())
    bias = node.args[2] if len(node.args) > 2 else None
    with graph.graph.inserting_before(node):
        weight_node = graph.graph.get_attr(add_buffer(graph, f"{name}.weight_int8", q))
        scale_node = graph.graph.get_attr(add_buffer(graph, f"{name}.weight_scale", scale))
        new = graph.graph.call_function(torch.ops.stepfold.qlinear.default, (*quantized, weight_node, scale_node, bias))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
