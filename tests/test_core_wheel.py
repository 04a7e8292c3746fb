"""The wheel holds the whole package, and its core install works without PyTorch, in an environment of its own."""

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["loop", "bundle", "ir", "frontend", "backends", "calibration", "passes", "runtime", "report", "cli"]
SHIPPED = {".py", ".yaml", ".html", ".css", ".js", ".j2"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders beside the sources."""
    source = tmp_path_factory.mktemp("source") / "stepfold"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "src"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """The folder of executables of a fresh environment with the wheel and what the wheel asks for."""
    folder = wheel.parents[1] / "environment"
    venv.create(folder, with_pip=True)
    executables = folder / ("Scripts" if sys.platform == "win32" else "bin")
    python = executables / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=folder)
    return executables


def test_wheel_holds_every_file(wheel: Path) -> None:
    expected = {
        f"stepfold/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SHIPPED
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected | {"stepfold/__init__.py", "stepfold/__main__.py", "stepfold/py.typed"}


def test_core_install_has_no_torch(environment: Path) -> None:
    listed = json.loads(run(environment / "python", "-m", "pip", "list", "--format=json", cwd=environment).stdout)
    installed = {item["name"].lower() for item in listed}
    assert {"stepfold", "numpy", "onnxruntime", "safetensors", "pydantic", "typer", "rich"} <= installed
    assert installed & {"torch", "diffusers", "transformers", "onnx", "onnxscript", "openvino", "plotly"} == set()


def test_core_install_imports(environment: Path) -> None:
    code = "import stepfold; print(stepfold.__version__, stepfold.LoopSpec.__name__, stepfold.load.__name__)"
    printed = run(environment / "python", "-c", code, cwd=environment).stdout.split()
    assert printed[1:] == ["LoopSpec", "load"]


def test_core_install_helps(environment: Path) -> None:
    printed = run(environment / "stepfold", "--help", cwd=environment).stdout
    for verb in ("optimize", "generate", "bench", "backends"):
        assert verb in printed


def test_core_install_lists_backends(environment: Path) -> None:
    backends = json.loads(run(environment / "stepfold", "backends", "--json", cwd=environment).stdout)["backends"]
    engine = next(backend for backend in backends if backend["name"] == "onnxruntime")
    assert engine["can_run"] and not engine["can_build"]
    assert "compile" in engine["install"]


def test_core_install_says_what_compiling_needs(environment: Path) -> None:
    command = [environment / "stepfold", "optimize", ROOT / "examples" / "mnist_dit", "--out", environment / "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 2
    assert "stepfold[compile]" in done.stderr and "Traceback" not in done.stderr
