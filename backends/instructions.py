"""The sets of instructions that decide how a processor multiplies 8-bit numbers, and what follows for a bundle."""

from __future__ import annotations

from collections.abc import Sequence

from .identity import processor

SETS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "amx_int8",
    "avx512_bf16",
    "amx_bf16",
    "asimddp",
    "i8mm",
)
"""As Linux names them in /proc/cpuinfo; those of ARM last."""

VNNI = ("avx_vnni", "avx512_vnni", "asimddp")
"""Any of these multiplies 8-bit numbers without saturation, and OpenVINO's dynamic scales need one of the first two."""


def instructions() -> tuple[str, ...]:
    """Those that this processor has; none where the system does not tell."""
    told = processor()["instructions"].split()
    return tuple(name for name in SETS if name in told)


def difference(recorded: Sequence[str], here: Sequence[str]) -> str | None:
    """What this processor has more or less than the one a bundle was built on; None where either is not known."""
    if not recorded or not here or set(recorded) == set(here):
        return None
    parts = [
        f"{verb} {', '.join(names)}"
        for verb, names in (
            ("lacks", [name for name in recorded if name not in here]),
            ("has", [name for name in here if name not in recorded]),
        )
        if names
    ]
    return f"this processor {' and '.join(parts)}"
