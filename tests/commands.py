"""The `stepfold` command in a process of its own, with packages that it must do without blocked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

BLOCKING = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from stepfold.cli import main
sys.exit(main())
"""
MODEL_CODE = ("onnx", "onnxscript", "diffusers", "transformers", "accelerate")
NOT_OF_THE_CORE = ("torch", *MODEL_CODE)


def command(*words: object, blocked: Sequence[str] = ()) -> str:
    """Run a command, which must end well and without a word on standard error, and return its standard output."""
    program = [sys.executable, "-c", BLOCKING.format(blocked=tuple(blocked))]
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
