"""Put a compiled program into a bundle's folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.instructions import instructions
from ..bundle.manifest import (
    BackendEntry,
    FrozenDimensionEntry,
    InputEntry,
    Manifest,
    ModelEntry,
    PassEntry,
    PipelineEntry,
    PortEntry,
    ProofEntry,
    QualityEntry,
    ScheduleEntry,
    SharedEntry,
    SkippedProofEntry,
    SlotEntry,
    StageEntry,
    stepfold_version,
)
from ..bundle.probe import TOLERANCE, Probe
from ..bundle.tables import Tables
from ..bundle.writer import write_manifest, write_probe, write_schedule, write_tables
from ..loop.noise import SETS, SampleSet
from ..loop.pipeline_call import PipelineCall
from ..loop.ports import BoundProgram
from .native import remember

if TYPE_CHECKING:
    from ..ir.program import PassRecord, Program, Stage
    from ..passes.recipe import Recipe
    from .workshop import Workshop


def pack(
    folder: Path,
    program: Program,
    bound: BoundProgram,
    shop: Workshop,
    recipe: Recipe,
    quality: QualityEntry | None,
    seed: int | None,
    pipeline: PipelineEntry | None = None,
    call: PipelineCall | None = None,
    proof: ProofEntry | SkippedProofEntry | None = None,
) -> Manifest:
    """Write stages, tables, schedule, probe and manifest into an empty folder.

    Args:
        folder: folder to write to.
        program: program after all passes.
        bound: the program on the engine, for the recorded probe.
        shop: where its stages were compiled.
        recipe: recipe as it was run.
        quality: quality on held-out samples, None where it was not measured.
        seed: seed of the sample sets, None where they are not known.
        pipeline: what surrounds the loop, its files written before.
        call: arguments of the pipeline's call that replaced its defaults.
        proof: proof of the unoptimized program against its pipeline.
    """
    stages = tuple(_copy_stage(folder, shop, stage) for stage in program.stages)
    slots = tuple(
        SlotEntry(name=s.name, variants=tuple(v.name for v in s.variants), by_call=s.by_call) for s in program.slots
    )
    shared = _share(folder, shop, stages)
    tables = _tables(program)
    write_tables(folder, tables)
    if program.schedule is not None:
        write_schedule(folder, tables, program.schedule.fitted_on, plain(program.schedule.details))
    capability = shop.backend.capability()
    tensors = _constant_tensors(program)
    computed = [shop.backend.prepared(stage) for stage in program.stages]
    probe, *further = _write_probes(folder, program, bound, computed)
    manifest = Manifest(
        stepfold_version=stepfold_version(),
        model=ModelEntry(class_name=program.model.class_name, weights_sha256=program.model.weights_sha256),
        recipe=recipe.document(),
        loop=program.loop,
        backend=BackendEntry(
            name=shop.backend.name,
            version=capability.version or "unknown",
            device=shop.backend.default_device,
            instructions=instructions(),
            options=shop.backend.options.model_dump(mode="json"),
        ),
        batch_invariant=batch_invariant(computed),
        seeds=_seeds(program, seed),
        passes=tuple(pass_entry(record) for record in program.records),
        schedule=_schedule(program),
        quality=quality,
        inputs=tuple(InputEntry.of_input(i) for i in program.inputs),
        outputs=program.outputs,
        stages=stages,
        slots=slots,
        shared=shared,
        constants={name: value for name, value in program.constants.items() if name not in tensors},
        frozen_dimensions=tuple(FrozenDimensionEntry(**asdict(f)) for f in program.frozen),
        probe=probe,
        further_probes=tuple(further),
        pipeline=pipeline,
        call=call if call is not None and call.given else None,
        proof=proof,
    )
    manifest = write_manifest(folder, manifest)
    remember(manifest)
    return manifest


def batch_invariant(stages: Iterable[Stage]) -> bool:
    """Whether a sample does not depend on its batch mates: per-tensor dynamic scales couple them.

    Args:
        stages: stages as the engine computes them; one that gives a scale to each token has no such operator.
    """
    from ..ir.operators import couples_batch

    return not any(couples_batch(node) for stage in stages for node in stage.graph.graph.nodes)


def summary(path: Path, manifest: Manifest, program: Program, shop: Workshop, seconds: float) -> dict[str, Any]:
    """The object of `optimize --json`."""
    from ..ir.cost import stage_flops

    fit = sum(record.seconds for record in program.records if record.name == "schedule")
    return {
        "bundle": str(path),
        "passes": [entry.model_dump(mode="json", exclude={"details"}) for entry in manifest.passes],
        "stages": [
            {
                "name": stage.name,
                "rate": stage.rate.value,
                "bytes": sum(f.bytes for name, f in manifest.files.items() if name.startswith(f"stages/{stage.name}.")),
                "flops": stage_flops(stage),
                "reused": shop.reused(stage),
            }
            for stage in program.stages
        ],
        "shared": _shared(manifest),
        "schedule": manifest.schedule.model_dump(mode="json") if manifest.schedule else None,
        "quality": manifest.quality.model_dump(mode="json") if manifest.quality else None,
        "proof": manifest.proof.model_dump(mode="json") if manifest.proof else None,
        "frozen_dimensions": [entry.model_dump(mode="json") for entry in manifest.frozen_dimensions],
        "seconds": seconds,
        "fit_seconds": fit,
    }


def _shared(manifest: Manifest) -> dict[str, Any] | None:
    """What stages share, with the size of the file, which counts for none of them."""
    if manifest.shared is None:
        return None
    return {**manifest.shared.model_dump(mode="json"), "bytes": manifest.files[manifest.shared.file].bytes}


def pass_entry(record: PassRecord) -> PassEntry:
    """A pass record as the manifest keeps it."""
    values = asdict(record)
    del values["keeps_activations"]  # says something to the passes after it, and nothing about the bundle
    return PassEntry.model_validate({**values, "details": plain(record.details)})


def _copy_stage(folder: Path, shop: Workshop, stage: Stage) -> StageEntry:
    target = folder / "stages"
    target.mkdir(exist_ok=True)
    files = shop.build(stage)
    for file in files:
        shutil.copy2(file, target / file.name)
    return StageEntry(
        name=stage.name,
        rate=stage.rate,
        file=f"stages/{files[0].name}",
        inputs=tuple(PortEntry.of(port) for port in stage.inputs),
        outputs=tuple(PortEntry.of(port) for port in stage.outputs),
        exact_forms=_exact_forms(shop, stage),
        float_without_vnni=shop.backend.float_without_vnni(stage),
    )


def _exact_forms(shop: Workshop, stage: Stage) -> dict[str, str]:
    """The form of each layer whose codes would saturate on some processors."""
    from ..backends.exact import saturating_layers
    from ..backends.quantizers import saturating_products
    from ..ir.names import module_path

    form = shop.backend.exact_form
    if form is None:
        return {}
    layers = {module_path(node): form for node in saturating_layers(stage)}
    return layers | {module_path(node): "float" for node in saturating_products(stage)}


def _share(folder: Path, shop: Workshop, stages: Sequence[StageEntry]) -> SharedEntry | None:
    """Store weights that several stages hold once.

    It is done to the copies: a compiled stage that other builds take again is whole on its own.
    """
    by_file = {folder / stage.file: stage.name for stage in stages}
    shared = shop.backend.share(list(by_file)) if len(by_file) > 1 else None
    if shared is None:
        return None
    return SharedEntry(
        file=shared.file.relative_to(folder).as_posix(),
        stages=tuple(by_file[file] for file in shared.readers),
        saved_bytes=shared.saved_bytes,
    )


def _seeds(program: Program, seed: int | None) -> dict[str, Any]:
    if seed is None or program.loop is None:
        return {}
    return {"seed": seed, **{name: SampleSet(name, seed, 0).entropy for name in SETS}}


def _tables(program: Program) -> Tables:
    fitted = program.schedule.fitted if program.schedule else {}
    return Tables(program.recurrence, fitted, program.tables, _constant_tensors(program))


def _constant_tensors(program: Program) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in program.constants.items() if hasattr(value, "numpy")}


def _schedule(program: Program) -> ScheduleEntry | None:
    if program.schedule is None or program.recurrence is None:
        return None
    plan = next(iter(program.schedule.fitted.values()))
    return ScheduleEntry(
        grid_steps=program.recurrence.calls,
        evaluations=plan.evaluations,
        guided_evaluations=plan.guided_evaluations,
        fitted_on="engine" if program.schedule.fitted_on == "engine" else "reference",
    )


def _write_probes(folder: Path, program: Program, bound: BoundProgram, computed: Sequence[Stage]) -> list[str]:
    """Record one evaluation by the variants of each number; returns the files."""
    from ..ir.probe import ROWS, probe_calls, probe_inputs

    types = {str(tensor.dtype).removeprefix("torch.") for stage in computed for tensor in stage.tensors().values()}
    tolerance = max(TOLERANCE[name] for name in ("float32", *types) if name in TOLERANCE)
    unconditional = {name: value.numpy()[:ROWS] for name, value in program.unconditional.items()}
    files = []
    fixed = [slot.by_call for slot in program.computing if slot.by_call is not None]
    first = {number: numbers.index(number) for numbers in fixed for number in set(numbers)}
    for i, call in enumerate([first[number] for number in sorted(first)] or probe_calls(program)[:1]):
        inputs = probe_inputs(program, call)
        outputs = dict(zip(program.outputs, bound.evaluate(inputs, call), strict=True))
        files.append(write_probe(folder, Probe(inputs, outputs, tolerance, call, unconditional), i))
    return files


def plain(value: Any) -> Any:
    """Details as JSON: NumPy numbers become Python's, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.floating, float)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
