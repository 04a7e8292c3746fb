"""What a person reads when a command fails."""

from __future__ import annotations

import typer

from ..loop.errors import StepfoldError

FAILED, USAGE = 1, 2

# The error that Typer raises for unknown options, missing arguments and unfit values; its class is not public in
# every release, but `BadParameter` derives from it in all of them.
WrongWords = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

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
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return [f"error: {type(error).__name__}: {text}", "Run again with --debug to see where."], FAILED


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
