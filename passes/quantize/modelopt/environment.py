"""The environment that modelopt runs in: a virtual environment of its own, because it pins older onnx and onnxruntime.

Make it once:

    python -m stepfold.passes.quantize.modelopt.environment ~/.cache/stepfold/modelopt
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from ....loop.errors import StepfoldError, UsageError
from ....loop.writing import temporary_sibling

VARIABLE = "STEPFOLD_MODELOPT_PYTHON"
FOLDER = "modelopt"  # below the cache
REQUIREMENTS = (
    "nvidia-modelopt==0.47.0",
    "torch==2.13.0",  # modelopt imports it; any build will do, and the CPU one is the smallest
    # its extra `onnx` without cupy and with onnxruntime in place of onnxruntime-gpu, which calibration on a CPU needs not
    "onnx~=1.21.0",
    "onnxruntime~=1.24.2",
    "onnxscript",
    "onnx-graphsurgeon>=0.6.1",
    "onnxconverter-common~=1.16.0",
    "onnxslim>=0.1.76",
    "polygraphy>=0.53.4",
    "ml_dtypes",
    "cppimport",
    "lief",
)
CHECK = "import modelopt.onnx.quantization"
STANDARD_ERROR = 2  # the stream, whatever Python has put in its place


def find(cache: Path) -> Path:
    """The Python of the environment.

    Args:
        cache: the folder that stepfold keeps its caches in; `$STEPFOLD_MODELOPT_PYTHON` wins over it.

    Raises:
        UsageError: there is none; the message has the command that makes it.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if not os.access(given, os.X_OK) or Path(given).is_dir():
            raise UsageError(f"${VARIABLE}: expected the Python of an environment with modelopt; received {given!r}.")
        return Path(given)
    folder = cache / FOLDER
    python = python_of(folder)
    if not python.exists():
        raise UsageError(
            f"modelopt: expected an environment with nvidia-modelopt in {folder}; there is none. Make it once (about "
            f"1.5 GB): python -m stepfold.passes.quantize.modelopt.environment {folder}\nOr name the Python of one: "
            f"{VARIABLE}=/path/to/python"
        )
    return python


def python_of(folder: Path) -> Path:
    """The Python of a virtual environment on this operating system."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create(
    folder: Path, options: Sequence[str] = (), requirements: Sequence[str] = REQUIREMENTS, check: str = CHECK
) -> Path:
    """Make the environment: beside its place first, so that an interruption leaves nothing half made.

    Args:
        folder: folder of the environment.
        options: options for `pip install`, such as an index with CPU builds of PyTorch.
        requirements: what to install.
        check: a statement that must run in it.

    Returns:
        Its Python.

    Raises:
        UsageError: the folder is taken.
        StepfoldError: the installation failed, or what was installed does not work.
    """
    if folder.exists():
        raise UsageError(f"{folder}: expected no such folder yet; remove it to make the environment again.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_sibling(folder)
    try:
        venv.create(partial, with_pip=bool(requirements), symlinks=os.name != "nt")
        python = python_of(partial)
        if requirements:
            _run("install", [python, "-m", "pip", "install", "--disable-pip-version-check", *options, *requirements])
        _run("check", [python, "-I", "-c", check])
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return python_of(folder)


def _run(step: str, command: Sequence[str | Path]) -> None:
    """Run a command of the creation; everything it prints goes to standard error."""
    code = subprocess.run([str(part) for part in command], stdout=STANDARD_ERROR, check=False).returncode
    if code != 0:
        raise StepfoldError(
            f"modelopt environment: {step}: expected exit code 0; received {code}. What the command printed says why; "
            "an index with CPU builds of PyTorch is given as --index-url URL."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m stepfold.passes.quantize.modelopt.environment",
        description="Make the environment that modelopt runs in (about 1.5 GB).",
        epilog="example: %(prog)s ~/.cache/stepfold/modelopt --index-url https://download.pytorch.org/whl/cpu",
    )
    parser.add_argument("folder", type=Path, help="of the environment; must not exist yet")
    parsed, options = parser.parse_known_args(arguments)
    try:
        python = create(parsed.folder.expanduser(), options)
    except StepfoldError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{python}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
