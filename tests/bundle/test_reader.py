"""A bundle is checked before anything in it is used, and every damage has its own line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepfold.bundle import FORMAT_VERSION, Bundle, Manifest, read, write_manifest
from stepfold.bundle.bind import check_values
from stepfold.loop.errors import BundleError, UsageError
from stepfold.loop.held import HeldFile


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest in place."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as error:
        read(folder).tables()
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_bundle(read_only_bundle: Path) -> None:
    bundle = read(str(read_only_bundle))
    assert bundle.manifest.loop is not None and bundle.manifest.loop.sampler.steps == 4
    tables = bundle.tables()
    assert sorted(tables.fitted) == [2.0, 3.0] and tables.recurrence is not None
    probe = bundle.probe()
    assert probe is not None and sorted(probe.inputs) == ["class_labels", "hidden_states", "timestep"]
    assert bundle.file("stages/step.onnx").is_file()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: expected the folder of a bundle; there is none"):
        read(tmp_path / "nowhere")


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "expected a bundle; it has no manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["stages/step.onnx", "stages/step.onnx.data", "tables.safetensors", "schedule.json"])
def test_one_changed_byte(bundle_folder: Path, name: str) -> None:
    content = bytearray((bundle_folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    expected = read(bundle_folder).manifest.files[name].sha256
    (bundle_folder / name).write_bytes(content)
    message = refusal(bundle_folder)
    assert f"{name}: expected sha256 {expected[:12]}...; received " in message
    assert "build it again with `stepfold optimize`" in message


def test_a_truncated_file(bundle_folder: Path) -> None:
    path = bundle_folder / "tables.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert f"tables.safetensors: expected {size} bytes; received {size - 1}." in refusal(bundle_folder)


def test_a_missing_file(bundle_folder: Path) -> None:
    (bundle_folder / "stages" / "step.onnx.data").unlink()
    assert "stages/step.onnx.data: expected a file of 16 bytes; it is missing." in refusal(bundle_folder)


def test_a_folder_in_place_of_a_file(bundle_folder: Path) -> None:
    (bundle_folder / "schedule.json").unlink()
    (bundle_folder / "schedule.json").mkdir()
    assert "schedule.json: expected a file of" in refusal(bundle_folder)


def test_a_newer_format(bundle_folder: Path) -> None:
    edit(bundle_folder, lambda m: m.update(format_version=FORMAT_VERSION + 1, stepfold_version="9.1", unheard="of"))
    message = refusal(bundle_folder)
    assert f"format version {FORMAT_VERSION + 1} is newer than this stepfold" in message
    assert "pip install 'stepfold>=9.1'" in message


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.0])
def test_a_format_that_never_was(bundle_folder: Path, version: object) -> None:
    edit(bundle_folder, lambda m: m.update(format_version=version))
    assert f"expected a format_version; received {version!r}" in refusal(bundle_folder)


@pytest.mark.parametrize("name", ["../step.onnx", "/etc/passwd", "C:\\step.onnx", "stages/../../x"])
def test_a_path_that_leaves_the_folder(bundle_folder: Path, name: str) -> None:
    (bundle_folder.parent / "step.onnx").write_bytes((bundle_folder / "stages" / "step.onnx").read_bytes())
    edit(bundle_folder, lambda m: m["files"].update({name: m["files"]["stages/step.onnx"]}))
    assert f"the path {name!r}" in refusal(bundle_folder)


def test_a_stage_that_leaves_the_folder(bundle_folder: Path) -> None:
    edit(bundle_folder, lambda m: m["stages"][1].update(file="../step.onnx"))
    assert "the path '../step.onnx' has an empty, '.' or '..' part" in refusal(bundle_folder)


def test_a_link_that_leaves_the_folder(bundle_folder: Path) -> None:
    stage = bundle_folder / "stages" / "step.onnx"
    stage.rename(bundle_folder.parent / "step.onnx")
    stage.symlink_to(bundle_folder.parent / "step.onnx")
    assert "'stages/step.onnx' leads out of the bundle through a link" in refusal(bundle_folder)


def test_a_stage_without_a_hash(bundle_folder: Path) -> None:
    edit(bundle_folder, lambda m: m["files"].pop("stages/step.onnx"))
    assert "'stages/step.onnx' has no hash among the files" in refusal(bundle_folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": NaN}', "\x00", '"' * 10, "[" * 100_000])
def test_a_manifest_that_is_no_manifest(bundle_folder: Path, text: str) -> None:
    (bundle_folder / "manifest.json").write_text(text)
    assert "manifest.json: expected" in refusal(bundle_folder)


def test_a_manifest_that_is_no_text(bundle_folder: Path) -> None:
    (bundle_folder / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "manifest.json: expected the JSON of a manifest" in refusal(bundle_folder)


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: m.pop("stages"), "stages: Field required"),
    (lambda m: m.update(surprise=1), "surprise: Extra inputs are not permitted"),
    (lambda m: m["stages"][0].update(rate="weekly"), "stages.0.rate: "),
    *[
        (lambda m, kind=kind: m["inputs"][0].update(dtype=kind), "inputs.0.dtype: Value error, expected one of float32")
        for kind in ("float33", "O", "U5", "i4,i4", "V99999", "(2,)f4", "complex64", "")
    ],
    *[
        (lambda m, shape=shape: m["inputs"][0].update(shape=shape), "inputs.0.shape")
        for shape in ([None, -1, 2, 2], [None, 10**30], [None, 1.5], [None] * 100)
    ],
    (
        lambda m: m.update(shared={"file": "stages/step.onnx", "stages": ["a", "b"], "saved_bytes": 1}),
        "shared: there is no stage 'a'",
    ),
    (lambda m: m["inputs"][0].update(shape=[7, 1, 2, 2]), "input 'hidden_states': expected a batch that is free"),
    (
        lambda m: m["inputs"][0].update(shape=[None, 1, 4, 4]),
        "expected the latent [1, 2, 2] of the loop; received [1, 4",
    ),
    (lambda m: m["inputs"][0].update(role="condition"), "expected the input 'hidden_states' as the only one of role"),
    (lambda m: m["inputs"][2].update(cardinality=10**15), "inputs.2.cardinality"),
    (
        lambda m: m["inputs"][2].update(cardinality=3),
        "guidance.unconditional.class_labels: expected an index from 0 to 2",
    ),
    (lambda m: m["slots"][-1].update(by_call=[0, 10**30]), "slots.1.by_call.1"),
    (lambda m: m["slots"][-1].update(by_call=[0, 1, 0, 0]), "slot 'step' has 1 variants; by_call names another"),
    (lambda m: m["slots"][-1].update(variants=["step", "other"]), "slot 'step': there is no stage 'other'"),
    (lambda m: m["slots"][-1].update(variants=["step", m["stages"][0]["name"]]), "and computes something else"),
    (lambda m: m["slots"][0].update(by_call=[0] * 4), "only one of rate step has variants"),
    (lambda m: m["slots"].reverse(), "expected each stage in one slot, in the order of the slots"),
    (lambda m: m["slots"].pop(), "expected each stage in one slot, in the order of the slots"),
    (lambda m: m["files"]["schedule.json"].update(bytes=10**30), "files.schedule.json.bytes"),
    (lambda m: m["loop"]["guidance"].update(scale="nan"), "loop.guidance.scale"),
    (
        lambda m: m["loop"]["guidance"].update(unconditional={"class_labels": 1.5}),
        "expected a whole number; received 1.5",
    ),
    (lambda m: m["loop"]["sampler"].update(steps=10**9), "loop.sampler.steps"),
    (lambda m: m["files"]["schedule.json"].update(sha256="no"), "files.schedule.json.sha256: "),
    (lambda m: m["stages"][0].update(name="step"), "two stages are called 'step'"),
    (lambda m: m["stages"][0]["outputs"][0].update(name="sample"), "two values are called 'sample'"),
    (lambda m: m.update(outputs=["picture"]), "outputs ['picture'] are computed by no stage"),
    (lambda m: m["loop"]["inputs"].pop("timestep"), "exactly one input must have the role 'timestep'"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[reason for _, reason in CHANGES])
def test_a_manifest_with_a_wrong_entry(bundle_folder: Path, change: Callable[..., Any], reason: str) -> None:
    edit(bundle_folder, change)
    assert reason in refusal(bundle_folder)


def rewrite(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change arrays of a bundle and hash them again, as a faulty writer would."""
    arrays = {key: value.copy() for key, value in load_file(folder / name).items()}
    change(arrays)
    save_file(arrays, folder / name)
    write_manifest(folder, Manifest.model_validate_json((folder / "manifest.json").read_text()))


TABLE_CHANGES: list[tuple[Callable[[dict[str, np.ndarray]], Any], str]] = [
    (lambda a: a.pop("scale=2.0/state"), "received an unusable one: 'state'"),
    (lambda a: a.update({"scale=two/state": np.zeros(1)}), "received an unusable one"),
    (lambda a: a.update({"scale=2.0/state": np.zeros(3)}), "state of a plan of 2 evaluations must be [2]"),
    (lambda a: a.update({"scale=2.0/conditional": np.zeros((2, 3))}), "must be lower triangular [2, 2]"),
    (lambda a: a.update({"scale=2.0/conditional": np.ones((2, 2))}), "conditional of a plan of 2 evaluations must be"),
    (lambda a: a.update({"scale=2.0/positions": np.array([0, 4])}), "needs positions that ascend from 0 below 4"),
    (lambda a: a.update({"scale=2.0/positions": np.array([0.0, 2.0])}), "needs positions that ascend from 0 below 4"),
    (lambda a: a["scale=2.0/state"].__setitem__(0, np.nan), "state weights of a plan must be finite"),
    (lambda a: a["recurrence/state"].__setitem__(0, np.inf), "the recurrence has values that are not finite"),
    (lambda a: a.update({"recurrence/outputs": np.ones((4, 4))}), "b must be lower triangular"),
    (lambda a: a.update({"recurrence/timesteps": np.array(1.0)}), "received an unusable one"),
    (
        lambda a: a.update({"recurrence/timesteps": a["recurrence/timesteps"][:, None]}),
        "needs shapes [S], [S], [S], [S, S]",
    ),
    (lambda a: a.update({"recurrence/timesteps": np.zeros(0)}), "a recurrence of 0 calls needs shapes"),
    (lambda a: a.update({"recurrence/initial_scale": np.ones(2)}), "expected one number; received shape [2]"),
    (lambda a: a.update({"scale=2.0/initial_scale": np.array(1.0)}), "expected one number; received shape []"),
    (
        lambda a: a.update({"scale=2.0/state": a["scale=2.0/state"] * 1e300}),
        "state weights of a plan must be finite, at",
    ),
    (lambda a: a.update({"values/x": np.full((4, 2), np.nan, "f4")}), "the values of the calls are not all finite"),
    (lambda a: a.update({"values/time": np.zeros((3, 1))}), "values/time must have 4 rows; received shape [3, 1]"),
    (lambda a: [a.pop(key) for key in list(a) if key.startswith("recurrence")], "has no sampler"),
]


@pytest.mark.parametrize(("change", "reason"), TABLE_CHANGES, ids=[reason for _, reason in TABLE_CHANGES])
def test_tables_that_cannot_drive_the_loop(bundle_folder: Path, change: Callable[..., Any], reason: str) -> None:
    rewrite(bundle_folder, "tables.safetensors", change)
    assert reason in refusal(bundle_folder)


def test_a_loop_without_tables(bundle_folder: Path) -> None:
    (bundle_folder / "tables.safetensors").unlink()
    edit(bundle_folder, lambda m: m["files"].pop("tables.safetensors"))
    assert "expected tables.safetensors with the recurrence of the loop" in refusal(bundle_folder)


def test_draws_that_the_sampler_does_not_make(bundle_folder: Path) -> None:
    edit(bundle_folder, lambda m: m["loop"].update(draws=2))
    assert "expected a sampler that draws noise 2 times, as the loop says; tables.safetensors has one of 0" in refusal(
        bundle_folder
    )


def test_tables_that_are_no_safetensors(bundle_folder: Path) -> None:
    (bundle_folder / "tables.safetensors").write_bytes(b"\xff" * 64)
    write_manifest(bundle_folder, read_again(bundle_folder).manifest)
    assert "tables.safetensors: expected a safetensors file" in refusal(bundle_folder)


def test_values_that_a_stage_computes(bundle_folder: Path) -> None:
    rewrite(bundle_folder, "tables.safetensors", lambda a: a.update({"values/sample": np.zeros((4, 1, 2, 2), "f4")}))
    bundle = read(bundle_folder)
    with pytest.raises(BundleError, match="the value 'sample' is both computed and a table"):
        check_values(bundle.manifest, bundle.tables())


UNRUNNABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "expected values of its rate, once; 'hidden_states' changes more often": lambda m: m["stages"][1].update(
        rate="once"
    ),
    "expected values of its rate, once; 'timestep' changes more often": lambda m: m["stages"][0].update(rate="once"),
    "slot step: expected a variant for each of 4 calls; received 3": lambda m: m["slots"][1].update(by_call=[0, 0, 0]),
}


@pytest.mark.parametrize("reason", UNRUNNABLE)
def test_a_manifest_that_cannot_run(bundle_folder: Path, reason: str) -> None:
    edit(bundle_folder, UNRUNNABLE[reason])
    bundle = read(bundle_folder)
    with pytest.raises(BundleError, match=reason):
        check_values(bundle.manifest, bundle.tables())


def test_a_program_without_a_loop_has_conditions_only(bundle_folder: Path) -> None:
    edit(bundle_folder, lambda m: m.update(loop=None))
    assert "a program without a loop has conditions only" in refusal(bundle_folder)


PROBES: list[tuple[str, np.ndarray]] = [
    ("tolerance", np.zeros(0)),
    ("tolerance", np.array(1.0)),
    ("tolerance", np.array([np.nan])),
    ("tolerance", np.array([-1.0])),
    ("tolerance", np.zeros((2, 2))),
    ("call", np.zeros(0, np.int64)),
    ("call", np.array([np.inf])),
    ("call", np.array(3)),
    ("inputs/hidden_states", np.full((2, 1, 2, 2), np.nan, "f4")),
    ("outputs/sample", np.full((2, 1, 2, 2), np.inf, "f4")),
]


@pytest.mark.parametrize(("name", "value"), PROBES, ids=range(len(PROBES)))
def test_a_damaged_probe(bundle_folder: Path, name: str, value: np.ndarray) -> None:
    rewrite(bundle_folder, "probe.safetensors", lambda a: a.update({name: value}))
    with pytest.raises(BundleError, match=r"^probe\.safetensors: expected "):
        read(bundle_folder).probe()


def test_a_probe_without_outputs(bundle_folder: Path) -> None:
    rewrite(bundle_folder, "probe.safetensors", lambda a: a.pop("outputs/sample"))
    with pytest.raises(BundleError, match="expected inputs, outputs and a tolerance"):
        read(bundle_folder).probe()


def test_a_file_that_nobody_listed(read_only_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"'stages/other\.onnx' is not among the files"):
        read(read_only_bundle).file("stages/other.onnx")


@pytest.mark.parametrize("name", ["stages/step.bin", "stages/other.data", "notes.txt", "more/file", ".hidden"])
def test_a_file_that_the_manifest_does_not_name(bundle_folder: Path, name: str) -> None:
    (bundle_folder / name).parent.mkdir(exist_ok=True)
    (bundle_folder / name).write_bytes(b"weights")
    with pytest.raises(BundleError, match=f"{name}: not part of the bundle: the manifest does not name it. Remove it"):
        read(bundle_folder)


def test_what_was_checked_is_what_is_read(bundle_folder: Path) -> None:
    """Files that take the place of others behind the check are not believed."""
    bundle = read(bundle_folder)
    expected = bundle.tables().arrays()
    for name in bundle.manifest.files:
        (bundle_folder / name).unlink()
        (bundle_folder / name).write_bytes(b"something else")
    received = bundle.tables().arrays()
    assert received.keys() == expected.keys()
    assert all(np.array_equal(received[name], value) for name, value in expected.items())
    files = bundle.stage_files(bundle.manifest.stages[1])
    assert files.has("step.onnx.data") and not files.has("probe.safetensors") and not files.has("other.data")
    assert files.open("step.onnx").read() != b"something else"


def read_again(folder: Path) -> Bundle:
    """The bundle without the check of its hashes."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    return Bundle(folder, manifest, {name: HeldFile(folder / name) for name in manifest.files})
