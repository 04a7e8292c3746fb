"""`docs/commands.md` has a section for each command, with its options and an example, and nothing else."""

import re
from pathlib import Path

import pytest
import typer

from stepfold.cli import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
OPTION = re.compile(r"^- `(--[a-z-]+)", re.MULTILINE)


def test_the_sections_are_the_commands() -> None:
    assert list(SECTIONS) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_command(name: str) -> None:
    shown = OPTION.findall(SECTIONS[name])
    options = [item.opts[0] for item in COMMANDS[name].params if item.opts[0].startswith("-")]
    assert shown == [option for option in options if option != "--help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_has_an_example(name: str) -> None:
    assert f"\n$ stepfold {name}" in SECTIONS[name]


def test_the_rules_for_all_commands_name_every_exit_code() -> None:
    head = PAGE.partition("## ")[0]
    assert re.findall(r"^\| (\d) \|", head, re.MULTILINE) == ["0", "1", "2", "3"]
    assert "`--debug`" in head
