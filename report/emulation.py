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

from ..loop.errors import StepfoldError, UsageError

EMULATOR = "qemu-x86_64"
PROCESSOR = "Haswell-noTSX"
"""AVX2, no AVX-512 and no VNNI."""


def missing() -> str | None:
    """Why nothing can be emulated here, None where it can."""
    if platform.machine() != "x86_64":
        return f"emulation: expected an x86_64 machine; this is {platform.machine()}"
    return None if shutil.which(EMULATOR) else f"{EMULATOR} is missing: apt-get install qemu-user"


def command(*arguments: str) -> tuple[str, ...]:
    """The command that runs this Python with arguments on an emulated processor.

    Raises:
        UsageError: the emulator is missing.
    """
    reason = missing()
    if reason is not None:
        raise UsageError(f"{reason}.")
    return (EMULATOR, "-cpu", PROCESSOR, sys.executable, *arguments)


def without_vnni(*arguments: str) -> str:
    """What this Python writes to its standard output on an emulated processor.

    Args:
        *arguments: command-line arguments of the interpreter, `-c` and a program for example.

    Raises:
        UsageError: the emulator is missing.
        StepfoldError: the program failed.
    """
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith(EMULATOR)]
        raise StepfoldError(f"emulated {PROCESSOR}: exit {done.returncode}: {' '.join(lines[-3:])}")
    return done.stdout
