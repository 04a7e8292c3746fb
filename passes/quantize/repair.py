"""Let the second layer of a feed-forward pair absorb what rounding took from the first, without any data (Q8).

Unified Data-Free Compression (arXiv 2308.07209): inputs are drawn as the modulated norm in front of the pair would make
them, with the scales and shifts that the model itself computes for a few timesteps, and the second layer is refitted to
the outputs of the unrounded pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from ...calibration.observe import watched_program
from ...ir.analysis.sites.feed_forward import find_feed_forward
from ...ir.analysis.sites.site import Site
from ...ir.edit import Copies, add_buffer, module_of
from ...ir.probe import probe_inputs
from ...ir.program import Program, Refusal, attribute
from .algebra.data_free import Pair, compensate, synthetic_inputs
from .layers import Group
from .smooth import modulation

TOKENS = 4096
CALLS = 8
"""Calls of the loop whose modulations are drawn from."""


@dataclass(frozen=True)
class Repairs:
    """What was refitted.

    Attributes:
        program: program with other second layers.
        errors: name of a pair -> relative output error without and with the repair, on synthetic inputs of another draw.
        refused: the pairs that were left alone.
    """

    program: Program
    errors: Mapping[str, tuple[float, float]]
    refused: Sequence[Refusal]


def repair_pairs(
    program: Program, groups: Sequence[Group], rounded: Callable[[Group], Sequence[torch.Tensor]], seed: int
) -> Repairs:
    """Refit the second layer of every feed-forward pair whose first layer is quantized.

    Args:
        program: its layers still in floats.
        groups: groups that will be quantized.
        rounded: the weights [N, M] that the layers of a group are rounded to.
        seed: seed of the synthetic inputs.
    """
    copies = Copies(program)
    by_node = {group.layers[0].node: group for group in groups if len(group.layers) == 1}
    errors: dict[str, tuple[float, float]] = {}
    refused = []
    for site in [site for stage in program.steps for site in find_feed_forward(stage.graph.graph).sites]:
        up, (down,) = site.parts["up"], site.parts["down"]
        operands = modulation(up[0].args[0])  # type: ignore[arg-type]
        if len(up) != 1 or up[0] not in by_node or len(site.parts["activation"]) != 1 or len(site.nodes) != 3:
            refused.append(Refusal(site.name, "repair: not a plain pair of layers around one activation"))
        elif operands is None or "layer_norm" not in str(_norm_of(operands).target):
            refused.append(Refusal(site.name, "repair: its input is not a modulated layer norm"))
        else:
            vectors = _modulations(program, [operand for operand, _ in operands])
            pair, (first,) = _pair(site), rounded(by_node[up[0]])
            damaged = Pair(first, pair.first_bias, pair.second, pair.second_bias, pair.activation)
            draw = partial(synthetic_inputs, TOKENS, vectors[0] - 1, vectors[1])
            found = compensate(pair, damaged, draw(2 * seed), draw(2 * seed + 1))
            errors[site.name] = (found.baseline, found.error)
            _set_layer(copies.twins[down], found.pair)
    return Repairs(copies.program(), errors, refused)


def _norm_of(operands: Sequence[tuple[fx.Node, fx.Node]]) -> fx.Node:
    """The norm that the scale of a modulation multiplies."""
    scale, product = operands[0]
    return next(a for a in product.args[:2] if a is not scale)  # type: ignore[return-value]


def _modulations(program: Program, nodes: Sequence[fx.Node]) -> list[torch.Tensor]:
    """What vectors are at a few calls, for the conditions of the example: each [S, D]."""
    seen: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in nodes}
    bound = watched_program(program, {node: seen[node].append for node in nodes})
    calls = program.recurrence.calls if program.recurrence is not None else 1
    for i in range(min(CALLS, calls)):
        call = i * calls // min(CALLS, calls)
        bound.evaluate(probe_inputs(program, call), call)
    return [torch.cat([value.flatten(0, -2) for value in values]) for values in seen.values()]


def _pair(site: Site) -> Pair:
    up, activation, down = site.parts["up"][0], site.parts["activation"][0], site.parts["down"][0]
    (first, first_bias), (second, second_bias) = (_weights(layer) for layer in (up, down))

    def act(hidden: torch.Tensor) -> torch.Tensor:
        return activation.target(hidden, *activation.args[1:], **activation.kwargs)  # type: ignore[operator]

    return Pair(first, first_bias, second, second_bias, act)


def _weights(layer: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, M] and bias [N] of a layer."""
    weight = attribute(module_of(layer), str(layer.args[1].target)).detach()  # type: ignore[union-attr]
    if len(layer.args) < 3 or layer.args[2] is None:
        return weight, weight.new_zeros(weight.shape[0])
    return weight, attribute(module_of(layer), str(layer.args[2].target)).detach()  # type: ignore[union-attr]


def _set_layer(layer: fx.Node, pair: Pair) -> None:
    with layer.graph.inserting_before(layer):
        weight = layer.graph.get_attr(add_buffer(module_of(layer), f"{layer.name}.repaired", pair.second.contiguous()))
        bias = layer.graph.get_attr(add_buffer(module_of(layer), f"{layer.name}.repaired_bias", pair.second_bias))
    layer.args = (layer.args[0], weight, bias)
