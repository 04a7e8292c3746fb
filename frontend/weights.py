"""Safetensors of a checkpoint folder: found, checked and read into the model class the configuration names."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from math import prod
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..loop.array_files import TensorEntry, tensor_entries
from ..loop.errors import StepfoldError, UsageError, nearest
from ..loop.reading import Expected, read_json
from .notes import report_ignored

logger = logging.getLogger(__name__)

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FLAX = ".msgpack"
PICKLED_STEMS = ("pytorch_model", *STEMS)
LARGEST_INDEX_BYTES = 64 << 20
LARGEST_CONFIG_BYTES = 16 << 20
SHARD = re.compile(r"[^/\\\0]{1,240}\.safetensors")
COUNTS = re.compile(r"layers|blocks|depth")
"""Keys of configurations whose numbers say how many modules are built."""
SIZES = re.compile(
    r"^(?!.*(relative|offset|index)).*(dim|size|width|channels|heads|groups|embeds|embeddings|positions|d_model|d_ff)"
)
"""Those whose numbers say how many values a weight has along one dimension."""
FEW_MODULES = 1000  # that cost nothing to build
MOST_GROWTH, FEW_ELEMENTS = 4, 1 << 24
"""A model with more values than this many times those in its files, and this many, is not built to be compared."""
CONFIG = Expected(
    "the JSON of a model",
    hint="A checkpoint is a diffusers or transformers folder with config.json, or a pipeline with model_index.json.",
)
WEIGHTS = Expected("a whole safetensors file of weights", hint="Download it again.")
INDEX = Expected("a safetensors index")
SIGNS_OF_SHELLS = "\"'$`\\!"
NAMED = 4  # how many weights a message names
FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a folder.

    Attributes:
        files: one, or the shards.
        variant: the middle of the file name, such as `fp16`, or None.
        entries: the tensors of all files, by name.
        places: the file of each tensor.
    """

    files: tuple[Path, ...]
    variant: str | None
    entries: Mapping[str, TensorEntry]
    places: Mapping[str, Path]

    @property
    def elements(self) -> int:
        """The number of values in all tensors."""
        return sum(prod(entry.shape) for entry in self.entries.values())


def find_weights(folder: Path) -> WeightFiles:
    """Find the weights of a folder and check that every file is complete.

    Files without a variant win over those with one, as in diffusers, and an index over a single file, unless one of
    its shards is missing. A variant that is read is warned of.

    Raises:
        UsageError: there are none, only pickled ones, a shard is missing, or a file is damaged.
    """
    found, incomplete = _candidates(folder)
    if not found:
        raise incomplete[0] if incomplete else UsageError(_no_weights(folder))
    variant, files = min(found, key=lambda item: item[0] or "")
    if variant is not None:
        logger.warning("%s: there are no weights of full precision; those of the variant %s are read.", folder, variant)
    entries: dict[str, TensorEntry] = {}
    places: dict[str, Path] = {}
    for file in files:
        header = tensor_entries(file, WEIGHTS)
        entries |= header
        places |= dict.fromkeys(header, file)
    return WeightFiles(files, variant, entries, places)


def _candidates(folder: Path) -> tuple[list[tuple[str | None, tuple[Path, ...]]], list[UsageError]]:
    """The complete sets of files with their variant, those of an index first; and what is wrong with the others."""
    found: list[tuple[str | None, tuple[Path, ...]]] = []
    incomplete: list[UsageError] = []
    names = sorted(os.listdir(folder))
    for stem in STEMS:
        for name in names:
            if name.startswith(f"{stem}.safetensors.index") and name.endswith(".json"):
                variant = name.removesuffix(".json").removeprefix(f"{stem}.safetensors.index").lstrip(".")
                shards = _shards(folder / name)
                missing = [shard for shard in shards if not (folder / shard).is_file()]
                if missing:
                    incomplete.append(
                        UsageError(f"{folder / missing[0]}: this shard is missing; {name} lists it. Download it again.")
                    )
                else:
                    found.append((variant or None, tuple(folder / shard for shard in shards)))
    for stem in STEMS:
        singles = [n for n in names if n.startswith(f"{stem}.") and n.endswith(".safetensors") and "-of-" not in n]
        for name in singles:
            variant = name.removesuffix("safetensors").removeprefix(stem).strip(".")
            found.append((variant or None, (folder / name,)))
    return found, incomplete


def _shards(index: Path) -> list[str]:
    """The shards that an index names."""
    data = read_json(index, INDEX, LARGEST_INDEX_BYTES, strict=False)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise UsageError(f"{index}: expected a safetensors index with a `weight_map`; received {places!r:.80}.")
    for name in places.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise UsageError(f"{index}: expected names of safetensors files beside it; received {name!r:.80}.")
    return sorted(set(places.values()))


def _no_weights(folder: Path) -> str:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        flax = sorted(path.name for path in folder.iterdir() if path.suffix == FLAX)
        what = f"its weights are those of Flax ({', '.join(flax[:NAMED])})" if flax else "no weights"
        release = " Take a release with weights for PyTorch." if flax else ""
        return f"{folder}: {what}; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors.{release}"
    named = [path for path in pickles if path.name.startswith(PICKLED_STEMS)] or pickles
    plain = [path for path in named if path.name.count(".") == 1] or named
    stem = STEMS[0] if plain[0].name.startswith(STEMS[0]) else STEMS[1]
    files = ", ".join(_shell_literal(str(path)) for path in plain)
    script = (
        "import torch; from safetensors.torch import save_file; save_file({k: v.clone().contiguous() for f in "
        f"[{files}] for k, v in torch.load(f, weights_only=True, map_location='cpu').items()}}, "
        f"{_shell_literal(f'{folder / stem}.safetensors')}, {{'format': 'pt'}})"
    )
    return (
        f"{folder}: the weights are pickled ({', '.join(path.name for path in pickles[:NAMED])}), and loading them can "
        f'run any code; expected safetensors. If you trust the file, convert it once: python -c "{script}"'
    )


def _shell_literal(text: str) -> str:
    """A literal of Python that means the same between the double quotes of a shell, whatever is in the text."""
    escaped = "".join(f"\\x{ord(sign):02x}" if sign in SIGNS_OF_SHELLS else sign for sign in text)
    return "'" + "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in escaped) + "'"


def read_model(folder: Path, class_name: str, library: str, files: WeightFiles) -> torch.nn.Module:
    """Build the model of a folder in float32, each weight read from its file straight into its place.

    The library is given a folder of its own with the configuration and links to the weights, so it reads the files
    that were found and nothing else that lies beside them. Buffers that are not in the state (position tables) are
    computed by the constructor.

    Args:
        folder: holds `config.json` and the weights.
        class_name: the model class.
        library: `diffusers` or `transformers`.
        files: the weights.

    Raises:
        UsageError: the class is unknown, the configuration does not build it, or the weights do not fit.
    """
    cls = model_class(class_name, library)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if library == "diffusers":
        options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": True}
    else:
        options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    _require_sizes(folder / "config.json", files)
    with _staged(folder, library, files) as stage, without_progress_bars(library), _built(folder, stage, class_name):
        _compare(folder, stage, cls, library, files)
        if library == "transformers":
            options["config"] = _plain_config(cls, stage)
        model, report = cls.from_pretrained(str(stage), **options)
    mismatched = [item[0] for item in report["mismatched_keys"]]
    _require_fit(folder, class_name, report["missing_keys"], report["unexpected_keys"], mismatched)
    if library == "diffusers":
        _report_foreign(folder, type(model))
    return model.eval().requires_grad_(False)


def _report_foreign(folder: Path, cls: type) -> None:
    """Tell which keys of a configuration its class does not have; diffusers builds the model without them."""
    content = read_json(folder / "config.json", CONFIG, LARGEST_CONFIG_BYTES, strict=False)
    known = signature(cls.__init__).parameters
    report_ignored(folder.name, cls.__name__, [key for key in content if key[0] != "_" and key not in known])


@contextmanager
def _staged(folder: Path, library: str, files: WeightFiles) -> Iterator[Path]:
    """A folder as the library wants it: the configuration, and links to the weights under their plain names."""
    stem = STEMS[0] if library == "diffusers" else STEMS[1]
    with TemporaryDirectory(prefix="stepfold-weights-") as made:
        stage = Path(made)
        (stage / "config.json").write_bytes((folder / "config.json").read_bytes())
        if len(files.files) == 1:
            link(files.files[0], stage / f"{stem}.safetensors")
        else:
            names = {file: f"{stem}-{i:05}.safetensors" for i, file in enumerate(files.files)}
            for file, name in names.items():
                link(file, stage / name)
            index = {"metadata": {}, "weight_map": {name: names[file] for name, file in files.places.items()}}
            (stage / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        yield stage


def link(file: Path, name: Path) -> None:
    """A link, or a copy where the system has no links for this user."""
    try:
        name.symlink_to(file.resolve())
    except OSError:
        copyfile(file, name)


@contextmanager
def _built(folder: Path, stage: Path, class_name: str) -> Iterator[None]:
    """Turn what a library raises about a configuration, which may be anything, into an error about that file."""
    try:
        yield
    except (StepfoldError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system
        reason = first_line(error).replace(str(stage), str(folder))
        raise UsageError(f"{folder / 'config.json'}: {class_name} cannot be built from it: {reason}") from error


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _require_sizes(config: Path, files: WeightFiles) -> None:
    """Refuse a configuration that asks for many more layers or values than the files hold, before they are made.

    Raises:
        UsageError: a number in it is too large, or a list too long.
    """
    modules = max(FEW_MODULES, len(files.entries))
    content = read_json(config, CONFIG, LARGEST_CONFIG_BYTES, strict=False)
    for name, value in content.items() if isinstance(content, dict) else ():
        most = modules if COUNTS.search(name) else files.elements + FEW_ELEMENTS if SIZES.search(name) else None
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
        received = max(numbers, default=0)
        if most is not None and min(numbers, default=0) < 0:
            raise UsageError(f"{config}: {name}: expected a size of 0 or more; received {min(numbers)}.")
        if isinstance(value, list) and len(value) > modules:
            most, received = modules, len(value)
        if most is not None and received > most:
            raise UsageError(
                f"{config}: {name}: expected at most {most}, as the files hold {len(files.entries)} weights of "
                f"{files.elements:,} values; received {received}. Take config.json and weights from the same release."
            )


def _plain_config(cls: Any, folder: Path) -> Any:
    """The configuration of a transformers model, with attention as its class prefers it and not as a file says.

    A file may name kernels there, which transformers would download and run.
    """
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    config._attn_implementation = None
    return config


@contextmanager
def without_progress_bars(library: str) -> Iterator[None]:
    """The command line draws its own; and what is wrong with the weights is an error here, no coloured report."""
    switches = import_module(f"{library}.utils.logging")
    was_on, verbosity = switches.is_progress_bar_enabled(), switches.get_verbosity()
    switches.disable_progress_bar()
    switches.set_verbosity_error()
    try:
        yield
    finally:
        switches.set_verbosity(verbosity)
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


def _compare(folder: Path, stage: Path, cls: Any, library: str, files: WeightFiles) -> None:
    """Refuse a model whose weights have other shapes than those in the files, or many more, before it takes memory."""
    try:
        with torch.device("meta"):
            if library == "diffusers":
                model = cls.from_config(cls.load_config(str(stage)))
            else:
                model = cls(_plain_config(cls, stage))
    except MemoryError as error:  # of a table that is computed, not of weights
        raise UsageError(f"{folder / 'config.json'}: {cls.__name__} is too large to be built: {error}") from None
    except Exception:  # noqa: BLE001 (the constructor fails again below, or it only fails without values)
        return
    _require_floats(folder, [name for name, _ in model.named_parameters()], files)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    have = {name: entry.shape for name, entry in files.entries.items()}
    other = [n for n in wanted if n in have and have[n] != wanted[n] and prod(have[n]) != prod(wanted[n])]
    if not other and sum(map(prod, wanted.values())) <= MOST_GROWTH * files.elements + FEW_ELEMENTS:
        return
    mismatched = [f"{n} (file {list(have[n])}, config {list(wanted[n])})" for n in other]
    _require_fit(folder, cls.__name__, wanted.keys() - have.keys(), have.keys() - wanted.keys(), mismatched)


def _require_floats(folder: Path, names: Sequence[str], files: WeightFiles) -> None:
    """Refuse weights that are stored as integers: quantized ones, whose scales would be lost, or damaged ones."""
    for name in names:
        entry = files.entries.get(name)
        if entry is not None and entry.dtype not in FLOATS:
            raise UsageError(
                f"{files.places[name]}: {name}: expected one of {', '.join(FLOATS)}; received {entry.dtype}. Take the "
                f"release of {folder.name} whose weights are not quantized."
            )


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
