"""Realize layers in the order they run, each under the moments of what it reads after those before it are realized.

The sequential calibration of GPTQ (Frantar et al., arXiv 2210.17323, section 4; IST-DASLab/gptq): the error of a layer
changes what those after it read, and they are compensated for the input they will get, not for the one they had. It
takes one pass over the computing slots, with evaluations of the real loop side by side: every node runs for all of them
before the next, and only values that are still read are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from ...calibration.memory import peak_bytes
from ...calibration.read import ROWS_PER_CHANNEL
from ...calibration.sampling import ROWS, TOKENS, gram_tokens
from ...calibration.stage_inputs import EVALUATIONS, step_inputs
from ...ir.edit import copy_graph
from ...ir.program import Program, Stage
from ...loop.errors import UsageError
from ...loop.noise import SampleSet
from .inputs import Inputs, Measured
from .layers import Group
from .realize import Realization
from .rewrite import replace_group

SAMPLES = 8
"""Samples of each evaluation, with guidance twice as many rows: those of one shard of a calibration store."""
LIVE_BYTES = 4 << 30
"""Of the values that all evaluations hold at once; of a larger model fewer evaluations are recorded."""
PLENTY = 2 * ROWS_PER_CHANNEL
"""Rows for each channel of a Gram matrix up to which more than `TOKENS` of a sample are taken."""

Realize = Callable[[Group, Inputs | None], Realization | None]


def realized_in_sequence(
    program: Program,
    groups: Sequence[Group],
    known: Mapping[str, Inputs],
    realize: Realize,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> list[Realization | None]:
    """What takes the place of each group, in the order of the groups.

    Args:
        program: its layers still in floats.
        groups: groups of its computing slots, in the order in which they run.
        known: what is known about what groups read, by key; its ranges are widened by those seen here.
        realize: what takes the place of a group, given what it reads after the groups before it.
        seed: seed of the samples and of the choice of rows.
        progress: called with (task, done, total).

    Raises:
        UsageError: the evaluations have too few rows for the moments of a group.
    """
    samples, evaluations = affordable(program)
    recorded = step_inputs(program, SampleSet("calibration", seed, samples), evaluations, progress)
    found: dict[str, Realization | None] = {}
    for stage in program.steps:
        run = SideBySide(stage, recorded)
        starts = {run.twins[group.layers[0].node]: group for group in groups if group.layers[0].node in run.twins}
        node = next(iter(run.graph.graph.nodes))
        with torch.no_grad():
            while node.op != "output":
                group = starts.pop(node, None)
                if group is None:
                    run.compute(node)
                    node = node.next
                    continue
                progress("quantizing in sequence", len(found), len(groups))
                before = node.prev
                realization = realize(group, _measured(run.values(group), group, known.get(group.key), seed))
                if realization is not None:
                    run.replace(group, realization)
                    node = before.next
                found[group.key] = realization
        for values, outputs in zip(recorded, run.outputs(), strict=True):
            values |= {port.name: value.numpy() for port, value in zip(stage.outputs, outputs, strict=True)}
    return [found.get(group.key) for group in groups]


class SideBySide:
    """Evaluations of a stage that run node by node, all of them at once, while its layers are replaced.

    Attributes:
        graph: the copy that is edited.
        twins: node of the stage -> what stands for it in the copy.
        runs: the evaluations, each with the values it holds.
    """

    def __init__(self, stage: Stage, recorded: Sequence[Mapping[str, np.ndarray]]):
        self._stage, self.graph = stage.name, copy_graph(stage)
        self.twins = dict(zip(stage.graph.graph.nodes, self.graph.graph.nodes, strict=True))
        inputs = self.graph.graph.find_nodes(op="placeholder")
        self._computed = set(inputs)
        self.runs = [fx.Interpreter(self.graph, garbage_collect_values=False) for _ in recorded]
        for run, values in zip(self.runs, recorded, strict=True):
            arrays = [values[port.name] for port in stage.inputs]
            run.env = {node: torch.from_numpy(array).clone() for node, array in zip(inputs, arrays, strict=True)}

    def compute(self, node: fx.Node) -> None:
        """Run one node for all evaluations, and drop what no later one reads."""
        if node in self._computed:
            return
        for run in self.runs:
            run.env[node] = run.run_node(node)
        self._computed.add(node)
        for read in node.all_input_nodes:  # what the stage returns is read by its output, which is never computed
            if self._computed.issuperset(read.users):
                for run in self.runs:
                    del run.env[read]

    def values(self, group: Group) -> list[torch.Tensor]:
        """What a group reads in each evaluation: [B, T, M], with B = 1 when it does not follow the batch."""
        found = [run.env[self.twins[group.source]].float() for run in self.runs]
        shape = group.source.meta["shape"]
        if None not in shape:
            return [value.reshape(1, -1, shape[-1]) for value in found]
        by_sample = [value.movedim(shape.index(None), 0) for value in found]
        return [value.reshape(len(value), -1, shape[-1]) for value in by_sample]

    def outputs(self) -> list[list[torch.Tensor]]:
        """What the stage computes in each evaluation, once every node has run."""
        returned = self.graph.graph.output_node().args[0]
        return [[run.env[node] for node in returned] for run in self.runs]  # type: ignore[union-attr]

    def replace(self, group: Group, realization: Realization) -> None:
        """Put a realization in the place of a group that is not computed yet."""
        tables: dict[str, torch.Tensor] = {}
        replace_group(self._stage, self.graph, self.twins, group, realization, tables)
        assert not tables, "a scale by the timestep is not known to a run of all timesteps at once"


def affordable(program: Program) -> tuple[int, int]:
    """How many samples of how many evaluations to record: `SAMPLES` of `EVALUATIONS` unless memory is short."""
    if program.loop is None:
        return SAMPLES, 1  # a component runs on its example
    rows = 2 if program.loop.guidance is not None else 1
    cells = max(1, LIVE_BYTES // max(peak_bytes(stage, rows) for stage in program.steps))
    evaluations = min(EVALUATIONS, cells)
    return min(SAMPLES, cells // evaluations), evaluations


def _measured(values: Sequence[torch.Tensor], group: Group, known: Inputs | None, seed: int) -> Inputs:
    """What is known of a value after the groups before it.

    Args:
        values: values of each evaluation, [B, T, M].
        group: group that reads it.
        known: what was known before.
        seed: seed of the choice of rows.

    Raises:
        UsageError: there are too few rows.
    """
    M, total = values[0].shape[-1], sum(len(value) * value.shape[1] for value in values)
    if total < ROWS_PER_CHANNEL * M:
        raise UsageError(
            f"quantize: site {group.name}: expected at least {ROWS_PER_CHANNEL} rows for each of {M} channels to round "
            f"it in sequence; received {total}. Choose rounding: gptq, and calibrate with more --samples."
        )
    tokens = max(TOKENS, -(-PLENTY * M // sum(map(len, values))))
    gram, kept, rows = torch.zeros(M, M, dtype=torch.float64), [], 0
    for i, value in enumerate(values):
        chosen = gram_tokens(value, seed, (0, 0, i, 0), tokens)
        gram += (chosen.T @ chosen).to(torch.float64)
        rows += len(chosen)
        places = np.random.default_rng([seed, i]).permutation(len(chosen))[: -(-ROWS // len(values))]
        kept.append(chosen[torch.from_numpy(np.sort(places))])
    low = torch.stack([value.amin(dim=(0, 1)) for value in values]).amin(dim=0, keepdim=True)
    high = torch.stack([value.amax(dim=(0, 1)) for value in values]).amax(dim=0, keepdim=True)
    if known is not None:
        low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
    return Inputs(low, high, torch.ones(M), Measured(gram / rows, torch.cat(kept)))
