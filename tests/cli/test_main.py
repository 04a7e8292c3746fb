"""The command line as a whole: help, the one error boundary, and what is printed where."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer

from stepfold.cli import app
from stepfold.loop.errors import GateError, StepfoldError, UsageError

VERBS = [
    "optimize",
    "calibrate",
    "generate",
    "bench",
    "compare",
    "refit",
    "inspect",
    "verify",
    "passes",
    "recipes",
    "backends",
]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LATER = {"--single-file"}
WORK = "stepfold.runtime.compiler.optimize"
OPTIMIZE = ("optimize", "checkpoint", "--out", "bundle")


def fails_with(error: BaseException):
    def work(*_: object) -> None:
        raise error

    return work


def test_the_verbs_are_those_that_work() -> None:
    assert list(COMMANDS) == VERBS


def test_no_option_of_a_later_version() -> None:
    options = {option for command in COMMANDS.values() for item in command.params for option in item.opts}
    assert not options & LATER


def test_help_lists_the_verbs(stepfold) -> None:
    result = stepfold("--help")
    assert result.code == 0
    assert all(f" {verb} " in result.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_shows_an_example(stepfold, verb: str) -> None:
    result = stepfold(verb, "--help")
    assert result.code == 0
    assert f"$ stepfold {verb}" in result.out
    assert result.out.count("$ stepfold") == 1  # in the example only, not in the text above


def test_help_shows_brackets(stepfold) -> None:
    assert "NAME[@STEPS][:solver]" in stepfold("bench", "--help").out


def test_no_words_show_help(stepfold) -> None:
    result = stepfold()
    assert result.code == 2
    assert "optimize" in result.out


def test_version(stepfold) -> None:
    from importlib.metadata import version

    assert stepfold("--version").out == f"stepfold {version('stepfold')}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimise",), "No such command 'optimise'. Did you mean 'optimize'?"),
        (("optimize", "x", "--outt", "y"), "No such option: --outt"),
        (("verify",), "Missing argument 'BUNDLE'."),
        (("optimize", "x"), "Missing option '--out'."),
        (("generate", "x", "--seed", "-1"), "Invalid value for '--seed'"),
        (("bench", "x", "--count", "many"), "Invalid value for '--count'"),
        (("calibrate", "x"), "Missing option '--out'."),
    ],
)
def test_wrong_words(stepfold, words: tuple[str, ...], message: str) -> None:
    result = stepfold(*words)
    assert result.code == 2
    assert result.error.startswith(message)
    assert "--help" in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StepfoldError("stage step: no."), 1, "stage step: no."),
        (UsageError("recipe: no."), 2, "recipe: no."),
        (GateError("quality: [b]no[/b]."), 3, "quality: [b]no[/b]."),
        (KeyboardInterrupt(), 1, "interrupted; nothing was written."),
        (ValueError("first\nsecond"), 1, "ValueError: first"),
        (AssertionError(), 1, "AssertionError: no message"),
        (
            MemoryError("3 TiB"),
            1,
            (
                "memory: expected enough of it for this request; there is none left (3 TiB). Ask for "
                "fewer samples at once."
            ),
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "this command: expected room to write; the disk is full. Free some space and run the same command again.",
        ),
        (
            OSError("1280 requested and 224 written"),
            1,
            (
                "this command: expected a file or folder that can be used; received: 1280 requested and 224 written. "
                "Check its place and its mode."
            ),
        ),
        (
            OSError(28, "No space left on device", "out/x"),
            1,
            "out/x: expected room to write; the disk is full. Free some space and run the same command again.",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            1,
            "x: expected a file or folder that can be used; received: Permission denied. Check its place and its mode.",
        ),
    ],
)
def test_errors_become_one_line(stepfold, monkeypatch, error: BaseException, code: int, message: str) -> None:
    monkeypatch.setattr(WORK, fails_with(error))
    result = stepfold(*OPTIMIZE)
    assert (result.code, result.error, result.out) == (code, message, "")


def test_an_unexpected_error_tells_of_debug(stepfold, monkeypatch) -> None:
    monkeypatch.setattr(WORK, fails_with(RuntimeError("odd")))
    assert "--debug" in stepfold(*OPTIMIZE).err


@pytest.mark.parametrize("words", [("--debug", *OPTIMIZE), (*OPTIMIZE, "--debug")])
def test_debug_shows_the_traceback(stepfold, monkeypatch, words: tuple[str, ...]) -> None:
    monkeypatch.setattr(WORK, fails_with(UsageError("odd")))
    result = stepfold(*words)
    assert result.code == 2
    assert "Traceback" in result.err and "in fails_with" not in result.err and "in work" in result.err
    assert "error: odd" in result.err


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "compile"), ("plotly.express", "report"), ("nncf", "openvino")]
)
def test_a_missing_package_is_named_with_its_extra(stepfold, monkeypatch, module: str, extra: str) -> None:
    monkeypatch.setattr(WORK, fails_with(ModuleNotFoundError(f"No module named {module!r}", name=module)))
    result = stepfold(*OPTIMIZE)
    name = module.partition(".")[0]
    assert result.code == 2
    assert result.error == f"this command needs {name}, which is not installed: pip install 'stepfold[{extra}]'"


def test_a_missing_module_of_our_own_is_a_defect(stepfold, monkeypatch) -> None:
    monkeypatch.setattr(WORK, fails_with(ModuleNotFoundError("No module named 'stepfold.x'", name="stepfold.x")))
    assert stepfold(*OPTIMIZE).error.startswith("ModuleNotFoundError: ")


def test_a_closed_pipe_is_silent(stepfold, monkeypatch) -> None:
    monkeypatch.setattr(WORK, fails_with(BrokenPipeError()))
    result = stepfold(*OPTIMIZE)
    assert (result.code, result.err) == (1, "")


def chatty(*_: object) -> dict[str, object]:
    print("[torch.onnx] a line on standard output")  # noqa: T201
    warnings.warn("a warning", FutureWarning, stacklevel=1)
    logging.getLogger("somebody.else").warning("a message")
    logging.getLogger("stepfold.passes").info("a detail")
    logging.getLogger("stepfold.passes").warning("ours [x]")
    return {"bundle": "bundle", "passes": []}


def test_json_is_alone_on_standard_output(stepfold, monkeypatch) -> None:
    monkeypatch.setattr(WORK, chatty)
    result = stepfold(*OPTIMIZE, "--json")
    assert result.document() == {"bundle": "bundle", "passes": []}


def test_libraries_are_quiet(stepfold, monkeypatch) -> None:
    monkeypatch.setattr(WORK, chatty)
    result = stepfold(*OPTIMIZE, "--json")
    assert "a warning" not in result.err and "a detail" not in result.err
    assert "warning: ours [x]\n" in result.err
    assert "DIFFUSERS_VERBOSITY" not in os.environ  # only while the command runs


def test_debug_shows_what_libraries_say(stepfold, monkeypatch) -> None:
    monkeypatch.setattr(WORK, chatty)
    with pytest.warns(FutureWarning, match="a warning"):
        result = stepfold("--debug", *OPTIMIZE, "--json")
    assert "info: a detail" in result.err


BLOCKED = """
import importlib.abc, io, json, sys
from contextlib import redirect_stdout
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "diffusers", "transformers", "plotly", "jinja2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from stepfold.cli import main
bundle, folder = sys.argv[1:]
def run(*words):
    with redirect_stdout(io.StringIO()) as printed:
        code = main(words)
    return [code, printed.getvalue()]
print(json.dumps({
    "--help": run("--help"),
    "generate": run("generate", bundle, "--count", "3", "--out", folder + "/a.png", "--npy", folder + "/a.npy"),
    "verify": run("verify", bundle, "--json"),
    "backends": run("backends", "--json"),
    "inspect": run("inspect", bundle, "--json"),
    "optimize": run("optimize", folder, "--out", folder + "/b"),
    "recipes": run("recipes"),
    "passes": run("passes"),
    "inspect a checkpoint": run("inspect", folder),
    "calibrate": run("calibrate", folder, "--out", folder + "/store"),
}))
"""


def test_a_core_install_runs_bundles_and_says_what_else_needs(read_only_bundle: Path, tmp_path: Path) -> None:
    import json

    command = [sys.executable, "-c", BLOCKED, str(read_only_bundle), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    codes = {name: code for name, (code, _) in results.items()}
    needs_torch = ("optimize", "recipes", "passes", "inspect a checkpoint", "calibrate")
    assert codes == {name: 2 if name in needs_torch else 0 for name in codes}
    assert json.loads(results["verify"][1])["ok"]
    assert (tmp_path / "a.png").is_file() and (tmp_path / "a.npy").is_file()
    assert done.stderr.count("needs torch, which is not installed: pip install 'stepfold[compile]'") == len(needs_torch)


def test_python_runs_the_package() -> None:
    command = [sys.executable, "-m", "stepfold", "backends", "--wrong"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such option: --wrong")


def test_progress_is_for_terminals_only(stepfold, read_only_bundle: Path) -> None:
    assert stepfold("verify", read_only_bundle).err == ""
