"""Docstrings that can be read alone: a field's sentence names what it is of, and does not lean on its neighbour."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


def test_a_sentence_that_leans_is_found():
    (found,) = fields('class A:\n    x: int\n    """Of x^2."""')
    assert LEANS.match(found[1])
