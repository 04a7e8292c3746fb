"""Roles and loop inferred from the steps of a pipeline, and steps that the fold cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from stepfold.frontend.recorder import Call, Recording, Step
from stepfold.frontend.roles import Inferred
from stepfold.frontend.watch import Watch
from stepfold.loop.errors import UsageError

BATCH, STEPS, LATENT = 2, 4, (3, 8)
TEXT, NEGATIVE = torch.randn(2, 5), torch.randn(2, 5)


class Recorded:
    """What a correct pipeline with a flow-matching scheduler leaves behind, to change."""

    def __init__(self, guidance: str, scale: float = 3.0, first_row: str = "unconditional", steps: int = STEPS):
        """
        Args:
            guidance: `none`, `doubled` (one call with twice the rows) or `twice` (two calls a step).
            scale: of the guidance.
            first_row: which branch comes first.
            steps: of the loop.
        """
        self.scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(steps)
        self.around = Recording(set_timesteps={"num_inference_steps": steps, "device": "cpu"}, begin_index=0)
        self.steps: list[Step] = []
        torch.manual_seed(0)
        latent = torch.randn(BATCH, *LATENT)
        for t in self.scheduler.timesteps:
            outputs = {name: torch.randn(BATCH, *LATENT) for name in ("conditional", "unconditional")}
            texts = {"conditional": TEXT, "unconditional": NEGATIVE}
            order = ["conditional", "unconditional"] if first_row == "conditional" else ["unconditional", "conditional"]
            if guidance == "none":
                calls, guided = [call(latent, t, TEXT, outputs["conditional"])], outputs["conditional"]
            else:
                guided = outputs["unconditional"] + scale * (outputs["conditional"] - outputs["unconditional"])
                calls = [call(latent, t, texts[name], outputs[name]) for name in order]
            if guidance == "doubled":
                calls = [
                    call(torch.cat([latent] * 2), t, *(torch.cat([d[n] for n in order]) for d in (texts, outputs)))
                ]
            result = self.scheduler.step(guided, t, latent).prev_sample
            self.steps.append(Step(calls, float(t), guided, latent, {}, result))
            latent = result

    def inferred(self) -> Inferred:
        watch = Watch(self.scheduler, BATCH, len(self.scheduler.timesteps))
        for step in self.steps:
            watch(self.around, step)
            self.around.taken += 1
        return watch.finish(self.around)

    def edit(self, **changes: Callable[[torch.Tensor, int], object]) -> None:
        """Change arguments of every denoiser call, by the number of its step."""
        for i, step in enumerate(self.steps):
            for made in step.calls:
                for name, change in changes.items():
                    made.arguments[name] = change(made.arguments[name], i)

    def give(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """Give the scheduler something else than the guided output, and let it go on from there."""
        self.scheduler.set_timesteps(len(self.steps))
        for i, step in enumerate(self.steps):
            step.guided = change(step.guided, i)
            step.result = self.scheduler.step(step.guided, step.timestep, step.sample).prev_sample
            self.begin(i + 1, step.result)

    def begin(self, i: int, latent: torch.Tensor) -> None:
        """Begin a step, where there is one, at another latent."""
        if i < len(self.steps):
            step = self.steps[i]
            step.sample = latent
            for made in step.calls:
                made.arguments["x"] = latent.repeat(len(made.output) // BATCH, 1, 1)


def call(latent: torch.Tensor, t: torch.Tensor, text: torch.Tensor, output: torch.Tensor) -> Call:
    arguments = {"x": latent.clone(), "t": t.expand(len(latent)) / 1000, "text": text, "ids": torch.zeros(7, 3)}
    return Call(arguments | {"more": {"flag": True, "nothing": None}, "return_dict": False, "mask": None}, output)


@pytest.mark.parametrize("guidance", ["none", "doubled", "twice"])
@pytest.mark.parametrize("first_row", ["conditional", "unconditional"])
def test_inferred(guidance: str, first_row: str) -> None:
    found = Recorded(guidance, 3.0, first_row).inferred()
    assert {name: spec.role for name, spec in found.loop.inputs.items()} == {
        "x": "state",
        "t": "timestep",
        "text": "condition",
        "ids": "constant",
    }
    assert found.loop.sampler.timestep_scale == pytest.approx(0.001)
    assert found.loop.sampler.timestep_offset == 0.0 and found.loop.sampler.output_scale == 1.0
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
    found = Recorded("twice", 1.0).inferred()
    assert found.loop.guidance is not None and found.loop.guidance.scale == pytest.approx(1.0)
    torch.testing.assert_close(found.kwargs["text"], TEXT)


def test_two_branches_at_a_scale_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mixes its two branches at a guidance scale of 0.7; .* --guidance SCALE"):
        Recorded("twice", 0.7).inferred()


@pytest.mark.parametrize(
    ("change", "scale", "strength"),
    [(lambda r: guided_until(r, 2), 3.0, (1, 1, 0, 0)), (lambda r: other_scale(r, 2), 5.0, (0.5, 0.5, 1, 0.5))],
    ids=["in an interval", "another scale"],
)
def test_guidance_that_changes_from_step_to_step(change: Any, scale: float, strength: tuple[float, ...]) -> None:
    """The scale is the largest of all steps."""
    recorded = Recorded("twice")
    change(recorded)
    recorded.give(lambda value, _: value)  # the steps that were taken from elsewhere go on from their own latents
    guidance = recorded.inferred().loop.guidance
    assert guidance is not None and guidance.scale == pytest.approx(scale)
    assert guidance.strength == pytest.approx(strength, abs=1e-4) and guidance.rescale is None


@pytest.mark.parametrize("guidance", ["none", "doubled", "twice"])
@pytest.mark.parametrize("scale", [-1.0, 0.5])
def test_a_scaled_output_is_written_down(guidance: str, scale: float) -> None:
    recorded = Recorded(guidance)
    recorded.give(lambda value, _: scale * value)
    found = recorded.inferred()
    assert found.loop.sampler.output_scale == pytest.approx(scale)
    if guidance != "none":
        assert found.loop.guidance is not None and found.loop.guidance.scale == pytest.approx(3.0)


def test_a_timestep_that_runs_the_other_way_is_written_down() -> None:
    recorded = Recorded("none")
    recorded.edit(t=lambda value, _: 1 - value)
    sampler = recorded.inferred().loop.sampler
    assert (sampler.timestep_scale, sampler.timestep_offset) == (pytest.approx(-0.001), pytest.approx(1.0))


def test_one_step() -> None:
    recorded = Recorded("none", steps=1)
    recorded.edit(t=lambda value, _: value)
    for step in recorded.steps:
        step.calls[0].arguments["timestep"] = step.calls[0].arguments.pop("t")
    loop = recorded.inferred().loop
    assert loop.sampler.steps == 1 and loop.timestep == "timestep"
    recorded = Recorded("none", steps=1)
    recorded.steps[0].calls[0].arguments["when"] = recorded.steps[0].calls[0].arguments.pop("t")
    with pytest.raises(UsageError, match="no denoiser input is called timestep, and the pipeline makes one step"):
        recorded.inferred()


def guided_until(recorded: Recorded, stop: int) -> None:
    """Guidance for the first steps only."""
    plain = Recorded("none")
    for i in range(stop, STEPS):
        recorded.steps[i] = plain.steps[i]


def other_scale(recorded: Recorded, i: int) -> None:
    other = Recorded("twice", 5.0)
    recorded.steps[i].calls, recorded.steps[i].guided = other.steps[i].calls, other.steps[i].guided


def by_sample(value: torch.Tensor) -> torch.Tensor:
    return value * torch.tensor([1.0, 1.3]).reshape(2, 1, 1)


LATENT_ROW = torch.zeros(LATENT)
REFUSED: dict[str, tuple[str, Callable[[Recorded], object], str]] = {
    "middle_of_the_grid": (
        "none",
        lambda r: setattr(r.around, "begin_index", 2),
        "the pipeline starts at call 2 of 4",
    ),
    "no_step": ("none", lambda r: r.steps.clear(), "the pipeline ended before its first step"),
    "one_step_less": ("none", lambda r: r.steps.pop(), "step 3: the pipeline ends its loop here; .* a grid of 4"),
    "one_step_more": ("none", lambda r: r.steps.append(r.steps[-1]), "step 5: the pipeline makes one step more"),
    "one_call_more": (
        "none",
        lambda r: setattr(r.around, "rest", 1),
        "behind step 4: the pipeline calls its denoiser 1 more times",
    ),
    "three_branches": (
        "twice",
        lambda r: r.steps[2].calls.append(r.steps[2].calls[0]),
        r"step 3 of 4: the guidance of the pipeline has three branches \(denoiser calls of \[2, 2, 2\] rows",
    ),
    "four_calls": (
        "twice",
        lambda r: r.steps[0].calls.extend(r.steps[0].calls),
        "step 1 of 4: the pipeline calls its denoiser 4 times",
    ),
    "lists_of_samples": (
        "none",
        lambda r: setattr(r.steps[0], "calls", [Call({"x": [LATENT_ROW] * BATCH}, torch.zeros(16, *LATENT))]),
        r"step 1 of 4: the denoiser takes its samples as a list \('x'\) with a tensor for each",
    ),
    "second_network_besides": (
        "none",
        lambda r: r.steps[1].networks.update(controlnet="ControlNetModel"),
        r"step 2 of 4: the pipeline calls controlnet \(ControlNetModel\) within its loop, besides the denoiser",
    ),
    "second_network_instead": (
        "none",
        lambda r: (r.steps[2].calls.clear(), r.steps[2].networks.update(transformer_2="WanTransformer3DModel")),
        r"step 3 of 4: the pipeline calls transformer_2 \(WanTransformer3DModel\) within its loop, in the place of",
    ),
    "no_network": ("none", lambda r: r.steps[2].calls.clear(), "step 3 of 4: .* takes its output from elsewhere"),
    "guidance_rescaled_by_no_rule": (
        "doubled",
        lambda r: r.give(lambda value, _: by_sample(value)),
        "rescales its guided output by a factor that follows neither the norm nor the deviation of the conditional",
    ),
    "rescaled_output": (
        "none",
        lambda r: r.give(lambda value, _: by_sample(value)),
        "step 1 of 4: the pipeline has an output that is rescaled",
    ),
    "other_guidance": (
        "doubled",
        lambda r: r.give(lambda value, _: value + value**2),
        "guidance is not `unconditional \\+ scale",
    ),
    "output_transform": (
        "none",
        lambda r: r.give(lambda value, _: value**3),
        "step 1 of 4: the pipeline has an output transform of its own: the scheduler is not given a multiple",
    ),
    "preconditioned_output": (
        "none",
        lambda r: r.give(lambda value, i: value + 0.5 * r.steps[i].sample),
        "an output transform of its own: it adds a multiple of the latent",
    ),
    "clipped_output": (
        "none",
        lambda r: r.give(lambda value, i: value.clamp(-1, 1) if i == 3 else value),
        "step 4 of 4: the pipeline clips the denoiser's output",
    ),
    "negated_from_a_step_on": (
        "none",
        lambda r: r.give(lambda value, i: -value if i > 1 else value),
        "step 3 of 4: the factor of the output is -1, and 1 before",
    ),
    "nothing_is_given": (
        "none",
        lambda r: r.give(lambda value, i: 0 * value if i == 0 else value),
        "step 1 of 4: the scheduler is given zeros",
    ),
    "other_form_of_guidance": (
        "twice",
        lambda r: r.steps.__setitem__(3, Recorded("doubled").steps[3]),
        r"step 4 of 4: the pipeline calls its denoiser with \[4\] rows, and with \[2, 2\] before",
    ),
    "noise_on_the_input": (
        "none",
        lambda r: r.edit(x=lambda value, i: value + torch.randn_like(value)),
        r"no denoiser input follows the latent \[2, 3, 8\]",
    ),
    "noise_at_each_step": (
        "none",
        lambda r: r.begin(2, r.steps[2].sample + torch.randn_like(r.steps[2].sample)),
        r"step 3 of 4: the pipeline changes the latent between the steps of its scheduler \(noise is added",
    ),
    "clipped_latent": (
        "none",
        lambda r: r.begin(3, r.steps[3].sample.clamp(-0.5, 0.5)),
        r"step 4 of 4: .* \(clipped to -0.5 and 0.5\)",
    ),
    "scaled_latent": (
        "none",
        lambda r: r.begin(1, 2 * r.steps[1].sample),
        r"step 2 of 4: .* \(multiplied by 2\)",
    ),
    "scaled_input": (
        "none",
        lambda r: r.edit(x=lambda value, i: value * (1 + (i > 1))),
        "step 3 of 4: .* the scale of the latent in 'x' differs",
    ),
    "timestep_by_a_power": (
        "none",
        lambda r: r.edit(t=lambda value, i: value**2),
        "step [123] of 4: .* the denoiser is given the timestep",
    ),
    "constant_timestep": (
        "none",
        lambda r: r.edit(t=lambda value, i: 0 * value + 3),
        "no denoiser input follows the scheduler's timestep",
    ),
    "other_timesteps_from_step_3_on": (
        "none",
        lambda r: r.edit(t=lambda value, i: value * (0.5 if i > 1 else 1)),
        "step 3 of 4: .* is given the timestep 0.167, and the grid of the scheduler says 0.334",
    ),
    "late_start": (
        "none",
        lambda r: (
            r.edit(t=lambda value, i: value * 0.5),
            [setattr(step, "timestep", step.timestep * 0.5) for step in r.steps],
        ),
        "step 1 of 4: the pipeline's loop is not that of its scheduler",
    ),
    "changing_condition": (
        "none",
        lambda r: r.edit(text=lambda value, i: value + i),
        "denoiser input 'text' changes from step to step",
    ),
    "condition_that_changes_later": (
        "none",
        lambda r: r.edit(text=lambda value, i: value + (i > 2)),
        "step 4 of 4: denoiser input 'text' changes from step to step",
    ),
    "flag_that_changes_later": (
        "none",
        lambda r: r.edit(more=lambda value, i: {"flag": i < 2}),
        "step 3 of 4: denoiser input 'more.flag' changes from step to step",
    ),
    "constant_of_a_branch": (
        "twice",
        lambda r: [step.calls[0].arguments.update(skip=True) for step in r.steps],
        "step 1 of 4: denoiser input 'skip' changes from branch to branch",
    ),
    "other_length_of_a_branch": (
        "twice",
        lambda r: [step.calls[0].arguments.update(text=NEGATIVE[:, :4]) for step in r.steps],
        r"step 1 of 4: condition 'text' is \[2, 5\] in the conditional branch and \[2, 4\] in the unconditional one",
    ),
    "other_arguments_of_a_step": (
        "none",
        lambda r: r.steps[2].arguments.update(s_noise=0.5),
        "step 3 of 4: the pipeline gives its scheduler's step s_noise=0.5, and None before",
    ),
    "another_update": (
        "none",
        lambda r: (setattr(r.steps[1], "result", r.steps[1].result * 1.1), r.steps[1].arguments.clear()),
        r"step 2 of 4: the scheduler answers another latent than its grid says \(multiplied by 1.1\)",
    ),
    "start_at_an_image": (
        "none",
        lambda r: r.begin(0, r.steps[0].sample * 0.2 + 3),
        "step 1: the pipeline starts at a latent of mean",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    guidance, edit, message = REFUSED[name]
    recorded = Recorded(guidance)
    edit(recorded)
    with pytest.raises(UsageError, match=message):
        recorded.inferred()
