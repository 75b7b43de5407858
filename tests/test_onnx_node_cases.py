"""ONNX's own cases: the oracle of what each operator means, in every group but strings and training."""

import re
from functools import cache

import pytest

from tests import onnx_cases

# What does not pass, by the case's name (a regular expression) -> reason. Strict: a row that passes is an error.
_LEFT_OUT = {
    r"test_bernoulli": "draws random numbers; a pure function without a key has none",
    r"test_training_dropout(_default)?(_mask)?$": "drops at random; a pure function without a key cannot",
    r"test_attention_(3d_causal|4d_(attn_mask_)?causal|4d_(causal_)?padded_kv)_bf16": "the expected values carry the "
    "oracle's own rounding to bfloat16 at each step, and rtol is an eighth of one; in float64 both are equally far off",
    r"test_causal_conv_with_state_silu_fp16_expanded": "three elements are one step of float16 away, and rtol is one",
}


def _marked(case):
    reasons = [reason for pattern, reason in _LEFT_OUT.items() if re.match(pattern, case.name)]
    marks = [pytest.mark.xfail(reason=reasons[0], strict=True)] if reasons else []
    if case.name.endswith("_expanded"):  # a quarter of the cases and a third of the time; each has its operator's case
        marks.append(pytest.mark.slow)
    return pytest.param(case, id=case.name, marks=marks)


def _cases():
    cases = [case for kind in onnx_cases.KINDS for case in onnx_cases.load(kind)]
    return [_marked(case) for case in cases if onnx_cases.group_of(case) != "string" and not _is_training(case)]


def _is_training(case):
    return any("training" in node.domain for node in onnx_cases.model_of(case).graph.node)


_TOGETHER = 40  # cases in a program


@pytest.fixture(scope="module")
def results_of(request):
    """Returns a function from a case to its results, which are computed together with those of its neighbours."""
    items = [item for item in request.session.items if item.function is test_the_case_passes]
    cases = [item.callspec.params["case"] for item in items]
    places = {case.name: place // _TOGETHER for place, case in enumerate(cases)}

    @cache
    def results(place):
        return onnx_cases.results_together(cases[place * _TOGETHER : (place + 1) * _TOGETHER])

    return lambda case: results(places[case.name]).get(case.name)


@pytest.mark.parametrize("case", _cases())
def test_the_case_passes(case, results_of):
    results = results_of(case)
    if results is None:
        onnx_cases.run(case)
    else:
        onnx_cases.check(case, results)


def test_each_reason_is_one_of_a_case():
    names = [case.name for kind in onnx_cases.KINDS for case in onnx_cases.load(kind)]
    unused = [pattern for pattern in _LEFT_OUT if not any(re.match(pattern, name) for name in names)]
    assert not unused
