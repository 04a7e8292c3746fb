"""The root folders are the package's sub-packages: no folder missing, no copy left behind."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["loop", "bundle", "ir", "frontend", "backends", "calibration", "passes", "runtime", "report", "cli"]
SHIPPED = {".py", ".yaml", ".html", ".css", ".js", ".j2"}  # package data: pyproject.toml names the same endings


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in SHIPPED}


@pytest.mark.parametrize("folder", FOLDERS)
def test_root_folder_is_subpackage(folder: str) -> None:
    link = ROOT / "src" / "stepfold" / folder
    hint = f"{link} must link to ../../{folder} (git config core.symlinks true)"
    assert link.is_symlink() and link.resolve() == ROOT / folder, hint
    assert link.readlink().as_posix() == f"../../{folder}", hint
    installed = Path(importlib.import_module(f"stepfold.{folder}").__path__[0])
    assert files(installed) == files(ROOT / folder)
    assert "__init__.py" in files(ROOT / folder)


def test_every_sub_package_is_in_the_table() -> None:
    package = ROOT / "src" / "stepfold"
    assert {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_modules_are_packages(folder: str) -> None:
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert [path for path in folders if not (path / "__init__.py").is_file()] == []


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
