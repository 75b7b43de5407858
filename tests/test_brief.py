"""Options for programs that run a few times: only where the compiler knows them, and only on few numbers."""

import numpy as np

from ptqjax.kernels.brief import FEW_TIMES, SOON, are_taken, brief_options


def test_options_that_the_compiler_does_not_know_are_not_taken():
    assert are_taken({"xla_backend_optimization_level": 0})
    assert are_taken(SOON) == are_taken(FEW_TIMES)  # jaxlib 0.12 has dropped one of them
    assert not are_taken(SOON | {"xla_cpu_no_such_option": True})


def test_many_numbers_have_the_usual_options():
    arrays = {"a": np.zeros((4, 8)), "b": [np.zeros(3), np.float32(1)]}
    assert brief_options(arrays, few=36) == (SOON if are_taken(SOON) else {})
    assert brief_options(arrays, few=35) == {}
