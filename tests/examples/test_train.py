"""The reference checkpoint's training script: a smoke run, its folder, resuming, and what it says to bad data."""

import gzip
import importlib
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from safetensors.numpy import load_file

from stepfold.loop.errors import StepfoldError
from stepfold.loop.spec import LoopSpec, read_loop

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "mnist_dit"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STATE = Path("training") / "state.safetensors"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # as `python examples/mnist_dit/train.py` does
    return importlib.import_module("train")


@pytest.fixture
def flow_matching(script: ModuleType) -> ModuleType:
    return sys.modules["flow_matching"]


@pytest.fixture
def mnist(script: ModuleType) -> ModuleType:
    return sys.modules["mnist"]


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(FOLDER / "train.py"), "--smoke", "--out", str(out), "--batch", "4", *options]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished smoke run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("smoke") / "checkpoint"
    options = [sys.executable, str(FOLDER / "train.py"), "--smoke", "--out", str(out), "--every", "5"]
    done = subprocess.run(options, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_smoke_loss_decreases(smoke: tuple[Path, str]) -> None:
    lines = re.findall(r"^step (\d+) loss ([\d.]+) held-out ([\d.]+)$", smoke[1], re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == [5, 10, 15, 20]
    first, last = float(lines[0][2]), float(lines[-1][2])
    assert last < first < 2.0  # the untrained model predicts 0, whose loss is E[(noise - x)^2] = 1 + E[x^2] > 1.9


def test_smoke_folder_is_a_checkpoint(smoke: tuple[Path, str]) -> None:
    out = smoke[0]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"config.json", WEIGHTS, "loop.yaml", STATE.as_posix()}
    assert {array.dtype for array in load_file(out / WEIGHTS).values()} == {np.dtype(np.float16)}
    loop = read_loop(out / "loop.yaml")
    assert isinstance(loop, LoopSpec)
    model, report = DiTTransformer2DModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    labels = torch.tensor([0, 10])
    prediction = model(torch.zeros(2, *loop.latent.shape), torch.full((2,), 500.0), labels).sample
    assert prediction.shape == (2, *loop.latent.shape) and not torch.equal(prediction[0], prediction[1])


def test_evaluate_reports_the_loss_of_the_saved_weights(
    script: ModuleType, smoke: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--smoke", "--evaluate", str(smoke[0])]) == 0
    reported = float(capsys.readouterr().out.split()[-1])
    assert reported == pytest.approx(float(smoke[1].split()[-1]), abs=2e-3)  # fp16 weights against fp32


def test_resumed_run_equals_unbroken_run(script: ModuleType, tmp_path: Path) -> None:
    def run(out: str, steps: int) -> None:
        arguments = command(tmp_path / out, "--steps", str(steps), "--every", "9")[2:]
        assert script.main(arguments) == 0

    run("unbroken", 4)
    run("resumed", 2)
    run("resumed", 4)
    for file in (WEIGHTS, STATE):
        unbroken, resumed = (load_file(tmp_path / out / file) for out in ("unbroken", "resumed"))
        assert unbroken.keys() == resumed.keys()
        assert all(np.array_equal(unbroken[name], resumed[name]) for name in unbroken), file


def test_finished_run_says_so(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path / "run", "--steps", "1")[2:]
    assert script.main(arguments) == 0 and script.main(arguments) == 0
    assert "at step 1 already; raise --steps to go on" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_to_resume(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = command(out, "--steps", "1000000", "--every", "1")
    with subprocess.Popen(options, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("step 1 ")
        run.send_signal(signal.SIGINT)
        printed = run.stdout.read()
    assert run.returncode == 130
    stopped = re.search(r"interrupted after step (\d+) of 1000000; the same command goes on from there", printed)
    assert stopped is not None
    following = int(stopped[1]) + 1
    assert script.main(command(out, "--steps", str(following))[2:]) == 0
    assert capsys.readouterr().out.startswith(f"step {following} ")
    assert not list(out.rglob(".*")), "no temporary file stays behind"


def test_failed_write_keeps_the_old_checkpoint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert script.main(command(out, "--steps", "1")[2:]) == 0
    before = (out / STATE).read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(sys.modules["states"], "save_file", full)
    assert script.main(command(out, "--steps", "2")[2:]) == 1
    assert (out / STATE).read_bytes() == before
    assert not list(out.rglob(".*"))


def test_class_dropout_happens_once(flow_matching: ModuleType, mnist: ModuleType) -> None:
    config = DiTTransformer2DModel.load_config(FOLDER) | {"num_layers": 2, "attention_head_dim": 8}
    model = flow_matching.build(config, seed=0)
    embeddings = [module for module in model.modules() if isinstance(module, LabelEmbedding)]
    assert model.training and len(embeddings) == 2
    for embedding in embeddings:
        assert embedding.embedding_table.num_embeddings == 11
        labels = torch.arange(10).repeat(100)
        assert torch.equal(embedding(labels), embedding.embedding_table(labels))
    data = mnist.generated(20, seed=0)
    batch = flow_matching.make_batch(data, seed=0, step=0, size=4000, dropout=0.1)
    dropped = (batch.labels == 10).double().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.02)  # standard deviation sqrt(0.1 * 0.9 / 4000) = 0.005


def test_batch_follows_the_flow(flow_matching: ModuleType, mnist: ModuleType) -> None:
    data = mnist.Digits(np.full((1, 28, 28), 255, np.uint8), np.array([3]))
    batch = flow_matching.make_batch(data, seed=1, step=2, size=5, dropout=0.0)
    s = (batch.timestep / 1000)[:, None, None, None]
    x = batch.state - s * batch.target  # z = (1 - s) x + s noise and v = noise - x, hence x = z - s v
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[2:30, 2:30] = True
    torch.testing.assert_close(x[:, 0, inside], torch.ones(5, 784), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, 0, ~inside], -torch.ones(5, 240), atol=1e-5, rtol=0)
    assert batch.labels.tolist() == [3] * 5 and len(set(batch.timestep.tolist())) == 5
    again, other = (flow_matching.make_batch(data, seed=1, step=step, size=5, dropout=0.0) for step in (2, 3))
    assert torch.equal(again.state, batch.state) and not torch.equal(other.state, batch.state)


def test_infinite_loss_is_an_error(flow_matching: ModuleType, mnist: ModuleType) -> None:
    config = DiTTransformer2DModel.load_config(FOLDER) | {"num_layers": 1, "attention_head_dim": 8}
    settings = flow_matching.Settings(config, seed=0, batch=2)
    training = flow_matching.start(settings, "cpu")
    with torch.no_grad():
        training.model.proj_out_2.bias.fill_(torch.inf)
    with pytest.raises(StepfoldError, match=r"step 1: expected a finite loss; received inf\."):
        flow_matching.advance(training, settings, mnist.generated(4, seed=0))


def idx(array: np.ndarray) -> bytes:
    """The idx form of an array of bytes, compressed."""
    return gzip.compress(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(folder: Path, **changed: bytes | None) -> Path:
    """A small MNIST of random images, with files replaced or (None) left out; keys are `part_kind`."""
    rng = np.random.default_rng(0)
    names = {"images": "images-idx3-ubyte.gz", "labels": "labels-idx1-ubyte.gz"}
    contents = {"images": idx(rng.integers(0, 256, (6, 28, 28), np.uint8)), "labels": idx(np.arange(6, dtype=np.uint8))}
    for part in ("train", "t10k"):
        for kind, content in contents.items():
            written = changed.get(f"{part}_{kind}", content)
            if written is not None:
                (folder / f"{part}-{names[kind]}").write_bytes(written)
    return folder


def test_mnist_files_are_read(mnist: ModuleType, tmp_path: Path) -> None:
    digits = mnist.read_mnist(write_mnist(tmp_path), "train")
    assert np.array_equal(digits.images, np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8))
    assert digits.labels.tolist() == [0, 1, 2, 3, 4, 5] and digits.labels.dtype == np.int64


IMAGES = np.zeros((6, 28, 28), np.uint8)
BAD_FILES = {
    "missing": ({"train_images": None}, "train-images-idx3-ubyte.gz: no such file; --data expects the folder"),
    "not gzip": ({"t10k_labels": b"<html>404</html>"}, "expected a gzip-compressed idx file; received: Not a gzipped"),
    "truncated": ({"train_images": idx(IMAGES)[:-20]}, "expected a gzip-compressed idx file; received: "),
    "empty": (
        {"train_labels": gzip.compress(b"")},
        "with 1 dimensions (it begins 00000801); received one that begins n",
    ),
    "swapped": ({"train_labels": idx(IMAGES)}, "(it begins 00000801); received one that begins 00000803. Fetch"),
    "short": (
        {"train_images": gzip.compress(gzip.decompress(idx(IMAGES))[:-3])},
        "its header announces 4704 bytes for [6, 28, 28]; received 4701. Fetch it again.",
    ),
    "wrong size": ({"t10k_images": idx(IMAGES[:, :20])}, "expected images of 28x28 in t10k; received [6, 20, 28]."),
    "mismatch": (
        {"train_images": idx(IMAGES[:4])},
        "one label for each image of train; received 4 images and 6 labels.",
    ),
    "bad label": ({"train_labels": idx(np.full(6, 10, np.uint8))}, "expected labels 0 to 9 in train; received 10."),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_is_one_clear_line(
    case: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, message = BAD_FILES[case]
    folder = write_mnist(tmp_path, **changed)
    assert script.main(["--data", str(folder), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert printed.out == "" and not (tmp_path / "out").exists()


def test_bad_data_ends_the_process_with_2(tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        str(FOLDER / "train.py"),
        "--data",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --data --smoke is required"),
        (["--smoke"], "one of the arguments --out --evaluate is required"),
        (["--smoke", "--data", "x", "--out", "y"], "not allowed with argument"),
        (["--smoke", "--out", "y", "--steps", "0"], "expected a whole number of 1 or more; received 0"),
        (["--smoke", "--out", "y", "--seed", "-1"], "expected a whole number of 0 or more; received '-1'"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        script.main(arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_unusable_out_folders(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert script.main(command(full)[2:]) == 2
    assert "expected a new folder or that of an earlier run; received one without" in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def test_resume_refuses_other_settings_and_damage(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert script.main(command(out, "--steps", "1")[2:]) == 0
    assert script.main(command(out, "--steps", "2", "--seed", "5")[2:]) == 2
    assert "holds a run with other settings: seed 0 -> 5. Choose another --out." in capsys.readouterr().err
    (out / STATE).write_bytes((out / STATE).read_bytes()[:-100])
    assert script.main(command(out, "--steps", "2")[2:]) == 2
    assert "expected the state of a training run; received: " in capsys.readouterr().err


def test_evaluate_refuses_what_is_no_checkpoint(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--smoke", "--evaluate", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path}: expected a DiT checkpoint in safetensors; received: " in printed and printed.count("\n") == 1


def test_generated_images_differ_by_class(mnist: ModuleType) -> None:
    digits = mnist.generated(20, seed=0)
    assert digits.images.shape == (20, 28, 28) and digits.labels.tolist() == [*range(10)] * 2
    brightest = digits.images.reshape(20, -1).argmax(1)
    assert len(set(brightest[:10].tolist())) == 10
