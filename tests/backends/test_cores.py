"""How many cores a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepfold.backends import cores

TWO_CORES_FOUR_THREADS = """processor : 0
model name : Test CPU @ 2 GHz
physical id : 0
core id : 0

processor : 1
physical id : 0
core id : 1

processor : 2
physical id : 0
core id : 0

processor : 3
physical id : 0
core id : 1
"""


@pytest.fixture
def four_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two cores with two threads each, without a quota; returns the quota's file."""
    cpuinfo, quota = tmp_path / "cpuinfo", tmp_path / "cpu.max"
    cpuinfo.write_text(TWO_CORES_FOUR_THREADS)
    monkeypatch.setattr(cores, "CPUINFO", cpuinfo)
    monkeypatch.setattr(cores, "CGROUP_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return quota


def test_hyper_threads_count_once(four_threads: Path) -> None:
    assert cores.physical_cores() == 2
    assert cores.processors()[0]["model name"] == "Test CPU @ 2 GHz"


def test_affinity_narrows(four_threads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert cores.physical_cores() == 1


@pytest.mark.parametrize(
    ("content", "number"), [("max 100000", 2), ("100000 100000", 1), ("20000 100000", 1), ("?", 2)]
)
def test_quota_of_a_container_narrows(four_threads: Path, content: str, number: int) -> None:
    four_threads.write_text(content)
    assert cores.physical_cores() == number


def test_without_cpuinfo_every_allowed_processor_counts(
    four_threads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "CPUINFO", tmp_path / "nothing")
    assert cores.physical_cores() == 4
    assert cores.processors() == []
