"""The store: what survives, what is refused, what is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated import SHARDS, calibrated, content, standard
from hypothesis import given, settings
from mutations import check, check_bytes, damaged
from safetensors.numpy import load_file

from stepfold.calibration import durable
from stepfold.calibration.document import FORMAT_VERSION, STATISTICS, STORE, is_finished, read_document
from stepfold.calibration.read import open_finished
from stepfold.calibration.shards import open_shard, shard_name
from stepfold.calibration.statistics import merge
from stepfold.calibration.store import missing_shards
from stepfold.calibration.summary import store_summary
from stepfold.calibration.tensors import TensorFileError, open_tensors
from stepfold.ir.program import ModelIdentity
from stepfold.loop.errors import StepfoldError, UsageError


def unfinished(store: Path, *missing: int) -> Path:
    """Take a store back to where these shards were not collected."""
    for index in missing:
        (store / shard_name(index)).unlink()
    (store / STATISTICS).unlink()
    document = json.loads((store / STORE).read_text()) | {"finished": False, "files": {}}
    (store / STORE).write_text(json.dumps(document))
    return store


def rewrite(store: Path, **changes: Any) -> None:
    (store / STORE).write_text(json.dumps(json.loads((store / STORE).read_text()) | changes))


# -- what it holds


def test_files(whole: Path) -> None:
    names = {"lock", STORE, STATISTICS, *(shard_name(i) for i in range(SHARDS))}
    assert content(whole).keys() == names
    document = read_document(whole)
    assert document.finished and set(document.files) == names - {"lock", STORE}
    assert document.shards == ((0, 8), (8, 16), (16, 20)) and document.format_version == FORMAT_VERSION
    assert document.plan.planned > 0 and document.parts["samples"] == 20


def test_statistics_are_the_sum_of_the_shards_in_their_order(whole: Path) -> None:
    parts = [load_file(whole / shard_name(i)) for i in range(SHARDS)]
    tensors = [{name.rpartition(".")[2]: part[name] for name in part if name.startswith("0001.")} for part in parts]
    expected, received = reduce(merge, tensors), load_file(whole / STATISTICS)
    for name, array in expected.items():
        np.testing.assert_array_equal(received[f"0001.{name}"], array)
    np.testing.assert_array_equal(received["seen"], sum(part["seen"] for part in parts))
    assert len(received["0001.rows"]) == sum(len(part["0001.rows"]) for part in parts)


def test_the_same_run_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    calibrated(standard(), tmp_path / "again")
    assert content(tmp_path / "again") == content(whole)


# -- resuming


def test_a_finished_store_stays_as_it_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stamps = content(store), {p: p.stat().st_mtime_ns for p in store.rglob("*.*")}
    monkeypatch.setattr("stepfold.calibration.run.collect_shard", None)
    outcome = calibrated(standard(), store)
    assert outcome.resumed == SHARDS and outcome.document.finished
    assert content(store) == before and {p: p.stat().st_mtime_ns for p in stamps} == stamps


@pytest.mark.parametrize("missing", [(2,), (0,), (0, 1, 2), ()])
def test_what_is_missing_is_collected(store: Path, whole: Path, missing: tuple[int, ...]) -> None:
    outcome = calibrated(standard(), unfinished(store, *missing))
    assert outcome.resumed == SHARDS - len(missing)
    assert content(store) == content(whole)


def test_what_a_killed_process_was_writing_is_removed(store: Path, whole: Path) -> None:
    unfinished(store, 2)
    for name in (".store.json.00aa11bb.partial", "shards/.00002.safetensors.00aa11bb.partial"):
        (store / name).write_bytes(b"half")
    calibrated(standard(), store)
    assert content(store) == content(whole)


def test_killed_before_the_first_file(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "store" / "shards").mkdir(parents=True)
    (tmp_path / "store" / "lock").touch()
    (tmp_path / "store" / ".store.json.00aa11bb.partial").write_bytes(b"{")
    calibrated(standard(), tmp_path / "store")
    assert content(tmp_path / "store") == content(whole)


def test_an_empty_folder_becomes_a_store(tmp_path: Path, whole: Path) -> None:
    calibrated(standard(), tmp_path)
    assert content(tmp_path) == content(whole)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    shutil.copy(path.parent / "00000.safetensors", path)


@pytest.mark.parametrize("harm", [truncate, flip, swap, Path.unlink])
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_collected_again(store: Path, whole: Path, harm: Callable, finished: bool) -> None:
    if not finished:
        unfinished(store)
    harm(store / shard_name(1))
    assert calibrated(standard(), store).resumed == SHARDS - 1
    assert content(store) == content(whole)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_damaged_statistics_are_added_again(store: Path, whole: Path, harm: Callable) -> None:
    harm(store / STATISTICS)
    assert not is_finished(store)
    assert calibrated(standard(), store).resumed == SHARDS
    assert content(store) == content(whole)


# -- what is refused


def test_a_store_of_another_run_is_refused_with_what_differs(store: Path) -> None:
    before = content(store)
    message = rf"^{store}: .*stale one: seed: 0 in the store, 1 here; samples: 20 in the store, 21 here\. Calibrate"
    with pytest.raises(UsageError, match=message):
        calibrated(standard(), store, samples=21, seed=1)
    assert content(store) == before


def test_a_store_of_another_checkpoint(store: Path) -> None:
    other = replace(standard(), model=ModelIdentity("Network", "f" * 64))
    known = standard().model.weights_sha256[:12]
    with pytest.raises(UsageError, match=f"weights: {known} in the store, {'f' * 12} here"):
        calibrated(other, store)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        UsageError, match=r"expected a calibration store or an empty folder; received one with notes\.txt"
    ):
        calibrated(standard(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(UsageError, match="expected a folder for the calibration store; received a file"):
        calibrated(standard(), tmp_path / "store")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepfoldError, match="expected a folder that can be made"):
        calibrated(standard(), tmp_path / "file" / "store")


def test_a_second_process_is_refused(store: Path) -> None:
    with durable.locked(store), pytest.raises(UsageError, match="another process is calibrating into this store"):
        calibrated(standard(), store)


# -- damage, as a reader sees it


def test_an_empty_folder_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"^{tmp_path}: expected a calibration store; there is no store\.json\. Make one"
    ):
        open_finished(tmp_path)


def test_an_unfinished_store_is_not_read(store: Path) -> None:
    with pytest.raises(UsageError, match="expected a finished calibration store; received one that was interrupted"):
        open_finished(unfinished(store, 1))


@pytest.mark.parametrize("name", [STATISTICS, shard_name(1)])
@pytest.mark.parametrize(
    ("harm", "message"), [(truncate, "expected \\d+ bytes; received \\d+"), (Path.unlink, "it is missing")]
)
def test_a_damaged_file_is_named_with_what_to_do(store: Path, name: str, harm: Callable, message: str) -> None:
    harm(store / name)
    with pytest.raises(
        StepfoldError, match=rf"^{store / name}: .*{message}\. Delete it or run `stepfold calibrate` again"
    ):
        open_finished(store)


def test_changed_statistics_are_noticed(store: Path) -> None:
    flip(store / STATISTICS)
    with pytest.raises(StepfoldError, match="expected the content it was written with; it was changed"):
        open_finished(store)


@pytest.mark.parametrize(("harm", "message"), [(truncate, "a damaged one: expected"), (swap, "one of another")])
def test_a_damaged_shard_of_an_unfinished_store(store: Path, harm: Callable, message: str) -> None:
    unfinished(store)
    harm(store / shard_name(1))
    key = read_document(store).key
    with pytest.raises(StepfoldError, match=rf"^{store / shard_name(1)}: expected .*{message}.* again"):
        open_shard(store, key, 1)
    assert missing_shards(store, read_document(store)) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the JSON of a calibration store; received no usable JSON"),
        ('{"format_version"', "expected the JSON of a calibration store; received no usable JSON"),
        ("[1]", "damaged: expected a JSON object; received list"),
        ('{"format_version": 1}', "damaged: key: Field required"),
    ],
)
def test_a_damaged_document(store: Path, whole: Path, text: str, message: str) -> None:
    (store / STORE).write_text(text)
    with pytest.raises(StepfoldError, match=rf"^{store / STORE}: {message}.*Delete it and run .* keeps the finished"):
        read_document(store)
    (store / STORE).unlink()
    assert calibrated(standard(), store).resumed == SHARDS  # as the message promises
    assert content(store) == content(whole)


def test_a_huge_document(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepfold.calibration.document.LARGEST_DOCUMENT_BYTES", 10)
    with pytest.raises(StepfoldError, match="larger than the 10 bytes"):
        read_document(store)


@pytest.mark.parametrize("use", [open_finished, lambda folder: calibrated(standard(), folder)])
def test_a_newer_format(store: Path, use: Callable) -> None:
    rewrite(store, format_version=FORMAT_VERSION + 1, unheard_of=True)
    before = content(store)
    with pytest.raises(StepfoldError, match=r"expected format version 1; received 2, of a newer stepfold\. Update"):
        use(store)
    assert content(store) == before


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("parts.samples", None),
        ("parts.seed", "x"),
        ("parts.model", 5),
        ("parts.passes", "x"),
        ("parts.passes", [1]),
        ("parts.passes", [{"a": 1}]),
        ("parts.buckets", 0),
        ("parts.buckets", -3),
        ("parts.buckets", True),
        ("parts.buckets", 10**12),
        ("branches", []),
        ("branches", ["conditional", "conditional"]),
        ("branches", ["a", "b", "c"]),
        ("timesteps", []),
        ("timesteps", [1.0]),
    ],
)
def test_a_document_that_contradicts_itself(store: Path, place: str, value: object) -> None:
    document = json.loads((store / STORE).read_text())
    *parents, last = place.split(".")
    target = document
    for parent in parents:
        target = target[parent]
    target[last] = value
    (store / STORE).write_text(json.dumps(document))
    with pytest.raises(StepfoldError, match=rf"^{store / STORE}: damaged: ") as caught:
        read_document(store)
    assert caught.value.exit_code == 1


def test_sites_of_another_width(store: Path) -> None:
    document = json.loads((store / STORE).read_text())
    document["sites"][0]["width"] = 9999
    (store / STORE).write_text(json.dumps(document))
    with pytest.raises(StepfoldError, match=r"low of site .* has shape .* and 9999 channels"):
        open_finished(store).statistics(0).low()


# -- whatever stands in it


def test_any_document(store: Path) -> None:
    document = json.loads((store / STORE).read_text())
    check(document, lambda changed: (store / STORE).write_text(json.dumps(changed)) and store_summary(store))


@pytest.mark.parametrize("name", [STORE, STATISTICS])
def test_any_bytes(store: Path, name: str) -> None:
    check_bytes(
        (store / name).read_bytes(), lambda content: (store / name).write_bytes(content) and store_summary(store)
    )


def test_any_bytes_of_a_shard(store: Path) -> None:
    path = store / shard_name(0)

    @settings(max_examples=60, deadline=None)
    @given(damaged(path.read_bytes()))
    def changed(content: bytes) -> None:
        path.write_bytes(content)
        with suppress(TensorFileError):
            found = open_tensors(path)
            for name, shape in found.shapes.items():
                assert found.read(name).shape == tuple(shape), "what is not refused is what its header says"

    changed()
