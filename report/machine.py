"""What a report says about the machine it was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("stepfold", "numpy", "onnxruntime", "openvino", "nncf", "torch", "diffusers", "onnx")
CPUINFO = Path("/proc/cpuinfo")
UNLIMITED = 1 << 20
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    return {
        "cpu": cpu_model(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The installed packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once; a container's quota counts."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {
        (entry.get("physical id", "0"), entry["core id"])
        for entry in _processors()
        if "core id" in entry and int(entry["processor"]) in allowed
    }
    return max(1, min(len(cores) or len(allowed), _quota()))


def cpu_model() -> str:
    """The name of the processor."""
    names = [entry["model name"] for entry in _processors() if "model name" in entry]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """The most memory this process has held resident.

    Linux: `VmHWM`, because `ru_maxrss` there begins with the size of the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _processors() -> list[dict[str, str]]:
    """The entries of /proc/cpuinfo; none where there is no such file."""
    try:
        blocks = CPUINFO.read_text().strip().split("\n\n")
    except OSError:
        return []
    entries = [dict(_key_value(line) for line in block.splitlines() if ":" in line) for block in blocks]
    return [entry for entry in entries if entry.get("processor", "").isdigit()]


def _key_value(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _quota() -> int:
    """Whole cores that the control group allows, at least one; a large number without a limit."""
    try:
        limit, period = CGROUP_QUOTA.read_text().split()
    except (OSError, ValueError):
        return UNLIMITED
    return UNLIMITED if limit == "max" else max(1, round(int(limit) / int(period)))
