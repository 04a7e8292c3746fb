"""Run a program as a processor without VNNI would, by QEMU's emulation of user programs.

What a bundle draws on another kind of processor is part of its quality, and most machines are of one kind. The
emulation has the instructions of the named processor and none besides, so engines choose their kernels for it; only
times say nothing.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence

from ..loop.errors import StepfoldError, UsageError

EMULATOR = "qemu-x86_64"
PROCESSOR = "Haswell-noTSX"
"""AVX2, no AVX-512 and no VNNI."""


def missing() -> str | None:
    """Why nothing can be emulated here, None where it can."""
    if platform.machine() != "x86_64":
        return f"emulation: expected an x86_64 machine; this is {platform.machine()}"
    return None if shutil.which(EMULATOR) else f"{EMULATOR} is missing: apt-get install qemu-user"


def without_vnni(arguments: Sequence[str]) -> str:
    """Run this Python with arguments on an emulated processor.

    Args:
        arguments: command-line arguments of the interpreter, `-c` and a program for example.

    Returns:
        What it wrote to its standard output.

    Raises:
        UsageError: the emulator is missing.
        StepfoldError: the program failed.
    """
    reason = missing()
    if reason is not None:
        raise UsageError(f"{reason}.")
    command = [EMULATOR, "-cpu", PROCESSOR, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith(EMULATOR)]
        raise StepfoldError(f"emulated {PROCESSOR}: exit {done.returncode}: {' '.join(lines[-3:])}")
    return done.stdout
