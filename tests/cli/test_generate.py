"""`generate`: from a bundle written by hand, and from a checkpoint."""

import shutil
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from checkpoints import CLASSES, LOOP, QUICK
from PIL import Image
from safetensors.numpy import save_file

from stepfold.bundle import read
from stepfold.loop.metrics import drift
from stepfold.loop.spec import LatentSpec, LoopSpec


def noise_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, 2, 2)).astype("float32")


def save(path: Path, array: object, **options: bool) -> Path:
    np.save(path, array, **options)  # type: ignore[arg-type]
    return path


def test_numbers_are_those_of_the_loop(stepfold, tiny, read_only_bundle: Path, tmp_path: Path) -> None:
    result = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy", "--count", 6, "--seed", 5)
    assert (result.code, result.err) == (0, "")
    samples = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert samples.dtype == np.float32
    expected = tiny.sample(noise_of(5, 6), np.arange(6) % 4, 2.0, (0, 2))
    np.testing.assert_allclose(samples, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "labels"),
    [((), [0]), (("--classes", "3,1"), [3, 1]), (("--classes", "3,1", "--count", 5), [3, 1, 3, 1, 3])],
)
def test_classes_are_cycled_to_the_count(
    stepfold, tiny, read_only_bundle: Path, tmp_path: Path, words: tuple, labels: list[int]
) -> None:
    assert stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy", *words).code == 0
    expected = tiny.sample(noise_of(0, len(labels)), np.array(labels), 2.0, (0, 2))
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-6)


def test_noise_and_guidance_are_taken(stepfold, tiny, read_only_bundle: Path, tmp_path: Path) -> None:
    noise = noise_of(9, 3)
    file = save(tmp_path / "noise.npy", noise)
    words = ("--npy", tmp_path / "a.npy", "--noise", file, "--guidance", "3")
    assert stepfold("generate", read_only_bundle, *words).code == 0
    expected = tiny.sample(noise, np.arange(3), 3.0, (0, 2))
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-6)


def test_both_files_are_written_and_replaced(stepfold, read_only_bundle: Path, tmp_path: Path) -> None:
    picture, numbers = tmp_path / "new" / "a.png", tmp_path / "a.npy"
    numbers.write_bytes(b"old")
    result = stepfold("generate", read_only_bundle, "--out", picture, "--npy", numbers, "--count", 2)
    assert result.code == 0
    assert Image.open(BytesIO(picture.read_bytes())).format == "PNG"
    assert np.load(numbers).shape == (2, 1, 2, 2)
    assert str(picture) in result.out and str(numbers) in result.out
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.npy", "a.png", "new"]


def test_conditions_are_taken_from_a_file(stepfold, tiny, read_only_bundle: Path, tmp_path: Path) -> None:
    """A row for each sample; fewer are taken in turn."""
    file = tmp_path / "conditions.safetensors"
    save_file({"class_labels": np.array([3, 1])}, file)
    for words, labels in (((), [3, 1]), (("--count", 3), [3, 1, 3])):
        done = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy", "--conditions", file, *words)
        assert (done.code, done.err) == (0, "")
        expected = tiny.sample(noise_of(0, len(labels)), np.array(labels), 2.0, (0, 2))
        np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "expected safetensors of arrays, for --conditions; received a file without arrays"),
        ({"class": np.array([1])}, "class: expected a condition of this model; received an unknown name"),
        ({"class_labels": np.array(1)}, "class_labels: expected rows, one for each sample; received shape []"),
        ({"class_labels": np.array([7])}, "class_labels: expected indices from 0 to 4; received 7"),
        ({"class_labels": np.array([1]), "unconditional/class_labels": np.array([1])}, "unconditional: expected none"),
    ],
)
def test_conditions_that_do_not_fit(
    stepfold, read_only_bundle: Path, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    save_file(arrays, tmp_path / "a.safetensors")
    done = stepfold(
        "generate", read_only_bundle, "--npy", tmp_path / "a.npy", "--conditions", tmp_path / "a.safetensors"
    )
    assert done.code == 2 and message in done.err and not (tmp_path / "a.npy").exists()


BAD = {
    "two": (("--npy", "a.npy", "--classes", "1", "--conditions", "b"), "--classes: expected --classes or --conditions"),
    "no conditions": (("--npy", "a.npy", "--conditions", "none"), "none: expected safetensors of arrays, for --cond"),
    "neither": ((), "expected --out FILE.png, --npy FILE.npy or both"),
    "suffix": (("--out", "a.jpg"), "--out: expected a file that ends in .png; received a.jpg."),
    "npy suffix": (("--npy", "a.png"), "--npy: expected a file that ends in .npy"),
    "words": (("--npy", "a.npy", "--classes", "1,x"), "--classes: expected whole numbers"),
    "range": (("--npy", "a.npy", "--classes", "0,7"), "classes: expected indices from 0 to 3; received 7."),
    "unconditional": (("--npy", "a.npy", "--classes", "4"), "classes: expected indices from 0 to 3; received 4."),
    "no noise": (
        ("--npy", "a.npy", "--noise", "none.npy"),
        "none.npy: expected an array saved with numpy.save, for --noise; there is no such file.",
    ),
    "guidance": (("--npy", "a.npy", "--guidance", "nan"), "guidance: expected a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_use(stepfold, read_only_bundle: Path, tmp_path: Path, monkeypatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = BAD[case]
    result = stepfold("generate", read_only_bundle, *words)
    assert result.code == 2
    assert message in result.error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(stepfold, read_only_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npy").mkdir()
    result = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy")
    assert (result.code, "expected a file; received the folder" in result.error) == (2, True)


NOISE = {
    "shape": (np.zeros((2, 1, 3, 3), np.float32), "noise: expected shape [B, 1, 2, 2]"),
    "empty": (np.zeros((0, 1, 2, 2), np.float32), "noise: expected shape [B, 1, 2, 2] with B at least 1"),
    "scalar": (np.zeros((), np.float32), "noise: expected shape [B, 1, 2, 2]"),
    "dtype": (np.zeros((2, 1, 2, 2)), "noise: expected dtype float32; received float64."),
    "text": (
        np.full((2, 1, 2, 2), "a"),
        "expected an array saved with numpy.save, for --noise; received values of <U1, which are no numbers",
    ),
    "NaN": (np.full((2, 1, 2, 2), np.nan, np.float32), "noise: expected finite numbers; received NaN"),
    "objects": (np.full((2, 1, 2, 2), None), "received values of object, which are no numbers"),
}


@pytest.mark.parametrize("case", NOISE)
def test_unfit_noise(stepfold, read_only_bundle: Path, tmp_path: Path, case: str) -> None:
    array, message = NOISE[case]
    file = save(tmp_path / "noise.npy", array, allow_pickle=case == "objects")
    result = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy", "--noise", file)
    assert result.code == 2
    assert message in result.error
    assert not (tmp_path / "a.npy").exists()


def test_truncated_noise(stepfold, read_only_bundle: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "noise.npy", noise_of(0, 4))
    file.write_bytes(file.read_bytes()[:-8])
    result = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy", "--noise", file)
    assert (result.code, "expected an array saved with numpy.save" in result.error) == (2, True)


def test_count_and_noise_must_agree(stepfold, read_only_bundle: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "noise.npy", noise_of(0, 4))
    words = ("--npy", tmp_path / "a.npy", "--noise", file, "--count", 3)
    result = stepfold("generate", read_only_bundle, *words)
    assert (result.code, result.error.startswith("--count: expected 4")) == (2, True)


def test_missing_folder(stepfold, tmp_path: Path) -> None:
    result = stepfold("generate", tmp_path / "none", "--npy", tmp_path / "a.npy")
    assert result.code == 2
    assert result.error == f"{tmp_path / 'none'}: expected the folder of a bundle or a checkpoint; there is none."


def test_a_damaged_bundle_fails(stepfold, bundle_folder: Path, tmp_path: Path) -> None:
    file = bundle_folder / "stages" / "step.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    result = stepfold("generate", bundle_folder, "--npy", tmp_path / "a.npy")
    assert (result.code, "The file was changed" in result.error) == (1, True)


def opened_with(monkeypatch, loop: LoopSpec | None) -> None:
    """Let `generate` open a model with this loop, whatever its folder holds."""
    sampler = SimpleNamespace(loop=loop, ends=SimpleNamespace(decoder=None))
    monkeypatch.setattr(sys.modules["stepfold.cli.generate"], "_open", lambda *_: sampler)


def test_latents_are_no_picture(stepfold, read_only_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    loop = read(read_only_bundle).manifest.loop
    assert loop is not None
    opened_with(monkeypatch, loop.model_copy(update={"latent": LatentSpec(shape=(2, 2))}))
    result = stepfold("generate", read_only_bundle, "--out", tmp_path / "a.png")
    assert (result.code, "its latents are [2, 2]" in result.error) == (2, True)


def test_a_component_makes_no_samples(stepfold, read_only_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    opened_with(monkeypatch, None)
    result = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy")
    assert (result.code, "received a component" in result.error) == (2, True)


def test_an_interruption_leaves_nothing(stepfold, read_only_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(stream, *_: object, **__: object) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.save", interrupted)
    result = stepfold("generate", read_only_bundle, "--npy", tmp_path / "a.npy")
    assert (result.code, result.error) == (1, "interrupted; nothing was written.")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_runs_every_call_of_its_loop(stepfold, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Against the loop written out with diffusers itself."""
    import torch
    from diffusers import DiTTransformer2DModel

    result = stepfold("generate", tiny_checkpoint, "--npy", tmp_path / "a.npy", "--count", 5, "--seed", 3)
    assert result.code == 0
    model = DiTTransformer2DModel.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32).eval()  # type: ignore[attr-defined]
    noise = np.random.default_rng(3).standard_normal((5, 1, 8, 8)).astype("float32")
    latents, labels = torch.from_numpy(noise), torch.arange(5) % CLASSES
    with torch.no_grad():
        for step in range(8):
            time = torch.full((5,), 1000 * (1 - step / 8))
            conditional, unconditional = (
                model(latents, timestep=time, class_labels=given).sample
                for given in (labels, torch.full_like(labels, CLASSES))
            )
            latents = latents - (unconditional + 2.0 * (conditional - unconditional)) / 8
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), latents.numpy(), atol=1e-4)


def test_a_loop_that_draws_noise(stepfold, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """From checkpoint to bundle to samples of half of the calls: in the same order, of one seed, near the full loop."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "noisy")
    sampler = {"scheduler": "EulerAncestralDiscreteScheduler", "steps": 8}
    (folder / "loop.yaml").write_text(yaml.safe_dump(LOOP | {"sampler": sampler}, sort_keys=False))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"passes": ["hoist", {"schedule": {**QUICK, "evaluations": 4}}]}))
    built = stepfold("optimize", folder, "--out", tmp_path / "bundle", "--recipe", recipe)
    assert built.code == 0, built.err
    draws = {}
    for model in ("noisy", "bundle"):
        done = stepfold("generate", tmp_path / model, "--npy", tmp_path / f"{model}.npy", "--count", 3, "--seed", 5)
        assert done.code == 0, done.err
        draws[model] = np.load(tmp_path / f"{model}.npy")
    assert drift(draws["bundle"], draws["noisy"]) < 0.05
    noise = np.random.default_rng(5).standard_normal((3, 8, 1, 8, 8)).astype("float32")  # the start and seven draws
    np.save(tmp_path / "noise.npy", noise)
    words = ("generate", tmp_path / "bundle", "--npy", tmp_path / "given.npy")
    assert stepfold(*words, "--noise", tmp_path / "noise.npy").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "given.npy"), draws["bundle"])
    np.save(tmp_path / "noise.npy", noise[:, 0])
    result = stepfold(*words, "--noise", tmp_path / "noise.npy")
    assert result.code == 2 and "noise: expected shape [B, 8, 1, 8, 8]" in result.error


def test_class_outside_the_range_of_a_checkpoint(stepfold, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = stepfold("generate", tiny_checkpoint, "--npy", tmp_path / "a.npy", "--classes", "4")
    assert (result.code, result.error) == (2, "classes: expected indices from 0 to 3; received 4.")
