"""The commands that the documentation shows are commands of this repository: verbs, options and make targets exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from stepfold.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
BLOCK = re.compile(r"^```(?:console|sh|bash|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
OPERATORS = {"&&", "||", "|", ";", "&"}


def commands(text: str) -> list[list[str]]:
    """The commands of a page's shell blocks as words; a console block's lines without a prompt are output."""
    found = []
    for block in BLOCK.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        for line in prompted or lines:
            found += _split(line)
    return found


def _split(line: str) -> list[list[str]]:
    words: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word in OPERATORS:
            words.append([])
        elif words[-1] or not re.fullmatch(r"[A-Z_]+=\S*", word):  # not a variable before the command
            words[-1].append(word)
    return [command for command in words if command]


def problems(command: list[str]) -> list[str]:
    """What in a command does not exist here; a program of somebody else has no problem."""
    program, *rest = command
    if Path(program).name == "stepfold":
        return _stepfold_problems(rest)
    if program == "make":
        return [f"make {word}: no such target" for word in rest if "=" not in word and word not in TARGETS]
    if Path(program).name.startswith("python"):
        return [f"{word}: no such file" for word in rest[:1] if word.endswith(".py") and not (ROOT / word).is_file()]
    return []


def _stepfold_problems(words: list[str]) -> list[str]:
    if not words or words[0].startswith("-"):
        return []
    if words[0] not in COMMANDS:
        return [f"stepfold {words[0]}: no such command"]
    known = {option for item in COMMANDS[words[0]].params for option in (*item.opts, *item.secondary_opts)} | {"--help"}
    used = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    return [f"stepfold {words[0]} {option}: no such option" for option in used if option not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_shown_commands_exist(page: Path) -> None:
    assert [problem for command in commands(page.read_text()) for problem in problems(command)] == []


def test_readme_shows_the_way() -> None:
    shown = {tuple(command[:2]) for command in commands((ROOT / "README.md").read_text())}
    assert {("make", "demo"), ("make", "test"), ("stepfold", "optimize"), ("stepfold", "bench")} <= shown


def test_commands_are_split() -> None:
    text = "```console\n$ A=1 make test \\\n    && stepfold bench b  # note\nprinted\n```\n```python\nstepfold x\n```\n```sh\nls\n```\n"
    assert commands(text) == [["make", "test"], ["stepfold", "bench", "b"], ["ls"]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make demmo", "make demmo: no such target"),
        ("stepfold optimise x", "stepfold optimise: no such command"),
        ("stepfold optimize x --outt=y --out z", "stepfold optimize --outt: no such option"),
        ("python examples/none.py --x", "examples/none.py: no such file"),
    ],
)
def test_wrong_commands_are_found(line: str, problem: str) -> None:
    assert problems(line.split()) == [problem]
