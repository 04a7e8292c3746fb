"""`calibrate`: what it prints, how it goes on, and every kind of bad use."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import HOIST, LOOP, save_tiny_dit

from stepfold.calibration import durable, run

pytestmark = pytest.mark.usefixtures("captured_once")

KEYS = {"store", "key", "shards", "resumed", "sites", "plan", "seconds"}


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of the tiny DiT; for tests that do not change it."""
    from stepfold.cli import main

    out = tmp_path_factory.mktemp("stores") / "store"
    assert main(["calibrate", str(tiny_checkpoint), "--out", str(out), "--samples", "9", "--json"]) == 0
    return out


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A finished store to damage."""
    return Path(shutil.copytree(store, tmp_path / "store"))


# What it does


def test_json(stepfold, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = stepfold(
        "calibrate", tiny_checkpoint, "--out", tmp_path / "store", "--samples", 9, "--buckets", 4, "--json"
    )
    assert result.code == 0, result.err
    document = result.document()
    assert document.keys() == KEYS and document["store"] == str(tmp_path / "store")
    assert document["shards"] == {"done": 2, "total": 2} and document["resumed"] == 0 and document["sites"] == 11
    planned = [document["plan"][name] for name in ("accumulators", "gram", "rows", "activations")]
    assert sum(planned) == document["plan"]["planned"] and min(planned) > 0
    assert document["plan"]["weights"] == 4 * 10388
    written = json.loads((tmp_path / "store" / "store.json").read_text())
    assert (written["key"], written["finished"], written["parts"]["buckets"]) == (document["key"], True, 4)
    assert "Plan: 9 samples in 2 shards, 8 calls in 4 buckets" in result.err  # before the work, beside the JSON


def test_text_begins_with_the_plan(stepfold, tiny_checkpoint: Path, copy: Path) -> None:
    result = stepfold("calibrate", tiny_checkpoint, "--out", copy, "--samples", 9)
    assert (result.code, result.err) == (0, "")
    plan, memory, disk, done = result.out.splitlines()
    assert plan.startswith(
        "Plan: 9 samples in 2 shards, 8 calls in 8 buckets, branches: conditional and unconditional, 11"
    )
    assert "B in use (weights 41.6 kB) and" in memory and "Gram matrices 1.1 MB" in memory
    assert disk.startswith("Disk: ")
    assert done.startswith(f"Store: {copy}: 2 shards, all of them finished before; 11 sites")


def test_an_interrupted_store_goes_on(stepfold, tiny_checkpoint: Path, copy: Path, store: Path) -> None:
    (copy / "shards" / "00001.safetensors").unlink()
    result = stepfold("calibrate", tiny_checkpoint, "--out", copy, "--samples", 9)
    assert "2 shards, 1 of them finished before" in result.out
    files = ("store.json", "statistics.safetensors", "shards/00001.safetensors")
    assert all((copy / name).read_bytes() == (store / name).read_bytes() for name in files)


def test_interrupting_keeps_finished_shards(stepfold, tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    real = run.collect_shard

    def interrupted(plan: Any, index: int, on_evaluation: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return real(plan, index, on_evaluation)

    monkeypatch.setattr(run, "collect_shard", interrupted)
    words = ("calibrate", tiny_checkpoint, "--out", tmp_path / "store", "--samples", 9)
    result = stepfold(*words)
    assert result.code == 1
    assert (
        result.error
        == f"interrupted; 1 of 2 shards are kept in {tmp_path / 'store'}. The same command goes on from there."
    )
    monkeypatch.setattr(run, "collect_shard", real)
    assert "1 of them finished before" in stepfold(*words).out


def test_a_loop_of_its_own(stepfold, tiny_checkpoint: Path, tmp_path: Path) -> None:
    loop = LOOP | {"guidance": None}
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({k: v for k, v in loop.items() if v is not None}))
    words = ("--out", tmp_path / "store", "--samples", 1, "--loop", tmp_path / "loop.yaml")
    assert "branches: conditional, 11 sites" in stepfold("calibrate", tiny_checkpoint, *words).out


# Wrong use


def test_a_stale_store_names_what_differs(stepfold, tiny_checkpoint: Path, store: Path) -> None:
    result = stepfold("calibrate", tiny_checkpoint, "--out", store, "--samples", 9, "--seed", 5)
    assert result.code == 2
    assert "received a stale one: seed: 0 in the store, 5 here." in result.error


def test_a_store_of_another_checkpoint(stepfold, store: Path, tmp_path: Path) -> None:
    other = save_tiny_dit(tmp_path / "other", seed=1)
    result = stepfold("calibrate", other, "--out", store, "--samples", 9)
    assert result.code == 2
    assert "received a stale one: weights: " in result.error


def test_two_at_once(stepfold, tiny_checkpoint: Path, store: Path) -> None:
    with durable.locked(store):
        result = stepfold("calibrate", tiny_checkpoint, "--out", store, "--samples", 9)
    assert (result.code, "another process is calibrating into this store" in result.error) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--buckets", "9"), "expected between 1 and 8 buckets, the calls of the loop; received 9."),
        (("--samples", "0"), "Invalid value for '--samples'"),
        (("--workers", "0"), "Invalid value for '--workers'"),
        (("--seed", "-1"), "Invalid value for '--seed'"),
        (("--loop", "none.yaml"), "none.yaml: expected a loop file, YAML; there is no such file."),
    ],
)
def test_wrong_words(stepfold, tiny_checkpoint: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    result = stepfold("calibrate", tiny_checkpoint, "--out", tmp_path / "store", *words)
    assert result.code == 2
    assert message in result.error
    assert not (tmp_path / "store").exists()


def test_a_foreign_folder_is_refused_before_anything_is_loaded(stepfold, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    result = stepfold("calibrate", tmp_path / "none", "--out", tmp_path)
    assert (result.code, "received one with notes.txt" in result.error) == (2, True)


def test_a_missing_checkpoint(stepfold, tmp_path: Path) -> None:
    result = stepfold("calibrate", tmp_path / "none", "--out", tmp_path / "store")
    assert (result.code, "no such checkpoint folder" in result.error) == (2, True)


def test_workers_without_ray(stepfold, tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = stepfold("calibrate", tiny_checkpoint, "--out", tmp_path / "store", "--workers", 2)
    assert result.code == 2
    assert "pip install 'stepfold[distributed]'" in result.error


# What it is for


def test_inspect_json(stepfold, store: Path) -> None:
    document = stepfold("inspect", store, "--json").document()
    assert document["finished"] and document["shards"] == {"done": 2, "total": 2}
    assert len(document["coverage"]) == 16 and {row["evaluations"] for row in document["coverage"]} == {9}
    assert all(site["drift"] >= 1 for site in document["sites"])


def test_inspect_text(stepfold, store: Path) -> None:
    result = stepfold("inspect", store)
    assert (result.code, result.err) == (0, "")
    for text in (
        "Calibration of DiTTransformer2DModel: 9 samples of seed 0, passes before it: none, 2 of 2 shards.",
        "Coverage",
        "1000 to 1000",
        "unconditional",
        "transformer_blocks.0.attn1.to_q ",
        "sites drift by more than 1.5",
    ):
        assert text in result.out


def test_inspect_of_an_unfinished_store(stepfold, copy: Path) -> None:
    (copy / "shards" / "00001.safetensors").unlink()
    document = json.loads((copy / "store.json").read_text()) | {"finished": False, "files": {}}
    (copy / "store.json").write_text(json.dumps(document))
    result = stepfold("inspect", copy)
    assert result.code == 0
    assert "1 of 2 shards" in result.out and "Not finished: run the same `stepfold calibrate` again." in result.out
    assert "sites drift" not in result.out


def test_inspect_of_a_truncated_shard(stepfold, copy: Path) -> None:
    path = copy / "shards" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    result = stepfold("inspect", copy)
    assert result.code == 1
    assert str(path) in result.error and "Delete it or run `stepfold calibrate` again" in result.error


def test_inspect_of_an_empty_folder_is_about_a_checkpoint(stepfold, tmp_path: Path) -> None:
    assert stepfold("inspect", tmp_path).code == 2


def test_optimize_takes_a_store(stepfold, tiny_checkpoint: Path, store: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "bundle", "--recipe", HOIST, "--calibration", store, "--json")
    result = stepfold("optimize", tiny_checkpoint, *words)
    assert result.code == 0, result.err


@pytest.mark.parametrize("what", ["another checkpoint", "no store", "unfinished"])
def test_optimize_refuses_a_store_it_cannot_use(
    stepfold, tiny_checkpoint: Path, copy: Path, tmp_path: Path, what: str
) -> None:
    checkpoint, message = tiny_checkpoint, "expected a finished calibration store"
    if what == "another checkpoint":
        checkpoint, message = save_tiny_dit(tmp_path / "other", seed=1), "received a stale one: weights: "
    elif what == "no store":
        (copy / "store.json").unlink()
        message = "expected a calibration store; there is no store.json. Make one: stepfold calibrate"
    else:
        document = json.loads((copy / "store.json").read_text()) | {"finished": False}
        (copy / "store.json").write_text(json.dumps(document))
    result = stepfold("optimize", checkpoint, "--out", tmp_path / "bundle", "--recipe", HOIST, "--calibration", copy)
    assert (result.code, message in result.error) == (2, True)
    assert not (tmp_path / "bundle").exists()
