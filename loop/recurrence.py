"""Recurrence: a sampler written as a linear recurrence.

With i counting denoiser *calls* (Heun makes two a step), v_i the guided outputs and n_d the draws of noise that a
stochastic sampler adds on its way,

    v_i = f(c_i x[i], t_i)    x[i+1] = a_i x[i] + sum_{j<=i} b_ij v_j + sum_d e_id n_d    x[0] = g noise

`stepfold.frontend.sampler` finds (a, b, c, t, g) by probing a diffusers scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Recurrence:
    """A sampler without thresholding over S calls.

    Attributes:
        timesteps: [S] the value the denoiser receives at each call.
        input_scale: [S] c, multiplies the latent before it enters the denoiser.
        state: [S] a.
        outputs: [S, S] b, lower triangular: row i weighs the outputs v_0..v_i in x[i+1].
        initial_scale: g, multiplies the standard normal noise (`init_noise_sigma`).
        noise: [S, D] e, weights of the D draws of standard normal noise; [S, 0] for a deterministic sampler.
    """

    timesteps: Array
    input_scale: Array
    state: Array
    outputs: Array
    initial_scale: float
    noise: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        S = len(self.timesteps)
        object.__setattr__(self, "noise", of_draws(self.noise, S))
        shapes = (self.timesteps.shape, self.input_scale.shape, self.state.shape, self.outputs.shape)
        if shapes != ((S,), (S,), (S,), (S, S)):
            raise ValueError(f"a recurrence of {S} calls needs shapes [S], [S], [S], [S, S]; received {shapes}")
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
        """How many outputs, the newest included, an update may read."""
        rows, columns = np.nonzero(self.outputs)
        return int((rows - columns).max(initial=0)) + 1

    def timesteps_as(self, dtype: str) -> Array:
        """[S] timesteps as the denoiser takes them; see `as_timesteps`."""
        return as_timesteps(self.timesteps, dtype)


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


def one_number(array: Array) -> float:
    """The number of an array [1]; raises ValueError for any other array."""
    if array.shape != (1,):
        raise ValueError(f"expected one number; received shape {list(array.shape)}")
    return float(array[0])


def as_timesteps(timesteps: Array, dtype: str) -> Array:
    """Timesteps in a dtype; 979.99997, a float32 grid's 980, must not become the integer 979."""
    return (np.rint(timesteps) if np.issubdtype(dtype, np.integer) else timesteps).astype(dtype)
