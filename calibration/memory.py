"""How much memory a calibration run needs, known before it starts."""

from __future__ import annotations

import os
import sys
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import fx

from ..ir.edit import output_nodes
from ..ir.program import Program, Stage
from ..ir.shapes import PROBE_BATCHES
from ..loop.ports import Rate
from .document import Memory
from .plan import CalibrationPlan
from .sampling import TOKENS
from .statistics import CHUNK

FLOAT32, FLOAT64 = 4, 8
LATENTS = 4
"""Copies of the latent beside the outputs in the history: noise, latent, scaled latent, batch of both branches."""
REDUCTION_BYTES = 2 * FLOAT32 + FLOAT64
"""Copies of a chunk that a reduction makes, per element: magnitudes or squares, and those in the type of their sum."""
KIBIBYTE = 1024


def memory(plan: CalibrationPlan) -> Memory:
    """Bytes that a run of this plan takes, by part."""
    cells = plan.buckets * len(plan.branches)
    widths = [item.entry.width for item in plan.watched]
    grams = [item.entry.width for item in plan.watched if item.entry.gram]
    channels = 2 * FLOAT32 + 3 * FLOAT64  # low and high, three sums
    accumulators = sum(cells * (width * channels + FLOAT64) for width in widths)
    gram = sum(width * width * FLOAT64 for width in grams)
    kept = max(plan.draws.count(*shard) for shard in plan.shards)
    rows = sum(kept * (width * FLOAT32 + 2 * FLOAT64) for width in widths)
    return Memory(
        weights=_weights(plan.program),
        accumulators=accumulators,
        gram=gram,
        rows=rows,
        activations=_activations(plan) + _reductions(plan),
        shard_file=accumulators + gram + rows,
    )


def _weights(program: Program) -> int:
    tensors = {t.data_ptr(): t for stage in program.stages for t in stage.tensors().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values()) + sum(v.nbytes for v in program.tables.values())


def _activations(plan: CalibrationPlan) -> int:
    """The largest stage, what lower rates hand to it, and the latents of a shard."""
    batch = max(stop - start for start, stop in plan.shards)
    rows = batch * len(plan.branches)
    if plan.whole is None:
        return max(peak_bytes(stage, rows) for stage in plan.program.stages)
    assert plan.program.loop is not None
    latent = prod(plan.program.loop.latent.shape)
    depth = plan.program.recurrence.depth if plan.program.recurrence else 1
    noise = plan.samples * latent * (FLOAT32 + FLOAT64)  # of all samples, as it is drawn and as it is used
    held = noise + (LATENTS + depth) * rows * latent * FLOAT32
    for stage in plan.program.stages:
        if stage.rate is not Rate.STEP:
            held += sum(_bytes(node, _stage_rows(plan, stage, rows)) for node in output_nodes(stage))
    return held + max(peak_bytes(stage, _stage_rows(plan, stage, rows)) for stage in plan.program.stages)


def _stage_rows(plan: CalibrationPlan, stage: Stage, rows: int) -> int:
    """Stages of rate once×timestep run all evaluations in one batch."""
    return rows * plan.evaluations if stage.rate is Rate.ONCE_TIMESTEP else rows


def _reductions(plan: CalibrationPlan) -> int:
    """Temporary copies while statistics of one value are taken: of its chunks, its sampled rows and their product."""
    batch = max(stop - start for start, stop in plan.shards)
    chunks = [min(CHUNK, batch * item.entry.tokens * item.entry.width) for item in plan.watched]
    grams = [item.entry for item in plan.watched if item.entry.gram]
    products = [FLOAT32 * (entry.width**2 + batch * min(entry.tokens, TOKENS) * entry.width) for entry in grams]
    return max(chunks) * REDUCTION_BYTES + max(products, default=0)


def peak_bytes(stage: Stage, rows: int) -> int:
    """The largest sum of values that are alive at once while a stage runs, and room for the copies of one operator.

    Values that share storage (views) count once and live as long as the last of them.
    """
    nodes = list(stage.graph.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    lives: dict[int, tuple[int, int, int]] = {}  # storage -> first node, last node, bytes
    for i, node in enumerate(nodes):
        end = len(nodes) - 1 if node.op == "placeholder" else max((position[user] for user in node.users), default=i)
        for storage, size in _storages(node, rows):
            first, last, known = lives.get(storage, (i, i, 0))
            lives[storage] = (first, max(last, end), max(known, size))
    changes = [0] * (len(nodes) + 1)
    for first, last, size in lives.values():
        changes[first] += size
        changes[last + 1] -= size
    return max(accumulate(changes)) + max((size for *_, size in lives.values()), default=0)


def _storages(node: fx.Node, rows: int) -> list[tuple[int, int]]:
    """Identity and bytes of what a node computes; weights are counted elsewhere."""
    if node.op in ("get_attr", "output"):
        return []
    values = node.meta.get("val")
    listed = values if isinstance(values, (tuple, list)) else [values]
    return [(t.untyped_storage()._cdata, _scaled(node, t, rows)) for t in listed if isinstance(t, torch.Tensor)]


def _scaled(node: fx.Node, tensor: torch.Tensor, rows: int) -> int:
    size = tensor.numel() * tensor.element_size()
    follows = None in node.meta["shape"] if "shape" in node.meta else True
    return size * rows // PROBE_BATCHES[0] if follows else size


def _bytes(node: fx.Node, rows: int) -> int:
    return sum(size for _, size in _storages(node, rows))


def resident_bytes() -> int:
    """Memory of this process now; where the system does not tell, the most it has held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * KIBIBYTE
