"""The names that users have: nodes beside tensors, in rules, files and options, and what is said where none matches."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from ptqjax import onnx_io
from ptqjax.commands import cli
from ptqjax.config import QuantizationConfig, Rule, config_from_toml, config_to_toml
from ptqjax.errors import ConfigError, ModelError
from ptqjax.ir import Model, rebuild
from ptqjax.placement.place import place
from tests.test_placement import CONV, SAME, build, floats, plan

NAMES = {"c1": "/body/Conv", "r": "/body/Relu", "c2": "/head/Conv", "t": "/head/Reshape", "y": "/head/Gemm"}


def net() -> Model:
    """A body and a head whose nodes have names, but for one; what the last layer reads was moved there."""
    found = build(
        ("Conv", "x w1 b1", "c1", SAME), ("Relu", "c1", "r"), ("Conv", "r w2 b2", "c2", SAME), ("Sigmoid", "c2", "s"),
        ("Flatten", "s", "t"), ("Gemm", "t g", "y"),
        w1=CONV["w"], b1=CONV["b"], w2=CONV["w"], b2=CONV["b"], g=floats(144, 3),
    )  # fmt: skip
    return rebuild(found, nodes=[replace(node, name=NAMES.get(node.output, "")) for node in found.graph.nodes])


def left_in_float(**settings) -> set[str]:
    """What the settings leave in float that is rounded or an integer without them."""
    before, after = (plan(place(net(), QuantizationConfig(**each))) for each in ({}, settings))
    return {tensor for tensor, what in after.items() if what == "float" != before[tensor]}


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("/head/Conv", {"w2", "b2", "r", "c2"}),
        ("/body/*", {"x", "w1", "b1", "r", "b2", "c2"}),  # what reads it runs in float, and gains nothing by rounding
        ("re:.*/Gemm", {"t", "s", "g", "y"}),  # rounded before it was moved, its input would be rounded all the same
        ("s", {"c2", "s", "t"}),  # a node without a name is called as what it produces; what is moved on follows it
    ],
)
def test_a_node_in_float_is_its_weight_its_inputs_and_its_result(pattern: str, left: set[str]) -> None:
    assert left_in_float(exclude_nodes=(pattern,)) == left
    assert left_in_float(rules=(Rule(nodes=(pattern,), enabled=False),)) == left
    reasons = {each.tensor: each.reason for each in place(net(), QuantizationConfig(exclude_nodes=(pattern,))).skipped}
    assert any(reasons[name] == f"excluded with the nodes {pattern!r}" for name in left)


def test_a_rule_for_nodes_sets_their_weights_or_their_activations() -> None:
    rule = Rule(nodes=("/head/*",), of="weights", dtype="int4")
    found = {site.tensor: site.dtype for site in place(net(), QuantizationConfig(rules=(rule,))).sites}
    assert {name for name, dtype in found.items() if dtype == "int4"} == {"w2", "g"}
    rule = Rule(nodes=("/head/Conv",), operators=("Conv",), of="activations", dtype="uint16")
    found = {site.tensor: site.dtype for site in place(net(), QuantizationConfig(rules=(rule,))).sites}
    assert {name for name, dtype in found.items() if dtype == "uint16"} == {"c2"}


def test_names_of_nodes_stand_in_files_of_settings() -> None:
    config = QuantizationConfig(exclude_nodes=("/head/*",), rules=(Rule(nodes=("/body/*",), dtype="int4"),))
    assert config_from_toml(config_to_toml(config)) == config


NOTHING_MATCHES = {
    "the name of a node": ({"exclude": ("/head/Conv",)}, "'/head/Conv' produces 'c2'; name these tensors, or write"),
    "a pattern of nodes": ({"exclude": ("/head/C*",)}, "'/head/Conv' produces 'c2'"),
    "a tensor among nodes": ({"exclude_nodes": ("c2",)}, "'c2' is of '/head/Conv'; name these nodes, or the tensor"),
    "a weight among nodes": ({"exclude_nodes": ("w2",)}, "'w2' is of '/head/Conv'"),
    "a typo": ({"exclude_nodes": ("/heat/Conv",)}, "matches none of 6 nodes; near names: /head/Conv"),
    "a typo in a pattern": ({"exclude_nodes": ("/haed/Con*",)}, "near names: /head/Conv"),
    "a part": ({"exclude_nodes": ("*GEMM*1",)}, "near names: /head/Gemm"),
    "nothing like it": ({"exclude": ("nosuch*",)}, "none of 12 tensors; the first are .*inspect MODEL.onnx` lists all"),
    "in a rule": ({"rules": (Rule(nodes=("q",), enabled=False),)}, "rules: the pattern 'q' matches none of 6 nodes"),
}


@pytest.mark.parametrize(("settings", "message"), NOTHING_MATCHES.values(), ids=NOTHING_MATCHES)
def test_a_name_that_matches_nothing_is_answered_with_names(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(net(), QuantizationConfig(**settings))


def test_a_damaged_expression_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"exclude: 're:\(' is no regular expression"):
        QuantizationConfig(exclude=("re:(",))
    with pytest.raises(ConfigError, match=r"exclude_nodes: 're:\(' is no regular expression"):
        QuantizationConfig(exclude_nodes=("re:(",))


def test_a_tensor_made_twice_is_said_so_and_by_whom() -> None:
    proto = onnx_io.to_proto(net())
    proto.graph.node[2].output[0] = "r"  # the second convolution, which reads it as well
    with pytest.raises(ModelError, match=r"'r' is produced 2 times, by Relu '/body/Relu'.* and by Conv '/head/Conv'"):
        onnx_io.read(proto)


RULES = 'equalize = false\n\n[[rules]]\nnodes = ["/head/*"]\ndtype = "int4"\nof = "weights"\n\n[[rules]]\n'


@pytest.mark.parametrize(
    ("rule", "place_of_it"),
    [
        ('nodes = ["/tail/*"]\nenabled = false', "line 9: rules: the pattern '/tail/\\*' matches none"),
        ('dtype = "int4"\ntensors = ["w7"]', "line 10: rules: the pattern 'w7' matches none"),
        ('operators = ["Gemm"]\nof = "inputs"\nenabled = false', "line 8: rules: no tensor meets all conditions"),
        ('tensors = ["c1"]\ndtype = "uint16"', "line 8: rules: .*'c1' stays in float"),
    ],
)
def test_a_rule_of_a_file_that_matches_nothing_names_file_and_line(tmp_path, rule: str, place_of_it: str) -> None:
    onnx_io.write(net(), tmp_path / "net.onnx")
    (tmp_path / "settings.toml").write_text(RULES + rule)
    asked = ["inspect", str(tmp_path / "net.onnx"), "--config", str(tmp_path / "settings.toml")]
    found = CliRunner().invoke(cli.commands, asked)
    assert found.exit_code == 2
    with pytest.raises(ConfigError, match=f"settings.toml, {place_of_it}"):
        raise ConfigError(" ".join(found.stderr.split()))
