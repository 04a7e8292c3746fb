"""Layers whose activations OpenVINO rounds at run time, on processors with VNNI and without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from blocks import block, quantized, tokens
from emulated import needs_emulator

import stepfold
from stepfold.backends import instructions
from stepfold.backends.openvino import blocks as openvino_blocks
from stepfold.backends.openvino import precision
from stepfold.backends.openvino.lower import float_without_vnni, lower
from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.bundle.manifest import Manifest
from stepfold.bundle.reader import read_manifest
from stepfold.bundle.verify import verify
from stepfold.ir.program import Program
from stepfold.loop.metrics import drift
from stepfold.report.emulation import without_vnni
from stepfold.runtime.differences import differences
from stepfold.runtime.engine import open_stage

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")

OPTIONS = OpenvinoOptions()
RUN = """
import sys
import numpy as np
import stepfold
from stepfold.bundle.verify import verify
from stepfold.runtime.engine import open_stage
np.save(sys.argv[2] + ".out.npy", stepfold.load(sys.argv[1], threads=1).run(x=np.load(sys.argv[2]))[0])
print(verify(sys.argv[1], open_stage))
"""


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Program:
    program = block()
    return program.with_stage(quantized(program, "dynamic", tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def bundle(dynamic: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(stepfold.lower(dynamic, "openvino", out=tmp_path_factory.mktemp("bundle") / "dynamic"))


def test_a_processor_that_rounds_nothing_builds_them_too(
    dynamic: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (precision, openvino_blocks):
        monkeypatch.setattr(module, "rounds_anywhere", lambda settings: False)
    monkeypatch.setattr(precision, "rounds_activations", lambda width, group, settings: False)
    assert lower(dynamic.step, tmp_path, options=OPTIONS).is_file()


def test_which_stages_such_a_processor_computes_in_float(dynamic: Program, bundle: Path) -> None:
    assert float_without_vnni(dynamic.step, OPTIONS) and not float_without_vnni(block().step, OPTIONS)
    assert [stage.float_without_vnni for stage in stepfold.load(bundle).manifest.stages] == [True]


@needs_emulator
def test_the_same_bundle_without_vnni(dynamic: Program, bundle: Path, tmp_path: Path) -> None:
    """It agrees with the bundle here to the rounding of activations, is nearer to the floats, and is verified."""
    x = tokens(3)
    np.save(tmp_path / "x.npy", x)
    said = without_vnni("-c", RUN, str(bundle), str(tmp_path / "x.npy"))
    received, here = np.load(tmp_path / "x.npy.out.npy"), stepfold.load(bundle).run(x=x)[0]
    exact = block().bind().evaluate({"x": x})[0]
    assert drift(received, here) < 2e-2 and drift(received, exact) < 2e-2
    assert said.strip() == "([], [])"


def processor_with(monkeypatch: pytest.MonkeyPatch, *sets: str) -> None:
    found = {"system": "Linux", "machine": "x86_64", "model": "a model", "instructions": " ".join(sets)}
    monkeypatch.setattr(instructions, "processor", lambda: found)


def rewritten(bundle: Path, sets: tuple[str, ...]) -> Manifest:
    """Let the manifest say another processor; it has no digest of its own."""
    document = json.loads((bundle / "manifest.json").read_text())
    document["backend"]["instructions"] = list(sets)
    (bundle / "manifest.json").write_text(json.dumps(document))
    return read_manifest(bundle)


OLD, NEW = ("avx2",), ("avx2", "avx512f", "avx512_vnni")


@pytest.mark.parametrize(
    ("built", "here", "words", "change"),
    [
        (NEW, OLD, "in float here and were in integers", "lacks avx512f, avx512_vnni"),
        (OLD, NEW, "in integers here and were in float", "has avx512f, avx512_vnni"),
    ],
)
def test_what_another_processor_is_told(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    built: tuple[str, ...],
    here: tuple[str, ...],
    words: str,
    change: str,
) -> None:
    """`verify` and `inspect` say all of it, `load` what changes samples."""
    manifest = rewritten(bundle, built)
    processor_with(monkeypatch, *here)
    products, speed = differences(manifest)
    assert f"stage forward: its 8-bit products are computed {words} where the bundle was built" in products
    assert f"speed: measured on a processor with {', '.join(built)}; this processor {change}, so" in speed
    assert verify(bundle, open_stage, differences) == ([], [products, speed])
    stepfold.load(bundle)
    assert products in caplog.text and speed not in caplog.text


@pytest.mark.parametrize(("built", "here"), [(OLD, OLD), ((), OLD), (OLD, ())])
def test_nothing_is_said_where_processors_agree_or_are_not_known(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, built: tuple[str, ...], here: tuple[str, ...]
) -> None:
    manifest = rewritten(bundle, built)
    processor_with(monkeypatch, *here)
    assert differences(manifest) == []
