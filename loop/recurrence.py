"""Recurrence: a sampler written as a linear recurrence.

With i counting denoiser *calls* (Heun makes two a step), v_i the guided outputs and n_d the draws of noise that a
stochastic sampler adds on its way,

    v_i = f(c_i x[i], t_i)    x[i+1] = a_i x[i] + sum_{j<=i} b_ij v_j + sum_d e_id n_d    x[0] = g noise

A sampler that clips what it predicts adds `sum_{j<=i} w_ij f_j` with the bounded predictions f_j (see `forms`).
`stepfold.frontend.sampler` finds all these numbers by probing a diffusers scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .forms import Prediction

Array = np.ndarray
PREDICTION = "prediction"


@dataclass(frozen=True, eq=False)
class Recurrence:
    """A sampler over S calls.

    Attributes:
        timesteps: [S] the value the denoiser receives at each call.
        input_scale: [S] c, multiplies the latent before it enters the denoiser.
        state: [S] a.
        outputs: [S, S] b, lower triangular: row i weighs the outputs v_0..v_i in x[i+1].
        initial_scale: g, multiplies the standard normal noise (`init_noise_sigma`).
        noise: [S, D] e, weights of the D draws of standard normal noise; [S, 0] for a deterministic sampler.
        prediction: bounded samples that the updates weigh too; None for a sampler that bounds nothing.
        strength: [S] share of the guidance that each call has, see `GuidanceSpec`; all ones where it is the same.
    """

    timesteps: Array
    input_scale: Array
    state: Array
    outputs: Array
    initial_scale: float
    noise: Array = field(default_factory=lambda: np.zeros((0, 0)))
    prediction: Prediction | None = None
    strength: Array = field(default_factory=lambda: np.ones(0))

    def __post_init__(self) -> None:
        S = len(self.timesteps)
        object.__setattr__(self, "noise", of_draws(self.noise, S))
        object.__setattr__(self, "strength", of_calls(self.strength, S))
        shapes = (self.timesteps.shape, self.input_scale.shape, self.state.shape, self.outputs.shape)
        if shapes != ((S,), (S,), (S,), (S, S)):
            raise ValueError(f"a recurrence of {S} calls needs shapes [S], [S], [S], [S, S]; received {shapes}")
        if self.prediction is not None and len(self.prediction.latent) != S:
            raise ValueError(f"a recurrence of {S} calls has predictions of {len(self.prediction.latent)}")
        if not np.allclose(self.outputs, np.tril(self.outputs)):
            raise ValueError("a recurrence may only read outputs that exist: b must be lower triangular")

    @property
    def calls(self) -> int:
        """S, the number of denoiser calls."""
        return len(self.timesteps)

    @property
    def draws(self) -> int:
        """D, how often noise is drawn on the way."""
        return self.noise.shape[1]

    @property
    def depth(self) -> int:
        """How many outputs, or predictions, the newest included, an update may read."""
        weighed = [self.outputs] if self.prediction is None else [self.outputs, self.prediction.weights]
        ages = [rows - columns for rows, columns in map(np.nonzero, weighed)]
        return int(np.concatenate(ages).max(initial=0)) + 1

    def guided_by(self, strength: Sequence[float] | None) -> Recurrence:
        """The recurrence with a strength for each call; one of another number of calls is spread over these.

        Args:
            strength: share of the guidance for each call, see `GuidanceSpec`; None leaves all calls alike.
        """
        if strength is None:
            return self
        nearest = ((np.arange(self.calls) + 0.5) * len(strength) / self.calls).astype(np.int64)
        return replace(self, strength=np.asarray(strength, np.float64)[nearest])

    def scales(self, scale: float | None) -> Array:
        """[S] the guidance scale of each call where the loop has this one; 1 where it has none."""
        if scale is None:
            return np.ones(self.calls)
        return np.where(self.strength == 1.0, scale, 1.0 + self.strength * (scale - 1.0))

    def arrays(self) -> dict[str, Array]:
        """The recurrence as named arrays, for `tables.safetensors`."""
        numbers = ("timesteps", "input_scale", "state", "outputs")
        predicted = {} if self.prediction is None else self.prediction.arrays()
        return {
            **{name: getattr(self, name).astype(np.float64) for name in numbers},
            "initial_scale": np.asarray([self.initial_scale], np.float64),
            **({"noise": self.noise.astype(np.float64)} if self.draws else {}),
            **({"strength": self.strength.astype(np.float64)} if (self.strength != 1.0).any() else {}),
            **{f"{PREDICTION}/{name}": value for name, value in predicted.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Recurrence:
        """Rebuild a recurrence from `arrays()`."""
        return cls(
            timesteps=arrays["timesteps"],
            input_scale=arrays["input_scale"],
            state=arrays["state"],
            outputs=arrays["outputs"],
            initial_scale=one_number(arrays["initial_scale"]),
            noise=arrays.get("noise", np.zeros((0, 0))),
            prediction=Prediction.from_arrays(below(PREDICTION, arrays)),
            strength=arrays.get("strength", np.ones(0)),
        )

    def timesteps_as(self, dtype: str) -> Array:
        """[S] timesteps as the denoiser takes them; see `as_timesteps`."""
        return as_timesteps(self.timesteps, dtype)


def below(group: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays whose names begin with a group, by the rest of their names."""
    return {name.removeprefix(f"{group}/"): value for name, value in arrays.items() if name.startswith(f"{group}/")}


def of_draws(weights: Array, rows: int) -> Array:
    """Weights [rows, D] of draws; what is empty stands for none.

    Raises:
        ValueError: they are of another number of rows.
    """
    if weights.size == 0:
        return np.zeros((rows, 0))
    if weights.ndim != 2 or len(weights) != rows:
        raise ValueError(f"weights of draws must be [{rows}, D]; received {list(weights.shape)}")
    return weights


def of_calls(values: Array, calls: int) -> Array:
    """Numbers [calls], one for each call; what is empty stands for ones.

    Raises:
        ValueError: they are of another number of calls, or are not finite.
    """
    if values.size == 0:
        return np.ones(calls)
    if values.shape != (calls,) or not np.isfinite(values).all():
        raise ValueError(f"expected {calls} finite numbers, one for each call; received shape {list(values.shape)}")
    return values


def one_number(array: Array) -> float:
    """The number of an array [1]; raises ValueError for any other array."""
    if array.shape != (1,):
        raise ValueError(f"expected one number; received shape {list(array.shape)}")
    return float(array[0])


def as_timesteps(timesteps: Array, dtype: str) -> Array:
    """Timesteps in a dtype; 979.99997, a float32 grid's 980, must not become the integer 979."""
    return (np.rint(timesteps) if np.issubdtype(dtype, np.integer) else timesteps).astype(dtype)
