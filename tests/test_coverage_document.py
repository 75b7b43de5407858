"""The document of tables: each is replaced alone, and says what failed."""

import pytest

from scripts.coverage import with_section
from scripts.coverage_cases import Outcome, failures, table

_DOCUMENT = "# title\n\n<!-- one -->\n<!-- end -->\n\ntext\n\n<!-- two -->\nold\n<!-- end -->\n"


def _outcome(group, name, here="", runtime=""):
    return Outcome(group=group, name=name, here=here, runtime=runtime)


def test_a_section_is_replaced_and_the_others_stay():
    once = with_section(_DOCUMENT, "one", r"a \1 b")
    assert once == _DOCUMENT.replace("<!-- one -->\n", "<!-- one -->\n\na \\1 b\n\n")
    assert with_section(once, "one", r"a \1 b") == once
    assert "old" not in with_section(once, "two", "new")


def test_a_document_without_the_section_is_refused():
    with pytest.raises(ValueError, match="'three'"):
        with_section(_DOCUMENT, "three", "")


def test_the_table_counts_what_passes_here_and_in_the_runtime():
    found = [_outcome("a", "x"), _outcome("a", "y", here="why"), _outcome("b", "z", here="why", runtime="no")]
    assert table(found).splitlines()[2:] == [
        "| a | 2 | 1 | 1 | 2 |",
        "| b | 1 | 0 | 1 | 0 |",
        "| all | 3 | 1 | 2 | 2 |",
    ]


def test_failures_are_grouped_by_their_reason():
    found = [_outcome("a", f"test_{name}", here="x | y") for name in "pq"] + [_outcome("a", "test_r")]
    assert failures(found).splitlines()[2:] == ["| a | x \\| y | p, q |"]
