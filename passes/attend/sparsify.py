"""Sparsify attention: each block of queries reads some blocks of keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from pydantic import Field, field_validator
from torch import fx

from ...ir.analysis.geometry import SDPA, Geometry, Grid, find_geometries
from ...ir.cost import flops, stage_flops
from ...ir.edit import add_buffer, copy_graph, finish, output_nodes
from ...ir.names import module_path
from ...ir.operators.block_sparse_attention import block_sparse_attention
from ...ir.program import Program, Refusal, Stage
from ...ir.shapes import PROBE_BATCHES
from ...ir.variants import alone, put_back
from ...loop.errors import UsageError, nearest
from ..base import Context, Options, Pass, PassResult, Phase
from ..marks import made, mark
from ..part import chosen_part
from .masses import block_masses
from .patterns import PATTERNS
from .patterns.pattern import Place
from .tiles import LARGEST, SMALLEST, Tiles, fitting_tile

EXPAND = torch.ops.aten.expand.default


class SparsifyOptions(Options):
    """Options of `sparsify_attention`.

    Attributes:
        pattern: which blocks of keys a block of queries reads.
        keep: share of the blocks of image keys that each block of queries reads, at most; text is always read.
        tile: frames, height and width of a block, in tokens; by default the tile of about 64 tokens that divides the grid.
        grid: frames, height and width of the image, in tokens, where the latent does not show them.
        part: part of the loop, from 0 at the noise to 1 at the sample, whose evaluations are sparse; the others get a stage of
            their own.
        skip: module patterns of attentions to leave alone.
        min_attention_share: share of the FLOPs of an evaluation below which attention is not worth the loss.
        force: go on below that share.
        max_drift: largest drift of this pass on the probe.
    """

    pattern: str = "window"
    keep: float = Field(default=0.25, gt=0, le=1)
    tile: Grid | None = None
    grid: Grid | None = None
    part: tuple[float, float] = (0.0, 1.0)
    skip: tuple[str, ...] = ()
    min_attention_share: float = Field(default=0.1, ge=0, le=1)
    force: bool = False
    max_drift: float | None = None

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in PATTERNS:
            raise ValueError(f"expected a pattern: {', '.join(PATTERNS)}")
        return value

    @field_validator("tile", "grid")
    @classmethod
    def _positive(cls, value: Grid | None) -> Grid | None:
        if value is not None and min(value) < 1:
            raise ValueError("expected frames, height and width of at least 1")
        return value


@dataclass(frozen=True)
class _Site:
    """An attention that can be sparse, and how its image is cut."""

    node: fx.Node
    geometry: Geometry
    tiles: Tiles
    mask: fx.Node | None


class SparsifyAttention(Pass[SparsifyOptions]):
    """Let each block of queries read some blocks of keys, and all of the text.

    The blocks are tiles of the image, whose place is found by trying (`ir/analysis/geometry.py`). What is sparse is one
    operator, in standard operators where an engine has none of its own.
    """

    name = "sparsify_attention"
    family = "attend"
    phase = Phase.ATTEND
    source = "STA (arXiv 2502.04507), GRAT (arXiv 2505.14687), Sparse-vDiT (arXiv 2506.03065)"
    options_type = SparsifyOptions

    def not_applicable(self, program: Program) -> str | None:
        """Attention of a component has no calls to be sparse at, and no grid to be found."""
        if program.loop is None:
            return "the program has no loop"
        nodes = [node for stage in program.steps for node in stage.graph.graph.nodes]
        found = any(node.target is SDPA or made(node, "attend") for node in nodes)
        return None if found else "the program computes no attention"

    def run(self, program: Program, context: Context) -> PassResult:
        """Sparsify every accepted attention of the chosen part of the loop.

        Raises:
            UsageError: a pattern or a tile does not fit, or `skip` matches nothing.
        """
        self._require_matches(program)
        program, numbers = chosen_part(program, self.options.part, self.name)
        changed, refused, details = 0, list[Refusal](), dict[str, object]()
        for number in numbers:
            part = alone(program, number)
            sites, reasons = self._sites(part)
            refused += reasons
            if sites:
                sparse, rows = self._sparse(part, sites, context)
                program = put_back(program, sparse)
                details.update(rows)
                changed += len(sites)
        before = [node for stage in program.steps for node in stage.graph.graph.nodes if made(node, "attend")]
        same = all(made(node, "attend") == self._way() for node in before)
        identity = not changed and bool(before) and same
        return PassResult(program, changed, tuple(refused), identity=identity, details={"sites": details})

    def _way(self) -> str:
        """How the pass marks what it makes."""
        return f"{self.options.pattern} {self.options.keep:g}"

    def _require_matches(self, program: Program) -> None:
        names = [module_path(node) for node in _attentions(program.steps)]
        for pattern in self.options.skip if names else ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"pass {self.name}: option 'skip': no attention matches {pattern!r}; {nearest(pattern, names)}"
                )

    def _sites(self, program: Program) -> tuple[list[_Site], list[Refusal]]:
        """The attentions that can be sparse, and why the others cannot."""
        attentions = _attentions(program.steps)
        share = sum(map(flops, attentions)) / PROBE_BATCHES[0] / max(1, sum(map(stage_flops, program.steps)))
        if share < self.options.min_attention_share and not self.options.force and attentions:
            reason = (
                f"attention is {share:.1%} of the FLOPs of an evaluation, below {self.options.min_attention_share:.0%}; "
                "`force: true` makes it sparse all the same"
            )
            return [], [Refusal("every attention", reason)]
        found, refused = list[_Site](), list[Refusal]()
        geometries = find_geometries(program, self.options.grid)
        for node in attentions:
            site = self._site(program, node, geometries[node])
            if isinstance(site, str):
                refused.append(Refusal(module_path(node), site))
            else:
                found.append(site)
        return found, refused

    def _site(self, program: Program, node: fx.Node, geometry: Geometry | str) -> _Site | str:
        """An attention with its tiles, or why it has none."""
        if any(fnmatchcase(module_path(node), pattern) for pattern in self.options.skip):
            return "skipped by the recipe"
        if isinstance(geometry, str):
            return geometry
        options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | node.kwargs
        given = _mask(node)
        mask = None if given is None else _of_keys(given, program)
        if given is not None and mask is None:
            return f"its mask {list(given.meta['shape'])} is not one of keys, the same for every query"
        if options.get("is_causal") or options.get("dropout_p") or options.get("enable_gqa"):
            return "it is causal, has dropout, or shares keys between heads"
        tile = self._tile(geometry.grid)
        if isinstance(tile, str):
            return tile
        return _Site(node, geometry, Tiles(geometry.grid, tile), mask)

    def _tile(self, grid: Grid) -> Grid | str:
        """The tile of a grid.

        Raises:
            UsageError: the tile of the recipe does not divide it.
        """
        offered, wanted = fitting_tile(grid), self.options.tile
        if wanted is None:
            return offered or f"no tile of {SMALLEST} to {LARGEST} tokens divides its grid of {list(grid)}"
        if any(size % part for size, part in zip(grid, wanted, strict=True)):
            instead = f"Take {list(offered)}, which does." if offered else "Remove it."
            raise UsageError(
                f"pass {self.name}: option 'tile': expected frames, height and width that divide the grid of {list(grid)} "
                f"tokens; received {list(wanted)}. {instead}"
            )
        return wanted

    def _sparse(
        self, program: Program, sites: Sequence[_Site], context: Context
    ) -> tuple[Program, Mapping[str, object]]:
        """The program with sparse attention, and a row for each site."""
        tiles = {site.node: (site.tiles, site.geometry.start) for site in sites}
        masses = _Once(lambda: block_masses(program, tiles, context))
        pattern, rows = PATTERNS[self.options.pattern], dict[str, object]()
        graphs = {stage.name: copy_graph(stage) for stage in program.steps}
        for stage in program.steps:
            twins = dict(zip(stage.graph.graph.nodes, graphs[stage.name].graph.nodes, strict=True))
            for site in (site for site in sites if site.node in twins):
                measured = partial(lambda node: masses()[node], site.node)
                kept = pattern.kept(Place(site.tiles, self.options.keep, measured))
                new = _replace(graphs[stage.name], twins, site, kept)
                mark(new, "attend", self._way())
                rows[f"{stage.name}: {module_path(site.node)}"] = _row(site, kept)
        changed = [finish(stage, graphs[stage.name]) for stage in program.steps]
        return program.with_stages(changed), rows


class _Once:
    """A value that is computed when it is first asked for."""

    def __init__(self, make: Callable[[], Mapping[fx.Node, torch.Tensor]]):
        self._make, self._value = make, None

    def __call__(self) -> Mapping[fx.Node, torch.Tensor]:
        if self._value is None:
            self._value = self._make()
        return self._value


def _attentions(stages: Sequence[Stage]) -> list[fx.Node]:
    return [node for stage in stages for node in stage.graph.graph.find_nodes(op="call_function", target=SDPA)]


def _replace(graph: fx.GraphModule, twins: Mapping[fx.Node, fx.Node], site: _Site, kept: torch.Tensor) -> fx.Node:
    """Put the operator in the place of an attention."""
    node = twins[site.node]
    order = site.tiles.order()
    names = {"order": order, "inverse": order.argsort(), "kept": kept}
    scale = node.kwargs.get("scale") or node.args[0].meta["val"].shape[-1] ** -0.5  # type: ignore[union-attr]
    with graph.graph.inserting_before(node):
        tables = [
            graph.graph.get_attr(add_buffer(graph, f"{module_path(node)}.{name}", value))
            for name, value in names.items()
        ]
        mask = None if site.mask is None else _one_row(graph.graph, twins[site.mask])
        arguments = (*node.args[:3], *tables, mask, site.geometry.start, site.tiles.block, scale)
        new = graph.graph.call_function(block_sparse_attention.overload, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask of an attention."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    assert mask is None or isinstance(mask, fx.Node)
    return mask


def _of_keys(mask: fx.Node, program: Program) -> fx.Node | None:
    """The value that a mask repeats for every query, itself where it has one row; None where rows may differ.

    A mask that another stage repeats is an input here; its rows are equal all the same.
    """
    while mask.target is EXPAND and mask.meta["shape"][1:-1] != (1, 1):
        mask = mask.args[0]  # type: ignore[assignment]
    if mask.meta["shape"][1:-1] == (1, 1):
        return mask
    maker = _maker(mask, program) if mask.op == "placeholder" else None
    return mask if maker is not None and maker is not mask and _of_keys(maker, program) is not None else None


def _maker(placeholder: fx.Node, program: Program) -> fx.Node | None:
    """The node of an earlier stage that computes what a stage receives."""
    stage = next(one for one in program.stages if placeholder.graph is one.graph.graph)
    name = stage.inputs[stage.graph.graph.find_nodes(op="placeholder").index(placeholder)].name
    made = {
        port.name: node for one in program.stages for port, node in zip(one.outputs, output_nodes(one), strict=True)
    }
    return made.get(name)


def _one_row(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """[B, 1, 1, T] of a mask whose rows are equal."""
    if mask.meta["shape"][1:-1] == (1, 1):
        return mask
    one_head = graph.call_function(torch.ops.aten.slice.Tensor, (mask, 1, 0, 1))
    return graph.call_function(torch.ops.aten.slice.Tensor, (one_head, 2, 0, 1))


def _row(site: _Site, kept: torch.Tensor) -> dict[str, object]:
    """For the record."""
    return {
        "grid": list(site.geometry.grid),
        "text": site.geometry.tokens - site.geometry.image,
        "tile": list(site.tiles.tile),
        "blocks": site.tiles.number,
        "kept": kept.shape[2],
    }
