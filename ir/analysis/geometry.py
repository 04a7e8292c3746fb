"""Where the tokens of an attention lie: which of them are of the image, and at which place of its grid.

Found by trying. With attention silenced, a token of a diffusion transformer depends on its own patch of the latent and on
no other. So parts of the latent are changed, and which tokens change with them spells out the coordinates of each token,
one bit at a time: about twelve evaluations without attention for a grid of 64 by 64. Whatever mixes neighbours by index,
such as a convolution over tokens, shows as tokens that no grid explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ..edit import module_of
from ..probe import probe_calls, probe_inputs
from ..program import Program, Stage

SDPA = torch.ops.aten.scaled_dot_product_attention.default
CHANGED = 1e-6
"""A token has changed when it differs by more than this, relative to the largest value."""

Array = np.ndarray
Grid = tuple[int, int, int]
Tokens = Mapping[fx.Node, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Geometry:
    """The tokens of an attention whose queries and keys are the same tokens.

    Attributes:
        grid: frames, height and width of the image, in tokens; in this order, the last fastest.
        start: place of the first image token; what stands before or after the image is text.
        tokens: number of all tokens.
    """

    grid: Grid
    start: int
    tokens: int

    @property
    def image(self) -> int:
        """Number of image tokens."""
        return prod(self.grid)


class Unknown(Exception):
    """What stands in the way of a geometry."""


def find_geometries(program: Program, grid: Grid | None = None) -> dict[fx.Node, Geometry | str]:
    """The geometry of every attention of the computing slots, or why it has none.

    Args:
        program: program with a loop.
        grid: frames, height and width in tokens, where the latent does not show them; None reads them off its shape.
    """
    probe = _Probe(program)
    everything = probe.changed(np.ones(probe.shape[1:], bool))
    found: dict[fx.Node, Geometry | str] = {}
    decoded: dict[tuple[int, Grid], Mapping[fx.Node, Array]] = {}
    for node, touched in everything.items():
        try:
            image = _same(touched)
            places = np.flatnonzero(image)
            sizes = list(_grids(probe.shape, len(places), grid))
            found[node] = _read(probe, node, places, len(image), sizes, decoded)
        except Unknown as reason:
            found[node] = str(reason)
    return found


def _read(
    probe: _Probe,
    node: fx.Node,
    places: Array,
    tokens: int,
    grids: Sequence[Grid],
    decoded: dict[tuple[int, Grid], Mapping[fx.Node, Array]],
) -> Geometry:
    """The first grid that explains the tokens of a node."""
    start = int(places[0])
    if not np.array_equal(places, np.arange(start, start + len(places))) or start not in (0, tokens - len(places)):
        raise Unknown("the tokens of the image do not follow each other")
    for grid in grids:
        key = (len(places), grid)
        if key not in decoded:
            decoded[key] = probe.coordinates(grid)
        if np.array_equal(decoded[key].get(node, ())[start : start + len(places)], np.arange(len(places))):
            return Geometry(grid, start, tokens)
    raise Unknown("its tokens are not those of a grid in order, or an operator mixes neighbours")


def _same(touched: tuple[Array, Array]) -> Array:
    """[T] whether a token depends on the latent, which queries and keys have to agree about."""
    queries, keys = touched
    if len(queries) != len(keys):
        raise Unknown(f"it has {len(queries)} queries and {len(keys)} keys")
    if not np.array_equal(queries, keys):
        raise Unknown("its keys are not of the tokens that ask")
    if not queries.any():
        raise Unknown("none of its tokens depends on the latent")
    return queries


def _grids(shape: Sequence[int], image: int, grid: Grid | None) -> Iterator[Grid]:
    """The grids of so many tokens that a latent [B, C, h, w] or [B, C, F, h, w] may be cut into, by square patches."""
    if grid is not None:
        if prod(grid) != image:
            raise Unknown(f"the grid {list(grid)} has {prod(grid)} tokens, and the image has {image}")
        yield grid
        return
    if len(shape) not in (4, 5):
        raise Unknown(f"a latent {list(shape[1:])} shows no grid; give it as `grid: [frames, height, width]`")
    frames, height, width = (1, *shape[2:]) if len(shape) == 4 else shape[2:]
    for depth in (d for d in range(1, frames + 1) if frames % d == 0):
        for patch in (p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0):
            sizes = (frames // depth, height // patch, width // patch)
            if prod(sizes) == image:
                yield sizes


class _Probe:
    """Which tokens of each attention change with parts of the latent, when no attention passes anything on."""

    def __init__(self, program: Program):
        assert program.loop is not None
        self._program, self._call = program, probe_calls(program)[0]
        self._inputs = probe_inputs(program, self._call)
        self._state = program.loop.state
        self._noise = np.random.default_rng(0).standard_normal(self._inputs[self._state].shape).astype(np.float32)
        self._before = self._tokens(self._inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the latent, the batch in front."""
        return self._noise.shape

    def changed(self, where: Array) -> dict[fx.Node, tuple[Array, Array]]:
        """Whether each query and each key [T] of every attention changes with the latent at `where`."""
        latent = self._inputs[self._state] + np.where(where, self._noise, 0).astype(np.float32)
        after = self._tokens({**self._inputs, self._state: latent})
        return {
            node: tuple(_differs(x, y) for x, y in zip(pair, after[node], strict=True))  # type: ignore[misc]
            for node, pair in self._before.items()
        }

    def coordinates(self, grid: Grid) -> dict[fx.Node, Array]:
        """For each attention the number [T] of the cell of a grid that each token depends on; -1 for none, or several."""
        numbers = {node: np.zeros(pair[0].shape[2], np.int64) for node, pair in self._before.items()}
        for weight, cells in self._bits(grid):
            high, low = self.changed(cells), self.changed(~cells)  # a token changes with one of them, and not with both
            for node, number in numbers.items():
                (up, keys_up), (down, keys_down) = high[node], low[node]
                alone = len(up) == len(keys_up) and (up != down) & (up == keys_up) & (down == keys_down)
                numbers[node] = np.where(alone & (number >= 0), number + np.where(up, weight, 0), -1)
        return numbers

    def _bits(self, grid: Grid) -> Iterator[tuple[int, Array]]:
        """Each bit of the number of a cell, and where in the latent [C, ...] it is set."""
        for axis, (size, cells) in enumerate(zip(grid, self._axes(grid), strict=True)):
            for bit in range((size - 1).bit_length()):
                yield prod(grid[axis + 1 :]) << bit, (cells >> bit & 1).astype(bool)

    def _axes(self, grid: Grid) -> list[Array]:
        """The frame, row and column of the grid that each value of the latent belongs to, [C, ...] each."""
        inner = self.shape[1:]
        if len(inner) == 2:  # [T, C]: tokens already
            numbers = np.broadcast_to(np.arange(inner[0])[:, None], inner)
            return list(np.unravel_index(numbers, grid)) if prod(grid) == inner[0] else [np.zeros(inner, int)] * 3
        sizes = (1, *inner[1:]) if len(inner) == 3 else inner[1:]
        places = np.indices(sizes)
        cells = [place // (size // count) for place, size, count in zip(places, sizes, grid, strict=True)]
        return [np.broadcast_to(cell.reshape(inner[1:]), inner) for cell in cells]

    def _tokens(self, inputs: Mapping[str, Array]) -> Tokens:
        """Queries and keys [B, H, T, K] of every attention."""
        seen: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]] = {}
        self._program.bound_by(lambda stage: _silenced(stage, seen)).evaluate(inputs, self._call)
        return seen


def _silenced(stage: Stage, seen: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]):
    """The stage with zeros for the results of its attentions, which are noted."""

    def call(values: Mapping[str, Array]) -> list[Array]:
        arguments = [torch.from_numpy(np.ascontiguousarray(values[port.name])) for port in stage.inputs]
        with torch.no_grad():
            outputs = _Silent(stage, seen).run(*arguments)
        return [value.numpy() for value in outputs]

    return call


class _Silent(fx.Interpreter):
    def __init__(self, stage: Stage, seen: dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(module_of(next(iter(stage.graph.graph.nodes))), graph=stage.graph.graph)
        self._seen = seen

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; the first two arguments of an attention are kept, and its result is zero."""
        if n.target is not SDPA:
            return super().run_node(n)
        query, key, value = (self.env[argument] for argument in n.args[:3])  # type: ignore[index]
        self._seen[n] = query, key
        return query.new_zeros((*query.shape[:3], value.shape[3]))


def _differs(before: torch.Tensor, after: torch.Tensor) -> Array:
    """[T] whether tokens [B, H, T, K] differ."""
    largest = float(before.abs().max()) or 1.0
    return ((before - after).abs().amax(dim=(0, 1, 3)) > CHANGED * largest).numpy()
