"""What a report says about the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepfold.report import machine

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
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    monkeypatch.setattr(machine, "CGROUP_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    return quota


def test_hyper_threads_count_once(four_threads: Path) -> None:
    assert machine.physical_cores() == 2
    assert machine.cpu_model() == "Test CPU @ 2 GHz"


def test_affinity_narrows(four_threads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert machine.physical_cores() == 1


@pytest.mark.parametrize(("content", "cores"), [("max 100000", 2), ("100000 100000", 1), ("20000 100000", 1), ("?", 2)])
def test_quota_of_a_container_narrows(four_threads: Path, content: str, cores: int) -> None:
    four_threads.write_text(content)
    assert machine.physical_cores() == cores


def test_without_cpuinfo_every_allowed_processor_counts(
    four_threads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "nothing")
    assert machine.physical_cores() == 4
    assert machine.cpu_model()


def test_description_names_what_figures_depend_on() -> None:
    found = machine.describe_machine()
    assert {"cpu", "physical_cores", "logical_cores", "memory_bytes", "system", "python", "versions"} == set(found)
    assert found["memory_bytes"] > 1 << 28
    assert {"stepfold", "numpy", "onnxruntime"} <= set(found["versions"])


def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"1" * len(ballast[:: 1 << 12])
    code = "from stepfold.report.machine import peak_memory_bytes as p; a = p(); b = bytearray(80 << 20); print(a, p())"
    before, after = map(
        int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()
    )
    assert machine.peak_memory_bytes() > 300 << 20
    assert before < 200 << 20
    assert after - before > 60 << 20
