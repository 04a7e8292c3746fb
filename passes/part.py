"""The part of a loop that a pass treats, the calls outside of it left as they were."""

from __future__ import annotations

from ..ir.program import Program
from ..ir.variants import numbers_at, split
from ..loop.errors import UsageError

Part = tuple[float, float]
WHOLE: Part = (0.0, 1.0)


def chosen_part(program: Program, part: Part, name: str) -> tuple[Program, list[int]]:
    """The program with variants of their own for the calls of a part, and the numbers of those.

    Args:
        program: program whose slots are split where that is needed.
        part: beginning and end of the part, from 0 at the noise to 1 at the sample.
        name: name of the pass, for messages.

    Raises:
        UsageError: a part of a component, or one without a call of the loop.
    """
    if part == WHOLE:
        return program, numbers_at(program)
    if program.recurrence is None:
        raise UsageError(f"pass {name}: option 'part': expected a model with a loop; received a component.")
    total = program.recurrence.calls
    calls = range(*(round(end * total) for end in part))
    if not calls:
        raise UsageError(
            f"pass {name}: option 'part': expected at least one of the {total} calls of the loop between {part[0]:g} and "
            f"{part[1]:g}; received none. Widen it."
        )
    program = split(program, calls)
    return program, numbers_at(program, calls)
