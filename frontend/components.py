"""`model_index.json`: the class of a pipeline and its components, under the names that the libraries have today."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from ..loop.errors import UsageError, nearest
from ..loop.reading import Expected, opened, read_json
from .load import LARGEST_CONFIG_BYTES, PIPELINE_FILE, read_config
from .notes import report_left_out, report_renamed
from .weights import find_weights, link, read_model

LIBRARIES = ("diffusers", "transformers")
UNCOMPILED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that neither the loop nor its ends read, so they need not load."""
CHOOSES_CODE = re.compile("Auto[A-Z]")
"""Classes of transformers and diffusers that take the class to load, and its code, from the folder (`AutoTokenizer`)."""
FLAX = "Flax"
"""Before the names of classes whose weights PyTorch classes of the name behind it read, where they are safetensors."""
RENAMED: Mapping[str, str] = {"TextToVideoMSPipeline": "TextToVideoSDPipeline"}
"""Pipelines that diffusers has under another name by now."""
ONNX = "Onnx"
FILE = Expected("a file of the pipeline", hint="Download it again.")


class Component(NamedTuple):
    """A component of a pipeline."""

    library: str
    class_name: str


@dataclass(frozen=True)
class Index:
    """The content of `model_index.json`.

    Attributes:
        path: folder of the pipeline.
        class_name: class of the pipeline.
        components: components by name; None for one that is left out.
        values: plain values of the pipeline's own, such as `boundary_ratio`, and diffusers' notes (`_diffusers_version`).
    """

    path: Path
    class_name: str
    components: Mapping[str, Component | None]
    values: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The index as today's diffusers writes it."""
        import diffusers

        listed = {name: list(item or (None, None)) for name, item in self.components.items()}
        return {"_diffusers_version": diffusers.__version__} | self.values | listed | {"_class_name": self.class_name}


def read_index(path: Path) -> Index:
    """The pipeline class of a folder and its components; names of other times and of Flax are told and replaced.

    Raises:
        UsageError: there is no such file, it lists no components of a pipeline, or one is a class from elsewhere.
    """
    file = path / PIPELINE_FILE
    index = read_json(file, Expected("the JSON of a diffusers pipeline"), LARGEST_CONFIG_BYTES, strict=False)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UsageError(f"{file}: expected a JSON object with `_class_name`, a pipeline of diffusers.")
    components: dict[str, Component | None] = {}
    values: dict[str, Any] = {}
    for name, value in index.items():
        if _lists_a_component(value):
            components[name] = _component(file, name, *value)
        else:
            values[name] = value
    return Index(path, _pipeline_name(file, index["_class_name"]), components, values)


def _lists_a_component(value: Any) -> bool:
    """Whether a value names a library and a class, or none of both; two numbers are a plain value."""
    return isinstance(value, list) and len(value) == 2 and not all(isinstance(entry, int | float) for entry in value)


def _component(file: Path, name: str, library: Any, class_name: Any) -> Component | None:
    if not all(entry is None or isinstance(entry, str) for entry in (library, class_name)):
        received = f"{[library, class_name]!r:.80}"
        raise UsageError(f"{file}: component {name!r}: expected a library and a class; received {received}.")
    if not class_name:
        return None
    foreign = library not in LIBRARIES and not _is_pipeline_module(library)
    if foreign or CHOOSES_CODE.match(class_name):
        raise UsageError(
            f"{file}: component {name!r} is {library}.{class_name}; only classes of diffusers and transformers are "
            "loaded, no code from a checkpoint is run."
        )
    if class_name.startswith(ONNX):
        raise UsageError(
            f"{file}: component {name!r} is an ONNX file ({class_name}); expected safetensors weights of a PyTorch "
            "model. Take the release of the model for PyTorch."
        )
    return Component(library, _without_flax(f"{PIPELINE_FILE}: {name}", class_name))


def _pipeline_name(file: Path, name: str) -> str:
    import diffusers

    known = RENAMED.get(name, name)
    if known != name:
        report_renamed(PIPELINE_FILE, name, known)
    known = _without_flax(PIPELINE_FILE, known)
    found = getattr(diffusers, known, None) if known.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        names = [entry for entry in dir(diffusers) if entry.endswith("Pipeline")]
        raise UsageError(f"{file}: diffusers has no pipeline {name!r}; {nearest(name, names)}")
    return known


def _without_flax(where: str, name: str) -> str:
    """The PyTorch class of the weights that a Flax class is named for."""
    if not name.startswith(FLAX):
        return name
    report_renamed(where, name, name.removeprefix(FLAX))
    return name.removeprefix(FLAX)


def _is_pipeline_module(library: Any) -> bool:
    """Whether diffusers itself has a pipeline module of this name (safety checkers live there)."""
    import diffusers.pipelines

    return isinstance(library, str) and library.isidentifier() and hasattr(diffusers.pipelines, library)


def read_parts(index: Index) -> dict[str, Any]:
    """The networks of a pipeline, each read as a checkpoint of its own; None for what is left out or never compiled.

    Tokenizers and schedulers are not among them: diffusers reads them, as they have no weights.

    Raises:
        UsageError: the folder of one is missing, or it cannot be read.
    """
    parts: dict[str, Any] = {}
    for name, component in index.components.items():
        if component is None:
            parts[name] = None
        elif name in UNCOMPILED:
            parts[name] = None
            report_left_out(name, component.class_name, (index.path / name).is_dir())
        elif _has_weights(component):
            folder = index.path / name
            if not folder.is_dir():
                raise UsageError(
                    f"{folder}: expected the folder of component {name!r}, as {PIPELINE_FILE} lists it; there is none."
                )
            read_config(folder)  # refuses what asks for code
            parts[name] = read_model(folder, component.class_name, component.library, find_weights(folder))
    return parts


def _has_weights(component: Component) -> bool:
    """Whether a component is a network of diffusers or transformers."""
    if component.library not in LIBRARIES or not component.class_name.isidentifier():
        return False
    found = getattr(import_module(component.library), component.class_name, None)
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


@contextmanager
def staged(index: Index, loaded: Mapping[str, Any]) -> Iterator[Path]:
    """A folder as today's diffusers wants it: the index, and links to the components that diffusers is to load itself.

    Args:
        index: index of the pipeline.
        loaded: components that need not be there.

    Raises:
        UsageError: a file of a component is only a pointer to it.
    """
    with TemporaryDirectory(prefix="stepfold-pipeline-") as made:
        stage = Path(made)
        (stage / PIPELINE_FILE).write_text(json.dumps(index.document()))
        for name, component in index.components.items():
            if component is not None and name not in loaded and (index.path / name).is_dir():
                _link_folder(index.path / name, stage / name)
        yield stage


def _link_folder(folder: Path, target: Path) -> None:
    target.mkdir()
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        if entry.is_file():
            with opened(Path(entry.path), FILE):  # refuses pointers and what is no file
                link(Path(entry.path), target / entry.name)
