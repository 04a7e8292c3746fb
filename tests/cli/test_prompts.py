"""From the folder of a text-to-image pipeline to pictures of prompts, without PyTorch."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from checkpoints import Remembered
from commands import NOT_OF_THE_CORE, command

from stepfold.bundle import read, write_manifest
from stepfold.bundle.reader import read_manifest
from stepfold.bundle.verify import verify
from stepfold.loop.errors import BundleError, UsageError
from stepfold.loop.metrics import drift
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.engine import load, open_stage
from stepfold.runtime.prompts import draw
from stepfold.runtime.unoptimized import load_unoptimized

pytestmark = pytest.mark.slow
PAGE = Path(__file__).resolve().parents[2] / "docs" / "pipelines.md"
PROMPT, NEGATIVE = "a cat in the sun", "rain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def remembered() -> Remembered:
    return Remembered()


@pytest.fixture(scope="module")
def bundle(folder: Path, remembered: Remembered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 and all 28 steps."""
    out = tmp_path_factory.mktemp("bundle") / "sd3"
    with pytest.MonkeyPatch.context() as patch:
        remembered.stand_in(patch)
        patch.setattr("stepfold.runtime.quality.HELD_OUT", 2)
        document = optimize(Job(folder, out, recipe={"passes": ["hoist"]}), lambda task, done, total: None)
    assert document["stages"]
    return out


def test_images_are_those_of_the_pipeline(folder: Path, bundle: Path, tmp_path: Path) -> None:
    """`generate --prompt` with PyTorch blocked against diffusers, from the same noise."""
    noise = np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    words = ["generate", bundle, "--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--noise", tmp_path / "noise.npy"]
    command(*words, "--npy", tmp_path / "a.npy", "--out", tmp_path / "a.png", blocked=NOT_OF_THE_CORE)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        [PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, latents=torch.from_numpy(noise), output_type="np"
    ).images
    received = (np.load(tmp_path / "a.npy").transpose(0, 2, 3, 1) + 1) / 2
    assert drift(received, wanted) < 1e-3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_takes_prompts_too(
    folder: Path,
    bundle: Path,
    remembered: Remembered,
    stepfold: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remembered.stand_in(monkeypatch)
    for model, name in ((folder, "a"), (bundle, "b")):
        words = ["generate", str(model), "--prompt", PROMPT, "--prompt", "a dog", "--seed", "5"]
        assert stepfold(*words, "--npy", str(tmp_path / f"{name}.npy")).code == 0
    first, second = (np.load(tmp_path / f"{name}.npy") for name in "ab")
    assert first.shape == (2, 3, 16, 16) and drift(second, first) < 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-2


def test_from_python(bundle: Path) -> None:
    engine = load(bundle)
    images = engine.draw(PROMPT, NEGATIVE, seed=5)
    assert images.shape == (1, 3, 16, 16) and np.abs(images).max() <= 1
    three = engine.draw([PROMPT, "a dog"], NEGATIVE, count=3, seed=5)
    np.testing.assert_allclose(three[0], images[0], atol=1e-4)
    assert drift(engine.draw(PROMPT, "", seed=5), images) > 1e-4, "the negative prompt has a say"
    np.testing.assert_array_equal(engine.draw(PROMPT, seed=5), engine.draw(PROMPT, "", seed=5))
    assert drift(engine.draw(PROMPT, NEGATIVE, seed=5, guidance=1.0), images) > 1e-4
    for name, value in {"prompt": [], "count": 0, "seed": -1, "negative_prompt": 5}.items():
        with pytest.raises(UsageError, match=f"{name}: expected "):
            engine.draw(**({"prompt": PROMPT} | {name: value}))


def test_the_page_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sd3").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    defined: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), defined)  # noqa: S102  (code of this repository)
    assert defined["images"].shape == (4, 3, 16, 16) and defined["images"].dtype == np.float32


def test_the_bundle_says_what_it_holds_and_is_verified(bundle: Path) -> None:
    manifest = read(bundle).manifest
    assert manifest.pipeline is not None and manifest.pipeline.class_name == "StableDiffusion3Pipeline"
    assert manifest.pipeline.folders == ("text", "decoder")
    assert {f"tokenizers/{name}.json" for name in ("input_ids", "input_ids_2", "input_ids_3")} <= set(manifest.files)
    assert verify(bundle, open_stage) == ([], [])


@pytest.mark.parametrize("name", ["text/manifest.json", "decoder/stages/forward.onnx", "tokenizers/input_ids.json"])
def test_a_changed_byte_around_the_loop_is_noticed(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(BundleError, match=f"{name}: expected sha256"):
        load(copy)
    assert len(verify(copy, open_stage)[0]) == 1


def test_a_bundle_within_that_names_other_files_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    inner = json.loads((copy / "text" / "manifest.json").read_text())
    inner["files"]["tables.safetensors"]["bytes"] += 1
    (copy / "text" / "manifest.json").write_text(json.dumps(inner))
    write_manifest(copy, read_manifest(copy))
    with pytest.raises(BundleError, match=r"'tables\.safetensors' is not what the manifest of"):
        load(copy).draw(PROMPT)


def test_wrong_use(bundle: Path, tiny_checkpoint: Path, stepfold: Callable[..., Any], tmp_path: Path) -> None:
    target = ["--npy", str(tmp_path / "a.npy")]
    cases = [
        ([bundle, "--prompt", "a", "--classes", "1"], "--classes: expected --classes or --prompt; received both"),
        ([bundle, "--negative-prompt", "a"], "--negative-prompt: expected a --prompt beside it"),
        ([tiny_checkpoint, "--prompt", "a"], "prompt: expected a model that is told what to draw by text"),
        ([bundle], "classes: expected a model whose only condition is a class index"),
    ]
    for words, message in cases:
        done = stepfold("generate", *map(str, words), *target)
        assert done.code == 2 and message in done.err
    assert not list(tmp_path.iterdir())


def test_without_the_tokenizer_library(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"Prompts need the package tokenizers: pip install 'stepfold\[prompts\]'"):
        load(bundle).draw(PROMPT)


def test_a_guidance_scale_that_was_distilled(tmp_path: Path) -> None:
    """FLUX is told its scale by an input; images are those of the pipeline."""
    folder = pipelines.flux(tmp_path / "flux")
    noise = np.random.default_rng(3).standard_normal((1, 4096, 16)).astype(np.float32)
    model = load_unoptimized(folder)
    received = draw(model, model.loop, model.ends, noise, [PROMPT], guidance=2.0)
    pipeline = diffusers.FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(PROMPT, guidance_scale=2.0, latents=torch.from_numpy(noise), output_type="np").images
    assert drift((received.transpose(0, 2, 3, 1) + 1) / 2, wanted) < 1e-3
    with pytest.raises(UsageError, match="negative prompt: expected none"):
        draw(model, model.loop, model.ends, noise, [PROMPT], NEGATIVE)
