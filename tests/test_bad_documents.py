"""Whatever stands in a document: reading it and using what was read is an error of ours, or works."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import LOOP
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import check, check_bytes

from stepfold.bundle.bind import check_values
from stepfold.bundle.probe import Probe
from stepfold.bundle.reader import Bundle, read, read_manifest
from stepfold.bundle.tables import Tables
from stepfold.cli.inspect import print_bundle
from stepfold.loop.errors import StepfoldError
from stepfold.loop.held import HeldFile
from stepfold.loop.spec import read_loop
from stepfold.passes.recipe import load_recipe

RECIPE = {
    "name": "all",
    "summary": "text",
    "target": {"backend": "onnxruntime"},
    "extends": {"passes": ["hoist", {"schedule": {"evaluations": 3, "samples": 8}}]},
    "passes": [{"quantize": {"scheme": "int8", "skip": ["a*"]}, "optional": True}, "fuse"],
}
COMPONENT = {
    "component": {"method": "decode"},
    "inputs": {"z": {"role": "condition", "shape": [4, 8], "dtype": "float32"}},
    "constants": {"return_dict": False, "a.b": [1, 2.5]},
}


def written(folder: Path, document: Any) -> Path:
    file = folder / "document.yaml"
    file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    return file


def use_manifest(folder: Path, document: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(document))
    print_bundle(read_manifest(folder).model_dump(mode="json", by_alias=True))
    bundle = read(folder)
    check_values(bundle.manifest, bundle.tables())


VALID: dict[str, Any] = {
    "loop": LOOP,
    "component": COMPONENT,
    "recipe": RECIPE,
}
USES: dict[str, Callable[[Path, Any], object]] = {
    "loop": lambda folder, document: read_loop(written(folder, document)),
    "component": lambda folder, document: read_loop(written(folder, document)),
    "recipe": lambda folder, document: load_recipe(written(folder, document)).steps(),
}


@pytest.mark.parametrize("kind", VALID)
def test_documents_of_users(tmp_path: Path, kind: str) -> None:
    check(VALID[kind], lambda document: USES[kind](tmp_path, document))


@pytest.mark.parametrize("kind", VALID)
def test_texts_of_users(tmp_path: Path, kind: str) -> None:
    """Damage of the text itself, which is found by the reader of the format or by what reads its values."""
    file = written(tmp_path, VALID[kind])
    uses = {"loop": read_loop, "component": read_loop, "recipe": lambda path: load_recipe(path).steps()}
    check_bytes(file.read_bytes(), lambda content: file.write_bytes(content) and uses[kind](file))


@pytest.mark.parametrize("name", ["manifest.json", "tables.safetensors", "probe.safetensors"])
def test_files_of_a_bundle(bundle_folder: Path, name: str) -> None:
    """What a bundle says of itself, whoever wrote it, digests included."""
    file, found = bundle_folder / name, read(bundle_folder)

    def use(content: bytes) -> None:
        file.write_bytes(content)
        held = {**found.held, name: HeldFile(file)}
        bundle = Bundle(bundle_folder, read_manifest(bundle_folder), held)
        check_values(bundle.manifest, bundle.tables())
        for probe in bundle.probes():
            probe.arrays()

    check_bytes(file.read_bytes(), use)


ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(["f4", "f8", "i8", "i1", "u1", "?", "f2"]),
    st.sampled_from([0, 1, 2.5, -1, 1e30, float("nan"), float("inf")]),
)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(
    ("kind", "name"), [(Tables, "tables.safetensors"), (Probe, "probe.safetensors")], ids=["tables", "probe"]
)
def test_arrays_of_a_bundle(read_only_bundle: Path, kind: Any, name: str) -> None:
    """Each array replaced by one of another shape, type and values, or left out, or beside one of another name."""
    arrays = read(read_only_bundle).arrays(name)

    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from([*arrays, "x", "scale=3.0/x", "values/class_labels"]), st.none() | ARRAYS)
    def changed(key: str, value: np.ndarray | None) -> None:
        others = {other: array for other, array in arrays.items() if other != key}
        with suppress(StepfoldError):
            assert isinstance(kind.from_arrays(others if value is None else {**others, key: value}), kind)

    changed()


def test_manifests(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((bundle_folder / "manifest.json").read_text())
    check(document, lambda changed: use_manifest(bundle_folder, changed))
    assert "\x1b[2J" not in capsys.readouterr().out
