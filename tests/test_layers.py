"""Imports point downwards only: the table of the design, held against every module of the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ptqjax"

# Per level: the modules on it, and what they may import besides those of the first; None: whatever stands above it.
BASIS = {"errors", "lazy", "mapped", "places", "pytrees"}
LEVELS: list[tuple[tuple[str, ...], set[str] | None]] = [
    (tuple(sorted(BASIS)), set()),
    (("kernels", "ir", "config", "targets", "publish", "versions", "stopwatch"), set()),
    (("metrics",), {"config"}),
    (("progress",), {"stopwatch"}),
    (("programs",), {"versions"}),
    (("ops",), {"kernels"}),
    (("onnx_io",), {"ir", "ops"}),
    (("transforms",), {"ir", "kernels"}),
    (("lowering",), {"ir", "kernels", "ops"}),
    (("encodings",), {"ir", "kernels", "config"}),
    (("placement",), {"ir", "kernels", "config", "transforms", "lowering", "encodings"}),
    (("qdq",), {"ir", "kernels", "config", "transforms", "encodings", "placement"}),
    (("data",), {"ir", "config", "metrics", "placement"}),
    (("ranges",), {"ir", "kernels", "config", "transforms", "lowering", "encodings", "placement", "data"}),
    (("simulation",), {"ir", "lowering", "encodings", "qdq"}),
    (("bridges",), {"ir", "lowering", "encodings", "placement", "qdq", "simulation"}),
    (("encoding_files",), {"ir", "kernels", "config", "onnx_io", "encodings", "placement", "qdq"}),
    (("captured",), {"ir", "lowering", "encodings", "qdq", "simulation", "publish"}),
    (("exporting",), {"ir", "config", "onnx_io", "encodings", "qdq", "encoding_files", "publish", "versions"}),
    (("agreement", "fit"), None),
    (("outputs", "decoders"), None),
    (("evaluation",), None),
    (("drafts", "exportable"), None),
    (("pipeline",), None),
    (("experiments",), None),
    (("report",), None),
    (("recipes",), None),
    (("commands",), None),
    (("files",), None),
]
ALONE = {"onnx": "onnx_io", "onnx_ir": "onnx_io", "onnxruntime": "agreement", "torch": None}


def table() -> dict[str, set[str]]:
    """What each module at the top of the package may import from it."""
    allowed: dict[str, set[str]] = {}
    for names, imports in LEVELS:
        above = set(allowed)
        allowed |= {name: (above if imports is None else imports) | BASIS | {name} for name in names}
    return allowed


ALLOWED = table()
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    """The name at the package's top that a module belongs to."""
    return module.parts[0].removesuffix(".py")


def imported(source: str, module: Path) -> set[str]:
    """Dotted names of all that a module imports, wherever in the file, relative ones resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = ("ptqjax", *module.parts[: len(module.parts) - node.level])
            base = ".".join((*(parents if node.level else ()), *filter(None, [node.module])))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def violations(source: str, module: Path) -> list[str]:
    """The imports of a module that the table forbids."""
    room, names = room_of(module), imported(source, module)
    forbidden = []
    for name in sorted(names):
        root, *rest = name.split(".")
        if root in ALONE and ALONE[root] != room:
            forbidden.append(name)
        if root == "ptqjax" and room != "__init__":
            target = rest[0] if rest and rest[0] in ALLOWED else "the public functions"
            may = target in ALLOWED[room] or (target == "the public functions" and room == "commands")
            forbidden += [] if may else [name]
    return forbidden


@pytest.mark.parametrize("room", sorted({room_of(module) for module in MODULES}))
def test_imports_point_downwards(room):
    assert room in {*ALLOWED, "__init__"}, f"{room} has no place in the table of layers"
    modules = [module for module in MODULES if room_of(module) == room]
    found = {str(module): violations((PACKAGE / module).read_text(), module) for module in modules}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels/grid.py", "from ptqjax.ir import Model"),
        ("ir/graph.py", "import onnx"),
        ("transforms/fold.py", "from ..lowering import apply"),
        ("ranges/search.py", "def f():\n    import onnxruntime"),
        ("fit/bias.py", "import torch.nn"),
        ("simulation.py", "from ptqjax import onnx_io"),
        ("report.py", "import ptqjax"),
        ("exporting.py", "import importlib\nimportlib.import_module('onnx')"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert violations(source, Path(module))


def test_a_permitted_import_is_passed():
    assert (
        violations("from ptqjax.ir import Model\nfrom .fold import fold\nimport numpy", Path("transforms/x.py")) == []
    )


def test_private_names_stay_in_their_files():
    found = {
        f"{module}: {name}"
        for module in MODULES
        for name in imported((PACKAGE / module).read_text(), module)
        if name.startswith("ptqjax") and name.rpartition(".")[2].startswith("_") and not name.endswith("__")
    }
    assert found == set()


def test_no_file_is_past_400_lines_without_its_reason():
    long = [module for module in MODULES if len((PACKAGE / module).read_text().splitlines()) > 400]
    reasons = {module: ast.get_docstring(ast.parse((PACKAGE / module).read_text())) or "" for module in long}
    assert [str(module) for module, reason in reasons.items() if "long" not in reason] == []
