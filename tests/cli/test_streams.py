"""Standard streams that are closed or know few characters, signals, and what a terminal must not get to see."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepfold.cli.console import console, table
from stepfold.cli.streams import mend_streams, printable

HOSTILE = "\x1b[2J\x1b]0;pwned\x07\x9b1m\u202ereversed"
SHOWN = "\\x1b[2J\\x1b]0;pwned\\x07\\x9b1m\\u202ereversed"


def test_control_characters_are_shown_and_not_sent() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("plain\ttext\nüber 漢字 [bold]") == "plain\ttext\nüber 漢字 [bold]"


def test_tables_and_lines_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    screen = console()
    screen.print(HOSTILE, markup=False, soft_wrap=True)
    screen.print(table(HOSTILE, ("a",), [(HOSTILE,)]))
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 3 and "\x1b" not in shown and "\x07" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_with_few_characters(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    mend_streams()
    console().print("漢字 × [B]", markup=False)
    console().print(table("t", ("a",), [("×",)]))
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding).startswith("\\u6f22\\u5b57")


CODE = """
import os, sys
os.close(1); os.close(2)
sys.stdout = sys.stderr = None
from stepfold.cli.streams import mend_streams
mend_streams()
print("nobody reads this")
with open("file", "w") as file:
    print("nor this", flush=True)
    os.write(1, b"nor that of a library")
    assert file.fileno() > 2
"""


def test_closed_streams_are_open_to_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "file").read_text() == ""


SIGNALS = """
import signal
from stepfold.cli.streams import stopped_like_interrupted

number = signal.SIGTERM
signal.signal(number, signal.{handler})
try:
    with stopped_like_interrupted():
        signal.raise_signal(number)
        print("went on")
except KeyboardInterrupt:
    print("interrupted")
assert signal.getsignal(number) is signal.{handler}
"""


@pytest.mark.parametrize(("handler", "told"), [("SIG_DFL", "interrupted"), ("SIG_IGN", "went on")])
def test_a_request_to_end_is_an_interruption_unless_it_is_ignored(handler: str, told: str) -> None:
    # In a process of its own: signals of the tests' process belong to whatever library it has loaded.
    code = SIGNALS.format(handler=handler)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, told + "\n"), ran.stderr


def test_an_interruption_of_the_imports_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stepfold.__main__ import run

    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith("stepfold.cli"):
                raise KeyboardInterrupt

    for name in [name for name in sys.modules if name.startswith("stepfold.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert run() == 1
    assert capsys.readouterr().err == "error: interrupted; nothing was written.\n"


NOISE = """
import os, sys
import stepfold.bundle.manifest as manifest
from stepfold.cli import main

def noisy():
    os.write(1, b"as a library writes\\n")
    sys.__stdout__.write("as Python writes\\n")
    sys.__stdout__.flush()
    return "1.2"

manifest.stepfold_version = noisy
code = main(["--version"])
os.write(1, b"behind\\n")
print("behind, too")
sys.exit(code)
"""


def test_what_libraries_write_is_no_result() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", NOISE]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "stepfold 1.2\nbehind\nbehind, too\n")
    assert ran.stderr == "as a library writes\nas Python writes\n"


def test_a_closed_pipe_stays_no_error() -> None:
    """As `stepfold passes --json | head -1` leaves it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "stepfold", "passes", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(words, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, "")
