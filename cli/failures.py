"""What a person reads when a command fails."""

from __future__ import annotations

import os

import typer

from ..loop.errors import StepfoldError
from ..loop.writing import disk_is_full

FAILED, USAGE = 1, 2

# The error that Typer raises for unknown options, missing arguments and unfit values; its class is not public in
# every release, but `BadParameter` derives from it in all of them.
WrongWords = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc")
"""What PyTorch and the engines say in a `RuntimeError` when the system gives them no memory."""

EXTRAS = {
    "compile": ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "scipy"),
    "report": ("plotly", "jinja2"),
    "openvino": ("openvino", "nncf"),
    "distributed": ("ray",),
}
"""Optional packages by the extra that installs them."""


def failure(error: BaseException) -> tuple[list[str], int]:
    """The lines for standard error and the exit code."""
    if isinstance(error, StepfoldError):
        return [f"error: {error}"], error.exit_code
    if isinstance(error, WrongWords):
        return _wrong_words(error), USAGE
    if isinstance(error, KeyboardInterrupt):
        return ["error: interrupted; nothing was written."], FAILED
    if isinstance(error, BrokenPipeError):
        return [], FAILED
    missing = missing_extra(error)
    if missing is not None:
        return [f"error: this command {missing}"], USAGE
    machine = _of_the_machine(error)
    if machine is not None:
        return [f"error: {machine}"], FAILED
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return [f"error: {type(error).__name__}: {text}", "Run again with --debug to see where."], FAILED


def _of_the_machine(error: BaseException) -> str | None:
    """What the system refused: memory, room on the disk, or a file; None for an error of another kind."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        what = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
        return (
            f"memory: expected enough of it for this request; there is none left{what}. Ask for fewer samples at once."
        )
    if disk_is_full(error):
        place = os.fsdecode(getattr(error, "filename", None) or "this command")
        return f"{place}: expected room to write; the disk is full. Free some space and run the same command again."
    if not isinstance(error, OSError):
        return None
    first = next(iter(str(error).splitlines()), type(error).__name__)  # NumPy raises some without a number
    place = "this command" if error.filename is None else os.fsdecode(error.filename)
    return f"{place}: expected a file or folder that can be used; received: {error.strerror or first}. Check its place and its mode."


def missing_extra(error: BaseException) -> str | None:
    """What to install when the error is that an optional package is missing, else None."""
    name = ((error.name if isinstance(error, ImportError) else None) or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if name in modules:
            return f"needs {name}, which is not installed: pip install 'stepfold[{extra}]'"
    return None


def _wrong_words(error: BaseException) -> list[str]:
    """A mistake in the words of the command, and where its options are listed."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "stepfold"
    return [f"error: {error.format_message()}", f"See: {path} --help"]  # type: ignore[attr-defined]
