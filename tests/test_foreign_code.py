"""Code and commands planted in every file that a user may get from others: nothing of it runs, nothing is written.

Each case makes a file that would write the marker, or another file, if what it holds were run or believed.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from calibrated import calibrated, standard
from checkpoints import LOOP, save_tiny_dit
from folders import edit_config, hashes

from stepfold.bundle import Manifest, write_manifest
from stepfold.cli import main

MARKER = "ran"
Words = Sequence[object]
Plant = Callable[[Path], Words]
"""Writes the files of a case into a folder, where a bundle lies, and returns the words of a command that reads them."""


class Pickled:
    """Unpickling it writes the marker."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.folder / MARKER, "ran")


def code(folder: Path) -> str:
    """Python that writes the marker."""
    return f"from pathlib import Path\nPath({str(folder / MARKER)!r}).write_text('ran')\n"


def yaml_code(folder: Path) -> str:
    """YAML that writes the marker where tags are believed."""
    return (
        f"!!python/object/apply:pathlib.Path.write_text [!!python/object/apply:pathlib.Path [{folder / MARKER}], ran]"
    )


def language_model(folder: Path, **component: Any) -> Path:
    """A folder of a tiny transformers model that generates, with a `loop.yaml` that says what to call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    inputs = {"input_ids": {"role": "condition", "shape": [8], "dtype": "int64"}}
    (folder / "loop.yaml").write_text(yaml.safe_dump({"component": {}, "inputs": inputs, **component}))
    return folder


def custom_generate(folder: Path) -> Words:
    """The way in that ran a checkpoint's Python under `inspect`."""
    place = folder / "model" / "custom_generate"
    place.mkdir(parents=True)
    (place / "generate.py").write_text(code(folder) + "def generate(model, input_ids, **more): return input_ids\n")
    constants = {"custom_generate": str(folder / "model"), "trust_remote_code": True}
    return "inspect", language_model(folder / "model", component={"method": "generate"}, constants=constants)


def saving_method(method: str) -> Plant:
    def plant(folder: Path) -> Words:
        model = save_tiny_dit(folder / "model")
        inputs = {"x": {"role": "condition", "shape": [1], "dtype": "float32"}}
        document = {"component": {"method": method}, "inputs": inputs}
        constants = {"save_directory": str(folder / "written")}
        (model / "loop.yaml").write_text(yaml.safe_dump(document | {"constants": constants}))
        return "inspect", model

    return plant


def model_code(folder: Path) -> Words:
    """`auto_map` names a class in a file beside it, which is not the class of the library then."""
    model = language_model(folder / "model")
    (model / "modeling_evil.py").write_text(code(folder) + "class Evil: pass\n")
    edit_config(model, architectures=["Evil"], auto_map={"AutoModel": "modeling_evil.Evil"})
    return "inspect", model


def kernel(folder: Path) -> Words:
    model = language_model(folder / "model")
    edit_config(model, attn_implementation="someone/kernel")
    return "inspect", model


def pickled_weights(folder: Path) -> Words:
    model = save_tiny_dit(folder / "model")
    (model / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(Pickled(folder), model / "diffusion_pytorch_model.bin")
    return "inspect", model


def loop_tags(folder: Path) -> Words:
    model = save_tiny_dit(folder / "model")
    (model / "loop.yaml").write_text(yaml.safe_dump(LOOP) + f"constants: {{x: {yaml_code(folder)}}}\n")
    return "inspect", model


def loop_scheduler(folder: Path) -> Words:
    """A name of diffusers that is no scheduler, and an argument that is code to whoever evaluates it."""
    model = save_tiny_dit(folder / "model")
    sampler = LOOP["sampler"] | {
        "scheduler": "os",
        "set_timesteps": {"sigmas": f"__import__('os').mkdir('{folder}/w')"},
    }
    (model / "loop.yaml").write_text(yaml.safe_dump(LOOP | {"sampler": sampler}))
    return "inspect", model


def recipe_tags(folder: Path) -> Words:
    (folder / "recipe.yaml").write_text(f"name: x\npasses:\n  - {yaml_code(folder)}\n")
    return "optimize", save_tiny_dit(folder / "model"), "--out", folder / "out", "--recipe", folder / "recipe.yaml"


def option_tags(folder: Path) -> Words:
    option = f"schedule.evaluations={yaml_code(folder)}"
    return "optimize", save_tiny_dit(folder / "model"), "--out", folder / "out", "--set", option


def pickled_noise(folder: Path) -> Words:
    np.save(folder / "noise.npy", np.array([Pickled(folder)], object), allow_pickle=True)
    words = "generate", save_tiny_dit(folder / "model"), "--npy", folder / "out.npy"
    return *words, "--noise", folder / "noise.npy"


def pickled_inputs(folder: Path) -> Words:
    model = save_tiny_dit(folder / "model")
    (model / "inputs.safetensors").write_bytes(pickle.dumps(Pickled(folder)))
    return "inspect", model


def pickled_statistics(folder: Path) -> Words:
    calibrated(standard(), folder / "store", 1)
    data = io.BytesIO()
    np.save(data, np.array([Pickled(folder)], object), allow_pickle=True)
    (folder / "store" / "statistics.safetensors").write_bytes(data.getvalue())
    return "inspect", folder / "store"


def report_of_code(folder: Path) -> Words:
    """A report is JSON and gets no farther than that."""
    (folder / "report.json").write_bytes(pickle.dumps(Pickled(folder)))
    return "compare", folder / "report.json", folder / "report.json"


def bundle(folder: Path, change: Callable[[Path, dict[str, Any]], object]) -> Path:
    """A bundle with right digests behind a change of its files and of its manifest."""
    made = folder / "bundle"
    document = json.loads((made / "manifest.json").read_text())
    change(made, document)
    write_manifest(made, Manifest.model_validate(document))
    return made


def pickled_tables(folder: Path) -> Words:
    def change(made: Path, document: dict[str, Any]) -> None:
        (made / "tables.safetensors").write_bytes(pickle.dumps(Pickled(folder)))

    return "generate", bundle(folder, change), "--npy", folder / "out.npy"


def native_code(folder: Path) -> Words:
    """A stage that the system's loader would run as soon as it is opened, had it the form of an object."""

    def change(made: Path, document: dict[str, Any]) -> None:
        (made / "stages" / "step.onnx").write_bytes(b"\x7fELF")
        document["backend"] |= {"name": "inductor", "options": {}}

    return "generate", bundle(folder, change), "--npy", folder / "out.npy"


def tokenizer_code(folder: Path) -> Words:
    """A tokenizer that is a pickle, as those of some libraries are."""

    def change(made: Path, document: dict[str, Any]) -> None:
        (made / "tokenizer.json").write_bytes(pickle.dumps(Pickled(folder)))
        tokenizers = [{"input": "input_ids", "file": "tokenizer.json"}]
        document["pipeline"] = {"class": "TinyPipeline", "tokenizers": tokenizers}

    return "generate", bundle(folder, change), "--npy", folder / "out.npy", "--prompt", "a"


def added_weights(folder: Path) -> Words:
    made = folder / "bundle"
    (made / "stages" / "step.bin").write_bytes(bytes(16))
    return "generate", made, "--npy", folder / "out.npy"


PLANTS: dict[str, Plant] = {
    "custom_generate": custom_generate,
    "save_config": saving_method("save_config"),
    "save_pretrained": saving_method("save_pretrained"),
    "model_code": model_code,
    "kernel": kernel,
    "pickled_weights": pickled_weights,
    "loop_tags": loop_tags,
    "loop_scheduler": loop_scheduler,
    "recipe_tags": recipe_tags,
    "option_tags": option_tags,
    "pickled_noise": pickled_noise,
    "pickled_inputs": pickled_inputs,
    "pickled_statistics": pickled_statistics,
    "report_of_code": report_of_code,
    "pickled_tables": pickled_tables,
    "native_code": native_code,
    "tokenizer_code": tokenizer_code,
    "added_weights": added_weights,
}


@pytest.mark.parametrize("name", PLANTS)
def test_nothing_is_run_and_nothing_is_written(
    name: str,
    read_only_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(read_only_bundle, tmp_path / "bundle")
    words = [str(word) for word in PLANTS[name](tmp_path)]
    monkeypatch.chdir(tmp_path)
    before = hashes(tmp_path)
    capsys.readouterr()
    assert main(words) in (1, 2)
    assert hashes(tmp_path) == before
    assert capsys.readouterr().err.startswith("error: ")
