"""What a compiled stage depends on beside the stage: code, versions of packages, and the processor."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

from .capability import version_of

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
"""Those that lowerings call; the engine's own version is in its capability."""
OWN = (Path(__file__).resolve().parent, Path(__file__).resolve().parents[1] / "ir")
CPU = Path("/proc/cpuinfo")


def packages() -> dict[str, str | None]:
    """The installed versions of packages that lowerings call."""
    return {name: version_of((name,)) for name in PACKAGES}


@functools.cache
def code(folder: Path) -> str:
    """SHA-256 over the sources of the lowerings of this package and of a backend's folder, by path and content.

    The version of stepfold would not tell: it stays the same while the code of a checkout changes.
    """
    digest = hashlib.sha256()
    for place in dict.fromkeys((*OWN, folder.resolve())):
        for path in sorted(place.rglob("*.py")):
            digest.update(f"{path.relative_to(place.parent).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def processor() -> dict[str, str]:
    """The system and the processor; its instructions decide which kernels an engine has."""
    lines = CPU.read_text(encoding="utf-8", errors="replace").splitlines() if CPU.is_file() else []
    told: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())  # the first processor stands for all
    instructions = told.get("flags") or told.get("Features") or ""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "model": told.get("model name") or platform.processor(),  # the second one starts a process
        "instructions": " ".join(sorted(instructions.split())),
    }
