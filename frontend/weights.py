"""Safetensors of a checkpoint folder: found, checked and read into the model class the configuration names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..loop.errors import UsageError, nearest

logger = logging.getLogger(__name__)

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NAMED = 4  # how many weights a message names
# What a third-party constructor or loader raises about a configuration or weights it does not like.
LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a folder.

    Attributes:
        files: one, or the shards.
        variant: the middle of the file name, such as `fp16`, or None.
    """

    files: tuple[Path, ...]
    variant: str | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor, from the headers."""
        from safetensors import safe_open

        found = {}
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        return found


def find_weights(folder: Path) -> WeightFiles:
    """Find the weights of a folder and check that every file is complete.

    Raises:
        UsageError: there are none, only pickled ones, a shard is missing, or a file is damaged.
    """
    found = _index(folder) or _single(folder)
    if found is None:
        raise UsageError(_no_weights(folder))
    for file in found.files:
        _check(file)
    return found


def _single(folder: Path) -> WeightFiles | None:
    names = sorted(path for stem in STEMS for path in folder.glob(f"{stem}*.safetensors") if "-of-" not in path.name)
    if not names:
        return None
    plain = [path for path in names if path.stem in STEMS]
    chosen = (plain or names)[0]
    return WeightFiles((chosen,), _variant(chosen.name, ".safetensors"))


def _index(folder: Path) -> WeightFiles | None:
    names = sorted(path for stem in STEMS for path in folder.glob(f"{stem}*.safetensors.index*.json"))
    if not names:
        return None
    index = names[0]
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index}: not a safetensors index: {type(error).__name__}: {error}") from None
    for name in shards:
        if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{index}: expected names of safetensors files beside it; received {name!r}.")
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name}: this shard is missing; {index.name} lists it. Download it again.")
    variant = index.name.removesuffix(".json").split(".safetensors.index")[-1].lstrip(".")
    return WeightFiles(tuple(folder / name for name in shards), variant or None)


def _variant(name: str, suffix: str) -> str | None:
    _, _, variant = name.removesuffix(suffix).partition(".")
    return variant or None


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return f"{folder}: no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors."
    return (
        f"{folder}: the weights are pickled ({', '.join(pickles[:NAMED])}), and loading them can run any code; expected "
        'safetensors. If you trust the file, convert it once: python -c "import torch; from safetensors.torch import '
        f"save_file; save_file({{k: v.contiguous() for k, v in torch.load('{folder / pickles[0]}', weights_only=True)"
        f".items()}}, '{folder / STEMS[0]}.safetensors')\""
    )


def _check(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{file}: damaged or truncated safetensors file of {file.stat().st_size} bytes: {error}. Download it again."
        ) from None


def read_model(folder: Path, class_name: str, library: str, files: WeightFiles) -> torch.nn.Module:
    """Build the model of a folder in float32, each weight read from its file straight into its place.

    Buffers that are not in the state (position tables) are computed by the constructor.

    Args:
        folder: holds `config.json` and the weights.
        class_name: the model class.
        library: `diffusers` or `transformers`.
        files: the weights.

    Raises:
        UsageError: the class is unknown, the configuration does not build it, or the weights do not fit.
    """
    cls = model_class(class_name, library)
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "variant": files.variant}
    if library == "diffusers":
        options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": True}
    else:
        options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    try:
        with _without_progress_bars(library):
            if library == "transformers":
                options["config"] = _plain_config(cls, folder)
            model, report = cls.from_pretrained(str(folder), **options)
    except LOADING_ERRORS as error:
        _compare(folder, cls, library, files)
        raise UsageError(
            f"{folder / 'config.json'}: {class_name} cannot be built from it: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        ) from error
    mismatched = [item[0] for item in report["mismatched_keys"]]
    _require_fit(folder, class_name, report["missing_keys"], report["unexpected_keys"], mismatched)
    return model.eval().requires_grad_(False)


def _plain_config(cls: Any, folder: Path) -> Any:
    """The configuration of a transformers model, with attention as its class prefers it and not as a file says.

    A file may name kernels there, which transformers would download and run.
    """
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    config._attn_implementation = None
    return config


@contextmanager
def _without_progress_bars(library: str) -> Iterator[None]:
    """The command line draws its own."""
    switches = import_module(f"{library}.utils.logging")
    was_on = switches.is_progress_bar_enabled()
    switches.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            switches.enable_progress_bar()


def model_class(name: str, library: str) -> Any:
    """The class of this name in diffusers or transformers.

    Raises:
        UsageError: there is none that loads weights.
    """
    module = import_module(library)
    found = getattr(module, name, None) if name.isidentifier() else None
    if not hasattr(found, "from_pretrained") or not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        known = [entry for entry in dir(module) if entry.endswith(("Model", "Model2D", "Model3D", "KL", "Projection"))]
        raise UsageError(f"config.json: {library} has no model class {name!r}; {nearest(name, known or dir(module))}")
    return found


def _compare(folder: Path, cls: Any, library: str, files: WeightFiles) -> None:
    """Compare names and shapes in the files with a model without weights, for the message of a failed load."""
    try:
        with torch.device("meta"):
            config = (
                cls.load_config(str(folder)) if library == "diffusers" else cls.config_class.from_pretrained(folder)
            )
            model = cls.from_config(config) if library == "diffusers" else cls(config)
    except LOADING_ERRORS:
        return  # the constructor fails by itself; the caller reports that
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    have = files.shapes()
    mismatched = [
        f"{name} (file {list(have[name])}, config {list(wanted[name])})"
        for name in wanted
        if name in have and have[name] != wanted[name]
    ]
    _require_fit(folder, cls.__name__, wanted.keys() - have.keys(), have.keys() - wanted.keys(), mismatched)


def _require_fit(folder: Path, class_name: str, missing: Any, unexpected: Any, mismatched: Any) -> None:
    problems: Mapping[str, list[str]] = {
        "missing from the files": sorted(missing),
        "unknown to the model": sorted(unexpected),
        "of another shape": sorted(mismatched),
    }
    texts = [
        f"{len(names)} {what}: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
        for what, names in problems.items()
        if names
    ]
    if texts:
        raise UsageError(
            f"{folder}: the weights do not fit {class_name} as config.json describes it: {'; '.join(texts)}. "
            "Take config.json and weights from the same release."
        )
