"""The package's own surface: names that load on first use."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stepfold

ROOT = Path(__file__).resolve().parents[1]


def test_version_is_that_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert stepfold.__version__ == declared, "install it again: pip install -e ."


@pytest.mark.parametrize("name", stepfold.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(stepfold, name) is not None
    assert name in dir(stepfold)


def test_names_are_those_of_their_modules() -> None:
    from stepfold.frontend.capture import capture
    from stepfold.loop.spec import LoopSpec
    from stepfold.runtime.engine import load

    assert (stepfold.capture, stepfold.LoopSpec, stepfold.load) == (capture, LoopSpec, load)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'stepfold' has no attribute 'compile'"):
        stepfold.compile  # noqa: B018


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, stepfold; print(*sorted({'torch', 'onnxruntime', 'numpy', 'pydantic', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_loop_spec_and_load_need_no_torch() -> None:
    code = (
        "import sys, stepfold; stepfold.LoopSpec, stepfold.load; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
