"""Reference trajectories: the loop as a hand would run it, kept by key."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import LATENT, Counter, adams_bashforth, analytic_program, euler, loop, velocity
from programs import component
from safetensors.numpy import load_file

from stepfold.calibration.conditions import sample_request
from stepfold.calibration.trajectories import BATCH, Trajectories, first, part, slices, trajectories
from stepfold.ir.program import ModelIdentity, Program, Slot, Stage, slots_of
from stepfold.loop.driver import Request
from stepfold.loop.noise import SampleSet
from stepfold.loop.ports import BoundProgram

STEPS = 5
COUNT = BATCH + 4


def program_of(scale: Any = 2.0, recurrence=None) -> Program:
    return analytic_program(recurrence or euler(STEPS), loop(scale, STEPS))


def run(
    program: Program, cache: Path, engine: Counter | BoundProgram | None = None, *, count: int = COUNT, **more: Any
) -> Trajectories:
    engine = engine or Counter()
    bound = engine.bound() if isinstance(engine, Counter) else engine
    scale = program.loop.guidance.scales[0] if program.loop and program.loop.guidance else None
    samples = more.pop("samples", SampleSet("calibration", 0, count))
    return trajectories(program, bound, samples, more.pop("scale", scale), cache, more.pop("progress", silent), **more)


def silent(done: int, total: int) -> None:
    """Report to nobody."""


def by_hand(program: Program, request: Request, scale: float | None) -> np.ndarray:
    """x[i+1] = a_i x[i] + sum_j b_ij v_j, written out for all samples at once: [S+1, B, 6]."""
    recurrence = program.recurrence
    assert recurrence is not None
    x, outputs, path = request.noise.astype(np.float64), [], [request.noise]
    for i, timestep in enumerate(recurrence.timesteps):
        t = np.full(len(x), timestep, np.float32)
        v = velocity(x.astype(np.float32), t, request.conditions["c"]).astype(np.float64)
        if scale is not None:
            assert request.unconditional is not None
            u = velocity(x.astype(np.float32), t, request.unconditional["c"])
            v = u + scale * (v - u)
        outputs.append(v)
        x = recurrence.state[i] * x + sum(b * o for b, o in zip(recurrence.outputs[i], outputs, strict=False))
        path.append(x)
    return np.stack(path)


# -- what they are


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("make", [euler, adams_bashforth])
def test_equal_to_a_loop_run_by_hand(tmp_path: Path, scale: float | None, make) -> None:
    program = program_of(scale, make(STEPS))
    data = run(program, tmp_path)
    assert data.latents.shape == (STEPS + 1, COUNT, *LATENT) and data.latents.dtype == np.float32
    np.testing.assert_allclose(data.latents, by_hand(program, data.request, scale), rtol=1e-4, atol=1e-5)


def test_it_starts_at_the_scaled_noise(tmp_path: Path) -> None:
    program = program_of(None, replace(euler(STEPS), initial_scale=3.0))
    data = run(program, tmp_path)
    noise = SampleSet("calibration", 0, COUNT).noise(LATENT)
    np.testing.assert_array_equal(data.latents[0], np.float32(3) * noise)


def test_the_samples_alone(tmp_path: Path) -> None:
    """[1, B, ...]: the last latents of the whole path, to the bit."""
    whole, samples = (run(program_of(), tmp_path, whole=whole) for whole in (True, False))
    assert samples.latents.shape == (1, COUNT, *LATENT)
    np.testing.assert_array_equal(samples.latents[-1], whole.latents[-1])


def test_samples_are_run_in_small_batches(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Watching(Counter):
        def __call__(self, inputs: Any) -> list[np.ndarray]:
            sizes.append(len(inputs["x"]))
            return super().__call__(inputs)

    run(program_of(None), tmp_path, Watching())
    assert sizes == [BATCH] * STEPS + [COUNT - BATCH] * STEPS


def test_progress_counts_evaluations(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    run(program_of(), tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, 2 * STEPS) for i in range(2 * STEPS)]


# -- the cache


def test_a_second_time_the_model_does_not_run(tmp_path: Path) -> None:
    engine = Counter()
    before = run(program_of(), tmp_path, engine)
    assert engine.calls == 2 * STEPS
    after = run(program_of(), tmp_path, engine)
    assert engine.calls == 2 * STEPS
    np.testing.assert_array_equal(after.latents, before.latents)
    np.testing.assert_array_equal(after.request.noise, before.request.noise)
    (file,) = kept(tmp_path)
    np.testing.assert_array_equal(load_file(file)["latents"], before.latents)


def test_the_folder_is_made(tmp_path: Path) -> None:
    run(program_of(), tmp_path / "deep" / "cache")
    assert len(kept(tmp_path / "deep" / "cache")) == 1


def step_of(module: torch.nn.Module) -> Stage:
    return component(module, torch.zeros(2, *LATENT)).step


def kept(cache: Path) -> list[Path]:
    """The files with latents."""
    return sorted((cache / "trajectories").glob("*/*.safetensors"))


def changed(program: Program, **more: Any) -> Program:
    return replace(program, **more)


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"samples": SampleSet("calibration", 1, COUNT)},
    "set": {"samples": SampleSet("validation", 0, COUNT)},
    "count": {"samples": SampleSet("calibration", 0, COUNT - 1)},
    "scale": {"scale": 3.0},
    "whole": {"whole": False},
    "weights": {"program": changed(program_of(), model=ModelIdentity("Analytic", "1" * 64))},
    "loop": {"program": changed(program_of(), loop=loop(2.0, STEPS).model_copy(update={"constants": {"a": 1}}))},
    "example": {"program": changed(program_of(), example={**program_of().example, "x": torch.ones(2, *LATENT)})},
    "constant": {"program": changed(program_of(), constants={"resolution": 4})},
    "constant tensor": {"program": changed(program_of(), constants={"ids": torch.ones(3)})},
    "class": {"program": changed(program_of(), model=ModelIdentity("Other", "0" * 64))},
    "unconditional": {"program": changed(program_of(), unconditional={"c": torch.ones(2, dtype=torch.int64)})},
    "graph": {"program": changed(program_of(), slots=slots_of(step_of(torch.nn.ReLU())))},
    "timesteps": {"program": program_of(recurrence=replace(euler(STEPS), timesteps=np.linspace(999, 1, STEPS)))},
    "updates": {"program": program_of(recurrence=euler(STEPS, stretch=1.001))},
    "noise scale": {"program": program_of(recurrence=replace(euler(STEPS), initial_scale=1.5))},
    "input scale": {"program": program_of(recurrence=replace(euler(STEPS), input_scale=np.full(STEPS, 0.5)))},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_key_has_everything_they_depend_on(tmp_path: Path, name: str) -> None:
    run(program_of(), tmp_path)
    engine = Counter()
    more = dict(OTHERS[name])
    run(more.pop("program", program_of()), tmp_path, engine, **more)
    assert engine.calls > 0 and len(kept(tmp_path)) == 2


@pytest.mark.parametrize(
    ("place", "here"),
    [
        ("version_of", lambda names: f"{names[0]} of tomorrow"),
        ("own_code", lambda: "other code"),
    ],
)
def test_other_versions_and_other_code_make_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, here: Any
) -> None:
    run(program_of(), tmp_path)
    monkeypatch.setattr(f"stepfold.calibration.origin.{place}", here)
    engine = Counter()
    run(program_of(), tmp_path, engine)
    assert engine.calls > 0


def test_what_fills_the_slots_at_each_call_is_part_of_the_key(tmp_path: Path) -> None:
    stages = (step_of(torch.nn.ReLU()), replace(step_of(torch.nn.ReLU()), name="step_1"))
    for by_call in ((0, 1) * (STEPS // 2) + (0,) * (STEPS % 2), (0,) * STEPS):
        engine = Counter()
        run(changed(program_of(), slots=(Slot("step", stages, by_call),)), tmp_path, engine)
        assert engine.calls > 0
    assert len(kept(tmp_path)) == 2


def test_a_graph_that_holds_something_unknown_is_not_kept(tmp_path: Path) -> None:
    stage = step_of(torch.nn.ReLU())
    next(iter(stage.graph.graph.nodes)).kwargs = {"unknown": object()}
    engine, program = Counter(), changed(program_of(), slots=slots_of(stage))
    for calls in (2 * STEPS, 4 * STEPS):
        run(program, tmp_path, engine)
        assert engine.calls == calls
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f"),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
    ],
    ids=["cut", "another number", "empty", "gone"],
)
def test_damaged_ones_are_made_again(
    tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = run(program_of(), tmp_path)
    damage(*kept(tmp_path))
    after = run(program_of(), tmp_path, engine := Counter())
    assert engine.calls == 2 * STEPS and "is damaged and is made again" in caplog.text
    np.testing.assert_array_equal(after.latents, before.latents)
    assert run(program_of(), tmp_path, engine).latents is not None and engine.calls == 2 * STEPS


def test_a_cache_that_cannot_be_used_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    assert run(program_of(), tmp_path / "cache").latents.shape[0] == STEPS + 1
    assert "cannot be kept" in caplog.text


def test_the_folder_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were not used for longest go first."""
    run(program_of(), tmp_path)
    (first_file,) = kept(tmp_path)
    monkeypatch.setattr("stepfold.calibration.trajectories.LIMIT_BYTES", 2 * first_file.stat().st_size)
    os.utime(first_file.parent, (1, 1))
    run(program_of(), tmp_path, scale=3.0)
    assert len(kept(tmp_path)) == 1 and not first_file.exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(Counter):
        def __call__(self, inputs: Any) -> list[np.ndarray]:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(inputs)

    with pytest.raises(KeyboardInterrupt):
        run(program_of(), tmp_path, Interrupted())
    assert list(tmp_path.rglob("*")) == []


# -- parts


def test_first_and_part(tmp_path: Path) -> None:
    data = run(program_of(), tmp_path)
    few = first(data, 3)
    assert few.latents.shape == (STEPS + 1, 3, *LATENT)
    np.testing.assert_array_equal(few.request.conditions["c"], [0, 1, 2])
    some = part(data.request, 2, 5)
    np.testing.assert_array_equal(some.noise, data.request.noise[2:5])
    assert some.unconditional is not None and some.unconditional["c"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(("size", "lengths"), [(COUNT, [COUNT]), (7, [7, 7, 6]), (1, [1] * COUNT), (100, [COUNT])])
def test_slices_cover_a_request(size: int, lengths: list[int]) -> None:
    request = sample_request(program_of(), SampleSet("calibration", 0, COUNT))
    pieces = slices(request, size)
    assert [len(piece.noise) for piece in pieces] == lengths
    np.testing.assert_array_equal(np.concatenate([piece.noise for piece in pieces]), request.noise)
    np.testing.assert_array_equal(np.concatenate([piece.conditions["c"] for piece in pieces]), request.conditions["c"])


def test_a_request_without_guidance_has_no_other_branch() -> None:
    request = sample_request(program_of(None), SampleSet("calibration", 0, 4))
    assert request.unconditional is None and part(request, 0, 2).unconditional is None
