"""The contract: which names exist, how they are called, and that importing them costs and changes nothing."""

import collections.abc
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ptqjax

ROOT = Path(__file__).parents[1]
REQUIRED = inspect.Parameter.empty

# Function: its parameters with their defaults, required ones in order (None: any name); more must have defaults.
SIGNATURES = {
    "read": [(None, REQUIRED)],
    "write": [("model", REQUIRED), (None, REQUIRED)],
    "apply": [("graph", REQUIRED), ("params", REQUIRED), ("inputs", REQUIRED)],
    "fold_batch_norms": [("model", REQUIRED)],
    "equalize": [("model", REQUIRED), ("absorb", "exact")],
    "calibrate": [("model", REQUIRED), ("batches", REQUIRED), ("config", None)],
    "simulate": [("model", REQUIRED), ("encodings", REQUIRED), ("arithmetic", "float")],
    "correct_biases": [("model", REQUIRED), ("encodings", REQUIRED), ("batches", REQUIRED)],
    "choose_encoding": [("samples", REQUIRED), ("dtype", "int8"), ("ranges", "sqnr")],
    "export": [("model", REQUIRED), ("encodings", REQUIRED), ("directory", REQUIRED), ("name", REQUIRED)],
    "quantize": [("model", REQUIRED), ("batches", REQUIRED), ("config", None)],
}
CONFIG = {
    "weights": "int8",
    "activations": "uint8",
    "granularity": "channel",
    "ranges": "sqnr",
    "equalize": True,
    "absorb": "exact",
    "correct": "empirical",
    "target": "ort-cpu",
}
# What signatures mention besides: Python's and NumPy's types, and aliases that stand for plain mappings and functions.
KNOWN = {
    *collections.abc.__all__,
    "Any",
    "None",
    "AbstractContextManager",
    "Array",
    "ModelProto",
    "Path",
    "PathLike",
} | {
    "Batches",
    "Configurations",
    "Follow",
    "GraphModule",
    "Runnable",
    "Simulation",
    "Strung",
    "Symmetry",
    "Tree",
}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120, cwd=ROOT
    ).stdout


def test_every_public_name_exists_and_says_what_it_is():
    things = {name: getattr(ptqjax, name) for name in ptqjax.__all__}
    assert [name for name, thing in things.items() if inspect.ismodule(thing) or not thing.__doc__] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_are_called_as_the_contract_says(name):
    parameters = inspect.signature(getattr(ptqjax, name)).parameters
    positional = [found for found in parameters.values() if found.kind is not found.KEYWORD_ONLY]
    required = [wanted for wanted, default in SIGNATURES[name] if default is REQUIRED]
    assert all(wanted in (None, found.name) for wanted, found in zip(required, positional, strict=False))
    assert len(positional) >= len(required)
    for wanted, default in SIGNATURES[name]:
        assert wanted is None or parameters[wanted].default == default
    more = [found for found in parameters.values() if found.name not in dict(SIGNATURES[name])]
    assert None in required or all(found.default is not REQUIRED for found in more)


def test_config_has_the_fields_and_defaults_of_the_contract():
    defaults = {field.name: field.default for field in dataclasses.fields(ptqjax.QuantizationConfig)}
    assert {name: defaults[name] for name in CONFIG} == CONFIG


@pytest.mark.parametrize("name", ["ptqjax.experiments", "ptqjax.files", "ptqjax.recipes"])
def test_a_namespace_gives_the_things_of_the_package(name):
    namespace = importlib.import_module(name)
    assert namespace.__all__
    assert {each: getattr(namespace, each) is getattr(ptqjax, each) for each in namespace.__all__} == dict.fromkeys(
        namespace.__all__, True
    )
    modules = {path.stem for path in Path(namespace.__file__).parent.glob("*.py")}
    assert namespace.__file__.endswith("files.py") or not modules & set(namespace.__all__)


def test_what_signatures_mention_is_public():
    """Of functions alone: an annotation that is a class of ours is a name that users can import from the top."""
    mentioned = {
        word
        for name in ptqjax.__all__
        if inspect.isfunction(thing := getattr(ptqjax, name))
        for annotation in thing.__annotations__.values()
        for word in re.findall(r"[A-Z]\w+", str(annotation))
    }
    assert mentioned - set(ptqjax.__all__) - KNOWN == set()


@pytest.mark.parametrize("name", ["experiments", "recipes"])
def test_result_types_stand_beside_their_functions(name):
    """What a room makes public is complete in its namespace: whoever imports from there can name what they get."""
    own = {each for each in ptqjax.__all__ if getattr(ptqjax, each).__module__.startswith(f"ptqjax.{name}.")}
    namespace = importlib.import_module(f"ptqjax.{name}")
    assert own <= set(namespace.__all__)
    stub = (ROOT / "ptqjax" / name / "__init__.pyi").read_text()
    assert set(re.findall(r" as (\w+)$", stub, re.MULTILINE)) == set(namespace.__all__)


def test_what_a_result_consists_of_is_public():
    fields = (str(field.type) for field in dataclasses.fields(ptqjax.Result))
    mentioned = {word for text in fields for word in re.findall(r"[A-Z]\w+", text)}
    assert mentioned - set(ptqjax.__all__) - KNOWN == set()


def test_documentation_names_every_public_name():
    documentation = (ROOT / "docs" / "architecture.md").read_text()
    assert [name for name in ptqjax.__all__ if f"`{name}" not in documentation] == []


def test_import_is_light():
    """No backend, no ONNX Runtime, no 64-bit mode, hardly any time: not even JAX is read before it is used."""
    code = """
import json, sys, time
start = time.perf_counter()
import ptqjax
seconds = time.perf_counter() - start
read = [name for name in ("jax", "onnx", "onnxruntime", "torch", "matplotlib") if name in sys.modules]
for name in ptqjax.__all__:
    getattr(ptqjax, name)
import jax
from jax._src import xla_bridge
runtime = "onnxruntime" in sys.modules
print(json.dumps([seconds, read, runtime, xla_bridge.backends_are_initialized(), jax.config.jax_enable_x64]))
"""
    seconds, read, runtime, backend, x64 = json.loads(run_python(code))
    assert seconds < 1  # measured: 0.02; the bound allows for a busy machine
    assert (read, runtime, backend, x64) == ([], False, False, False)


def test_no_module_has_the_name_of_a_public_function():
    package = Path(ptqjax.__file__).parent
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not modules & set(ptqjax.__all__)  # importing such a module would put it in the function's place


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match="fold_batch_norms"):
        _ = ptqjax.no_such_name


def test_version_is_that_of_the_package():
    assert ptqjax.__version__ == importlib.metadata.version("ptqjax")
