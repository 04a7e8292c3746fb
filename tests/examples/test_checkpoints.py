"""The trained pipeline of an example loads and draws; what the scripts train on is what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.numpy import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNET, CAPTIONED = EXAMPLES / "mnist_unet", EXAMPLES / "captioned_digits"
LIMITS = {UNET: 5e6}
"""Bytes of the folders whose weights are in the repository."""


def module(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a script, found as the script finds it."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "shared"))
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("canvases", CAPTIONED, monkeypatch)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("words", CAPTIONED, monkeypatch)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("drawing", CAPTIONED, monkeypatch)


@pytest.fixture
def denoising(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("denoising", UNET, monkeypatch)


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("mnist", UNET, monkeypatch)


@pytest.mark.parametrize("folder", LIMITS, ids=lambda folder: folder.name)
def test_folder_is_small_and_holds_no_run(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < LIMITS[folder]
    assert {path.suffix for path in files} <= {".py", ".md", ".json", ".txt", ".safetensors"}
    assert not (folder / "training").exists()


def test_unconditional_pipeline_draws() -> None:
    pipeline = DDIMPipeline.from_pretrained(UNET, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    defaults = DDIMScheduler().config
    given = pipeline.scheduler.config
    assert {name: given[name] for name in defaults if not name.startswith("_")} == {
        name: value for name, value in defaults.items() if not name.startswith("_")
    }
    drawn = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, 28, 28, 1) and np.isfinite(drawn).all() and drawn.std() > 0.05


def test_unseen_captions_are_listed_and_not_trained_on(canvases: ModuleType, mnist: ModuleType) -> None:
    listed = (CAPTIONED / "unseen.txt").read_text().splitlines()
    assert listed == [str(caption) for caption in canvases.UNSEEN] and len(listed) == 24
    assert len({*map(str, canvases.CAPTIONS)}) == 240 == len(canvases.SEEN) + len(canvases.UNSEEN)
    drawn = canvases.canvases_of(mnist.generated(600, seed=0), canvases.SEEN, seed=0)
    trained = {str(canvases.CAPTIONS[place]) for place in drawn.captions}
    assert len(drawn.captions) == 600 and len(trained) > 150 and not trained & {*listed}


def test_every_word_of_an_unseen_caption_is_in_a_seen_one(canvases: ModuleType) -> None:
    seen, unseen = (
        {word for caption in captions for word in str(caption).split()} for captions in (canvases.SEEN, canvases.UNSEEN)
    )
    assert unseen <= seen and {"seven", "purple", "large", "white"} <= unseen


def test_canvas_shows_its_caption(canvases: ModuleType) -> None:
    image = np.zeros((28, 28), np.uint8)
    image[7:21, 7:21] = 255
    for caption in canvases.CAPTIONS:
        canvas = canvases.draw(image, caption, (0, 0))
        assert canvas.shape == (32, 32, 3) and canvas.dtype == np.uint8
        assert tuple(canvas[0, 0]) == canvases.GROUNDS[caption.ground]
        assert tuple(canvas[16, 16]) == canvases.COLOURS[caption.colour]
        covered = (canvas == canvases.COLOURS[caption.colour]).all(-1).sum()
        assert covered == {"small": 6, "large": 14}[caption.size] ** 2  # half the side, less a pixel of each edge


def test_only_small_digits_are_off_the_middle(canvases: ModuleType) -> None:
    image = np.full((28, 28), 255, np.uint8)
    small, large = (canvases.Caption(size, "red", 3, "white") for size in ("small", "large"))
    moved = canvases.draw(image, small, (-4, 4))
    assert np.array_equal(moved, np.roll(canvases.draw(image, small, (0, 0)), (-4, 4), (0, 1)))
    assert np.array_equal(canvases.draw(image, large, (-4, 4)), canvases.draw(image, large, (0, 0)))


def test_canvases_are_of_their_digits(canvases: ModuleType, mnist: ModuleType) -> None:
    digits = mnist.generated(30, seed=0)
    first, again, other = (canvases.canvases_of(digits, canvases.SEEN, seed) for seed in (0, 0, 1))
    assert [canvases.CAPTIONS[place].digit for place in first.captions] == digits.labels.tolist()
    assert np.array_equal(first.images, again.images) and not np.array_equal(first.images, other.images)
    sevens = [caption for caption in canvases.UNSEEN if caption.digit == 7]
    assert canvases.canvases_of(digits, sevens, seed=0).images.shape == (3, 32, 32, 3)
    pixels = first.pixels(np.array([4, 2]))
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == np.float32
    assert pixels[1, :, 5, 9] == pytest.approx(first.images[2, 5, 9] / 127.5 - 1, abs=1e-6)


def test_each_word_of_the_captions_is_one_token(words: ModuleType, canvases: ModuleType) -> None:
    tokenizer = words.make_tokenizer()
    for caption in canvases.CAPTIONS:
        assert tokenizer.tokenize(str(caption)) == [word + "</w>" for word in str(caption).split()]
    tokens = words.tokens_of(["A small RED seven on white", "a small red seven on white", "a violet elephant", ""])
    assert tokens.shape == (4, 16) and torch.equal(tokens[0], tokens[1])
    assert tokens[3].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 15
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_captions_are_dropped_for_guidance(drawing: ModuleType) -> None:
    data = drawing.Latents(torch.randn(10, 4, 8, 8), torch.arange(10))
    batch = drawing.make_batch(data, seed=0, step=0, size=4000, dropout=0.1)
    assert (batch.captions == drawing.EMPTY).double().mean().item() == pytest.approx(0.1, abs=0.02)
    a = drawing.DDIMScheduler(**drawing.SCHEDULE).alphas_cumprod[batch.timestep][:, None, None, None]
    kept = batch.captions != drawing.EMPTY
    x = a.sqrt() * batch.state - (1 - a).sqrt() * batch.velocity  # of a velocity and a state
    torch.testing.assert_close(x[kept], data.values[batch.captions[kept]], atol=1e-4, rtol=0)
    assert torch.equal(drawing.make_batch(data, 0, 0, 4000, 0.1).state, batch.state)


def test_batch_has_the_noise_that_is_asked_for(denoising: ModuleType, mnist: ModuleType) -> None:
    data = mnist.Digits(np.full((1, 28, 28), 255, np.uint8), np.array([3]))
    batch = denoising.make_batch(data, seed=1, step=2, size=5)
    a = DDIMScheduler().alphas_cumprod[batch.timestep][:, None, None, None]
    torch.testing.assert_close(batch.state, a.sqrt() + (1 - a).sqrt() * batch.noise)
    assert len(set(batch.timestep.tolist())) == 5
    assert not torch.equal(denoising.make_batch(data, seed=1, step=3, size=5).noise, batch.noise)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [UNET, CAPTIONED], ids=lambda folder: folder.name)
def test_smoke_run_writes_a_pipeline_and_goes_on(folder: Path, tmp_path: Path) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, str(folder / "train.py"), "--smoke", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    unbroken, resumed = (str(tmp_path / name) for name in ("unbroken", "resumed"))
    run("--steps", "3", "--out", unbroken)
    run("--steps", "2", "--out", resumed)
    assert run("--steps", "3", "--out", resumed).splitlines()[-1].startswith("step 3 ")
    files = [path.relative_to(unbroken) for path in Path(unbroken).rglob("*.safetensors")]
    assert len(files) >= 2
    for file in files:
        first, second = (load_file(Path(out, file)) for out in (unbroken, resumed))
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first), file
    assert not list(tmp_path.rglob(".*")), "no temporary file stays behind"
    made = {path.relative_to(unbroken) for path in Path(unbroken).rglob("*.json")}
    assert folder not in LIMITS or made == {path.relative_to(folder) for path in folder.rglob("*.json")}
    assert "held-out loss" in run("--evaluate", unbroken)
