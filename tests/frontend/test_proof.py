"""The proof of a captured program against the pipeline it was captured from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import changed
import pytest
import torch

from stepfold.frontend.load import Checkpoint, load_checkpoint
from stepfold.frontend.proof import Proof, prove
from stepfold.frontend.surroundings import SURROUNDINGS
from stepfold.frontend.surroundings.dit import DitSurroundings
from stepfold.ir.program import Program
from stepfold.loop.errors import StepfoldError


@dataclass(frozen=True)
class Captured:
    checkpoint: Checkpoint
    program: Program
    decoder: Program

    def proof(self, program: Program | None = None, decoder: Program | None = None) -> Proof:
        assert self.checkpoint.run is not None
        return prove(self.checkpoint.run, program or self.program, decoder or self.decoder, lambda *_: None)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Captured]:
    folder: Path = changed.folder(tmp_path_factory.mktemp("changed") / "pipeline")
    with changed.change(""), pytest.MonkeyPatch.context() as patch:
        patch.setitem(SURROUNDINGS, "ChangedPipeline", DitSurroundings)
        checkpoint = load_checkpoint(folder)
        ends = checkpoint.capture_ends()
        assert ends is not None and ends.decoder is not None
        yield Captured(checkpoint, checkpoint.capture(), ends.decoder)


def test_a_captured_program_is_equal(captured: Captured) -> None:
    done: list[tuple[int, int]] = []
    assert captured.checkpoint.run is not None
    found = prove(captured.checkpoint.run, captured.program, captured.decoder, lambda *at: done.append(at))
    assert found.latent_db > 100 and found.image_db is not None and found.image_db > 100 and found.samples == 2
    assert done == [(i + 1, changed.STEPS) for i in range(changed.STEPS)]


def test_without_a_decoder_latents_alone_are_compared(captured: Captured) -> None:
    assert captured.checkpoint.run is not None
    found = prove(captured.checkpoint.run, captured.program, None, lambda *_: None)
    assert found.image_db is None and found.latent_db > 100


def test_a_wrong_network_is_named_by_its_branch(captured: Captured) -> None:
    program = with_other_weights(captured.program)
    with pytest.raises(StepfoldError, match=r"proof: .*part at step 1 of 6 .* the (un)?conditional branch .* differs"):
        captured.proof(program)


def test_a_wrong_branch_is_named(captured: Captured) -> None:
    """The unconditional class, which one branch reads."""
    loop = captured.program.loop
    assert loop is not None and loop.guidance is not None
    guidance = loop.guidance.model_copy(update={"unconditional": {"class_labels": 3}})
    program = replace(captured.program, loop=loop.model_copy(update={"guidance": guidance}))
    with pytest.raises(StepfoldError, match=r"part at step 1 of 6 .* the unconditional branch"):
        captured.proof(program)


def test_a_wrong_update_is_named_with_its_step(captured: Captured) -> None:
    recurrence = captured.program.recurrence
    assert recurrence is not None
    outputs = recurrence.outputs.copy()
    outputs[3] *= 1.5
    program = replace(captured.program, recurrence=replace(recurrence, outputs=outputs))
    with pytest.raises(StepfoldError, match=r"part at step 4 of 6 .* the branches agree, and the update of the latent"):
        captured.proof(program)


def test_a_wrong_decoder_is_named(captured: Captured) -> None:
    with pytest.raises(StepfoldError, match="They part at the decoder"):
        captured.proof(decoder=with_other_weights(captured.decoder))


def test_a_pipeline_that_draws_otherwise_is_refused(captured: Captured) -> None:
    changed.ChangedPipeline.change = "mirrored image"
    try:
        with pytest.raises(StepfoldError, match="decoder: expected the images of ChangedPipeline"):
            captured.checkpoint.capture_ends()
    finally:
        changed.ChangedPipeline.change = ""


def with_other_weights(program: Program) -> Program:
    """The program with one of its weights scaled, in a graph of its own."""
    import copy

    stage = program.stages[0]
    graph = copy.deepcopy(stage.graph)
    name = max(stage.tensors(), key=lambda name: stage.tensors()[name].numel())
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(graph.get_submodule(owner), leaf)
    tensor.data = tensor.data + 0.3 * torch.ones_like(tensor)
    return program.with_stage(replace(stage, graph=graph))
