"""Cut: the step slot in pieces, at the borders of blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.analysis.sites.block import find_blocks
from ...ir.analysis.sites.site import Site
from ...ir.cost import stage_flops
from ...ir.cut import cut
from ...ir.program import Program, Refusal
from ...loop.errors import UsageError, nearest
from ..base import Context, Options, Pass, PassResult, Phase

Border = int | str


class CutOptions(Options):
    """Options of `cut`.

    Attributes:
        bodies: first and last block of each body, both included, by number (negative ones count from the end) or name.
    """

    bodies: tuple[tuple[Border, Border], ...] = ((1, -2),)


class Cut(Pass[CutOptions]):
    """Cut the network at the borders of ranges of blocks, so that a schedule may fill each piece on its own.

    The pieces compute what the whole did. A body returns what it adds to the values that pass through it, so that what
    it added at earlier evaluations can stand for it.
    """

    name = "cut"
    family = "schedule"
    phase = Phase.CUT
    source = "DeepCache (arXiv 2312.00858) and Delta-DiT (arXiv 2406.01125): what the blocks between add is reused"
    exact = True
    keeps_activations = True
    options_type = CutOptions

    def not_applicable(self, program: Program) -> str | None:
        """A network without blocks has no borders."""
        if program.loop is None:
            return "the program has no loop"
        return None if any(_blocks(program)) else "the program has no repeated blocks"

    def requires(self, program: Program) -> None:
        """Blocks are numbered in one graph.

        Raises:
            UsageError: the loop has stages of other precision for some calls.
        """
        if any(len(slot.variants) > 1 for slot in program.computing):
            raise UsageError(
                "cut: expected one stage that computes every evaluation; received several. Put cut before quantize in "
                "the recipe."
            )

    def run(self, program: Program, context: Context) -> PassResult:
        """Find the blocks of each body and cut.

        Raises:
            UsageError: a body names a block that the model lacks, or does not lie after the one before it; the network
                is cut already, into others.
        """
        bodies = self._bodies(_blocks(program))
        if len(program.computing) > 1:
            _require_same([[block.name for block in body] for body in bodies], program)
            return PassResult(program, 0, identity=True, details=_details(program))
        made = cut(program, [[node for block in body for node in block.nodes] for body in bodies])
        if isinstance(made, Refusal):
            return PassResult(program, 0, (made,))
        return PassResult(made, len(bodies), details=_details(made))

    def _bodies(self, blocks: Sequence[Site]) -> list[Sequence[Site]]:
        """The blocks of each body."""
        found, names, taken = list[Sequence[Site]](), [block.name for block in blocks], 0
        for borders in self.options.bodies:
            first, last = (_number(border, names) for border in borders)
            if not taken <= first <= last:
                raise UsageError(
                    f"pass cut: option 'bodies': expected ranges of the blocks {names[0]} to {names[-1]} in their order "
                    f"({len(names)} blocks), one after the other; received {list(borders)}, which is none after block "
                    f"{taken - 1}. Give the first and the last block of each body."
                )
            found.append(blocks[first : last + 1])
            taken = last + 1
        return found


def _blocks(program: Program) -> tuple[Site, ...]:
    return find_blocks(*(slot.original.graph.graph for slot in program.computing)).sites


def _require_same(wanted: list[list[str]], program: Program) -> None:
    """Raise UsageError unless the blocks of each body of a cut program are the wanted ones."""
    bodies = [slot.original.graph.graph for slot in program.computing if ".body" in slot.name]
    blocks = _blocks(program)
    found = [[block.name for block in blocks if block.nodes[0].graph is body] for body in bodies]
    if found != wanted:
        raise UsageError(
            f"pass cut: expected the bodies of the cut before it, {found}; received {wanted}. Name all bodies in one cut."
        )


def _number(border: Border, names: Sequence[str]) -> int:
    """The number of a block that is given by number or name."""
    if isinstance(border, str):
        if border not in names:
            raise UsageError(
                f"pass cut: option 'bodies': the model has no block {border!r}; {nearest(border, list(names))}"
            )
        return names.index(border)
    number = border + len(names) if border < 0 else border
    if not 0 <= number < len(names):
        raise UsageError(
            f"pass cut: option 'bodies': expected numbers of the {len(names)} blocks, {names[0]} to {names[-1]}; "
            f"received {border}."
        )
    return number


def _details(program: Program) -> dict[str, object]:
    """FLOPs of each piece for one sample, and what crosses its border."""
    return {
        "pieces": {
            slot.name: {"flops": stage_flops(slot.original), "outputs": [str(port) for port in slot.outputs]}
            for slot in program.computing
        }
    }
