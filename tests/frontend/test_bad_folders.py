"""Checkpoint folders that are refused with one clear line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from folders import WEIGHTS, edit_config
from safetensors.torch import load_file, save_file

from stepfold.frontend.load import load_checkpoint
from stepfold.loop.errors import UsageError

Edit = Callable[[Path], object]


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder: Path, size: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])


def edit_loop(folder: Path, **changes: object) -> None:
    document = yaml.safe_load((folder / "loop.yaml").read_text()) | changes
    (folder / "loop.yaml").write_text(yaml.safe_dump(document))


def edit_sampler(folder: Path, **changes: object) -> None:
    edit_loop(folder, sampler=yaml.safe_load((folder / "loop.yaml").read_text())["sampler"] | changes)


def shard(folder: Path, names: dict[str, str]) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


PROJECTION = "proj_out_2.weight"
BAD: dict[str, tuple[Edit, str]] = {
    "no_config": (
        lambda f: (f / "config.json").unlink(),
        "config.json: expected the JSON of a model; there is no such file. A checkpoint is a diffusers or transformers folder",
    ),
    "config_not_json": (
        lambda f: (f / "config.json").write_text("{a"),
        "config.json: expected the JSON of a model; received no usable JSON",
    ),
    "config_a_list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object; received list"),
    "config_binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "expected the JSON of a model; received bytes that are no UTF-8 text",
    ),
    "no_class": (lambda f: edit_config(f, _class_name=None), "names no model class"),
    "class_misspelled": (
        lambda f: edit_config(f, _class_name="DiTTransformer2DModle"),
        "no model class 'DiTTransformer2DModle'; did you mean 'DiTTransformer2DModel'?",
    ),
    "class_a_pipeline": (lambda f: edit_config(f, _class_name="DiTPipeline"), "no model class 'DiTPipeline'"),
    "class_a_path": (lambda f: edit_config(f, _class_name="os.system"), "no model class 'os.system'"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "the weights are quantized"),
    "a_number_that_is_text": (lambda f: edit_config(f, norm_eps="tiny"), "and fails: TypeError: layer_norm"),
    "negative": (lambda f: edit_config(f, sample_size=-8), "sample_size: expected a size of 0 or more; received -8"),
    "config_value": (lambda f: edit_config(f, num_layers="two"), "DiTTransformer2DModel cannot be built from it"),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), "no weights; expected diffusion_pytorch_model.safetensors"),
    "pickled": (
        lambda f: (f / WEIGHTS).rename(f / "diffusion_pytorch_model.bin"),
        r"pickled \(diffusion_pytorch_model.bin\), and loading them can run any code; .* convert it once: python -c",
    ),
    "truncated_header": (lambda f: truncate(f, 100), "damaged or truncated: 100 bytes with a header of"),
    "truncated_data": (lambda f: truncate(f, 50_000), "damaged or truncated: its tensors have .* bytes; received"),
    "empty_weights": (lambda f: truncate(f, 0), "damaged or truncated: 0 bytes"),
    "missing_weight": (
        lambda f: edit_weights(f, lambda w: w.pop(PROJECTION)),
        f"do not fit DiTTransformer2DModel as config.json describes it: 1 missing from the files: {PROJECTION}",
    ),
    "unexpected_weight": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))),
        "1 unknown to the model: extra",
    ),
    "wrong_shape": (
        lambda f: edit_weights(f, lambda w: w.update({PROJECTION: torch.zeros(3, 3)})),
        r"1 of another shape: proj_out_2.weight \(file \[3, 3\], config \[32, 32\]\)",
    ),
    "config_of_another_model": (lambda f: edit_config(f, num_layers=3), "missing from the files: transformer_blocks.2"),
    "weights_in_a_pipe": (
        lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)),
        "expected a whole safetensors file of weights; received a pipe",
    ),
    "many_layers": (
        lambda f: edit_config(f, num_layers=10**7),
        "num_layers: expected at most 1000, as the files hold .* weights of .* values; received 10000000",
    ),
    "many_classes": (
        lambda f: edit_config(f, num_embeds_ada_norm=10**7),
        r"do not fit DiTTransformer2DModel .* of another shape: .*embedding_table.weight \(file \[\d+, ",
    ),
    "wide_heads": (
        lambda f: edit_config(f, attention_head_dim=10**9),
        "attention_head_dim: expected at most .* values; received 1000000000",
    ),
    "many_blocks": (
        lambda f: edit_config(f, block_out_channels=[8] * 100_000),
        "block_out_channels: expected at most 1000, .* received 100000",
    ),
    "an_activation": (
        lambda f: edit_config(f, activation_fn="nope"),
        "DiTTransformer2DModel cannot be built from it: UnboundLocalError",
    ),
    "weights_as_integers": (
        lambda f: edit_weights(f, lambda w: w.update({PROJECTION: w[PROJECTION].int()})),
        f"{PROJECTION}: expected one of F32, .*; received I32",
    ),
    "missing_shard": (
        lambda f: ((f / WEIGHTS).unlink(), shard(f, {"a": "b.safetensors"})),
        "b.safetensors: this shard is missing",
    ),
    "shard_outside": (lambda f: shard(f, {"a": "../b.safetensors"}), "expected names of safetensors files beside it"),
    "index_damaged": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"),
        "index.json: expected a safetensors index with a `weight_map`; received None",
    ),
    "no_loop": (lambda f: (f / "loop.yaml").unlink(), "inputs: {hidden_states: state, timestep: timestep"),
    "condition_without_shape": (
        lambda f: edit_loop(
            f,
            inputs={"hidden_states": "state", "timestep": "timestep", "cross_attention_kwargs": "condition"},
            guidance=None,
        ),
        r"input 'cross_attention_kwargs' has no shape. Add it to loop.yaml, without the batch:\n  inputs: {cross_attention_kwargs: {role: condition",
    ),
    "unknown_dtype": (
        lambda f: edit_loop(
            f,
            inputs={
                "hidden_states": "state",
                "timestep": "timestep",
                "class_labels": {"role": "condition", "shape": [], "dtype": "int65"},
            },
        ),
        "unknown dtype 'int65' of a condition; expected one of float32",
    ),
    "constant_without_value": (
        lambda f: edit_loop(
            f,
            inputs={"hidden_states": "state", "timestep": "timestep", "class_labels": {"role": "constant"}},
            guidance=None,
        ),
        "input 'class_labels' is constant, but has no value",
    ),
    "component_method": (
        lambda f: (f / "loop.yaml").write_text("component: {method: decode}"),
        "component.method: expected one of forward of DiTTransformer2DModel; received 'decode'",
    ),
    "kernels_from_elsewhere": (
        lambda f: edit_config(f, attn_implementation="someone/kernel"),
        "config.json: attn_implementation: expected eager or sdpa; received 'someone/kernel', which names code",
    ),
    "kernels_of_a_part": (
        lambda f: edit_config(f, vision_config={"_attn_implementation": {"": "someone/kernel"}}),
        "config.json: _attn_implementation: expected eager or sdpa; received",
    ),
    "constant_that_runs_code": (
        lambda f: edit_loop(f, constants={"trust_remote_code": True}),
        "constants.trust_remote_code: expected an argument .*; received one that names code or a file",
    ),
    "constant_with_a_path": (
        lambda f: edit_loop(f, constants={"more": {"kind": ["word", "../evil"]}}),
        "constants.more.kind: expected a number, a switch or a word; received '../evil'",
    ),
    "constant_with_a_file": (
        lambda f: edit_loop(f, constants={"kind": "evil.py"}),
        "constants.kind: expected a number, a switch or a word; received 'evil.py'",
    ),
    "input_that_names_code": (
        lambda f: edit_loop(
            f, inputs={"hidden_states": "state", "timestep": "timestep", "x.custom_code": "constant"}, guidance=None
        ),
        "constants.x.custom_code: expected an argument that is a number",
    ),
    "no_argument": (
        lambda f: edit_loop(f, constants={"nope": 1}),
        "'nope' is no argument of DiTTransformer2DModel.forward; valid: class_labels",
    ),
    "arguments_that_clash": (
        lambda f: edit_loop(f, constants={"added_cond_kwargs": 1, "added_cond_kwargs.a": 2}),
        "no argument of DiT|expected an argument, or one nested in it",
    ),
    "a_constant_that_is_text": (
        lambda f: edit_loop(
            f,
            inputs={"hidden_states": "state", "timestep": "timestep", "class_labels": {"role": "constant"}},
            constants={"class_labels": "abc"},
            guidance=None,
        ),
        "constants.class_labels: expected numbers; received 'abc'",
    ),
    "a_large_training_grid": (
        lambda f: edit_sampler(f, config={"num_train_timesteps": 10**12}),
        "sampler.config.num_train_timesteps: expected at most 1000000; received 1000000000000",
    ),
    "another_size_than_the_configuration": (
        lambda f: edit_loop(f, latent={"shape": [1, 16, 16]}),
        "latent.shape: expected 8 x 8 values, the sample_size of .*config.json; received 16 x 16. Correct the loop",
    ),
    "a_grid_of_many_calls": (
        lambda f: edit_sampler(f, steps=1999, set_timesteps={"sigmas": [i / 5000 for i in range(5000, 0, -1)]}),
        "sampler.set_timesteps: expected at most 4000 calls of the denoiser; .* makes 4999",
    ),
    "a_grid_without_steps": (
        lambda f: edit_sampler(f, set_timesteps={"sigmas": [1.0] * 8}),
        "expected a grid of .* that goes from noise to sample; received",
    ),
    "labels_that_are_fractions": (
        lambda f: save_file({"class_labels": torch.zeros(2)}, f / "inputs.safetensors"),
        r"it was called with .*class_labels \[2\] float32, and fails: RuntimeError: .* Correct loop.yaml",
    ),
    "foreign_input": (
        lambda f: save_file({"classlabels": torch.zeros(2)}, f / "inputs.safetensors"),
        "'classlabels' is no input of the model; did you mean 'class_labels'?",
    ),
    "input_without_batch": (
        lambda f: save_file({"class_labels": torch.tensor(1)}, f / "inputs.safetensors"),
        r"'class_labels' has shape \[\]; expected a leading batch",
    ),
    "inputs_that_clash": (
        lambda f: save_file(
            {"class_labels": torch.zeros(2), "class_labels.x": torch.zeros(2)}, f / "inputs.safetensors"
        ),
        "expected arguments, or tensors nested in them; received 'class_labels'",
    ),
    "rows_that_differ": (
        lambda f: save_file({"class_labels": torch.arange(3), "timestep": torch.ones(4)}, f / "inputs.safetensors"),
        "expected as many rows in each tensor, or one that serves all; received class_labels 3, timestep 4",
    ),
    "inputs_damaged": (
        lambda f: (f / "inputs.safetensors").write_bytes(b"{}"),
        "expected a safetensors file of example inputs; it is damaged",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folder(name: str, folder: Path) -> None:
    edit, message = BAD[name]
    edit(folder)
    with pytest.raises(UsageError, match=message):
        load_checkpoint(folder).capture()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere")


def test_missing_inputs_file(folder: Path) -> None:
    with pytest.raises(UsageError, match="expected a safetensors file of example inputs; there is no such file"):
        load_checkpoint(folder, inputs=folder / "absent.safetensors")
