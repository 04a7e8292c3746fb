"""What the tests of OpenVINO share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.ir.program import Stage
from stepfold.loop.ports import StageCallable


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., StageCallable]:
    """Lower a stage and open it on one thread."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")
    from stepfold.backends.openvino.lower import lower
    from stepfold.backends.openvino.session import open_session

    def open_stage(stage: Stage, options: OpenvinoOptions = OpenvinoOptions()) -> StageCallable:  # noqa: B008  (frozen)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        file = lower(stage, folder, options=options)
        return open_session(file, stage.inputs, stage.outputs, threads=1, options=options)

    return open_stage
