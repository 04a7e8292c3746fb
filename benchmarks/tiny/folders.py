"""Tiny pipeline folders of published checkpoints: their configurations made small, random weights, tokenizers of letters.

A checkpoint is a file of JSON:

    found: for each configuration that is public as it stands, where it was found; the others are written after the
        checkpoint's card and the defaults of the class
    model_index: `model_index.json`, every key kept
    components: the configuration of each component, every key kept; of a tokenizer, only what differs from others
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

from .sizes import shrunk
from .vocabularies import save_tokenizer

IMAGES = {"size": 224, "crop_size": 224, "do_resize": True, "do_center_crop": True, "do_normalize": True}
ONLY_OF_SAVING = ("torch_dtype", "transformers_version", "_name_or_path", "quantization_config")


@dataclass(frozen=True)
class Checkpoint:
    """Configurations of a published checkpoint.

    Attributes:
        name: The checkpoint's.
        found: Source of each configuration that is public as it stands, by component; the others were written by hand.
        index: Content of `model_index.json`.
        components: Configuration by component.
    """

    name: str
    found: Mapping[str, str]
    index: Mapping[str, Any]
    components: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """Read a checkpoint's file; the name is the file's."""
        document = json.loads(file.read_text())
        return cls(file.stem, document["found"], document["model_index"], document["components"])

    def classes(self) -> dict[str, tuple[str, str]]:
        """Library and class by component, without those that the pipeline lacks."""
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        return {name: (library, cls) for name, (library, cls) in pairs.items() if cls is not None}


def make(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a tiny pipeline folder; weights are the same each time.

    Raises:
        FileExistsError: The folder is there.
    """
    folder.mkdir(parents=True)
    vocabularies: dict[str, int] = {}
    ordered = sorted(checkpoint.classes().items(), key=lambda item: not item[0].startswith("tokenizer"))
    for name, (library, class_name) in ordered:
        config, place = checkpoint.components.get(name, {}), folder / name
        if "Tokenizer" in class_name:
            vocabularies[name.replace("tokenizer", "text_encoder")] = save_tokenizer(class_name, config, place)
        elif class_name.endswith(("ImageProcessor", "FeatureExtractor")):
            write(place / "preprocessor_config.json", {"feature_extractor_type": "CLIPFeatureExtractor", **IMAGES})
        elif class_name.endswith("Scheduler"):
            write(place / "scheduler_config.json", config)
        elif config:  # those of ONNX have none
            save_model(library, class_name, config, place, vocabularies.get(name))
    write(folder / "model_index.json", checkpoint.index)
    return folder


def write(file: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as the libraries do."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def save_model(library: str, class_name: str, config: Mapping[str, Any], folder: Path, vocabulary: int | None) -> None:
    """Write a component of random weights; its configuration keeps keys that the class does not have."""
    plain = class_name.removeprefix("Flax")  # the same configuration and the same weights
    small = shrunk(config, plain, vocabulary)
    model = random_model(simple_get_class_obj(library, plain), small, zlib.crc32(folder.name.encode()))
    model.save_pretrained(folder)
    write(folder / "config.json", small)
    (folder / "generation_config.json").unlink(missing_ok=True)


def random_model(cls: Any, config: Mapping[str, Any], seed: int) -> Any:
    """A model in which every parameter counts; of diffusers or of transformers."""
    torch.manual_seed(seed)
    known = {key: value for key, value in config.items() if key not in ONLY_OF_SAVING}
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is not initialized is NaN then
    try:
        of_diffusers = hasattr(cls, "load_config")
        model = cls.from_config(known) if of_diffusers else cls(cls.config_class.from_dict(known))
    finally:
        torch.use_deterministic_algorithms(False)
    disturb(model, torch.Generator().manual_seed(seed + 1))
    return model.eval()


@torch.no_grad()
def disturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give values to what is zero, constant or not initialized: a zero gate would leave its block without effect."""
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        random = torch.randn(parameter.shape, generator=generator)
        if not torch.isfinite(parameter).all():
            parameter.copy_(0.1 * random)
        elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.05 * random)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def make_once(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder of a checkpoint, made where it is not there; one that was begun only is never found."""
    if not folder.is_dir():
        begun = folder.with_name(folder.name + ".begun")
        shutil.rmtree(begun, ignore_errors=True)
        make(checkpoint, begun)
        begun.rename(folder)
    return folder
