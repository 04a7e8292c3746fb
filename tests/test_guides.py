"""The code that the documentation shows runs, and the files that it shows are valid."""

from __future__ import annotations

import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from installed import declare

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WITH_A_BUNDLE = ["pipelines.md"]
"""Run by the tests that have the bundle: tests/cli/test_prompts.py."""
OF_THE_REPOSITORY = ["guides/write-a-schedule-method.md"]
"""Show files of the repository as they are."""
RUNNABLE = [
    "python.md",
    "loop.md",
    "calibration.md",
    "guides/write-a-pass.md",
    "guides/write-an-operator.md",
    "guides/add-a-backend.md",
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+/[\w/]+\.py)\n")


@dataclass(frozen=True)
class Block:
    """Code of a page: its text, the line it begins on, and the file it is shown as, if any."""

    text: str
    line: int
    file: str | None


def blocks(page: str, language: str) -> list[Block]:
    """The fenced blocks of one language."""
    found = []
    for match in BLOCK.finditer(page):
        if match[1] == language:
            shown = FILE.match(match[2])
            found.append(Block(match[2], page[: match.start(2)].count("\n"), shown[1] if shown else None))
    return found


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose packages can be imported, and declare entry points, for one test; the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None) or ""):
            sys.modules.pop(name)


def run_page(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Write the files of a page into a folder, then run its other Python blocks one after the other."""
    module = ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pydantic and dataclasses look their module up
    page = path.read_text()
    listed = blocks(page, "python")
    for block in listed:
        if block.file is not None:
            file = folder / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
            (file.parent / "__init__.py").touch()
    for block in blocks(page, "toml"):
        declare(folder, "shown", "1.0", tomllib.loads(block.text)["project"]["entry-points"])
    for block in listed:
        if block.file is None:
            code = compile("\n" * block.line + block.text, str(path), "exec")
            exec(code, vars(module))  # noqa: S102  (code of this repository)
    return vars(module)


@pytest.mark.parametrize("name", RUNNABLE)
def test_page_runs(name: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defined = run_page(DOCS / name, package, monkeypatch)
    assert defined.keys() - vars(ModuleType("empty")).keys(), "the blocks of the page ran"


def test_every_page_with_python_is_run() -> None:
    pages = [path for path in DOCS.rglob("*.md") if blocks(path.read_text(), "python")]
    assert sorted(path.relative_to(DOCS).as_posix() for path in pages) == sorted(
        RUNNABLE + WITH_A_BUNDLE + OF_THE_REPOSITORY
    )


@pytest.mark.parametrize("name", OF_THE_REPOSITORY)
def test_files_are_shown_as_they_are(name: str) -> None:
    for block in blocks((DOCS / name).read_text(), "python"):
        assert block.file is not None
        assert block.text.partition("\n")[2] in (ROOT / block.file).read_text()


def test_wrong_code_is_found(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = package / "page.md"
    page.write_text(
        "```python\n# acme/shown.py\nfrom stepfold.passes.base import Options\nX = Options.__name__\n```\n"
        "```python\nfrom acme.shown import X\n```\n```sh\nls\n```\n```python\nassert X == 'Pass'\n```\n"
    )
    with pytest.raises(AssertionError) as caught:
        run_page(page, package, monkeypatch)
    assert caught.traceback[-1].lineno == 12, "the traceback names the line of the page"


@pytest.mark.parametrize("block", blocks((DOCS / "loop.md").read_text(), "yaml"), ids=lambda block: str(block.line))
def test_shown_loop_is_valid(block: Block, tmp_path: Path) -> None:
    from stepfold.loop.spec import ComponentFile, LoopSpec, read_loop

    file = tmp_path / "loop.yaml"
    file.write_text(block.text)
    expected = ComponentFile if "component" in yaml.safe_load(block.text) else LoopSpec
    assert isinstance(read_loop(file), expected)


@pytest.mark.parametrize("block", blocks((DOCS / "recipes.md").read_text(), "yaml"), ids=lambda block: str(block.line))
def test_shown_recipe_is_valid(block: Block) -> None:
    from stepfold.passes.recipe import load_recipe

    assert load_recipe(yaml.safe_load(block.text)).steps()


def test_recipes_page_names_every_shipped_recipe() -> None:
    from stepfold.passes.recipe import shipped_recipes

    page = (DOCS / "recipes.md").read_text()
    assert [name for name in shipped_recipes() if f"| `{name}` |" not in page] == []


def test_pages_of_passes_list_every_option() -> None:
    from stepfold.passes.registry import PASSES

    page = "\n".join(path.read_text() for path in sorted((DOCS / "passes").glob("*.md")))
    options = [(kind.name, option) for kind in PASSES for option in kind.options_type.model_fields]
    assert [item for item in options if f"| `{item[1]}` |" not in page] == []


def test_loop_page_lists_every_key() -> None:
    from stepfold.loop import spec

    kinds = (spec.LoopSpec, spec.SamplerSpec, spec.GuidanceSpec, spec.LatentSpec, spec.ComponentFile, spec.InputSpec)
    keys = {key for kind in kinds for key in kind.model_fields}
    page = (DOCS / "loop.md").read_text()
    assert [key for key in sorted(keys) if not re.search(rf"`(?:\w+\.)?{key}`", page)] == []


def test_blocks_are_found() -> None:
    page = textwrap.dedent(
        """\
        text
        ```python
        # passes/fuse/a.py
        x
        ```
        ```yaml
        y
        ```
        """
    )
    assert blocks(page, "python") == [Block("# passes/fuse/a.py\nx\n", 2, "passes/fuse/a.py")]
    assert blocks(page, "yaml") == [Block("y\n", 6, None)]
