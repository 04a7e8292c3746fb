"""Reading the statistics of a store."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrated import CALLS, INNER, TOKENS, WIDTH, calibrated, standard
from programs import component, context_of
from safetensors.numpy import load_file

from stepfold.calibration.document import STATISTICS, STORE
from stepfold.calibration.read import Calibration, SiteStatistics, open_finished, open_store
from stepfold.ir.names import module_path
from stepfold.ir.program import ModelIdentity
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.passes.hoist.hoist import Hoist, HoistOptions
from stepfold.passes.manager import Step, run_passes
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

SAMPLES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    calibrated(standard(), out, SAMPLES)
    return out


@pytest.fixture(scope="module")
def store(folder: Path) -> Calibration:
    return open_store(folder, standard())


@pytest.fixture(scope="module")
def second(store: Calibration) -> SiteStatistics:
    return store.site("second")


@pytest.fixture(scope="module")
def raw(folder: Path, second: SiteStatistics) -> dict[str, np.ndarray]:
    tensors, prefix = load_file(folder / STATISTICS), f"{second.index:04d}."
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


# -- figures


def test_over_everything(second: SiteStatistics, raw: dict[str, np.ndarray]) -> None:
    rows = SAMPLES * TOKENS * CALLS * 2
    assert second.count() == second.gram_count() == rows
    np.testing.assert_array_equal(second.low(), raw["low"].min((0, 1)))
    np.testing.assert_array_equal(second.high(), raw["high"].max((0, 1)))
    np.testing.assert_allclose(second.mean(), raw["total"].sum((0, 1)) / rows)
    np.testing.assert_allclose(second.mean_abs(), raw["magnitude"].sum((0, 1)) / rows)
    np.testing.assert_allclose(second.second_moment(), raw["square"].sum((0, 1)) / rows)
    np.testing.assert_allclose(second.gram(), raw["gram"] / rows)


def test_a_gram_matrix_has_the_second_moments_on_its_diagonal(second: SiteStatistics) -> None:
    np.testing.assert_allclose(np.diag(second.gram()), second.second_moment(), rtol=1e-5)
    np.testing.assert_allclose(second.gram(), second.gram().T)


@pytest.mark.parametrize(("bucket", "branch"), [(0, "conditional"), (3, "unconditional")])
def test_of_one_bucket_and_branch(second: SiteStatistics, raw: dict, bucket: int, branch: str) -> None:
    at = (bucket, ("conditional", "unconditional").index(branch))
    assert second.count(bucket, branch) == SAMPLES * TOKENS
    np.testing.assert_array_equal(second.low(bucket, branch), raw["low"][at])
    np.testing.assert_array_equal(second.high(bucket, branch), raw["high"][at])
    np.testing.assert_allclose(second.mean(bucket, branch), raw["total"][at] / (SAMPLES * TOKENS))


def test_of_one_bucket_or_one_branch(second: SiteStatistics, raw: dict) -> None:
    np.testing.assert_array_equal(second.high(2), raw["high"][2].max(0))
    np.testing.assert_array_equal(second.high(branch="unconditional"), raw["high"][:, 1].max(0))
    assert second.count(branch="conditional") == second.count(branch="unconditional") == second.count() / 2


def test_raw_rows(second: SiteStatistics, raw: dict) -> None:
    np.testing.assert_array_equal(second.rows(), raw["rows"])
    assert second.rows().shape == (len(second.rows_bucket()), INNER) and second.rows().dtype == np.float32
    assert set(second.rows_bucket()) == set(range(CALLS)) and set(second.rows_branch()) == {0, 1}
    for row, bucket in zip(second.rows(), second.rows_bucket(), strict=True):
        assert (second.low(bucket) <= row).all() and (row <= second.high(bucket)).all()


@pytest.mark.parametrize(
    ("ranges", "drift"), [([1, 1, 1, 1], 1.0), ([1, 2, 4, 8], 8 / 3), ([0, 0, 0, 5], float("inf")), ([0, 0, 0, 0], 1.0)]
)
def test_drift_is_the_largest_range_by_the_median(
    second: SiteStatistics, monkeypatch: pytest.MonkeyPatch, ranges: list[float], drift: float
) -> None:
    monkeypatch.setattr(SiteStatistics, "ranges", lambda self: np.array(ranges, np.float64))
    assert second.drift() == pytest.approx(drift)


def test_ranges_by_bucket(second: SiteStatistics) -> None:
    absmax = [np.maximum(-second.low(bucket), second.high(bucket)) for bucket in range(CALLS)]
    assert second.ranges().tolist() == [float(channels.max()) for channels in absmax]


def test_ranges_of_what_was_not_seen_are_zero(second: SiteStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"low": np.full((2, 2, 3), np.inf), "high": np.full((2, 2, 3), -np.inf)}
    monkeypatch.setattr(SiteStatistics, "_tensor", lambda self, name: nothing[name])
    assert second.ranges().tolist() == [0, 0]


# -- sites


def test_a_site_by_its_layer(store: Calibration) -> None:
    node = next(
        n for n in standard().step.graph.graph.nodes if module_path(n) == "second" and "linear" in str(n.target)
    )
    assert store.site(module_path(node), node.name).entry == store.site("second").entry
    assert [entry.name for entry in store.sites] == [store.site(entry.name).entry.name for entry in store.sites]


def test_an_unknown_site(store: Calibration) -> None:
    with pytest.raises(UsageError, match="expected a site of the store; received 'secnd'; did you mean 'second'"):
        store.site("secnd")


def test_a_module_that_is_called_twice(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    program = component(Twice(), torch.tensor([[5.0, -5.0], [4.0, 3.0]]))
    calibrated(program, tmp_path, None)
    store = open_store(tmp_path, program)
    with pytest.raises(
        UsageError, match="site layer is called several times; expected one of the nodes linear, linear_1"
    ):
        store.site("layer")
    assert store.site("layer", "linear").high().tolist() == [5, 3]
    assert np.abs([store.site("layer#2").low(), store.site("layer#2").high()]).max() <= 1


# -- Gram matrices


def test_too_few_rows_for_a_gram_matrix(store: Calibration) -> None:
    second = store.site("second")
    rows, least = second.gram_count(), second.gram_count() / INNER
    assert second.gram(least).shape == (INNER, INNER)
    with pytest.raises(
        UsageError, match=rf"site second: expected at least .* rows for each of 7 channels .*received {rows}"
    ):
        second.gram(least * 1.01)


def test_a_gram_matrix_needs_four_rows_a_channel(tmp_path: Path) -> None:
    program = component(torch.nn.Linear(3, 2), torch.randn(11, 3))
    calibrated(program, tmp_path, None)
    with pytest.raises(UsageError, match=r"at least 4 rows for each of 3 channels .*received 11"):
        open_store(tmp_path, program).statistics(0).gram()
    assert open_store(tmp_path, program).statistics(0).gram(0).shape == (3, 3)


def test_a_wide_value_has_none(tmp_path: Path) -> None:
    calibrated(standard(), tmp_path, 1, gram_width=WIDTH)
    store = open_store(tmp_path, standard())
    with pytest.raises(UsageError, match="site second: expected a Gram matrix; its 7 channels are more than the 5"):
        store.site("second").gram()
    assert store.site("first").gram(0).shape == (WIDTH, WIDTH)


# -- whose statistics


def test_passes_that_keep_what_layers_read_may_have_run(folder: Path, tmp_path: Path) -> None:
    context = context_of(standard(), tmp_path)
    hoisted = run_passes(standard(), [Step(Hoist(HoistOptions()))], context)
    assert [record.outcome for record in hoisted.records] == ["changed"]
    assert open_store(folder, hoisted).site("second").count() > 0
    quantized = run_passes(hoisted, [Step(Quantize(QuantizeOptions(min_tokens=1)))], context)
    with pytest.raises(UsageError, match=r"stale one: passes: none in the store, quantize [0-9a-f]{12} here\."):
        open_store(folder, quantized)


def test_another_model_is_refused(folder: Path) -> None:
    other = replace(standard(), model=ModelIdentity("Network", "f" * 64))
    with pytest.raises(UsageError, match=f"stale one: weights: .* in the store, {'f' * 12} here"):
        open_store(folder, other)


def test_seed_and_samples_are_the_store_s_own(tmp_path: Path) -> None:
    calibrated(standard(), tmp_path, 3, seed=7)
    assert open_store(tmp_path, standard()).site("second").count() == 3 * TOKENS * CALLS * 2


def test_a_file_that_is_damaged_while_it_is_read(tmp_path: Path) -> None:
    calibrated(standard(), tmp_path, 1)
    store = open_finished(tmp_path)
    (tmp_path / STATISTICS).unlink()
    with pytest.raises(StepfoldError, match=rf"^{tmp_path / STATISTICS}: damaged: .*Delete it or run"):
        store.site("second").low()


def test_a_document_without_a_number(folder: Path, store: Calibration) -> None:
    broken = store.document.model_copy(update={"parts": {**store.document.parts, "buckets": "many"}})
    with pytest.raises(StepfoldError, match="expected a number for 'buckets'; received 'many'"):
        _ = broken.buckets
    assert json.loads((folder / STORE).read_text())["parts"]["buckets"] == CALLS


def test_reading_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stepfold.calibration.read import open_finished;"
        "from stepfold.calibration.summary import store_summary; folder = Path(sys.argv[1]);"
        "open_finished(folder).site('second').gram(); store_summary(folder); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
