"""What the plugin computes in integers, asked of the compiled model and not of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from blocks import block, needs_vnni, quantized

from stepfold.backends.instructions import instructions
from stepfold.backends.openvino import precision as precision_of
from stepfold.backends.openvino.lower import GROUP_PROPERTY, lower
from stepfold.backends.openvino.options import OpenvinoOptions
from stepfold.backends.openvino.precision import (
    AMX,
    IntegerSite,
    float_sites,
    integer_sites,
    rounds_activations,
    unpacked_for_amx,
)
from stepfold.backends.openvino.session import settings_of

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'stepfold[openvino]'")

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
Written = Callable[[str], Path]
LAYERS = 6  # query, key, value, merge, up, down
GROUP = 32  # of a block of width 32, whose layers read 32 and 128 features


@pytest.fixture(params=["dynamic", "static"])
def activations(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The file of the block, in float or with activations of a kind in 8 bits."""

    @cache
    def file(activations: str) -> Path:
        folder = tmp_path_factory.mktemp(activations)
        stage = block().step if activations == "float" else quantized(block(), activations, folder)
        return lower(stage, folder, options=OpenvinoOptions())

    return file


def compiled(file: Path, **settings: Any) -> Any:
    core = openvino.Core()
    return core.compile_model(core.read_model(file), "CPU", {**SETTINGS, **settings})


def layers(model: Any) -> Counter[tuple[str, str]]:
    """Kind and precision of every layer that a compiled model runs."""
    found = [(str(n.get_rt_info()["layerType"].astype(str)), n) for n in model.get_runtime_model().get_ops()]
    return Counter(
        (kind, node.get_rt_info()["runtimePrecision"].astype(str))
        for kind, node in found
        if kind not in ("Input", "Output", "Const")
    )


@needs_vnni
def test_every_quantized_layer_runs_in_integers(written: Written, activations: str) -> None:
    file = written(activations)
    sites = integer_sites(openvino.Core().read_model(file))
    assert [site.dynamic for site in sites] == [activations == "dynamic"] * LAYERS
    assert sorted(site.width for site in sites) == [32] * 5 + [128]
    model = compiled(file)
    assert float_sites(model, sites, SETTINGS, GROUP) == {}
    matrices = {key: count for key, count in layers(model).items() if key[0] == "FullyConnected"}
    assert sum(matrices.values()) == LAYERS and {precision for _, precision in matrices} <= {"i8", "u8"}


@needs_vnni
def test_the_group_is_stored_in_the_file(written: Written, activations: str) -> None:
    model = compiled(written(activations))
    assert (model.get_property(GROUP_PROPERTY) == GROUP) or activations == "static"


@needs_vnni
def test_layers_in_float_are_found(written: Written) -> None:
    """Without groups the plugin unpacks the weights and multiplies in float; what it reports is the same."""
    file = written("dynamic")
    sites = integer_sites(openvino.Core().read_model(file))
    model = compiled(file, **{GROUP_PROPERTY: 0})
    assert {precision for kind, precision in layers(model) if kind == "FullyConnected"} == {"i8"}
    found = float_sites(model, sites, SETTINGS, 0)
    assert found.keys() == {site.weight for site in sites}
    assert "keeps activations in float" in next(iter(found.values()))


def test_a_layer_that_the_compiled_model_lacks(written: Written) -> None:
    model = compiled(written("static"))
    lost = IntegerSite("no_such_weight", 32, False)
    assert float_sites(model, [lost], SETTINGS, GROUP) == {
        "no_such_weight": "no product of the compiled model reads its weight"
    }


def test_a_model_in_float_has_no_integer_site(written: Written) -> None:
    file = written("float")
    assert integer_sites(openvino.Core().read_model(file)) == []
    assert {precision for _, precision in layers(compiled(file))} <= {"f32", "i32", "i64"}


def test_attention_is_one_layer(written: Written) -> None:
    """Its products and its softmax are in one kernel, as are the head split and merge."""
    model = openvino.Core().read_model(written("float"))
    assert [node.get_type_name() for node in model.get_ops()].count("ScaledDotProductAttention") == 1
    kinds = Counter(kind for kind, _ in layers(compiled(written("float"))).elements())
    assert "Softmax" not in kinds and "MatMul" not in kinds
    assert kinds["Subgraph"] + kinds["ScaledDotProductAttention"] == 1


@needs_vnni
@pytest.mark.parametrize(
    ("width", "group", "integers"),
    [
        (64, 32, True),
        (32, 32, True),
        (33, 32, True),
        (16, 16, True),
        (31, 32, False),
        (12, 16, False),
        (32, 0, False),
        (1, 16, False),
    ],
)
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_activations_are_rounded_where_the_group_fits(width: int, group: int, integers: bool, precision: str) -> None:
    """The rule that `lower` goes by; a new version of OpenVINO that changes it is found here.

    In bfloat16 AMX multiplies floats by weights that are unpacked on the way, so nothing is rounded there.
    """
    if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    settings = {**SETTINGS, "INFERENCE_PRECISION_HINT": precision}
    in_floats = precision == "bf16" and AMX in instructions()
    assert rounds_activations(width, group, settings) is (integers and not in_floats)


@pytest.mark.parametrize(
    ("width", "outputs", "unpacked"),
    [(32, 32, True), (64, 32, False), (32, 64, False), (48, 64, True), (48, 512, True), (48, 513, False)],
)
def test_narrow_layers_are_unpacked_for_amx(
    width: int, outputs: int, unpacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the layers of `test_lower` and `test_blocks` in bfloat16 tell whether the rule is that of OpenVINO."""
    settings = {"INFERENCE_PRECISION_HINT": "bf16"}
    monkeypatch.setattr(precision_of, "instructions", lambda: (AMX,))
    assert unpacked_for_amx(width, outputs, settings) is unpacked
    assert not unpacked_for_amx(width, outputs, {"INFERENCE_PRECISION_HINT": "f32"})
    monkeypatch.setattr(precision_of, "instructions", lambda: ("avx512_bf16",))
    assert not unpacked_for_amx(width, outputs, settings)


def test_settings() -> None:
    core = openvino.Core()
    assert settings_of(core, None, OpenvinoOptions()) == {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    assert settings_of(core, 2, OpenvinoOptions())["INFERENCE_NUM_THREADS"] == 2
