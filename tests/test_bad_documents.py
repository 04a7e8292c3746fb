"""Whatever stands in a document: reading it and using what was read is an error of ours, or works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import LOOP
from mutations import check

from stepfold.bundle.bind import check_values
from stepfold.bundle.reader import read, read_manifest
from stepfold.cli.inspect import print_bundle
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


def test_manifests(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads((bundle_folder / "manifest.json").read_text())
    check(document, lambda changed: use_manifest(bundle_folder, changed))
    assert "\x1b[2J" not in capsys.readouterr().out
