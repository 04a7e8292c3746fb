"""Passes and backends of other packages: found once installed, named when broken, and never in the way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from installed import declare

from stepfold.backends import registry as backends
from stepfold.loop.errors import UsageError
from stepfold.passes import registry as passes
from stepfold.passes.recipe import load_recipe

PASS = '''
from stepfold.passes.base import Options, Pass, PassResult, Phase

class Nothing(Pass[Options]):
    """Change nothing."""

    name, family, source, options_type, phase = "nothing", "none", "a test", Options, Phase.PRUNE

    def run(self, program, context):
        return PassResult(program, 0, identity=True)
'''
BACKEND = """
from stepfold.backends import Backend
from stepfold.backends.capability import Capability

class Acme(Backend):
    name, suffix = "acme", ".acme"

    def capability(self):
        return Capability("acme", True, False, "1.2", "no device", "buy one")

    def lower(self, stage, folder):
        raise NotImplementedError

    def session(self, file, inputs, outputs, **more):
        raise NotImplementedError

ENGINE = Acme()
"""
ENTRIES = {
    "stepfold.passes": {"nothing": "acme_stepfold.nothing:Nothing"},
    "stepfold.backends": {"acme": "acme_stepfold.engine:ENGINE"},
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of `sys.path` with an installed package of one pass and one backend."""
    package = tmp_path / "acme_stepfold"
    package.mkdir()
    for name, text in {"__init__": "", "nothing": PASS, "engine": BACKEND}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    declare(tmp_path, "acme", "2.0", ENTRIES)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme_stepfold"]:
        del sys.modules[name]


def test_an_installed_package_adds_a_pass_and_a_backend(site: Path) -> None:
    """Nothing but its installation is needed: both are listed, and `extends` places the pass by its phase."""
    assert [kind.name for kind in passes.all_passes()][-1] == "nothing"
    assert {one.name: one.reason for one in backends.backends()}["acme"] == "no device"
    assert passes.pass_named("nothing").summary() == "Change nothing."
    recipe = load_recipe({"extends": "fp32", "passes": ["nothing"]})
    assert [step.operation.name for step in recipe.steps()] == ["hoist", "nothing", "fuse", "schedule"]
    assert backends.get("acme").capability().version == "1.2" and "acme" in backends.names()


def test_a_misspelled_name_has_a_neighbour_among_them(site: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'nothing'"):
        passes.pass_named("nothin")
    with pytest.raises(UsageError, match="did you mean 'acme'"):
        backends.get("acne")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("acme_stepfold.missing:Nothing", "cannot be imported: ModuleNotFoundError"),
        ("acme_stepfold.nothing:Missing", "cannot be imported: AttributeError"),
        ("acme_stepfold.nothing:Phase", "expected a pass whose name is 'broken'; received"),
        ("acme_stepfold.nothing:Nothing", "expected a pass whose name is 'broken'; received"),
    ],
)
def test_a_broken_package_is_named_and_breaks_nothing_else(
    site: Path, caplog: pytest.LogCaptureFixture, value: str, message: str
) -> None:
    declare(site, "acme", "2.0", {"stepfold.passes": {"broken": value}})
    with pytest.raises(UsageError, match=f"pass 'broken' of package acme 2.0 .*{message}"):
        passes.pass_named("broken")
    with caplog.at_level(logging.WARNING):
        assert passes.all_passes() == passes.PASSES
    assert "pass 'broken' of package acme 2.0" in caplog.text
    assert passes.pass_named("hoist").name == "hoist"


def test_two_packages_of_one_name(site: Path) -> None:
    declare(site, "other", "0.1", {"stepfold.passes": ENTRIES["stepfold.passes"]})
    with pytest.raises(UsageError, match=r"pass 'nothing': declared by acme 2.0 and other 0.1; uninstall"):
        passes.pass_named("nothing")


def test_names_of_stepfold_are_its_own(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    declare(site, "acme", "2.0", {"stepfold.passes": {"hoist": "acme_stepfold.nothing:Nothing"}})
    assert passes.pass_named("hoist") is passes.PASSES[0]
    with caplog.at_level(logging.WARNING):
        assert passes.all_passes() == passes.PASSES
    assert "pass 'hoist' of another package is ignored" in caplog.text


def test_an_engine_that_fails_to_say_what_it_can(site: Path) -> None:
    engine = site / "acme_stepfold" / "engine.py"
    engine.write_text(
        engine.read_text().replace("return Capability(", "raise OSError('no driver'); return Capability(")
    )
    (found,) = [one for one in backends.backends() if one.name == "acme"]
    assert (found.can_build, found.can_run) == (False, False) and "OSError: no driver" in found.reason
