"""The cores that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
UNLIMITED = 1 << 20
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once; a container's quota counts."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {
        (entry.get("physical id", "0"), entry["core id"])
        for entry in processors()
        if "core id" in entry and int(entry["processor"]) in allowed
    }
    return max(1, min(len(cores) or len(allowed), _quota()))


def processors() -> list[dict[str, str]]:
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
