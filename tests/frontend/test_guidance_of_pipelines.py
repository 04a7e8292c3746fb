"""Pipelines whose guidance is no plain sum of two branches, each against its own code, and Wan 2.2 with its two experts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.overview import overview
from stepfold.frontend.proof import prove
from stepfold.loop.pipeline_call import PipelineCall

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EXACT_DB = 100.0
STEPS = 4
BY_ROW = {"over": "row", "measure": "norm", "share": 1.0, "limit": None}
AT_MOST = {"over": "sample", "measure": "norm", "share": 1.0, "limit": 1.0}
BY_DEVIATION = {"over": "sample", "measure": "deviation", "share": 0.7, "limit": None}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, list[bool]]] = {
    # checkpoint, its call, how it rescales, which steps are guided
    "qwen": ("qwen-image", {"guidance": 4.0, "negative_prompt": "a drawing of a bird"}, BY_ROW, [True] * 4),
    "z-image": (
        "z-image",
        {"guidance": 4.0, "arguments": {"cfg_normalization": True, "cfg_truncation": 0.2}},
        AT_MOST,
        [True, True, True, False],
    ),
    "lumina": ("lumina-image-2.0", {"arguments": {"cfg_trunc_ratio": 0.5}}, BY_ROW, [True, True, False, False]),
    "stable diffusion": (
        "stable-diffusion-v1-5",
        {"arguments": {"guidance_rescale": 0.7}},
        BY_DEVIATION,
        [True] * 5,
    ),
    "cogvideox": ("cogvideox-2b", {"frames": 9, "arguments": {"use_dynamic_cfg": True}}, None, [True] * 4),
    "wan 2.2": ("wan2.2-t2v-a14b", {"frames": 9, "arguments": {"guidance_scale_2": 3.0}}, None, [True] * 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from tiny.folders import Checkpoint, make_once  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(BENCHMARKS))
    made = tmp_path_factory.mktemp("published")
    return lambda name: make_once(Checkpoint.read(BENCHMARKS / "published" / f"{name}.json"), made / name)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_pipeline_computes(case: str, folder: Callable[[str], Path]) -> None:
    name, call, rescale, guided = CASES[case]
    asked = {"steps": STEPS, "height": 64, "width": 64} | call
    checkpoint = load_checkpoint(folder(name), call=PipelineCall.model_validate(asked))
    program = checkpoint.capture()
    assert program.loop is not None and program.loop.guidance is not None and program.recurrence is not None
    found = program.loop.guidance.rescale
    assert (None if found is None else found.model_dump()) == rescale
    assert (program.recurrence.scales(program.loop.guidance.scales[0]) > 1.0).tolist() == guided
    described = overview(checkpoint)
    assert described is not None and (f"{sum(guided)} of {len(guided)} calls are guided" in described["guidance"]) == (
        program.loop.guidance.strength is not None
    )
    turns = [row["calls"] for row in described["networks"] if "calls" in row]
    assert turns == ([2, 2] if case == "wan 2.2" else [])
    assert checkpoint.run is not None
    assert prove(checkpoint.run, program, None, lambda done, total: None).latent_db > EXACT_DB
