"""Compiler options for programs that run a few times on few numbers: there, optimizing takes longer than running."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import numpy as np

from ptqjax.kernels.platforms import current

SOON = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options under which LLVM does not optimize, and gets one module, without a detour of each fusion through MLIR: an
eighth of the time to compile, several times that to run. Each of the three halves it (jaxlib 0.10)."""
FEW_TIMES = SOON | {"xla_backend_optimization_level": 1}
"""Options under which some large programs compile in half the time and run as fast (MobileNetV2's correction: 2.0 s for
3.5), others twice as long: each has to be measured. On CPUs alone."""
FEW = 2**17
"""Elements of all arguments of a program that runs a few times, up to which those options pay."""


def brief_options(arrays: Any, *, few: int = FEW) -> dict[str, Any]:
    """Returns the compiler's options for a program that runs a few times on these arrays; {} for the usual ones.

    Args:
        arrays: The arguments.
        few: Up to how many elements they are few.
    """
    sizes = (int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(arrays))
    return dict(SOON) if sum(sizes) <= few and are_taken(SOON) else {}


def are_taken(options: Mapping[str, Any]) -> bool:
    """Tells whether the compiler that is in use knows these options: they are for CPUs, and versions drop some."""
    is_for_cpu = jax.default_backend() == "cpu" and current().platform == "cpu"
    return is_for_cpu and _are_known(tuple(sorted(options.items())))


@cache
def _are_known(options: tuple[tuple[str, Any], ...]) -> bool:
    try:
        jax.jit(_nothing).lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _nothing() -> int:
    return 0
