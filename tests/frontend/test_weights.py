"""Files of weights: which of several are read, by what name, and what is left to whoever has pickles."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import WEIGHTS
from safetensors.torch import load_file, save_file

from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.weights import find_weights
from stepfold.loop.errors import UsageError

NAMES = {
    "plain": ("diffusion_pytorch_model.safetensors",),
    "half": ("diffusion_pytorch_model.fp16.safetensors",),
    "other": ("model.safetensors",),
    "sharded": (
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ),
    "half sharded": (
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    ),
}


def write(folder: Path, kind: str, shards: int = 2) -> None:
    """Files of one kind, with fewer shards than the index names where asked for."""
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3)}
    first, *parts = NAMES[kind]
    if not parts:
        save_file(tensors, folder / first)
        return
    for name, part in list(zip(tensors, parts, strict=True))[:shards]:
        save_file({name: tensors[name]}, folder / part)
    (folder / first).write_text(json.dumps({"weight_map": dict(zip(tensors, parts, strict=True))}))


@pytest.mark.parametrize(
    ("kinds", "read"),
    [
        (("plain", "half"), "plain"),
        (("sharded", "half"), "sharded"),
        (("sharded", "half sharded"), "sharded"),
        (("plain", "half sharded"), "plain"),
        (("sharded", "plain"), "sharded"),
        (("half sharded", "half"), "half sharded"),
        (("other",), "other"),
        (("other", "half"), "other"),
        (("half",), "half"),
    ],
)
def test_plain_weights_win_over_variants(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kinds: tuple[str, ...], read: str
) -> None:
    for kind in kinds:
        write(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        found = find_weights(tmp_path)
    names = tuple(name for name in NAMES[read] if name.endswith(".safetensors"))
    assert tuple(file.name for file in found.files) == names and found.entries.keys() == {"a", "b"}
    assert ("those of the variant fp16 are read" in caplog.text) == read.startswith("half")


@pytest.mark.parametrize("complete", ["plain", "half", "other"])
def test_an_index_without_its_shards_hides_nothing(tmp_path: Path, complete: str) -> None:
    write(tmp_path, "sharded", shards=1)
    with pytest.raises(UsageError, match=r"00002-of-00002\.safetensors: this shard is missing"):
        find_weights(tmp_path)
    write(tmp_path, complete)
    assert [file.name for file in find_weights(tmp_path).files] == list(NAMES[complete])


@pytest.mark.parametrize(
    "names", [["/etc/x.safetensors"], ["a\0.safetensors"], ["a" * 5000 + ".safetensors"], [5], ["a.bin"]]
)
def test_names_of_shards(tmp_path: Path, names: list[object]) -> None:
    (tmp_path / NAMES["sharded"][0]).write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    with pytest.raises(UsageError, match="expected names of safetensors files beside it"):
        find_weights(tmp_path)


def halve(folder: Path) -> None:
    """The weights under the name of a variant, and in its precision."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({name: value.half() for name, value in weights.items()}, folder / NAMES["half"][0], {"format": "pt"})


def rename(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / NAMES["other"][0])


@pytest.mark.parametrize("edit", [halve, rename])
def test_the_library_reads_what_was_found(folder: Path, edit: Callable[[Path], None]) -> None:
    before = load_checkpoint(folder).model.state_dict()
    edit(folder)
    (folder / NAMES["sharded"][0]).write_text(json.dumps({"weight_map": {"a": "nowhere.safetensors"}}))
    after = load_checkpoint(folder).model.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4)  # half precision has 11 bits


@pytest.mark.parametrize(("stem", "shell"), [("pytorch_model", True), ("diffusion_pytorch_model", False)])
def test_the_remedy_for_pickles_works_to_the_letter(tmp_path: Path, stem: str, shell: bool) -> None:
    """In a shell, and as the words between the double quotes, whatever signs of shells the folder is named with."""
    folder = tmp_path / 'it\'s a "model" of $HOME, `true` \\n!'
    folder.mkdir()
    value = torch.arange(3.0)
    torch.save({"a": value, "tied": value}, folder / f"{stem}.bin")
    torch.save({"step": 1}, folder / "training_state.bin")
    with pytest.raises(UsageError, match="pickled") as caught:
        find_weights(folder)
    remedy = str(caught.value).partition("convert it once: python -c ")[2]
    code = re.fullmatch('"([^"]*)"', remedy)
    assert code is not None
    command = ["sh", "-c", f"{shlex.quote(sys.executable)} -c {remedy}"] if shell else [sys.executable, "-c", code[1]]
    subprocess.run(command, check=True, timeout=120)
    assert find_weights(folder).entries.keys() == {"a", "tied"}
    assert find_weights(folder).files[0].name == f"{stem.removeprefix('pytorch_')}.safetensors"
