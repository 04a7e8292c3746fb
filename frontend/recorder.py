"""A recorder on the denoiser and the scheduler of a diffusers pipeline: how they are really called, step by step.

The denoiser answers with noise, so a step costs next to nothing and all of them are watched. Each is handed on when
the scheduler has made it and then dropped: only what a caller keeps stays in memory.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from ..loop.errors import UsageError
from .dense import dense_arguments
from .draws import drawing, noting

NOT_ITS_OWN = ("model_output", "timestep", "sample", "generator", "return_dict", "kwargs")
"""Arguments of a scheduler's step that every loop gives."""


@dataclass(frozen=True)
class Call:
    """One denoiser call: its arguments by name, what was answered, and which of several networks it was."""

    arguments: dict[str, Any]
    output: torch.Tensor
    network: int = 0


@dataclass
class Step:
    """The denoiser calls before one scheduler step, and the step.

    Attributes:
        calls: calls in their order.
        timestep: what the scheduler was given.
        guided: the output the scheduler was given, guidance applied.
        sample: the latent it was given.
        arguments: the others it was given, such as `eta`.
        result: the latent it answered with.
        draws: the noise that it drew.
        networks: other networks of the pipeline that ran since the step before, name -> class; in the first step
            those that ran behind its first denoiser call.
    """

    calls: list[Call] = field(default_factory=list)
    timestep: float = 0.0
    guided: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    sample: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: dict[str, Any] = field(default_factory=dict)
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    draws: tuple[torch.Tensor, ...] = ()
    networks: dict[str, str] = field(default_factory=dict)


@dataclass
class Recording:
    """What a pipeline did around its steps.

    Attributes:
        set_timesteps: arguments of the scheduler's `set_timesteps`.
        begin_index: where the scheduler was told to begin.
        taken: how many steps the scheduler made.
        rest: denoiser calls behind the last of them.
    """

    set_timesteps: dict[str, Any] = field(default_factory=dict)
    begin_index: int | None = None
    taken: int = 0
    rest: int = 0


OnStep = Callable[[Recording, Step], None]
LARGER, APART = 1.15, 0.03
"""Of noise that is answered in a denoiser's place: how much larger that of one branch is, and how far apart they are."""


@contextmanager
def recording(
    denoisers: Sequence[torch.nn.Module],
    scheduler: Any,
    networks: Mapping[str, Any],
    on_step: OnStep,
    *,
    answer: bool = True,
    tokens: int = 0,
) -> Iterator[Recording]:
    """Watch every step that a pipeline makes within.

    Args:
        denoisers: its network, and others of its class that may take its place. Each runs once for each form of its
            arguments, to learn what it returns; every call is answered with noise of that form: the branches of guidance
            then differ clearly, whatever the weights.
        scheduler: its scheduler, which makes its steps.
        networks: its components by name; those that are no modules are left aside.
        on_step: called when the scheduler has made a step.
        answer: whether the denoiser is answered for; False lets it run.
        tokens: number of tokens that a prompt may have, where the denoiser takes each prompt at its own length.

    Raises:
        UsageError: within the pipeline, where it sets another grid on its way.
    """
    recorder = _Recorder(denoisers, scheduler, networks, on_step, answer, tokens)
    hook = register_module_forward_pre_hook(recorder.ran)
    patches: list[tuple[Any, str, Any]] = [
        *((network, "forward", partial(recorder.forward, i)) for i, network in enumerate(denoisers)),
        (scheduler, "set_timesteps", recorder.set_timesteps),
        (scheduler, "step", recorder.step),
    ]
    if hasattr(scheduler, "set_begin_index"):
        patches.append((scheduler, "set_begin_index", recorder.set_begin_index))
    before = [vars(owner).get(name) for owner, name, _ in patches]
    for owner, name, patched in patches:
        object.__setattr__(owner, name, _like(getattr(owner, name), patched))
    try:
        yield recorder.found
    finally:
        for (owner, name, _), old in zip(patches, before, strict=True):
            if old is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, old)
        hook.remove()
        recorder.found.rest = len(recorder.current.calls)


def _like(original: Callable[..., Any], patched: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the signature of the original, which pipelines ask for; it is given the original first."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return patched(original, *args, **kwargs)

    wrapper.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return wrapper


class _Recorder:
    """What stands in the place of a denoiser's and a scheduler's methods."""

    def __init__(
        self,
        denoisers: Sequence[torch.nn.Module],
        scheduler: Any,
        networks: Mapping[str, Any],
        on_step: OnStep,
        answer: bool,
        tokens: int,
    ):
        self._denoisers, self._scheduler, self._tokens = denoisers, scheduler, tokens
        self.found, self.current = Recording(), Step()
        self._on_step, self._answer = on_step, answer
        self._names = {
            id(part): (name, type(network).__name__)
            for name, network in networks.items()
            if isinstance(network, torch.nn.Module) and all(network is not one for one in denoisers)
            for part in network.modules()
        }
        self._own = {id(part) for denoiser in denoisers for part in denoiser.modules()}
        self._forms: dict[str, Any] = {}
        self._generator = torch.Generator().manual_seed(0)

    @property
    def _in_loop(self) -> bool:
        return self.found.taken > 0 or bool(self.current.calls)

    def ran(self, module: torch.nn.Module, _: Any) -> None:
        """Note another network of the pipeline; modules that belong to none are its own business."""
        if self._in_loop and id(module) in self._names and id(module) not in self._own:
            name, kind = self._names[id(module)]
            self.current.networks[name] = kind

    def forward(self, network: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """That of the denoiser of a number."""
        arguments = _cloned(dict(inspect.signature(original).bind(*args, **kwargs).arguments))
        arguments |= arguments.pop("kwargs", {}) if isinstance(arguments.get("kwargs"), dict) else {}
        answer = self._noise(network, original, args, kwargs) if self._answer else original(*args, **kwargs)
        arguments = dense_arguments(self._denoisers[network], arguments, self._tokens)
        self.current.calls.append(Call(arguments, _first(answer), network))
        return answer

    def _noise(self, network: int, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        form = repr((network, pytree.tree_map(_form, (args, kwargs))))
        if form not in self._forms:
            with torch.no_grad():
                self._forms[form] = pytree.tree_map(_sizes, original(*args, **kwargs))
        leaves, structure = pytree.tree_flatten(self._forms[form])
        forms = [leaf for leaf in leaves if isinstance(leaf, _Form)]
        answers = (self._drawn(one, forms) if isinstance(one, _Form) else one for one in leaves)
        return pytree.tree_unflatten(list(answers), structure)

    def _drawn(self, form: _Form, forms: list[_Form]) -> torch.Tensor:
        """Noise of a form: independent in the first step, nearly the same for both branches in those to come.

        So guidance that follows the sizes of the branches is seen where it makes its output smaller, and where larger: in
        every other step, and every other sample, the branch that comes first is the larger one.
        """
        own = torch.randn(form.sizes, generator=self._generator)
        if self.found.taken == 0 or not form.sizes:
            return own
        alone = len(forms) == 1  # its rows are samples; else each tensor is one
        common = self._common((1, *form.sizes[1:]) if alone else form.sizes)
        rows = torch.arange(form.sizes[0]) if alone else torch.tensor([_place(form, forms)])
        turn = (rows >= (len(rows) if alone else len(forms)) / 2).int() + len(self.current.calls) + self.found.taken
        larger = torch.where(turn % 2 == 0, LARGER, 1.0).reshape(-1, *(1,) * (len(form.sizes) - 1))
        return larger * common + APART * own

    def _common(self, sizes: tuple[int, ...]) -> torch.Tensor:
        """Noise that all calls of a step share."""
        generator = torch.Generator().manual_seed(self.found.taken)
        return torch.randn(sizes, generator=generator)

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's."""
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        step, self.current = self.current, Step()
        step.timestep = _one_number(given["timestep"])
        step.guided, step.sample = given["model_output"].clone(), given["sample"].clone()
        step.arguments = {name: value for name, value in given.items() if name not in NOT_ITS_OWN}
        drawn: list[torch.Tensor] = []
        with drawing(self._scheduler, noting(drawn)):
            answer = original(*args, **kwargs)
        step.draws = tuple(drawn)
        step.result = (answer[0] if isinstance(answer, tuple) else answer.prev_sample).clone()
        self._on_step(self.found, step)
        self.found.taken += 1
        return answer

    def set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The scheduler's."""
        if self._in_loop:
            raise UsageError(
                f"step {self.found.taken + 1}: the pipeline sets another grid on its way (set_timesteps); the fold holds "
                "one grid from noise to sample. Write a loop.yaml for the denoiser alone."
            )
        self.found.set_timesteps = copy.deepcopy(dict(inspect.signature(original).bind(*args, **kwargs).arguments))
        return original(*args, **kwargs)

    def set_begin_index(self, original: Callable[..., Any], begin_index: int = 0) -> Any:
        """The scheduler's."""
        self.found.begin_index = begin_index
        return original(begin_index)


def _first(answer: Any) -> torch.Tensor:
    """The first tensor of what a denoiser answers; of a list with one for each sample [B, ...], all of them."""
    first = answer[0] if isinstance(answer, tuple) else answer
    samples = first if isinstance(first, list) else next(iter(first.values())) if isinstance(first, dict) else None
    if isinstance(samples, list):
        return torch.stack(samples)
    return next(leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)).clone()


@dataclass(frozen=True)
class _Form:
    """A tensor without its values."""

    sizes: tuple[int, ...]


def _place(form: _Form, forms: list[_Form]) -> int:
    """Which of several tensors a form is."""
    return next(i for i, one in enumerate(forms) if one is form)


def _sizes(leaf: Any) -> Any:
    return _Form(tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else leaf


def _form(leaf: Any) -> Any:
    """What of an argument decides the form of an answer: sizes and switches, no numbers."""
    return _sizes(leaf) if leaf is None or isinstance(leaf, torch.Tensor | bool | str) else type(leaf)


def _one_number(timestep: Any) -> float:
    values = torch.as_tensor(timestep).flatten()
    if not bool((values == values[0]).all()):
        raise UsageError(
            f"the pipeline gives its scheduler a timestep for each of {len(values)} tokens or samples; the fold holds one "
            "for all. Write a loop.yaml for the denoiser alone."
        )
    return float(values[0])


def _cloned(values: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, values)
