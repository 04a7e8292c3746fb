"""Engine: one evaluation and the whole loop of a tiny bundle, against NumPy."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.bundle import Manifest, write_manifest, write_tables
from stepfold.bundle.reader import read_manifest
from stepfold.bundle.tables import Tables
from stepfold.loop.errors import BundleError, UsageError
from stepfold.loop.noise import noise
from stepfold.runtime import Engine, load

NOISE = noise(7, (5, 1, 2, 2))
LABELS = np.array([0, 3, 1, 2, 3])
ALL = (0, 1, 2, 3)
TOLERANCE = 1e-6  # float32, values around 1


@pytest.fixture(scope="module")
def engine(read_only_bundle: Path) -> Engine:
    return load(read_only_bundle, threads=1)


@pytest.fixture(scope="module")
def table_engine(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same model with `timestep / 1000` computed at compile time."""
    return load(tiny.build(tmp_path_factory.mktemp("tables") / "b", timestep_table=True), threads=1)


@pytest.fixture(params=["engine", "table_engine"])
def either(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("guidance", [None, 2.0, 3.0, 3])
def test_fitted_scales_use_their_table(tiny: Any, either: Engine, guidance: float | None) -> None:
    samples = either.sample(NOISE, guidance, class_labels=LABELS)
    assert samples.dtype == np.float32
    expected = tiny.sample(NOISE, LABELS, guidance or 2.0, (0, 2))
    np.testing.assert_allclose(samples, expected, atol=TOLERANCE)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.7, -1.0])
def test_other_scales_use_the_unfitted_fold(
    tiny: Any, either: Engine, guidance: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        samples = either.sample(NOISE, guidance, class_labels=LABELS)
    np.testing.assert_allclose(samples, tiny.sample(NOISE, LABELS, max(guidance, 1.0), ALL), atol=TOLERANCE)
    assert f"guidance {guidance:g} has no fitted plan: running all 4 grid calls" in caplog.text


@pytest.mark.parametrize("count", [1, 5])
def test_a_sample_does_not_depend_on_its_batch(either: Engine, count: int) -> None:
    together = either.sample(NOISE[:count], class_labels=LABELS[:count])
    alone = [either.sample(NOISE[i : i + 1], class_labels=LABELS[i : i + 1])[0] for i in range(count)]
    np.testing.assert_array_equal(together, alone)


def test_runs_are_equal_bit_by_bit(engine: Engine, read_only_bundle: Path) -> None:
    first = engine.sample(NOISE, class_labels=LABELS)
    np.testing.assert_array_equal(first, engine.sample(NOISE, class_labels=LABELS))
    np.testing.assert_array_equal(first, load(read_only_bundle, threads=1).sample(NOISE, class_labels=LABELS))


def test_progress(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.sample(NOISE, on_step=lambda done, total: seen.append((done, total)), class_labels=LABELS)
    assert seen == [(1, 2), (2, 2)]


def test_conditions_by_mapping(engine: Engine) -> None:
    expected = engine.sample(NOISE, class_labels=LABELS)
    np.testing.assert_array_equal(engine.sample(NOISE, conditions={"class_labels": LABELS}), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise": NOISE.astype("float64")}, "noise: expected dtype float32"),
        ({"class_labels": LABELS + 9}, "class_labels: expected indices from 0 to 4; received 9"),
        ({"labels": LABELS}, "labels: expected a condition of this model; received an unknown name: did you mean"),
        ({"guidance": float("nan")}, "guidance: expected a finite number, at most 1e+06; received nan"),
        ({"guidance": True}, "guidance: expected a finite number, at most 1e+06; received True"),
        ({"guidance": "2"}, "guidance: expected a finite number, at most 1e+06; received '2'"),
        ({"guidance": -1e300}, "guidance: expected a finite number, at most 1e+06; received -1e+300"),
        ({"guidance": 10**400}, "guidance: expected a finite number, at most 1e+06; received 1000"),
        ({"conditions": [1]}, "conditions: expected a mapping from names to values; received list [1]"),
        ({"unconditional": 5}, "unconditional: expected a mapping from names to values; received int 5"),
        ({"on_step": 5}, "on_step: expected a function; received int 5"),
        ({"unconditional": {"class_labels": LABELS}}, "unconditional: expected none; the loop gives the values"),
    ],
)
def test_requests_that_do_not_fit(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"noise": NOISE, "class_labels": LABELS, **arguments}
    with pytest.raises(UsageError) as error:
        engine.sample(**request)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(None, [0, 1, 2, 3, 0]), ([3, 1], [3, 1, 3, 1, 3]), (np.array([3, 1], np.uint8), [3, 1, 3, 1, 3])],
)
def test_generate(engine: Engine, classes: Any, labels: list[int]) -> None:
    samples = engine.generate(5, seed=7, classes=classes)
    np.testing.assert_array_equal(samples, engine.sample(NOISE, class_labels=np.array(labels)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: expected a whole number, 1 or more; received int 0."),
        ({"count": 1.0}, "count: expected a whole number, 1 or more; received float 1.0."),
        ({"count": True}, "count: expected a whole number, 1 or more; received bool True."),
        ({"count": "1"}, "count: expected a whole number, 1 or more; received str '1'."),
        ({"count": 1, "seed": -1}, "seed: expected a whole number, 0 or more; received int -1."),
        ({"count": 1, "seed": None}, "seed: expected a whole number, 0 or more; received NoneType None."),
        ({"count": 1, "classes": 3}, "classes: expected a list of whole numbers; received int 3."),
        ({"count": 1, "classes": "01"}, "classes: expected a list of whole numbers; received str '01'."),
        ({"count": 1, "classes": [0.5]}, "classes[0]: expected a whole number"),
        ({"count": 1, "classes": np.zeros(0, int)}, "classes: expected at least one; received an empty list."),
        ({"count": 1, "classes": [4]}, "classes: expected indices from 0 to 3; received 4."),
    ],
)
def test_generate_refuses(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        engine.generate(**arguments)
    assert message in str(error.value)


def rewritten(folder: Path, **changes: Any) -> Path:
    """A bundle with another manifest, hashed again."""
    data = read_manifest(folder).model_dump(mode="json", by_alias=True) | changes
    write_manifest(folder, Manifest.model_validate(data))
    return folder


def test_a_strict_bundle_refuses_other_scales(tiny: Any, tmp_path: Path) -> None:
    guidance = {"scale": {"values": [2.0, 3.0]}, "unconditional": {"class_labels": 4}, "strict": True}
    engine = load(tiny.build(tmp_path / "b", loop={"guidance": guidance}), threads=1)
    assert engine.plan(3.0).evaluations == 2
    with pytest.raises(UsageError, match="guidance: expected one of 2, 3, because the bundle was built with `strict"):
        engine.sample(NOISE, 2.5, class_labels=LABELS)


def test_a_bundle_without_fitted_tables_runs_every_call(tiny: Any, bundle_folder: Path) -> None:
    write_tables(bundle_folder, Tables(tiny.recurrence))
    engine = load(rewritten(bundle_folder), threads=1)
    samples = engine.sample(NOISE, class_labels=LABELS)
    np.testing.assert_allclose(samples, tiny.sample(NOISE, LABELS, 2.0, ALL), atol=TOLERANCE)


def test_a_loop_without_guidance(tiny: Any, tmp_path: Path) -> None:
    engine = load(tiny.build(tmp_path / "b", loop={"guidance": None}), threads=1)
    samples = engine.sample(NOISE, class_labels=LABELS)
    np.testing.assert_allclose(samples, tiny.sample(NOISE, LABELS, 1.0, ALL), atol=TOLERANCE)
    with pytest.raises(
        UsageError, match=r"this loop has no guidance; received 2\.0\. An input of the model of that name"
    ):
        engine.sample(NOISE, 2.0, class_labels=LABELS)


def test_a_negative_prompt(tiny: Any, tmp_path: Path) -> None:
    engine = load(tiny.build(tmp_path / "b", loop={"guidance": {"scale": 2.0, "unconditional": "input"}}), threads=1)
    null = np.full_like(LABELS, 4)
    samples = engine.sample(NOISE, unconditional={"class_labels": null}, class_labels=LABELS)
    np.testing.assert_allclose(samples, tiny.sample(NOISE, LABELS, 2.0, (0, 2)), atol=TOLERANCE)
    with pytest.raises(UsageError, match="unconditional: expected a mapping with values for class_labels"):
        engine.sample(NOISE, class_labels=LABELS)
    unguided = engine.sample(NOISE, 1.0, class_labels=LABELS)  # needs none: the branch is not evaluated
    np.testing.assert_allclose(unguided, tiny.sample(NOISE, LABELS, 1.0, ALL), atol=TOLERANCE)


def arguments(**changes: Any) -> dict[str, Any]:
    given = {"hidden_states": NOISE, "timestep": np.full(5, 750, np.float32), "class_labels": LABELS, **changes}
    return {name: value for name, value in given.items() if value is not None}


def test_run(tiny: Any, either: Engine) -> None:
    (output,) = either.run(**arguments(return_dict=False))
    np.testing.assert_allclose(output, tiny.denoise(NOISE, 750.0, LABELS), atol=TOLERANCE)


def test_torch_tensors_are_taken_as_they_are(engine: Engine) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value, requires_grad=value.dtype == "f4") for name, value in arguments().items()}
    np.testing.assert_array_equal(engine.run(**tensors), engine.run(**arguments()))
    samples = engine.sample(torch.tensor(NOISE), class_labels=torch.tensor(LABELS))
    np.testing.assert_array_equal(samples, engine.sample(NOISE, class_labels=LABELS))


def test_run_at_any_timestep_without_tables(tiny: Any, engine: Engine) -> None:
    (output,) = engine.run(**arguments(timestep=[1.0, 20, 300, 4.5, 0]))
    times = np.array([1.0, 20, 300, 4.5, 0], np.float32)
    expected = [tiny.denoise(NOISE[i : i + 1], times[i], LABELS[i : i + 1])[0] for i in range(5)]
    np.testing.assert_allclose(output, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": None}, "arguments: expected timestep [B] float32; received ['class_labels', 'hidden_states']."),
        (
            {"timestpe": 1},
            "timestpe: expected an argument of this model; received an unknown name: did you mean 'times",
        ),
        ({"timestep": np.zeros(4, np.float32)}, "arguments: expected one batch size of at least 1; received {"),
        ({"return_dict": True}, "return_dict: expected False, which was baked in when the model was captured"),
        ({"return_dict": 0}, "return_dict: expected False, which was baked in"),
        ({"hidden_states": NOISE * np.float32(np.nan)}, "hidden_states: expected numbers; received NaN in 20 places."),
        ({"hidden_states": [NOISE]}, "hidden_states: expected shape [B, 1, 2, 2]; received [1, 5, 1, 2, 2]."),
        ({"class_labels": LABELS + 9}, "class_labels: expected indices from 0 to 4"),
    ],
)
def test_run_refuses(engine: Engine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        engine.run(**arguments(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("times", "received"), [([700.0] * 5, "700."), ([750.0, 500, 500, 500, 500], "750 and others.")]
)
def test_run_off_the_grid_of_a_table(table_engine: Engine, times: list[float], received: str) -> None:
    with pytest.raises(UsageError) as error:
        table_engine.run(**arguments(timestep=times))
    assert "timestep: expected one of the 4 timesteps of the grid, the same for every row" in str(error.value)
    assert f"received {received} The nearest is 750." in str(error.value)


def test_run_where_the_variant_depends_on_the_call(tiny: Any, tmp_path: Path) -> None:
    """Without tables too: the timestep says which of them computes the prediction."""
    whole = Manifest.model_validate_json((tiny.build(tmp_path / "whole") / "manifest.json").read_bytes())
    embed, step = whole.stages
    late = step.model_copy(update={"name": "step_1"})
    slots = [{"name": "embed", "variants": [embed.name]}, {"name": "step", "variants": ["step", "step_1"]}]
    slots[1]["by_call"] = [0, 0, 1, 1]
    engine = load(tiny.build(tmp_path / "parts", stages=[embed, step, late], slots=slots))
    latents, labels = np.ones((2, 1, 2, 2), np.float32), np.array([1, 3])
    for timestep in (1000.0, 250.0):
        (received,) = engine.run(hidden_states=latents, timestep=np.full(2, timestep, np.float32), class_labels=labels)
        np.testing.assert_allclose(received, tiny.denoise(latents, timestep, labels), rtol=1e-6)
    with pytest.raises(UsageError, match=r"one of the 4 timesteps of the grid.*which variants compute the prediction"):
        engine.run(hidden_states=latents, timestep=np.full(2, 700, np.float32), class_labels=labels)


def test_a_number_serves_all_samples(engine: Engine) -> None:
    """A denoiser takes one timestep for its whole batch."""
    arguments = {"hidden_states": NOISE, "class_labels": LABELS}
    (wanted,) = engine.run(**arguments, timestep=np.full(5, 750, np.float32))
    for number in (750, np.float32(750), np.array(750, np.float32)):
        np.testing.assert_array_equal(engine.run(**arguments, timestep=number)[0], wanted)


def test_nested_arguments(tiny: Any, bundle_folder: Path) -> None:
    """`added.labels.0` is the first element of a list in a dictionary, and constants may be nested too."""
    data = read_manifest(bundle_folder).model_dump(mode="json", by_alias=True)
    data["constants"] = {"shapes.0.0": 4, "shapes.0.1": None}
    load(rewritten(bundle_folder, **data), threads=1).run(**arguments(shapes=[(4, None)]))
    with pytest.raises(UsageError, match=r"shapes\.0\.0: expected 4, which was baked in"):
        load(bundle_folder, threads=1).run(**arguments(shapes=[[5, None]]))
    with pytest.raises(UsageError, match=r"shapes\.1: expected an argument of this model"):
        load(bundle_folder, threads=1).run(**arguments(shapes=[[4, None], 1]))


def test_constant_tensors_may_be_passed_again(tiny: Any, bundle_folder: Path) -> None:
    ids = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tables(bundle_folder, Tables(tiny.recurrence, constants={"ids": ids}))
    engine = load(rewritten(bundle_folder), threads=1)
    engine.run(**arguments(ids=ids.tolist()))
    with pytest.raises(UsageError, match=r"ids: expected an array \[2, 3\], which was baked in .*; received another"):
        engine.run(**arguments(ids=ids + 1))


def test_a_component_has_no_loop(tiny: Any, bundle_folder: Path) -> None:
    inputs = read_manifest(bundle_folder).model_dump(mode="json")["inputs"]
    (bundle_folder / "tables.safetensors").unlink()
    inputs = [{**entry, "role": "condition"} for entry in inputs]
    engine = load(rewritten(bundle_folder, loop=None, inputs=inputs), threads=1)
    (output,) = engine.run(**arguments())
    np.testing.assert_allclose(output, tiny.denoise(NOISE, 750.0, LABELS), atol=TOLERANCE)
    for call in (lambda: engine.sample(NOISE), lambda: engine.generate(1), lambda: engine.plan()):
        with pytest.raises(UsageError, match=r"this bundle is a component without a loop\. Call Engine\.run\."):
            call()


def test_what_a_measurement_reads(engine: Engine, read_only_bundle: Path) -> None:
    assert engine.bundle.path == read_only_bundle and engine.manifest.model.class_name == "Tiny"
    assert [stage.name for stage in engine.program.stages] == ["embed", "step"]
    assert engine.loop is not None and engine.loop.latent.shape == (1, 2, 2)
    assert (engine.plan().evaluations, engine.plan(5.0).evaluations) == (2, 4)


def test_an_engine_that_is_closed(read_only_bundle: Path) -> None:
    before = set(threading.enumerate())
    with load(read_only_bundle, threads=2) as engine:
        engine.sample(np.concatenate([NOISE] * 4), class_labels=np.tile(LABELS, 4))  # enough rows for parts
    engine.close()
    assert set(threading.enumerate()) == before and engine.bundle.held == {}
    for use in (lambda: engine.generate(1), lambda: engine.program, lambda: engine.run(**arguments())):
        with pytest.raises(UsageError, match=r"expected an open engine; it was closed\. Load the bundle again\."):
            use()
    assert engine.manifest.model.class_name == "Tiny"


def test_wrong_threads_and_backend(read_only_bundle: Path, bundle_folder: Path) -> None:
    for wrong in (0, 1.5, "2", True):
        with pytest.raises(UsageError, match="threads: expected a whole number, 1 or more; received"):
            load(read_only_bundle, threads=wrong)  # type: ignore[arg-type]
    for path in (5, None, b"bundle", "a\0b"):
        with pytest.raises(UsageError, match="path: expected a path; received"):
            load(path)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device: expected a text; received int 0"):
        load(read_only_bundle, device=0)  # type: ignore[arg-type]
    backend = {"name": "onnxruntme", "version": "1", "device": "cpu"}
    with pytest.raises(BundleError, match=r"received 'onnxruntme': did you mean 'onnxruntime'\?"):
        load(rewritten(bundle_folder, backend=backend))


def test_a_bundle_with_an_option_that_its_backend_lacks(bundle_folder: Path) -> None:
    backend = {"name": "onnxruntime", "version": "1", "device": "cpu", "options": {"later": 1}}
    with pytest.raises(BundleError, match=r"unknown option 'later'; valid: provider, rows\."):
        load(rewritten(bundle_folder, backend=backend))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"rows": 10**30}}, "option 'rows': expected less than or equal to 1048576"),
        ({"options": {"provider": "cuda"}}, "expected the device 'cuda' that the options of onnxruntime say; received"),
        ({"device": "tpu"}, "expected the device 'cpu' that the options of onnxruntime say; received 'tpu'"),
    ],
)
def test_a_bundle_whose_backend_contradicts_itself(bundle_folder: Path, changes: dict[str, Any], message: str) -> None:
    backend = {"name": "onnxruntime", "version": "1", "device": "cpu"} | changes
    with pytest.raises(BundleError, match=message):
        load(rewritten(bundle_folder, backend=backend))


def test_a_stage_has_the_rate_of_what_it_reads(bundle_folder: Path) -> None:
    """One that runs more often would cost more than was measured, and says something else than it does."""
    stages = read_manifest(bundle_folder).model_dump(mode="json", by_alias=True)["stages"]
    with pytest.raises(
        BundleError, match="stage embed: expected the rate of what it reads, once×timestep; received step"
    ):
        load(rewritten(bundle_folder, stages=[stage | {"rate": "step"} for stage in stages]))


def test_a_damaged_bundle_is_not_loaded(bundle_folder: Path) -> None:
    (bundle_folder / "stages" / "step.onnx.data").write_bytes(bytes(16))
    with pytest.raises(BundleError, match=r"stages/step\.onnx\.data: expected sha256"):
        load(bundle_folder)
