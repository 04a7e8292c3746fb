"""What a pipeline is called with: options become arguments of its call, or one clear line."""

from __future__ import annotations

from typing import Any

import pytest

from stepfold.loop.errors import UsageError
from stepfold.loop.pipeline_call import PipelineCall, pipeline_call

DEFAULTS = {
    "prompt": None,
    "height": None,
    "width": None,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "negative_prompt": None,
    "prompt_2": None,
    "max_sequence_length": 256,
}


def arguments(call: PipelineCall, **more: Any) -> dict[str, Any]:
    return call.for_pipeline("SomePipeline", DEFAULTS | more, prompts=2)


def test_options_are_arguments_of_the_call() -> None:
    call = pipeline_call(steps=4, guidance=0, height=64, negative_prompt="rain", arguments={"max_sequence_length": 8})
    assert arguments(call) == {
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "height": 64,
        "negative_prompt": ["rain", "rain"],
        "max_sequence_length": 8,
    }
    assert call.given == {
        "steps": 4,
        "guidance": 0.0,
        "height": 64,
        "negative_prompt": "rain",
        "max_sequence_length": 8,
    }
    assert PipelineCall().given == {} and arguments(PipelineCall()) == {}


def test_a_text_for_a_prompt_is_given_for_each() -> None:
    assert arguments(pipeline_call(arguments={"prompt_2": "a cat"})) == {"prompt_2": ["a cat", "a cat"]}


def test_the_guidance_that_is_not_distilled_is_meant_where_the_other_is_none_by_default() -> None:
    call = pipeline_call(guidance=4)
    assert arguments(call, guidance_scale=3.5, true_cfg_scale=1.0) == {"guidance_scale": 4.0}
    assert arguments(call, guidance_scale=None, true_cfg_scale=4.0) == {"true_cfg_scale": 4.0}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no_frames": ({"frames": 9}, "^--frames: SomePipeline takes no num_frames; its call has prompt, height"),
    "unknown": (
        {"arguments": {"max_sequence_lenght": 8}},
        "^--call max_sequence_lenght: SomePipeline takes no such argument; did you mean 'max_sequence_length'",
    ),
    "ours": ({"arguments": {"prompt": "a"}}, "^--call prompt: stepfold gives this argument itself; leave it out"),
    "twice": (
        {"steps": 4, "arguments": {"num_inference_steps": 5}},
        "^--call num_inference_steps: there is an option for it, and it was given too",
    ),
    "negative_steps": ({"steps": -1}, "the pipeline's call: steps: .*greater than 0"),
    "infinite": ({"guidance": float("inf")}, "the pipeline's call: guidance"),
    "a_word": ({"height": "tall"}, r"the pipeline's call: height: .*\(received 'tall'\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_for(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(UsageError, match=message):
        arguments(pipeline_call(**options))
