"""Quantize: linear layers in few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...ir.operators import RECORDS
from ...ir.program import Program, Refusal, Stage
from ...ir.variants import alone, numbers_at, put_back
from ..base import Context, Pass, PassResult, Phase
from ..part import chosen_part
from .inputs import Inputs, known_inputs
from .layers import LINEAR, Group, Selection, find_groups, groups_of, named, quantized_layers, require_matches
from .options import CHOOSING, QuantizeOptions
from .pays import does_not_pay
from .realize import Realization
from .repair import repair_pairs
from .rewrite import replaced, replaced_in
from .rotate import rotate
from .scheme import RoundingScheme, Scheme
from .schemes import SCHEMES
from .schemes.blocks import Int4, Int8Weights
from .sequence import realized_in_sequence
from .smooth import smooth

QUANTIZED = frozenset(overload for overload, record in RECORDS.items() if record.weight is not None)
WEIGHTS_ONLY: Mapping[str, type[Scheme]] = {"int8": Int8Weights, "int4": Int4}


@dataclass(frozen=True)
class _Done:
    """What became of the computing slots: the layers that were replaced, those that were not, and what was decided."""

    program: Program
    sites: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    decided: Mapping[str, object] = field(default_factory=dict)


def _decided(done: Mapping[str, _Done]) -> dict[str, object]:
    """What was decided, by stage where there are several."""
    if len(done) == 1:
        return dict(next(iter(done.values())).decided)
    return {stage: dict(each.decided) for stage, each in done.items() if each.decided}


@dataclass(frozen=True)
class _Before:
    """A layer that was quantized before: in which way, and whether it is that of this pass."""

    name: str
    way: str
    same: bool


class Quantize(Pass[QuantizeOptions]):
    """Replace linear layers by ones of few bits; layers that read one value share how it is scaled and rounded.

    The layers of the computing slots are quantized by the scheme; those of stages that run once a request may keep their
    arithmetic and get smaller weights.
    """

    name = "quantize"
    family = "quantize"
    phase = Phase.QUANTIZE
    source = "docs/passes/quantize.md names the source of each scheme"
    options_type = QuantizeOptions

    def not_applicable(self, program: Program) -> str | None:
        """Whether the program has linear layers at all."""
        found = any(node.target is LINEAR for stage in program.stages for node in stage.graph.graph.nodes)
        return None if found or _quantized(program.stages) else "the program has no linear layer"

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantize every accepted site."""
        if context.activations is None:
            reason = f"{context.engine_name} has no form for quantized layers"
            return PassResult(program, 0, (Refusal("every layer", reason),))
        if self.options.activations == "auto":
            chosen = self.options.model_copy(update={"activations": context.activations})
            return Quantize(chosen).run(program, context)
        scheme = SCHEMES[self.options.scheme](self.options)
        require_matches(self._selection, (*program.stages, *context.original.stages))
        program, numbers = chosen_part(program, self.options.part, self.name)
        several, done = len(numbers_at(program)) > 1, dict[str, _Done]()
        for number in numbers:
            part = alone(program, number)
            done[part.computing[0].original.name] = made = self._step(part, scheme, context, shared=several)
            program = put_back(program, made.program)
        sites = [name for each in done.values() for name in each.sites]
        refused = [refusal for each in done.values() for refusal in each.refused]
        program, hoisted = self._hoisted(program)
        changed = len(sites) + len(hoisted)
        details = {**self._options_read(scheme), "sites": sites, "hoisted_sites": hoisted, **_decided(done)}
        before = self._quantized_before(program, numbers, scheme) if not changed else []
        others = [Refusal(one.name, f"quantized before, in another way: {one.way}") for one in before if not one.same]
        identity = bool(before) and not others
        return PassResult(program, changed, (*others, *refused), identity=identity, details=details)

    def _quantized_before(self, program: Program, numbers: Sequence[int], scheme: Scheme) -> list[_Before]:
        """The chosen layers that another `quantize` has treated."""
        wanted = [(stage, _way(scheme)) for number in numbers for stage in alone(program, number).steps]
        if self.options.hoisted is not None:
            hoisted = _way(_weights_only(self.options.hoisted))
            wanted += [(stage, hoisted) for stage in program.stages if stage not in program.steps]
        return [
            _Before(name, way, way == own)
            for stage, own in wanted
            for name, way in quantized_layers(stage, self._selection).items()
        ]

    def _options_read(self, scheme: Scheme) -> dict[str, object]:
        """The options that had a say."""
        return {
            key: value for key, value in self.options.model_dump().items() if key in CHOOSING or key in scheme.reads
        }

    @property
    def _selection(self) -> Selection:
        return Selection(self.options.include, self.options.skip, self.options.min_tokens)

    def _groups(self, program: Program, scheme: Scheme) -> list[Group]:
        """The groups of the computing slots, with the weights that they have now."""
        return groups_of(program, self._selection, scheme.unfit)[0]

    def _step(self, program: Program, scheme: Scheme, context: Context, shared: bool) -> _Done:
        """Fold scales and rotations into what groups of the computing slots read, then replace their layers."""
        groups, refused = groups_of(program, self._selection, scheme.unfit)
        if not groups:
            return _Done(program, refused=refused)
        inputs = known_inputs(program, groups, scheme.need, context)
        scales = _scales(scheme, groups, inputs, context)
        if scales:
            program, smoothed, unscaled = smooth(program, groups, scales, scheme.scales_at_run_time, shared)
            inputs |= {key: inputs[key].divided(scales[key]) for key in smoothed}
            groups, refused = self._groups(program, scheme), [*refused, *unscaled]
        program, inputs, rotated = _rotated(program, groups, inputs, scheme, context.seed)
        groups = self._groups(program, scheme)
        decided = {**rotated, **scheme.prepare(program, groups, inputs, context)}
        if self.options.repair is not None and isinstance(scheme, RoundingScheme):
            repairs = repair_pairs(program, groups, lambda g: scheme.rounded(g, inputs.get(g.key)), context.seed)
            program, refused = repairs.program, [*refused, *repairs.refused]
            decided["repaired"] = repairs.errors
            groups = self._groups(program, scheme)
        realizations = _realizations(program, groups, inputs, scheme, context)
        pairs = list(zip(groups, realizations, strict=True))
        left = named(group for group, item in pairs if item is None)
        refused += [Refusal(name, "left in full precision by the scheme") for name in left]
        sites = named(group for group, item in pairs if item is not None)
        decided |= does_not_pay(pairs, scheme.name, context) if scheme.saves_time else {}
        return _Done(replaced(program, groups, realizations, _way(scheme)), sites, refused, decided)

    def _hoisted(self, program: Program) -> tuple[Program, list[str]]:
        """Smaller weights for the layers of the stages that do not run at every evaluation."""
        if self.options.hoisted is None:
            return program, []
        scheme, names = _weights_only(self.options.hoisted), list[str]()
        for stage in program.stages:
            if stage in program.steps:
                continue
            groups, _ = find_groups(stage, replace(self._selection, predicts=False), scheme.unfit)
            if groups:
                realized = [scheme.realize(group, None) for group in groups]
                small, _ = replaced_in(stage, groups, realized, _way(scheme))
                program = program.with_stage(small)
            names += named(groups)
        return program, names


def _weights_only(name: str) -> Scheme:
    """The scheme of the layers of stages that run once a request."""
    kind = WEIGHTS_ONLY[name]
    return kind(QuantizeOptions.model_validate({"scheme": kind.name, "activations": "float"}))


def _way(scheme: Scheme) -> str:
    """The scheme with the options that it reads: layers of the same way would come out the same."""
    options = scheme.options.model_dump(mode="json", include=set(scheme.reads))
    return ", ".join([scheme.name, *(f"{name} {value}" for name, value in sorted(options.items()))])


def _rotated(
    program: Program, groups: Sequence[Group], inputs: dict[str, Inputs], scheme: Scheme, seed: int
) -> tuple[Program, dict[str, Inputs], dict[str, object]]:
    """The program and what groups read with the rotations that help folded in, and the errors of all for the record."""
    tried = scheme.rotations(groups, inputs, seed)
    if not tried:
        return program, inputs, {}
    helping = {key: rotation for key, rotation in tried.items() if rotation.helps}
    turned = {key: inputs[key].rotated(item.heads.spread(item.matrix)) for key, item in helping.items()}
    errors = {group.name: tried[group.key].errors for group in groups if group.key in tried}
    return rotate(program, groups, helping) if helping else program, inputs | turned, {"rotated": errors}


def _scales(
    scheme: Scheme, groups: Sequence[Group], inputs: Mapping[str, Inputs], context: Context
) -> dict[str, torch.Tensor]:
    """The scale of each group that gets one."""
    found = {}
    for i, group in enumerate(groups):
        if group.key in inputs:
            context.progress("searching scales", i, len(groups))
            scale = scheme.scale(group, inputs[group.key])
            if scale is not None:
                found[group.key] = scale
    return found


def _realizations(
    program: Program, groups: Sequence[Group], inputs: Mapping[str, Inputs], scheme: Scheme, context: Context
) -> list[Realization | None]:
    """What takes the place of each group, None where the scheme leaves it."""
    if scheme.in_sequence:
        return realized_in_sequence(program, groups, inputs, scheme.realize, context.seed, context.progress)
    found = []
    for i, group in enumerate(groups):
        context.progress("quantizing", i, len(groups))
        found.append(scheme.realize(group, inputs.get(group.key)))
    return found


def _quantized(stages: Sequence[Stage]) -> bool:
    return any(node.target in QUANTIZED for stage in stages for node in stage.graph.graph.nodes)
