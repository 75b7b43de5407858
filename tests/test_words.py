"""Docstrings that can be read alone: a field's sentence names what it is of, and what they point to is there."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptqjax

PACKAGE = Path(__file__).parents[1] / "ptqjax"
LEANS = re.compile(r"(Of|The same|See|The others|How many there are|Those|As)\b")


def fields(source: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the docstring of each field of the classes in a module."""
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.ClassDef):
            for field, text in zip(found.body, found.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)
                ):
                    yield f"{found.name}.{ast.unparse(field.target)}", text.value.value


def test_a_fields_sentence_can_be_read_without_its_neighbours():
    leaning = [
        f"{path.relative_to(PACKAGE)}: {name}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, text in fields(path.read_text())
        if LEANS.match(text)
    ]
    assert leaning == []


@pytest.mark.parametrize("name", ["fit/learned_rounding.py", "fit/trials.py", "report/measure.py"])
def test_every_field_has_a_sentence(name):
    source = (PACKAGE / name).read_text()
    every = {
        f"{found.name}.{ast.unparse(field.target)}"
        for found in ast.walk(ast.parse(source))
        if isinstance(found, ast.ClassDef)
        for field in found.body
        if isinstance(field, ast.AnnAssign)
    }
    assert every - {field for field, _ in fields(source)} == set()


def test_a_sentence_that_leans_is_found():
    (found,) = fields('class A:\n    x: int\n    """Of x^2."""')
    assert LEANS.match(found[1])


ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
DOTTED = re.compile(r"`((?:ptqjax\.)?[a-z_]+(?:\.\w+)+)")
FILES = re.compile(r".*\.(html|json|md|npz|onnx|pyi?|toml|zip)")
SETTINGS = {f"config.{field.name}" for field in dataclasses.fields(ptqjax.QuantizationConfig)}
METADATA = {"ptqjax.grids", "ptqjax.version"}  # keys of files


def docstrings(source: str) -> Iterator[str]:
    """Yields the texts that stand as statements of their own: docstrings of modules, functions, classes and fields."""
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.Expr) and isinstance(found.value, ast.Constant) and isinstance(found.value.value, str):
            yield found.value.value


def is_there(name: str) -> bool:
    """Tells whether a dotted name is a module of the package, or what one holds."""
    parts = name.removeprefix("ptqjax.").split(".")
    found, length = ptqjax, len(parts)
    for length in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["ptqjax", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[length:]:
        found = getattr(found, part, None)
    return found is not None


def lost(text: str) -> list[str]:
    """The dotted names in backticks that begin like a room, or a public function, and lead nowhere."""
    names = {name for name in DOTTED.findall(text) if name.split(".")[0] in {"ptqjax", *ROOMS, *ptqjax.__all__}}
    return sorted(name for name in names - SETTINGS - METADATA if not FILES.fullmatch(name) and not is_there(name))


def test_dotted_names_lead_to_modules_and_what_they_hold():
    texts = [(path, text) for path in sorted(PACKAGE.rglob("*.py")) for text in docstrings(path.read_text())]
    texts += [(path, path.read_text()) for path in sorted((PACKAGE.parent / "docs").glob("*.md"))]
    assert {f"{path.name}: {name}" for path, text in texts for name in lost(text)} == set()


def test_a_dotted_name_that_leads_nowhere_is_found():
    assert lost("as `quantize.bias`, `fit.rounding.solved` and `ptqjax.nowhere.x`, or `fit.rounding.Solving`") == [
        "fit.rounding.solved", "ptqjax.nowhere.x", "quantize.bias"
    ]  # fmt: skip
