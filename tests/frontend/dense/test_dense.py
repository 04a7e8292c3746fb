"""Dense forms against the models of diffusers that count samples or tokens in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

from stepfold.frontend.capture import capture
from stepfold.frontend.dense import FORMS, dense, dense_arguments

ROWS = 3
TOKENS = 40
LENGTHS = (35, 38, 19)  # the third needs one multiple of 32 tokens for Z-Image, the others two
EQUAL = {"atol": 1e-5, "rtol": 1e-4}  # float32


@dataclass(frozen=True)
class Example:
    """A model, how a pipeline calls it, and an input that changes what it computes."""

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    telling: str


def z_image() -> Any:
    config = {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 12}
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16], **config
    )


def z_image_call() -> dict[str, Any]:
    prompts = [torch.randn(length, 12) for length in LENGTHS]
    return {"x": [torch.randn(4, 1, 8, 6) for _ in LENGTHS], "t": torch.rand(ROWS), "cap_feats": prompts}


def lumina2() -> Any:
    return diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 16, 16),
        cap_feat_dim=12,
    )


def lumina2_call() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(ROWS, 4, 8, 6),
        "timestep": torch.rand(ROWS),
        "encoder_hidden_states": torch.randn(ROWS, TOKENS, 12),
        "encoder_attention_mask": (torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]).long(),
    }


def chroma() -> Any:
    return diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def chroma_call() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(ROWS, 6, 4),
        "timestep": torch.rand(ROWS),
        "encoder_hidden_states": torch.randn(ROWS, 5, 12),
        "img_ids": torch.rand(6, 3),
        "txt_ids": torch.zeros(5, 3),
        "attention_mask": (torch.arange(11) != 3).float().expand(ROWS, -1).clone(),
    }


EXAMPLES: Mapping[str, Example] = {
    "ChromaTransformer2DModel": Example(chroma, chroma_call, "timestep"),
    "Lumina2Transformer2DModel": Example(lumina2, lumina2_call, "encoder_attention_mask"),
    "ZImageTransformer2DModel": Example(z_image, z_image_call, "cap_feats_mask"),
}


def random_model(example: Example) -> Any:
    """With weights that are all random: those that a model begins with at zero hide what they are multiplied with."""
    torch.manual_seed(0)
    model = example.build().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def own_answer(model: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    answer = model(**arguments, return_dict=False)[0]
    return torch.stack(answer) if isinstance(answer, list) else answer


@pytest.fixture(params=sorted(FORMS))
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]


@torch.no_grad()
def test_a_dense_form_computes_what_its_model_does(example: Example) -> None:
    model, arguments = random_model(example), example.arguments()
    wanted = own_answer(model, {n: list(v) if isinstance(v, list) else v for n, v in arguments.items()})
    for tokens in (0, 100):  # with prompts as long as the longest, and longer
        given = dense_arguments(model, arguments, tokens)
        torch.testing.assert_close(dense(model)(**given)[0], wanted, **EQUAL)
    torch.testing.assert_close(own_answer(model, arguments), wanted, **EQUAL)  # the model itself is as it was


@torch.no_grad()
def test_what_a_form_is_given_matters(example: Example) -> None:
    """Of a mask: how many tokens a prompt has decides where the patches stand."""
    model = random_model(example)
    given = dense_arguments(model, example.arguments())
    before, value = dense(model)(**given)[0], given[example.telling]
    other = value.flip(0) if value.ndim > 1 else 1 - value
    after = dense(model)(**{**given, example.telling: other})[0]
    assert not torch.allclose(before, after, **EQUAL)


def test_tensors_are_taken_as_they_are() -> None:
    """The second capture of a Z-Image, or one from a loop.yaml, gives them; so does a model without a form."""
    model = z_image()
    given = dense_arguments(model, z_image_call())
    assert dense_arguments(model, given) == given
    plain = torch.nn.Linear(2, 2)
    assert dense(plain) is plain and dense_arguments(plain, given) is given


@pytest.mark.slow
@torch.no_grad()
def test_a_capture_serves_any_batch(example: Example) -> None:
    model, arguments = random_model(example), example.arguments()
    given = dense_arguments(model, arguments)
    constant = {name for name in ("img_ids", "txt_ids") if name in given}
    two = {name: value if name in constant else value[:2] for name, value in given.items()}
    program = capture(model, two)
    inputs = {port.name: given[port.name].numpy() for port in program.inputs}
    (answer,) = program.bind().evaluate(inputs)
    torch.testing.assert_close(torch.from_numpy(answer), own_answer(model, arguments), **EQUAL)
