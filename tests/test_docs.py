"""Every public name is documented, every link in the documentation leads somewhere, every page is in the index."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["loop", "bundle", "ir", "frontend", "backends", "calibration", "passes", "runtime", "report", "cli"]
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
HEADLESS = re.compile(r"^ {4}([a-z]\w*): (?:of|that|with|in|to|for|from|by|as|on|at|behind|without) ", re.MULTILINE)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def undocumented(source: str) -> list[str]:
    """Public names of a module without a docstring, or with one that says nothing but the name."""
    missing = []
    for name, node in _public(ast.parse(source), "module"):
        words = re.findall(r"\w+", (ast.get_docstring(node) or "").lower())
        if not words or "".join(words) == name.replace("_", "").lower():
            missing.append(name)
    return missing


def headless(source: str) -> list[str]:
    """Entries of docstrings that are no noun phrase: only the name in front of them would make one."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Documented)]
    return [match[0] for node in nodes for match in HEADLESS.finditer(ast.get_docstring(node) or "")]


def _public(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    yield name, node
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        overrides = isinstance(child, ast.FunctionDef) and "override" in map(ast.unparse, child.decorator_list)
        if isinstance(child, Documented) and not child.name.startswith("_") and not overrides:
            yield from _public(child, child.name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    source = path.read_text()
    assert undocumented(source) == [] and headless(source) == []


def test_headless_entries_are_found() -> None:
    source = '''
def run(seed, path):
    """Run.

    Args:
        seed: of the noise.
        path: path of the file.
    """
'''
    assert headless(source) == ["    seed: of "]


def test_missing_docstrings_are_found() -> None:
    source = '''
def bare(): ...
class Held:
    """Hold a value."""
    def method(self): ...
    def _private(self): ...
    @override
    def inherited(self): ...
def run():
    """Run."""
def shape():
    """[...] -> [B, ...]"""
'''
    assert undocumented(source) == ["module", "bare", "method", "run"]


def anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    headings = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links of a page to files or headings that do not exist."""
    broken = []
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in ("".join(groups) for groups in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Two words\n[a](none.md) [b](#two-words) [c](#three) [d](https://e.org) `[e](f)` [g](../h) ![i](j.png)"
    )
    assert broken_links(page) == ["none.md", "#three", "../h", "j.png"]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link, _ in LINK.findall(index)}
    pages = {path for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md"}
    assert {name_of(path) for path in pages - linked} == set()


def test_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/index.md", "docs/architecture.md"} <= {
        name_of(page) for page in PAGES
    }
