"""What differs between the processor that a bundle was built on and this one."""

from __future__ import annotations

from ..backends.instructions import VNNI, difference, instructions
from ..bundle.manifest import Manifest


def differences(manifest: Manifest) -> list[str]:
    """One line for everything that this processor does otherwise; none where nothing is known to differ."""
    recorded = manifest.backend.instructions
    found = difference(recorded, instructions())
    if found is None:
        return []
    measured = f"speed: measured on a processor with {', '.join(recorded)}; {found}, so other choices may be faster."
    return [*other_products(manifest), measured]


def other_products(manifest: Manifest) -> list[str]:
    """One line for every stage whose 8-bit products are of integers on one of the two processors and of floats here."""
    stages = [stage for stage in manifest.stages if stage.float_without_vnni]
    if not stages:
        return []
    recorded, here = manifest.backend.instructions, instructions()
    built, able = (bool(set(VNNI) & set(sets)) for sets in (recorded, here))
    if built == able or not recorded or not here:
        return []
    there, now = ("integers", "float") if built else ("float", "integers")
    return [
        f"stage {stage.name}: its 8-bit products are computed in {now} here and were in {there} where the bundle was "
        f"built; {difference(recorded, here)}. Samples differ by that rounding."
        for stage in stages
    ]
