"""Capture: roles, batch, constants, outputs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from zoo import ZooModel

from stepfold.frontend.calling import prediction
from stepfold.frontend.capture import capture
from stepfold.frontend.identity import weights_hash
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.spec import LoopSpec

Captured = Callable[[ZooModel], Program]


def loop(**inputs: object) -> LoopSpec:
    sampler = {"scheduler": "FlowMatchEulerDiscreteScheduler", "steps": 4}
    return LoopSpec.model_validate({"inputs": inputs, "sampler": sampler, "latent": {"shape": [3, 4]}})


LOOP = loop(x="state", t="timestep", c="condition")


def guided(value: float) -> LoopSpec:
    guidance = {"scale": 2.0, "unconditional": {"c": value}}
    return LoopSpec.model_validate(LOOP.model_dump(mode="json") | {"guidance": guidance})


class Denoiser(torch.nn.Module):
    """x [B, 3, 4], t [B], c a class, a nested condition and a constant table."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.channels = channels

    def forward(self, x, t, c=None, more=None, table=None, scale=1.0):
        y = x * scale + t[:, None, None]
        y = y if c is None else y + self.embedding(c)[:, None]
        y = y if more is None else y + more["text"][0][:, None]
        y = y if table is None else y + table
        return (y.repeat(1, 2, 1) if self.channels == 6 else y[:, : self.channels],)


X, T, C = torch.randn(2, 3, 4), torch.tensor([3.0, 2.0]), torch.tensor([1, 4])


def evaluate(program: Program, **inputs: torch.Tensor) -> np.ndarray:
    return program.bind().evaluate({name: value.numpy() for name, value in inputs.items()})[0]


def test_roles_ports_and_cardinality() -> None:
    program = capture(Denoiser(), {"x": X, "t": T, "c": C}, LOOP)
    assert [(i.name, i.role, i.port.shape, i.port.dtype, i.cardinality) for i in program.inputs] == [
        ("x", "state", (None, 3, 4), "float32", None),
        ("t", "timestep", (None,), "float32", None),
        ("c", "condition", (None,), "int64", 5),
    ]
    assert program.outputs == ("sample",) and program.step.name == "step"
    assert program.recurrence is not None and program.recurrence.calls == 4


def test_an_example_of_one_sample_grows() -> None:
    program = capture(Denoiser(), {"x": X[:1], "t": torch.tensor(3.0), "c": C[:1]}, LOOP)
    assert [value.shape[0] for value in program.example.values()] == [2, 2, 2]
    got = evaluate(program, x=torch.ones(5, 3, 4), t=torch.zeros(5), c=torch.zeros(5, dtype=torch.int64))
    assert got.shape == (5, 3, 4)


def test_nested_conditions_are_named_by_dots() -> None:
    declared = loop(x="state", t="timestep", more="condition")
    program = capture(Denoiser(), {"x": X, "t": T, "more": {"text": [torch.ones(2, 4)]}}, declared)
    assert [i.name for i in program.inputs] == ["x", "t", "more.text.0"]
    assert program.inputs[2].role == "condition"


def test_constants_are_baked_in() -> None:
    declared = loop(x="state", t="timestep", table="constant")
    table = torch.arange(12.0).reshape(3, 4)
    program = capture(Denoiser(), {"x": X, "t": T, "table": table, "scale": 2.0}, declared)
    assert [i.name for i in program.inputs] == ["x", "t"]
    assert program.constants["scale"] == 2.0 and torch.equal(program.constants["table"], table)
    got = evaluate(program, x=torch.ones(3, 3, 4), t=torch.zeros(3))
    np.testing.assert_array_equal(got, np.broadcast_to(2 + table.numpy(), (3, 3, 4)))


def test_a_constant_with_two_rows_is_no_batch() -> None:
    declared = loop(x="state", t="timestep", table="constant")
    program = capture(Denoiser(), {"x": X[:, :3], "t": T, "table": torch.ones(1, 3, 4).expand(2, 3, 4)[0]}, declared)
    assert evaluate(program, x=torch.ones(4, 3, 4), t=torch.zeros(4)).shape == (4, 3, 4)


def test_learned_variance_is_cut_off(captured: Captured) -> None:
    """DiT and PixArt return twice the channels."""
    program = captured(zoo.DIT)
    kwargs = zoo.DIT.kwargs(3)
    wanted = zoo.DIT.call(zoo.DIT.build(), kwargs)
    assert wanted.shape == (3, 8, 8, 8)
    got = evaluate(program, **kwargs)
    np.testing.assert_allclose(got, wanted[:, :4].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "latent", "kept"),
    [((2, 8, 4), (4, 4), (2, 4, 4)), ((2, 4, 8), (4, 4), (2, 4, 4)), ((2, 4, 4), (4, 4), (2, 4, 4))],
)
def test_prediction_is_the_first_half(sizes: tuple[int, ...], latent: tuple[int, ...], kept: tuple[int, ...]) -> None:
    output = torch.randn(sizes)
    assert torch.equal(prediction(output, latent), output[tuple(slice(size) for size in kept)])


@pytest.mark.slow
def test_an_output_gets_a_name_no_input_has(captured: Captured) -> None:
    program = captured(zoo.UNET)
    assert "sample" in {i.name for i in program.inputs} and program.outputs == ("sample_output",)


def test_outputs_of_a_component_keep_their_names(captured: Captured) -> None:
    program = captured(zoo.CLIP_TEXT)
    assert program.outputs == ("last_hidden_state", "pooler_output")
    assert program.loop is None and program.step.name == "forward"


def test_paths_are_those_of_the_model(captured: Captured) -> None:
    program = captured(zoo.DIT)
    assert "transformer_blocks.0.attn1.to_q.weight" in program.step.tensors()
    stacks = [node.meta.get("nn_module_stack") or {} for node in program.step.graph.graph.nodes]
    assert "transformer_blocks.0.attn1" in {path for stack in stacks for path, _ in stack.values()}


def test_weights_are_shared_with_the_model() -> None:
    model = zoo.DIT.build()
    program = capture(model, zoo.DIT.kwargs(2), zoo.DIT.loop())
    weight = program.step.tensors()["transformer_blocks.0.attn1.to_q.weight"]
    assert weight.data_ptr() == model.transformer_blocks[0].attn1.to_q.weight.data_ptr()  # type: ignore[union-attr]


def test_the_hash_covers_scalars() -> None:
    model = torch.nn.Module()
    model.register_buffer("scale", torch.tensor(2.0))
    before = weights_hash(model)
    model.scale += 1  # type: ignore[operator]
    assert weights_hash(model) != before


REFUSED: dict[str, tuple[dict[str, object], LoopSpec, type[Exception], str]] = {
    "undeclared": (
        {"x": X, "t": T, "c": C},
        loop(x="state", t="timestep"),
        UsageError,
        "input 'c' is a tensor without a role. Add `c: condition`",
    ),
    "absent": ({"x": X, "t": T}, LOOP, UsageError, "input 'c' of the loop has no example tensor"),
    "without_batch": (
        {"x": X, "t": T, "c": torch.tensor([1, 2, 3])},
        LOOP,
        UsageError,
        r"input 'c' has shape \[3\]; expected a leading batch of 2",
    ),
    "latent_shape": (
        {"x": X[:, :2], "t": T, "c": C},
        LOOP,
        UsageError,
        r"latent.shape of the loop is \[3, 4\], but the model returns \[2, 4\]",
    ),
    "not_called_so": ({"x": X[0], "t": T, "c": C}, LOOP, UsageError, "expected a leading batch of 3"),
    "refused_by_export": (
        {"x": X, "t": torch.ones(2, 7), "c": C},
        LOOP,
        UsageError,
        r"Denoiser: .* called with x \[2, 3, 4\] float32, t \[2, 7\] float32, c \[2\] int64, and fails: RuntimeError",
    ),
    "label_outside": (
        {"x": X, "t": T, "c": torch.tensor([1, 5])},
        LOOP,
        UsageError,
        "input 'c': expected indices from 0 to 4 in the example; received 1 to 5",
    ),
    "unconditional_outside": (
        {"x": X, "t": T, "c": C},
        guided(5),
        UsageError,
        r"guidance\.unconditional\.c: expected an index from 0 to 4; received 5",
    ),
    "unconditional_fraction": (
        {"x": X, "t": T, "c": C},
        guided(1.5),
        UsageError,
        r"guidance\.unconditional\.c: expected a whole number; received 1\.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    kwargs, declared, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        capture(Denoiser(), kwargs, declared)


class Component(torch.nn.Module):
    """t as a scheduler gives it, or one for each row; the mode `rows` makes something else of that."""

    def __init__(self, rows: bool = False):
        super().__init__()
        self.rows = rows

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + (t.sum() if self.rows else torch.atleast_1d(t)[:, None, None])


def test_a_timestep_without_dimensions_gets_a_row_for_each_sample() -> None:
    program = capture(Component(), {"x": X, "t": torch.tensor(3.0)})
    assert [(i.name, i.port.shape) for i in program.inputs] == [("x", (None, 3, 4)), ("t", (None,))]
    np.testing.assert_array_equal(evaluate(program, x=X, t=torch.tensor([3.0, 3.0])), (X + 3).numpy())


def test_a_number_that_is_none_of_a_sample_is_refused() -> None:
    with pytest.raises(UsageError, match=r"input 't': expected a tensor with a leading batch; .* Give it as a number"):
        capture(Component(rows=True), {"x": X, "t": torch.tensor(3.0)})


def test_no_tensor_at_all() -> None:
    with pytest.raises(UsageError, match="expected an example tensor with a leading batch"):
        capture(Denoiser(), {"scale": 2.0})


class Refused(torch.nn.Module):
    """Runs, but chooses by a value, which export refuses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x.sum()) > 0 else x


def test_what_export_refuses_is_no_fault_of_the_inputs() -> None:
    with pytest.raises(StepfoldError, match=r"Refused: torch\.export could not capture this model: ") as caught:
        capture(Refused(), {"x": X})
    assert not isinstance(caught.value, UsageError)


class FixedBatch(torch.nn.Module):
    """Reshapes to a batch of two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 12) + 1


def test_a_fixed_batch_is_refused() -> None:
    with pytest.raises(StepfoldError, match="the model fixes its batch"):
        capture(FixedBatch(), {"x": X})


def test_a_fixed_batch_leaves_no_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StepfoldError):
        capture(FixedBatch(), {"x": X})
    assert not [record for record in caplog.records if record.name == "torch._subclasses.fake_tensor"]


# -- numbers for all samples


class Shifted(torch.nn.Module):
    """x [B, 4] and a number t, or one for each row, as diffusers networks take a timestep."""

    def __init__(self, way: str = "expanded"):
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.way == "another":
            return x * t.sum()
        if self.way == "refused":
            raise ValueError("x has 4 values; this network takes 5")
        return x + (t[None] if t.ndim == 0 else t).expand(x.shape[0])[:, None]


def test_a_number_has_a_row_for_each_sample() -> None:
    x, t = torch.randn(3, 4), torch.tensor(7.0)
    program = capture(Shifted(), {"x": x, "t": t})
    assert [str(port.port) for port in program.inputs] == ["x [B, 4] float32", "t [B] float32"]
    np.testing.assert_allclose(evaluate(program, x=x, t=t.expand(3)), Shifted()(x, t).numpy())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("another", "input 't': expected a tensor with a leading batch; .* Give it as a number, which is baked in"),
        ("refused", "x has 4 values; this network takes 5"),
    ],
)
def test_a_number_that_no_row_stands_for(way: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(Shifted(way), {"x": torch.randn(3, 4), "t": torch.tensor(7.0)})


BLOCKS = {
    "in_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "ControlNetModel"])
def test_networks_that_take_one_timestep(name: str) -> None:
    import diffusers

    torch.manual_seed(0)
    arguments = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7)}
    arguments["encoder_hidden_states"] = torch.randn(2, 5, 16)
    if name == "ControlNetModel":
        model = diffusers.ControlNetModel(**BLOCKS, conditioning_embedding_out_channels=(8, 16))
        arguments["controlnet_cond"] = torch.randn(2, 3, 16, 16)
        output = "mid_block_res_sample"
    else:
        up = ("UpBlock2D", "CrossAttnUpBlock2D")
        model = diffusers.UNet2DConditionModel(sample_size=8, out_channels=4, up_block_types=up, **BLOCKS)
        output = "sample"
    program = capture(model, arguments)
    with torch.no_grad():
        wanted = getattr(model(**arguments), output).numpy()
    rows = arguments | {"timestep": torch.tensor([7, 7])}
    received = program.bind().evaluate({key: value.numpy() for key, value in rows.items()})
    place = next(i for i, found in enumerate(program.outputs) if found.startswith(output))
    np.testing.assert_allclose(received[place], wanted, atol=1e-5)


def test_tensors_inside_of_tuples_are_outputs() -> None:
    """CLIP with all of its hidden states, which Stable Diffusion XL and 3 read."""
    model = zoo.CLIP_TEXT.build().eval()
    ids = torch.randint(0, 50, (2, 6))
    program = capture(model, {"input_ids": ids, "output_hidden_states": True})
    with torch.no_grad():
        wanted = model(input_ids=ids, output_hidden_states=True)
    count = len(wanted.hidden_states)
    assert program.outputs[2:] == tuple(f"hidden_states.{i}" for i in range(count)) and count > 2
    received = dict(zip(program.outputs, program.bind().evaluate({"input_ids": ids.numpy()}), strict=True))
    for i, value in enumerate(wanted.hidden_states):
        torch.testing.assert_close(torch.from_numpy(received[f"hidden_states.{i}"]), value, rtol=1e-4, atol=1e-5)


class Cache:
    """What a model returns, and nobody can look into."""


class Remembering(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": x + 1, "past": Cache()}


def test_an_object_among_the_outputs_is_refused() -> None:
    with pytest.raises(
        UsageError, match="output past: expected tensors, or tuples, lists and mappings of them; received Cache"
    ):
        capture(Remembering(), {"x": torch.randn(2, 3)})
