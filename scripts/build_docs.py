"""Builds the documentation site from README.md, docs/ and the docstrings of the public names; broken links are errors.

    .venv/bin/python scripts/build_docs.py --out out/site

Needs the extra `docs` (MkDocs with Material and mkdocstrings), which `dev` contains.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ptqjax

ROOT = Path(__file__).parents[1]
_SUBJECTS = {"files": "Files", "experiments": "Experiments", "recipes": "Recipes"}
_PAGES = {
    "Start": ["index.md", "settings.md", "export.md", "encodings.md", "experiments.md", "coverage.md"],
    "What it gives": [
        "accuracy.md",
        "rounding.md",
        "transformers.md",
        "agreement.md",
        "speed.md",
        "runtime.md",
        "gpu.md",
    ],
    "How it is made": ["architecture.md", "contributing.md", "changelog.md"],
}


def sources(folder: Path) -> None:
    """Writes the pages that the site is made of into `folder`."""
    for page in (ROOT / "docs").glob("*.md"):
        _write(folder / page.name, page.read_text(encoding="utf-8"))
    for name in ("README", "CONTRIBUTING", "CHANGELOG"):
        target = "index" if name == "README" else name.lower()
        _write(folder / f"{target}.md", (ROOT / f"{name}.md").read_text(encoding="utf-8"))
    for title, names in _by_subject().items():
        lines = [f"# {title}", "", *(f"::: {_home(name)}" for name in names)]
        (folder / f"api-{title.lower()}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Writes a page whose links are those of the site: pages beside it, and code where the repository shows it."""
    text = re.sub(r"\]\((?:\.\./)?(?:docs/)?(README|CONTRIBUTING|CHANGELOG|[\w-]+)\.md", _page_link, text)
    text = re.sub(r"\]\(((?:\.\./)?(?:examples|scripts|ptqjax|tests)/[^)]*)\)", "]", text)
    path.write_text(text, encoding="utf-8")


def _page_link(match: re.Match[str]) -> str:
    name = match.group(1)
    return "](" + {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}.get(name, name) + ".md"


def _home(name: str) -> str:
    """Returns where a public name is defined, as mkdocstrings finds it without importing."""
    stub = (ROOT / "ptqjax" / "__init__.pyi").read_text(encoding="utf-8")
    (module,) = re.findall(rf"^from (\S+) import {name} as {name}$", stub, re.MULTILINE)
    thing = getattr(ptqjax, name)
    defined = getattr(thing, "__module__", module)
    return f"{defined if str(defined).startswith('ptqjax.') else module}.{name}"


def _by_subject() -> dict[str, list[str]]:
    """Returns the public names that have a docstring of their own, by the title of their page."""
    own = [
        name
        for name in vars(ptqjax)["__all__"]
        if getattr(getattr(ptqjax, name), "__module__", "").startswith("ptqjax")
    ]
    found: dict[str, list[str]] = {}
    for namespace, title in _SUBJECTS.items():
        some = set(importlib.import_module(f"ptqjax.{namespace}").__all__)
        found[title] = [name for name in own if name in some]
    taken = {name for some in found.values() for name in some}
    return {"Core": [name for name in own if name not in taken], **found}


def _configuration(pages: Path, out: Path) -> Iterator[str]:
    yield "site_name: ptqjax"
    yield f"docs_dir: {pages}"
    yield f"site_dir: {out.resolve()}"
    yield "theme: {name: material, font: false, features: [navigation.sections, content.code.copy]}"
    yield "markdown_extensions: [tables, fenced_code, attr_list, {toc: {permalink: true}}]"
    yield "validation: {omitted_files: info, absolute_links: warn, unrecognized_links: warn, anchors: warn}"
    yield "plugins:"
    yield "  - search"
    yield "  - mkdocstrings:"
    options = "docstring_style: google, show_source: false, heading_level: 2, show_root_heading: true"
    options += ", show_root_full_path: false, members: false, show_signature_annotations: true"
    yield "      handlers: {python: {paths: ['" + str(ROOT) + "'], options: {" + options + "}}}"
    yield "nav:"
    for title, names in _PAGES.items():
        found = [name for name in names if (pages / name).is_file()]
        yield f"  - {title}: [{', '.join(found)}]"
    yield f"  - Reference: [{', '.join(f'api-{title.lower()}.md' for title in _by_subject())}]"


def build(out: Path) -> None:
    """Builds the site into `out`.

    Raises:
        subprocess.CalledProcessError: A link leads nowhere, or a docstring cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        pages.mkdir()
        sources(pages)
        configuration = Path(folder) / "mkdocs.yml"
        configuration.write_text("\n".join(_configuration(pages, out)) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(configuration)]
        subprocess.run(command, check=True, env=_quiet())


def _quiet() -> dict[str, str]:
    import os  # noqa: PLC0415

    return {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "site")
    build(parser.parse_args().out)
