"""ONNX's own cases: the oracle of what each operator means, in every group but strings and training."""

import re

import pytest

from tests import onnx_cases

# What does not pass, by the case's name (a regular expression) -> reason. Strict: a row that passes is an error.
_LEFT_OUT = {
    r"test_bernoulli(_double|_seed)?(_expanded)?$": "draws random numbers, which a pure function without a key has not",
}


def _marked(case):
    reasons = [reason for pattern, reason in _LEFT_OUT.items() if re.match(pattern, case.name)]
    marks = [pytest.mark.xfail(reason=reasons[0], strict=True)] if reasons else []
    return pytest.param(case, id=case.name, marks=marks)


def _cases():
    node = [case for case in onnx_cases.load("node") if onnx_cases.group_of(case) not in {"string", "training"}]
    others = [case for kind in ("simple", "pytorch-operator", "pytorch-converted") for case in onnx_cases.load(kind)]
    return [_marked(case) for case in (*node, *others)]


@pytest.mark.parametrize("case", _cases())
def test_the_case_passes(case):
    onnx_cases.run(case)


def test_each_reason_is_one_of_a_case():
    names = [case.name for kind in onnx_cases.KINDS for case in onnx_cases.load(kind)]
    unused = [pattern for pattern in _LEFT_OUT if not any(re.match(pattern, name) for name in names)]
    assert not unused
