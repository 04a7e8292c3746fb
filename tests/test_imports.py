"""Imports go one way: cli > report > runtime > passes > calibration > frontend > ir, backends > bundle > loop."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    "loop": "",
    "bundle": "loop",
    "ir": "loop bundle",
    "backends": "loop bundle",
    "frontend": "loop bundle ir backends",
    "calibration": "loop bundle ir backends frontend",
    "passes": "loop bundle ir backends frontend calibration",
    "runtime": "loop bundle ir backends frontend calibration passes",
    "report": "loop bundle ir backends frontend calibration passes runtime",
    "cli": "loop bundle ir backends frontend calibration passes runtime report",
}
STANDARD = sys.stdlib_module_names
CORE = {"numpy", "onnxruntime", "safetensors", "pydantic", "pydantic_core", "yaml", "typer", "click", "rich", "PIL"}
TORCH_FREE = (
    "loop/",
    "bundle/",
    "runtime/",
    "cli/",
    "backends/registry.py",
    "backends/capability.py",
    "backends/ports.py",
)
TORCH_FREE_IN_BACKENDS = ("backend.py", "own.py", "session.py", "capability.py", "options.py")


@dataclass(frozen=True)
class Import:
    """One import: in which file and line, of which module, and whether it happens when the file is imported."""

    file: str
    line: int
    module: str
    at_once: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module}"


def modules() -> dict[str, str]:
    """Dotted names within the package -> files below the root, for every module of the root folders."""
    files = [path.relative_to(ROOT) for folder in BELOW for path in (ROOT / folder).rglob("*.py")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file.as_posix() for file in files}


def imports(file: str, source: str) -> Iterator[Import]:
    """Every import of a file; names inside the package lose their dots: `..loop.spec` -> `stepfold.loop.spec`."""
    parts = ("stepfold", *Path(file).parts[:-1])
    for node, at_once in _nodes(ast.parse(source), at_once=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, at_once)
        elif node.level == 0:
            yield Import(file, node.lineno, node.module or "", at_once)
        else:
            base = ".".join((*parts[: len(parts) - node.level + 1], *filter(None, [node.module])))
            for alias in node.names:  # `from . import x` and `from .x import y` may both name a module
                yield Import(file, node.lineno, f"{base}.{alias.name}", at_once)


def _nodes(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_once
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_only(child)
            yield from _nodes(child, at_once and not later)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def may_use_ir(file: str) -> bool:
    """Of backends, export, emission, lowerings and what checks them read programs; sessions run where there are none.

    A `backend.py`, and what they share, names a stage as a type; that it imports no torch is tested below.
    """
    shared = ("backends/onnx/", "backends/export.py", "backends/exact.py", "backends/quantizers.py")
    return file.startswith(shared) or file.endswith(("/lower.py", "/census.py", "/backend.py", "/own.py"))


def violations(file: str, source: str) -> list[str]:
    """What is wrong with a file's imports."""
    folder = Path(file).parts[0]
    allowed = {folder, *BELOW[folder].split()} | ({"ir"} if folder == "backends" and may_use_ir(file) else set())
    wrong = []
    for item in imports(file, source):
        first, *rest = item.module.split(".")
        if first in BELOW:
            wrong.append(f"{item}: imports a root folder by its bare name")
        elif first == "stepfold" and rest and rest[0] in BELOW and rest[0] not in allowed:
            wrong.append(f"{item}: {folder} may import {', '.join(sorted(allowed - {folder})) or 'no other folder'}")
    return wrong


ENGINES = {"onnxruntime", "openvino", "tensorrt", "torch_tensorrt", "inductor"}


def engines_named(file: str, source: str) -> list[str]:
    """Where a file names an engine, in a string of its own or as a module that it imports."""
    found = [f"{item}" for item in imports(file, source) if ENGINES & set(item.module.split(".")[1:])]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in ENGINES:
            found.append(f"{file}:{node.lineno}: {node.value!r}")
    return found


SOURCES = {name: (ROOT / file).read_text() for name, file in modules().items()}


@pytest.mark.parametrize("file", sorted(file for file in modules().values() if file.startswith("passes/")))
def test_passes_name_no_engine(file: str) -> None:
    """What differs from engine to engine is said by the backend, and comes in the context."""
    assert engines_named(file, (ROOT / file).read_text()) == []


def test_an_engine_is_found_by_its_name() -> None:
    source = 'from ..backends.openvino.lower import lower\nif context.engine_name == "tensorrt":\n    pass\n'
    assert [found.split(": ")[1] for found in engines_named("passes/a.py", source)] == [
        "stepfold.backends.openvino.lower.lower",
        "'tensorrt'",
    ]


@pytest.mark.parametrize("file", sorted(modules().values()))
def test_imports_go_down(file: str) -> None:
    assert violations(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "module"),
    [
        ("loop/a.py", "from ..bundle.reader import read", "stepfold.bundle.reader.read"),
        ("ir/a.py", "from .. import backends", "stepfold.backends"),
        ("ir/a.py", "from ..backends import registry", "stepfold.backends.registry"),
        ("backends/registry.py", "from ..ir.program import Stage", "stepfold.ir.program.Stage"),
        ("backends/onnxruntime/session.py", "def f():\n from ...ir import shapes", "stepfold.ir.shapes"),
        ("passes/fuse/a.py", "import stepfold.runtime.engine", "stepfold.runtime.engine"),
        ("passes/fuse/a.py", "if TYPE_CHECKING:\n from ...report import bench", "stepfold.report.bench"),
        ("cli/a.py", "import passes.base", "passes.base"),
    ],
)
def test_upward_import_is_found(file: str, source: str, module: str) -> None:
    (wrong,) = violations(file, source)
    assert wrong.startswith(f"{file}:{source.count(chr(10)) + 1}: {module}: ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("backends/onnx/emit.py", "from ...ir.program import Stage"),
        ("backends/onnxruntime/lower.py", "from ...ir.program import Stage"),
        ("cli/a.py", "from ..report.bench import run\nfrom . import console\nimport torch"),
        ("passes/fuse/a.py", "from ..base import Pass\nfrom ...ir.edit import replace"),
    ],
)
def test_downward_import_is_allowed(file: str, source: str) -> None:
    assert violations(file, source) == []


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks", "src/stepfold"])
def test_nobody_imports_a_root_folder_by_its_bare_name(folder: str) -> None:
    """With the root on `sys.path`, as `python -m pytest` has it, that would load a second copy."""
    files = [path for path in (ROOT / folder).glob("**/*.py") if not path.is_symlink()]
    found = [item for path in files for item in imports(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert [str(item) for item in found if item.module.split(".")[0] in BELOW] == []


def test_folders_form_no_cycle() -> None:
    uses: dict[str, set[str]] = {folder: set() for folder in BELOW}
    for name, file in modules().items():
        folder = Path(file).parts[0]
        used = {
            item.module.split(".")[1] for item in imports(file, SOURCES[name]) if item.module.startswith("stepfold.")
        }
        uses[folder] |= used & BELOW.keys() - {folder}
    order = list(TopologicalSorter(uses).static_order())  # raises CycleError
    assert sorted(order) == sorted(BELOW)


def loaded_with(name: str) -> set[str]:
    """The modules of the package that importing this one loads, itself and its parents included."""
    known, found, waiting = modules(), set(), [name]
    while waiting:
        module = waiting.pop()
        if module in found or module not in known:
            continue
        found.add(module)
        waiting.append(module.rpartition(".")[0])
        for item in imports(known[module], SOURCES[module]):
            if item.at_once and item.module.startswith("stepfold."):
                inner = item.module.removeprefix("stepfold.")
                waiting += [inner, inner.rpartition(".")[0]]
    return found


def torch_free() -> list[str]:
    chosen = [
        name
        for name, file in modules().items()
        if file.startswith(TORCH_FREE) or (file.startswith("backends/") and file.endswith(TORCH_FREE_IN_BACKENDS))
    ]
    return sorted(chosen)


@pytest.mark.parametrize("name", torch_free())
def test_core_modules_load_the_core_install_only(name: str) -> None:
    known = modules()
    foreign = [
        str(item)
        for module in loaded_with(name)
        for item in imports(known[module], SOURCES[module])
        if item.at_once and item.module.split(".")[0] not in {*STANDARD, *CORE, "stepfold"}
    ]
    assert foreign == [], "import it inside the function that needs it"
