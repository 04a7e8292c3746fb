"""Checkpoint folders that load: names, roles, example inputs, precisions, components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zoo
from folders import WEIGHTS, edit_config
from safetensors.torch import load_file, save_file
from zoo import EACH, ZooModel

from stepfold.calibration.conditions import sample_request
from stepfold.frontend.calling import flatten
from stepfold.frontend.load import load_checkpoint
from stepfold.ir.probe import ROWS, probe_inputs
from stepfold.loop.errors import UsageError
from stepfold.loop.noise import SampleSet


@pytest.mark.parametrize("model", EACH)
def test_every_zoo_folder_loads(model: ZooModel, tmp_path: Path) -> None:
    """Names, roles and example inputs; and the loaded model, tables computed in its constructor included, is equal."""
    checkpoint = load_checkpoint(model.save(tmp_path / "saved"))
    assert checkpoint.class_name == model.class_name and checkpoint.method == model.method
    assert (checkpoint.loop is not None) == model.is_loop
    wanted, _ = flatten(model.kwargs(2))
    got, _ = flatten(checkpoint.kwargs)
    assert {name: (value.shape, value.dtype) for name, value in got.items()} == {
        name: (value.shape, value.dtype) for name, value in wanted.items()
    }
    kwargs = model.kwargs(2)
    torch.testing.assert_close(
        model.call(checkpoint.model, kwargs), model.call(model.build(), kwargs), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(zoo.SD3.save(tmp_path / "sd3", dtype))
    stored = zoo.SD3.build().to(dtype).float()
    for name, tensor in checkpoint.model.state_dict().items():
        assert tensor.dtype == torch.float32, name
        torch.testing.assert_close(tensor, stored.state_dict()[name], rtol=0, atol=0, msg=name)


def test_sharded_weights(tmp_path: Path) -> None:
    zoo.SD3.build().save_pretrained(tmp_path / "shards", max_shard_size="60KB")  # type: ignore[operator]
    (tmp_path / "shards" / "loop.yaml").write_text(yaml.safe_dump(zoo.SD3.document))
    whole = load_checkpoint(zoo.SD3.save(tmp_path / "whole"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert load_checkpoint(tmp_path / "shards").weights_sha256 == whole.weights_sha256


def test_variant_files(folder: Path) -> None:
    whole = load_checkpoint(folder).weights_sha256
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert load_checkpoint(folder).weights_sha256 == whole


def test_the_hash_follows_the_weights(folder: Path) -> None:
    before = load_checkpoint(folder).weights_sha256
    weights = load_file(folder / WEIGHTS)
    next(iter(weights.values())).flatten()[0] += 1
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert load_checkpoint(folder).weights_sha256 != before


def test_a_checkpoint_captures(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    program = checkpoint.capture()
    assert program.model.class_name == "DiTTransformer2DModel"
    assert program.model.weights_sha256 == checkpoint.weights_sha256
    assert program.recurrence is not None and program.recurrence.calls == 8


def test_example_inputs_from_a_file(tmp_path: Path) -> None:
    folder = zoo.SD3.save(tmp_path / "sd3")
    document = yaml.safe_load((folder / "loop.yaml").read_text())
    document["inputs"]["pooled_projections"] = "condition"
    (folder / "loop.yaml").write_text(yaml.safe_dump(document))
    save_file({"pooled_projections": torch.full((1, 20), 3.0)}, tmp_path / "inputs.safetensors")
    kwargs = load_checkpoint(folder, inputs=tmp_path / "inputs.safetensors").kwargs
    assert torch.equal(kwargs["pooled_projections"], torch.full((2, 20), 3.0))


def test_nested_example_inputs(tmp_path: Path) -> None:
    """`a.b` becomes a dictionary, `a.0` a list."""
    folder = zoo.UNET.save(tmp_path / "unet")
    document = yaml.safe_load((folder / "loop.yaml").read_text())
    document["inputs"] |= {"added_cond_kwargs.text_embeds": "condition", "down_block_additional_residuals": "condition"}
    (folder / "loop.yaml").write_text(yaml.safe_dump(document))
    residuals = {f"down_block_additional_residuals.{i}": torch.randn(2, 16, 8, 8) for i in range(2)}
    save_file({"added_cond_kwargs.text_embeds": torch.randn(2, 5)} | residuals, folder / "inputs.safetensors")
    kwargs = load_checkpoint(folder).kwargs
    assert kwargs["added_cond_kwargs"]["text_embeds"].shape == (2, 5)
    assert [tensor.shape for tensor in kwargs["down_block_additional_residuals"]] == [(2, 16, 8, 8)] * 2


def test_constants_may_be_written_out(tmp_path: Path) -> None:
    folder = zoo.FLUX.save(tmp_path / "flux")
    (folder / "inputs.safetensors").unlink()
    document = yaml.safe_load((folder / "loop.yaml").read_text())
    document["constants"] = {name: value.tolist() for name, value in zoo.FLUX.constants.items()}
    (folder / "loop.yaml").write_text(yaml.safe_dump(document))
    assert torch.equal(load_checkpoint(folder).kwargs["img_ids"], zoo.FLUX.constants["img_ids"])


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """A transformers model outside the table."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def test_unknown_text_encoder(roberta: Path) -> None:
    """The error shows what to give and the component file to write."""
    with pytest.raises(UsageError, match=r"(?s)RobertaModel.*--inputs FILE.*component: \{method: forward\}.*input_ids"):
        load_checkpoint(roberta)


def test_given_inputs_say_how_a_transformers_model_is_called(roberta: Path) -> None:
    tokens = {"input_ids": torch.randint(2, 8, (5, 7)), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}
    save_file(tokens, roberta / "inputs.safetensors")
    kwargs = load_checkpoint(roberta).kwargs
    assert kwargs.keys() == tokens.keys()
    assert torch.equal(kwargs["input_ids"], tokens["input_ids"])
    assert torch.equal(kwargs["attention_mask"], torch.ones(5, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("input_ids", "attention_masks"),
            "'attention_masks' is no input of RobertaModel; did you mean 'attention_mask'?",
        ),
        (("attention_mask",), "expected 'input_ids' of RobertaModel among them; received attention_mask"),
    ],
)
def test_inputs_that_a_transformers_model_lacks(roberta: Path, names: tuple[str, ...], message: str) -> None:
    save_file({name: torch.ones(2, 7, dtype=torch.int64) for name in names}, roberta / "inputs.safetensors")
    with pytest.raises(UsageError, match=message):
        load_checkpoint(roberta)


def test_made_up_example_inputs_of_a_component_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = zoo.BERT.save(tmp_path / "bert")
    load_checkpoint(folder)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "--inputs FILE" in caplog.text
    caplog.clear()
    save_file({"input_ids": torch.ones(1, 5, dtype=torch.int64)}, folder / "inputs.safetensors")
    assert load_checkpoint(folder).kwargs["input_ids"].shape == (2, 5) and not caplog.records


@pytest.mark.slow
def test_every_row_of_the_inputs_is_an_example(tmp_path: Path) -> None:
    """The values that are made up have as many rows; what the program is probed with has no more than it needs."""
    folder = zoo.SD3.save(tmp_path / "sd3")
    given = {"pooled_projections": torch.randn(20, 20), "encoder_hidden_states": torch.randn(1, 6, 24)}
    save_file(given, folder / "inputs.safetensors")
    checkpoint = load_checkpoint(folder)
    assert {name: len(value) for name, value in checkpoint.kwargs.items()} == dict.fromkeys(checkpoint.kwargs, 20)
    assert torch.equal(checkpoint.kwargs["pooled_projections"], given["pooled_projections"])
    program = checkpoint.capture()
    assert program.step.inputs[0].shape == (None, 4, 8, 8)
    requested = sample_request(program, SampleSet("calibration", 0, 21)).conditions["pooled_projections"]
    np.testing.assert_array_equal(requested, given["pooled_projections"][[*range(20), 0]])
    assert {len(value) for value in probe_inputs(program, 0).values()} == {ROWS}


def test_classes_of_many_rows_stay_valid(folder: Path) -> None:
    save_file({"timestep": torch.full((5,), 400.0)}, folder / "inputs.safetensors")
    assert load_checkpoint(folder).kwargs["class_labels"].tolist() == [0, 1, 0, 1, 0]


def test_transformers_class_misspelled(tmp_path: Path) -> None:
    folder = zoo.CLIP_TEXT.save(tmp_path / "clip")
    edit_config(folder, architectures=["CLIPTextModle"])
    with pytest.raises(
        UsageError, match=r"transformers has no model class 'CLIPTextModle'; did you mean 'CLIPTextModel'?"
    ):
        load_checkpoint(folder)


def test_transformers_weights_of_another_shape(tmp_path: Path) -> None:
    folder = zoo.CLIP_TEXT.save(tmp_path / "clip")
    edit_config(folder, intermediate_size=128)
    with pytest.raises(UsageError, match=r"the weights do not fit CLIPTextModel .* of another shape: .*fc1"):
        load_checkpoint(folder)
