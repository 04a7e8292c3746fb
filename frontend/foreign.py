"""What a checkpoint may ask for: a method that computes, and arguments that name neither code nor files.

Models of libraries have public methods that download and run code (`generate` with `custom_generate`), or write files
(`save_config`). So what a file may call is listed, and everything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..loop.errors import UsageError
from ..loop.spec import ComponentFile, LoopSpec

METHODS: Mapping[str, Sequence[str]] = {
    "diffusers": ("forward", "encode", "decode"),
    "transformers": (
        "forward",
        "encode",
        "decode",
        "get_text_features",
        "get_image_features",
        "get_audio_features",
        "get_video_features",
    ),
}
"""Methods that compute tensors from tensors, by the library of the model."""
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of a configuration whose values may name kernels that transformers downloads and runs."""
OWN_IMPLEMENTATIONS = ("eager", "sdpa", "grouped_mm", "batched_mm")
"""Their values that are code of PyTorch and transformers themselves."""
CODE = re.compile(
    r"(^|_)(code|path|dir|directory|folder|file|filename|url|kernels?|implementation)$|^custom_|^push_to_hub$"
)
"""Names of arguments whose values libraries read as code, or as a place."""
PLACE = re.compile(r"[/\\:]|\.[A-Za-z]\w*$")
"""What a text has that can be a path, an address or the name of a file."""


def require_method(cls: type, library: str, method: str) -> None:
    """Refuse a method of a model class that no file may call.

    Raises:
        UsageError: it is not listed in `METHODS`, or the class lacks it.
    """
    allowed = [name for name in METHODS[library] if callable(getattr(cls, name, None))]
    if method not in allowed:
        raise UsageError(
            f"component.method: expected one of {', '.join(allowed)} of {cls.__name__}; received {method!r}. No other "
            "method is called for a file, because others can load code or write files."
        )


def require_plain(description: LoopSpec | ComponentFile | None) -> None:
    """Refuse constants that name code or files.

    Raises:
        UsageError: the message names the constant.
    """
    if description is None:
        return
    for name in description.inputs:
        _require_name(name)
    for name, value in description.constants.items():
        _require_name(name)
        _require_value(name, value)


def require_own_code(file: Path, config: Any) -> None:
    """Refuse a configuration that asks transformers for code from elsewhere.

    Args:
        file: `config.json`, for the message.
        config: its content.

    Raises:
        UsageError: an implementation is not one of `OWN_IMPLEMENTATIONS`.
    """
    if isinstance(config, list):
        for entry in config:
            require_own_code(file, entry)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in IMPLEMENTATIONS and value is not None and value not in OWN_IMPLEMENTATIONS:
            raise UsageError(
                f"{file}: {key}: expected eager or sdpa; received {value!r:.60}, which names code from elsewhere. Remove "
                "the key."
            )
        require_own_code(file, value)


def _require_name(name: str) -> None:
    for part in name.split("."):
        if CODE.search(part):
            raise UsageError(
                f"constants.{name}: expected an argument that is a number, a switch or a word; received one that names "
                "code or a file. Remove it: nothing of a checkpoint is run."
            )


def _require_value(name: str, value: Any) -> None:
    if isinstance(value, str) and PLACE.search(value):
        raise UsageError(
            f"constants.{name}: expected a number, a switch or a word; received {value!r:.60}, which can name code or a "
            "file. Remove it: nothing of a checkpoint is run."
        )
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_name(f"{name}.{key}")
            _require_value(f"{name}.{key}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            _require_value(name, inner)
