"""Roles and loop inferred from a recording, and recordings the fold cannot hold."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch

from stepfold.frontend.recorder import Call, Recording, Step
from stepfold.frontend.roles import infer
from stepfold.loop.errors import UsageError

BATCH, STEPS, LATENT = 2, 4, (3, 4)
TEXT, NEGATIVE = torch.randn(2, 5), torch.randn(2, 5)
Edit = Callable[[Recording], object]


def record(guidance: str = "none", scale: float = 3.0, first_row: str = "unconditional") -> Recording:
    """What a correct pipeline with a flow-matching scheduler leaves behind.

    Args:
        guidance: `none`, `doubled` (one call with twice the rows) or `twice` (two calls a step).
        scale: of the guidance.
        first_row: which branch comes first.
    """
    scheduler = build()
    torch.manual_seed(0)
    recorded = Recording(steps=[], set_timesteps={"num_inference_steps": STEPS, "device": "cpu"}, begin_index=0)
    latent = torch.randn(BATCH, *LATENT)
    for t in scheduler.timesteps[:2]:
        outputs = {name: torch.randn(BATCH, *LATENT) for name in ("conditional", "unconditional")}
        texts = {"conditional": TEXT, "unconditional": NEGATIVE}
        order = ["conditional", "unconditional"] if first_row == "conditional" else ["unconditional", "conditional"]
        if guidance == "none":
            calls = [call(latent, t, TEXT, outputs["conditional"])]
            guided = outputs["conditional"]
        else:
            guided = outputs["unconditional"] + scale * (outputs["conditional"] - outputs["unconditional"])
            calls = [call(latent, t, texts[name], outputs[name]) for name in order]
        if guidance == "doubled":
            calls = [call(torch.cat([latent] * 2), t, *(torch.cat([d[n] for n in order]) for d in (texts, outputs)))]
        recorded.steps.append(Step(calls, float(t), guided, latent))
        latent = scheduler.step(guided, t, latent).prev_sample
    return recorded


def build() -> diffusers.FlowMatchEulerDiscreteScheduler:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler


def call(latent: torch.Tensor, t: torch.Tensor, text: torch.Tensor, output: torch.Tensor) -> Call:
    arguments = {"x": latent.clone(), "t": t.expand(len(latent)) / 1000, "text": text, "ids": torch.zeros(7, 3)}
    return Call(arguments | {"more": {"flag": True, "nothing": None}, "return_dict": False, "mask": None}, output)


@pytest.mark.parametrize("guidance", ["none", "doubled", "twice"])
@pytest.mark.parametrize("first_row", ["conditional", "unconditional"])
def test_inferred(guidance: str, first_row: str) -> None:
    found = infer(record(guidance, 3.0, first_row), build(), BATCH, STEPS)
    assert {name: spec.role for name, spec in found.loop.inputs.items()} == {
        "x": "state",
        "t": "timestep",
        "text": "condition",
        "ids": "constant",
    }
    assert found.loop.sampler.timestep_scale == pytest.approx(0.001)
    assert found.loop.latent.shape == LATENT and found.loop.sampler.set_timesteps == {}
    torch.testing.assert_close(found.kwargs["text"], TEXT)
    assert found.kwargs["t"].shape == (BATCH,) and found.kwargs["t"].dtype == torch.float32
    assert "mask" not in found.kwargs and found.kwargs["return_dict"] is False
    if guidance == "none":
        assert found.loop.guidance is None
    else:
        assert found.loop.guidance is not None and found.loop.guidance.scale == pytest.approx(3.0)
        assert found.loop.guidance.unconditional == "input"


def test_a_scale_of_one_has_no_direction_to_mistake() -> None:
    found = infer(record("twice", 1.0), build(), BATCH, STEPS)
    assert found.loop.guidance is not None and found.loop.guidance.scale == pytest.approx(1.0)
    torch.testing.assert_close(found.kwargs["text"], TEXT)


def edit_arguments(recorded: Recording, **changes: Callable[[torch.Tensor, int], object]) -> None:
    for i, step in enumerate(recorded.steps):
        for made in step.calls:
            for name, change in changes.items():
                made.arguments[name] = change(made.arguments[name], i)


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "middle_of_the_grid": (
        "none",
        lambda r: setattr(r, "begin_index", 2),
        "the pipeline starts at call 2 of 4",
    ),
    "one_step": ("none", lambda r: r.steps.pop(), "the pipeline ended before its second step"),
    "three_calls": (
        "twice",
        lambda r: [step.calls.append(step.calls[0]) for step in r.steps],
        r"calls its denoiser 3 times a step, with \[2, 2, 2\] rows for 2 samples",
    ),
    "rescaled_guidance": (
        "doubled",
        lambda r: [setattr(step, "guided", step.guided + step.guided**2) for step in r.steps],
        "guidance is not `unconditional \\+ scale",
    ),
    "noise_on_the_latent": (
        "none",
        lambda r: edit_arguments(r, x=lambda value, i: value + torch.randn_like(value)),
        r"no denoiser input follows the latent \[2, 3, 4\]",
    ),
    "timestep_by_offset": (
        "none",
        lambda r: edit_arguments(r, t=lambda value, i: 1 - value),
        "no denoiser input follows the scheduler's timestep",
    ),
    "changing_condition": (
        "none",
        lambda r: edit_arguments(r, text=lambda value, i: value + i),
        "denoiser input 'text' changes from step to step",
    ),
    "latent_changed_between_steps": (
        "none",
        lambda r: (
            edit_arguments(r, x=lambda value, i: value * (1 + i)),
            setattr(r.steps[1], "sample", r.steps[1].sample * 2),
        ),
        "the first update of the latent differs",
    ),
    "late_start": (
        "none",
        lambda r: (
            edit_arguments(r, t=lambda value, i: value * 0.5),
            [setattr(step, "timestep", step.timestep * 0.5) for step in r.steps],
        ),
        "the timesteps of the first two calls differs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    guidance, edit, message = REFUSED[name]
    recorded = record(guidance)
    edit(recorded)
    with pytest.raises(UsageError, match=message):
        infer(recorded, build(), BATCH, STEPS)
