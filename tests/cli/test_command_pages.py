"""`docs/commands` has a page for each command, with its options and an example, and nothing else."""

import re
from pathlib import Path

import pytest
import typer

from stepfold.cli import app

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "commands"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTION = re.compile(r"^- `(--[a-z-]+)", re.MULTILINE)


def page(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text()


def test_the_pages_are_the_commands() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {"README", *COMMANDS}
    assert re.findall(r"^\| \[(\w+)\]\(\1\.md\) \|", page("README"), re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_command(name: str) -> None:
    options = [item.opts[0] for item in COMMANDS[name].params if item.opts[0].startswith("-")]
    assert OPTION.findall(page(name)) == [option for option in options if option != "--help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_an_example(name: str) -> None:
    assert f"\n$ stepfold {name}" in page(name)


def test_the_rules_for_all_commands_name_every_exit_code() -> None:
    rules = page("README")
    assert re.findall(r"^\| (\d) \|", rules, re.MULTILINE) == ["0", "1", "2", "3"]
    assert "`--debug`" in rules
