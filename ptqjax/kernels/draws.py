"""Random keys that are made where they are used: made outside of a compiled program, a key is three programs more."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

_WORD = 2**32 - 1


class Draw(NamedTuple):
    """What decides about a key: two numbers, an argument of the program that draws."""

    seed: Any
    """The seed, uint32."""
    number: Any
    """Which of the seed's keys, uint32."""

    @staticmethod
    def of(seed: int, number: int) -> Draw:
        """Returns the draw, on NumPy; of larger integers the lowest 32 bits count, as JAX has it by default."""
        return Draw(np.uint32(seed & _WORD), np.uint32(number & _WORD))

    def key(self) -> Any:
        """Returns `jax.random.fold_in(jax.random.key(seed), number)`, to be traced."""
        return jax.random.fold_in(jax.random.key(self.seed), self.number)
