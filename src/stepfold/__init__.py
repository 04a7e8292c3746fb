"""stepfold: a compiler for diffusion models and the denoising loop that calls them.

Names load what they need when they are first used: `import stepfold` loads neither PyTorch nor an engine. It asks the
libraries that it will load to report to nobody, unless the user's own environment says otherwise.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frontend.capture import capture
    from .loop.spec import LoopSpec
    from .runtime.compiler import apply, lower
    from .runtime.engine import load

    __version__: str

for _name, _value in {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)  # read when a library is imported, here and in the processes that are started

_MODULES = {
    "capture": ".frontend.capture",
    "apply": ".runtime.compiler",
    "lower": ".runtime.compiler",
    "load": ".runtime.engine",
    "LoopSpec": ".loop.spec",
}

__all__ = ["LoopSpec", "__version__", "apply", "capture", "load", "lower"]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version(__name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
