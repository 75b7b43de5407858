"""Names of a package that are looked up when they are first used."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__all__`, `__getattr__` and `__dir__` of a package whose names stand in the stub beside its file.

    The stub, which editors read, has a line `from module import name as name` for each public name: it is the one list.

    Args:
        package: The package's name.
        file: Its `__init__.py`, or the module that is one by itself.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    modules = {alias.name: node.module or "" for node in imports for alias in node.names}
    names = sorted(modules)

    def find(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415  (slow to import, seldom asked for)

            return version(package)
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'; it has {', '.join(names)}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return names, find, lambda: sorted({*vars(sys.modules[package]), *names})
