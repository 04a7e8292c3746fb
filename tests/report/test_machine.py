"""What a report says about the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stepfold.backends import cores
from stepfold.report import machine


def test_processor_has_a_name_without_a_list_of_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CPUINFO", tmp_path / "nothing")
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
