"""Folders whose names are no UTF-8: engines and libraries that take paths as text find them all the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from stepfold.cli import main
from stepfold.frontend.examples import read_tensors
from stepfold.loop import held
from stepfold.loop.errors import UsageError
from stepfold.loop.held import utf8_folder
from stepfold.runtime import load


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    return folder


def test_a_bundle_with_weights_beside_its_stage(tiny: Any, odd: Path, read_only_bundle: Path) -> None:
    found = load(tiny.build(odd / os.fsdecode(b"b\xfe")))
    np.testing.assert_array_equal(found.generate(2, seed=3), load(read_only_bundle).generate(2, seed=3))


def test_example_inputs(odd: Path) -> None:
    (odd / "i.safetensors").write_bytes(save({"c": torch.tensor([1, 2])}))
    assert read_tensors(odd / "i.safetensors")["c"].tolist() == [1, 2]


def test_a_system_without_another_name_for_a_folder(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held.os, "getpid", lambda: 0)
    with pytest.raises(UsageError, match="expected a path that is UTF-8 text, as engines take it"), utf8_folder(odd):
        pytest.fail("there is no other name")


def test_a_folder_for_temporary_files(
    odd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(odd))
    assert main(["recipes"]) == 2
    assert "TMPDIR: expected a folder whose path is UTF-8 text" in capsys.readouterr().err
