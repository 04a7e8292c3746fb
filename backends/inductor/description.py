"""What a shared object needs of the machine that opens it: opening it elsewhere is what would crash."""

from __future__ import annotations

from typing import ClassVar

from ..description import Description


class ObjectDescription(Description):
    """The description of a shared object.

    Attributes:
        torch: version of PyTorch that compiled it, whose kernels it calls.
        system: `linux` or `darwin`.
        machine: architecture, such as `x86_64`.
        instructions: sets of the processor that its code uses, as `torch.cpu.get_capabilities` names them.
    """

    suffix: ClassVar[str] = ".description.json"  # in the place of `.so`, PyTorch would take `.json` for its own list

    torch: str
    system: str
    machine: str
    instructions: tuple[str, ...]
