"""What a program is made of: the content of `inspect --json` for a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import fx

from ..ir.analysis.rates import node_rates, parameters_by_rate
from ..ir.analysis.sites import Sites, find_sites
from ..ir.cost import flops
from ..ir.program import Program
from ..ir.shapes import PROBE_BATCHES
from ..loop.ports import Rate

aten = torch.ops.aten
DATA_DEPENDENT = frozenset(
    {
        aten.nonzero.default,
        aten.masked_select.default,
        aten.unique_consecutive.default,
        aten._unique2.default,
        aten.item.default,
        aten._local_scalar_dense.default,
    }
)
"""Operators whose output shape depends on values."""


def inspect_program(program: Program) -> dict[str, Any]:
    """Describe a program.

    Returns:
        `class`, `parameters`, `inputs`, `loop`, `rates` (parameters, and FLOPs of one evaluation for one sample),
        `sites` (counts), `near_misses` (what a site lacks), `frozen_dimensions`, `unsupported`.
    """
    sites = find_sites(program)
    return {
        "class": program.model.class_name,
        "parameters": program.parameters(),
        "inputs": [
            {"name": i.name, "role": i.role, "shape": list(i.port.shape), "dtype": i.port.dtype} for i in program.inputs
        ],
        "loop": program.loop.model_dump(mode="json", exclude_defaults=True) if program.loop else None,
        "rates": rates_table(program),
        "sites": sites.counts(),
        "near_misses": _near_misses(sites),
        "frozen_dimensions": [asdict(dimension) for dimension in program.frozen],
        "unsupported": unsupported(program),
    }


def rates_table(program: Program) -> list[dict[str, Any]]:
    """For each rate the weights it reads and its FLOPs for one sample."""
    parameters = parameters_by_rate(program)
    counted = dict.fromkeys(Rate, 0)
    for node, rate in node_rates(program).items():
        counted[rate] += flops(node)
    return [
        {"rate": rate.value, "parameters": parameters[rate], "flops": counted[rate] // PROBE_BATCHES[0]}
        for rate in Rate
    ]


def unsupported(program: Program) -> list[dict[str, str]]:
    """Nodes no engine can run: complex values, and shapes that depend on values."""
    found = []
    for stage in program.stages:
        for node in stage.graph.graph.nodes:
            reason = _reason(node)
            if reason:
                found.append({"node": node.name, "reason": reason, "source": source_line(node)})
    return found


def _reason(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype.is_complex:
        return f"{node.target}: engines have no complex numbers"
    if node.target in DATA_DEPENDENT:
        return f"{node.target}: its output shape depends on values"
    return ""


def source_line(node: fx.Node) -> str:
    """The innermost source line of a node, `file:line: code`; empty when none was recorded."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return ": ".join(lines[-2:])


def _near_misses(sites: Sites) -> list[dict[str, str]]:
    return [{"kind": miss.kind, "site": miss.name, "missing": miss.missing} for miss in sites.near_misses]
