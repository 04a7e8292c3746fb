"""The contract of a pass, as the manager holds every pass to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import euler
from programs import FakePass, component, context_of, modulated, run
from torch import fx

from stepfold.ir.edit import copy_graph, finish
from stepfold.ir.program import Program, Refusal, Schedule
from stepfold.loop.errors import GateError, StepfoldError, UsageError
from stepfold.loop.plan import fold
from stepfold.loop.ports import Port
from stepfold.passes.base import Context, Options, PassResult, Phase, silent
from stepfold.passes.manager import EXACT_DRIFT, Step, exact_drift, run_passes

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


class Limited(Options):
    """Options of a lossy pass."""

    max_drift: float | None = None


def edited(program: Program, edit: Callable[[fx.GraphModule], None]) -> Program:
    graph = copy_graph(program.step)
    edit(graph)
    return program.with_stage(finish(program.step, graph))


def scaled(program: Program, factor: float) -> Program:
    """The program with its prediction multiplied: drift |factor - 1|."""

    def edit(graph: fx.GraphModule) -> None:
        output = graph.graph.output_node()
        (last,) = output.args[0]  # type: ignore[misc]
        with graph.graph.inserting_before(output):
            output.args = ((graph.graph.call_function(aten.mul.Tensor, (last, factor)),),)

    return edited(program, edit)


def multiplies(factor: float, exact: bool = False, options: Options | None = None) -> FakePass:
    operation = FakePass(lambda program, context: PassResult(scaled(program, factor), 1), options)
    operation.exact = exact  # type: ignore[misc]
    return operation


def returns(**result: Any) -> FakePass:
    return FakePass(lambda program, context: PassResult(program, **{"changed": 0, **result}))


# -- outcomes


def test_changed(program: Program) -> None:
    result = run(program, multiplies(1.5))
    (record,) = result.records
    assert (record.name, record.outcome, record.changed) == ("fake", "changed", 1)
    assert result.step is not program.step and program.records == ()


def test_identity(program: Program) -> None:
    refused = (Refusal("blocks.0", "skipped by the recipe"),)
    result = run(program, returns(identity=True, refused=refused, details={"figure": 3}))
    (record,) = result.records
    assert (record.outcome, record.changed, record.refused, record.details) == ("identity", 0, refused, {"figure": 3})
    assert result.stages == program.stages


def test_not_applicable(program: Program) -> None:
    class Inapplicable(FakePass):
        name = "attention"

        def not_applicable(self, program: Program) -> str | None:
            return "the program has no attention"

        def requires(self, program: Program) -> None:
            raise AssertionError("preconditions do not matter then")

    result = run(program, Inapplicable(lambda *_: pytest.fail("it ran")))
    (record,) = result.records
    assert (record.outcome, record.changed, record.drift) == ("not_applicable", 0, 0.0)
    assert record.details == {"reason": "the program has no attention"}


def test_changed_nothing_fails_with_the_reasons(program: Program) -> None:
    refused = tuple(Refusal(f"blocks.{i}", f"reason {i}") for i in range(7))
    with pytest.raises(StepfoldError) as caught:
        run(program, returns(refused=refused))
    assert str(caught.value) == (
        "pass fake: expected to change something, changed nothing (blocks.0: reason 0; blocks.1: reason 1; "
        "blocks.2: reason 2; blocks.3: reason 3; blocks.4: reason 4). Remove it from the recipe or mark it "
        "`optional: true`."
    )
    assert caught.value.exit_code == 1


def test_changed_nothing_without_a_candidate_says_so(program: Program) -> None:
    with pytest.raises(StepfoldError, match=r"changed nothing \(no candidate found\)"):
        run(program, returns())


def test_an_optional_pass_may_change_nothing(program: Program) -> None:
    refused = (Refusal("blocks.0", "why"),)
    result = run(program, Step(returns(refused=refused), optional=True))
    (record,) = result.records
    assert (record.outcome, record.refused) == ("identity", refused)


def test_a_pass_that_counts_no_change_makes_none(program: Program) -> None:
    """What is not probed must not reach the bundle."""
    sneaky = FakePass(lambda p, context: PassResult(scaled(p, 3.0), 0, identity=True))
    assert run(program, sneaky).stages == program.stages


def test_a_precondition_that_does_not_hold(program: Program) -> None:
    class Needs(FakePass):
        def requires(self, program: Program) -> None:
            raise UsageError("fake: run hoist before it.")

    with pytest.raises(UsageError, match="run hoist before it"):
        run(program, Needs(lambda *_: pytest.fail("it ran")))


# -- drift


def test_drift_is_against_the_program_before_and_the_captured_one(program: Program) -> None:
    """1.5 then 2 then 0.5: this pass's own cost, and the product of all so far."""
    records = run(program, multiplies(1.5), multiplies(2.0), multiplies(0.5)).records
    assert [record.drift for record in records] == pytest.approx([0.5, 1.0, 0.5], rel=1e-5)
    assert [record.total_drift for record in records] == pytest.approx([0.5, 2.0, 0.5], rel=1e-5)


def test_total_drift_is_against_the_captured_program_even_when_passes_start_later(program: Program) -> None:
    later = scaled(program, 3.0)
    result = run_passes(later, [Step(multiplies(2.0))], context_of(program, Path("unused")))
    (record,) = result.records
    assert (record.drift, record.total_drift) == pytest.approx((1.0, 5.0), rel=1e-5)


def test_an_exact_pass_that_drifts_fails(program: Program) -> None:
    with pytest.raises(
        StepfoldError, match=r"pass fake: drift 1\.00e-03 exceeds 1e-05, the limit of an exact pass\. This is a defect"
    ):
        run(program, multiplies(1.001, exact=True))


def test_an_exact_pass_may_round(program: Program) -> None:
    (record,) = run(program, multiplies(1 + EXACT_DRIFT / 3, exact=True)).records
    assert 0 < record.drift <= EXACT_DRIFT == 1e-5


def test_a_lossy_pass_over_its_max_drift_fails(program: Program) -> None:
    with pytest.raises(
        StepfoldError, match=r"drift 2\.50e-01 exceeds 0\.2, its max_drift; raise max_drift or exclude sites"
    ):
        run(program, multiplies(1.25, options=Limited(max_drift=0.2)))


@pytest.mark.parametrize("limit", [0.3, None])
def test_a_lossy_pass_within_its_max_drift(program: Program, limit: float | None) -> None:
    (record,) = run(program, multiplies(1.25, options=Limited(max_drift=limit))).records
    assert record.drift == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_fail(program: Program, value: float) -> None:
    with pytest.raises(
        StepfoldError, match="pass fake: expected finite outputs on the probe; received NaN or infinity"
    ):
        run(program, multiplies(value))


def chain(layers: int) -> Program:
    return component(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers))), torch.randn(2, 4))


def test_the_drift_of_an_exact_pass_may_grow_with_the_depth() -> None:
    """As the root of the products in a chain, from 32 on."""
    shallow, deep = chain(2), chain(128)
    assert exact_drift(shallow) == EXACT_DRIFT and exact_drift(deep) == pytest.approx(2 * EXACT_DRIFT)
    operation = multiplies(1 + 1.5e-5, exact=True)
    assert run(deep, operation).records[-1].drift > EXACT_DRIFT
    with pytest.raises(StepfoldError, match="the limit of an exact pass"):
        run(shallow, operation)


# -- the quality of what a pass leaves


def measured(program: Program, operation: FakePass, quality: Callable[[Program], float]) -> Program:
    return run_passes(program, [Step(operation)], context_of(program, Path("unused"), quality=quality))


def test_quality_is_measured_once_the_drift_is_known_to_be_allowed(program: Program) -> None:
    """It costs a build of the engine."""
    assert measured(program, multiplies(1.5), lambda p: 30.0).records[-1].psnr_db == 30.0
    for operation in (multiplies(1.25, options=Limited(max_drift=0.2)), multiplies(float("nan"))):
        with pytest.raises(StepfoldError, match=r"its max_drift|NaN or infinity"):
            measured(program, operation, lambda p: pytest.fail("it was measured"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [(StepfoldError("no form"), StepfoldError), (GateError("too low"), GateError), (ValueError("x"), StepfoldError)],
)
def test_an_engine_that_fails_on_what_a_pass_left_names_the_pass(
    program: Program, error: Exception, kind: type[StepfoldError]
) -> None:
    def fail(p: Program) -> float:
        raise error

    with pytest.raises(kind, match=f"pass fake: quality of what it left: .*{error}") as caught:
        measured(program, multiplies(1.5), fail)
    assert type(caught.value) is kind


# -- phases


def of(phase: Phase | None, rewrite: Callable[[Program, Context], PassResult]) -> Step:
    operation = FakePass(rewrite)
    operation.phase, operation.name = phase, str(phase)  # type: ignore[misc]
    return Step(operation)


def identity(p: Program, context: Context) -> PassResult:
    return PassResult(p, 0, identity=True)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [*pairwise(Phase), (Phase.HOIST, Phase.SCHEDULE), (Phase.QUANTIZE, Phase.FUSE), (None, Phase.SCHEDULE)],
)
def test_phases_have_an_order(program: Program, earlier: Phase | None, later: Phase) -> None:
    """Another is refused before anything is run."""
    steps = [of(earlier, identity), of(None if later < Phase.SCHEDULE else earlier, identity), of(later, identity)]
    assert len(run_passes(program, steps, context_of(program, Path("unused"))).records) == 3
    wrong = [of(later, lambda *_: pytest.fail("it ran")), of(earlier, identity)]
    with pytest.raises(
        UsageError, match=rf"pass {earlier}: expected it before {later}.*hoist, prune, cut, attend, quantize"
    ):
        run_passes(program, wrong, context_of(program, Path("unused")))


@pytest.mark.parametrize("changes", [True, False])
def test_a_schedule_that_a_later_pass_invalidates_is_dropped(
    program: Program, changes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that was scheduled in another run: its table was fitted on the stages that it had then."""
    scheduled = replace(program, schedule=Schedule({1.0: fold(euler(4))}, "engine"))
    result = run(scheduled, multiplies(1.5) if changes else returns(identity=True))
    if changes:
        assert result.schedule is None and result.records[-1].details == {"dropped": ["schedule"]}
        assert "the schedule was fitted on the program before it and is dropped" in caplog.text
    else:
        assert result.schedule is scheduled.schedule and not caplog.text


# -- broken programs


def test_a_broken_program_is_caught(program: Program) -> None:
    def rename(p: Program, context: Context) -> PassResult:
        return PassResult(
            p.with_stage(replace(p.step, inputs=(Port("k", (None, 3, 5), "float32"), *p.step.inputs[1:]))), 1
        )

    with pytest.raises(
        StepfoldError, match="pass fake: left a broken program: stage step: broken rule: input 'k' is neither"
    ):
        run(program, FakePass(rename))


def test_a_program_that_does_not_run_is_caught(program: Program) -> None:
    """Well-formed by its records, and yet the weight has another shape."""

    def swap(p: Program, context: Context) -> PassResult:
        graph = copy_graph(p.step)
        for node, original in zip(graph.graph.nodes, p.step.graph.graph.nodes, strict=True):
            node.meta = dict(original.meta)
        graph.get_submodule("body").weight = torch.zeros(2, 2)
        return PassResult(p.with_stage(replace(p.step, graph=graph)), 1)

    before = {name: value.clone() for name, value in program.step.tensors().items()}
    with pytest.raises(StepfoldError, match="pass fake: left a broken program: RuntimeError: ") as caught:
        run(program, FakePass(swap))
    assert isinstance(caught.value.__cause__, RuntimeError)
    program.step.graph.get_submodule("body").weight = before["body.weight"]  # copies share modules


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(28, "No space left on device", "step.onnx")])
def test_an_error_of_the_machine_is_no_defect_of_the_pass(program: Program, error: Exception) -> None:
    def crash(p: Program, context: Context) -> PassResult:
        raise error

    with pytest.raises(type(error)) as caught:
        run(program, FakePass(crash))
    assert caught.value is error


def test_an_error_inside_a_pass_names_the_pass(program: Program) -> None:
    def crash(p: Program, context: Context) -> PassResult:
        raise KeyError("first\nsecond")

    with pytest.raises(
        StepfoldError, match=r"pass fake: KeyError: .*This is a defect of the pass on this model"
    ) as caught:
        run(program, FakePass(crash))
    assert isinstance(caught.value.__cause__, KeyError) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [GateError("no schedule reaches 40 dB"), UsageError("wrong"), KeyboardInterrupt()])
def test_errors_with_an_exit_code_and_interruptions_pass_through(program: Program, error: BaseException) -> None:
    def stop(p: Program, context: Context) -> PassResult:
        raise error

    with pytest.raises(type(error)) as caught:
        run(program, FakePass(stop))
    assert caught.value is error


# -- records


def test_a_record_has_counts_parameters_and_flops(program: Program) -> None:
    """The body leaves: 5 x 5 + 5 weights, and 2 * 3 * 5 * 5 FLOPs of a step."""

    def drop_body(p: Program, context: Context) -> PassResult:
        def edit(graph: fx.GraphModule) -> None:
            node = next(n for n in graph.graph.nodes if "body" in str(n.args) and n.target is aten.linear.default)
            node.replace_all_uses_with(node.args[0])

        return PassResult(edited(p, edit), 1, (Refusal("gain", "its input is no image"),), details={"kept": 2})

    (record,) = run(program, FakePass(drop_body)).records
    assert record.parameters_before == program.parameters()
    assert record.parameters_before - record.parameters_after == 5 * 5 + 5
    assert record.flops_before - record.flops_after == 2 * 3 * 5 * 5
    assert record.refused == (Refusal("gain", "its input is no image"),)
    assert record.details == {"kept": 2} and record.seconds > 0


def test_records_are_appended_in_order(program: Program) -> None:
    first = run(program, multiplies(1.5))
    result = run_passes(first, [Step(returns(identity=True))], context_of(program, Path("unused")))
    assert [record.outcome for record in result.records] == ["changed", "identity"]
    assert result.records[:1] == first.records


def test_no_passes_no_records(program: Program) -> None:
    assert run(program) is program


def test_progress_of_nobody_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    silent("task", 1, 2)
    assert capsys.readouterr() == ("", "")


# -- the probe


def test_the_probe_is_the_reference_of_pytorch(program: Program) -> None:
    """Drift is of the PyTorch reference, never of the engine."""

    def engine(p: Program) -> Any:
        raise AssertionError("no engine is needed to verify")

    context = context_of(program, Path("unused"), engine=engine)
    (record,) = run_passes(program, [Step(multiplies(1.5))], context).records
    assert np.isclose(record.drift, 0.5)
