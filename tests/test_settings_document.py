"""The document of settings files and the end of --help: complete, and true."""

import re
from dataclasses import fields
from pathlib import Path

import click.testing
import pytest

from ptqjax.commands.cli import commands
from ptqjax.config import QuantizationConfig, Rule, config_from_toml, load_target, target_names

TEXT = (Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
KEYS, RULES = TEXT.split("## Keys")[1].split("## Rules")


def named(text: str) -> set[str]:
    """What stands in the first column of tables."""
    rows = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_key_of_settings_and_of_rules_is_in_the_document() -> None:
    assert named(KEYS) == {field.name for field in fields(QuantizationConfig)} - {"rules"}
    rules, targets = RULES.split("## Targets")
    assert named(rules) == {field.name for field in fields(Rule)}
    assert named(targets) == set(target_names())


def test_the_example_of_the_document_is_read() -> None:
    config = config_from_toml(TEXT.split("```toml")[1].split("```")[0])
    assert (config.exclude_nodes, len(config.rules), config.rules[0].nodes) == (("/head/*",), 3, ("/stem/Conv",))


def test_the_defaults_of_the_document_are_so() -> None:
    rows = re.findall(r'^\| `(\w+)` \| .* \| `("?[\w\[\]-]+"?)` \|', KEYS, re.MULTILINE)
    assert len(rows) >= 13
    for name, default in rows:
        assert config_from_toml(f"{name} = {default}") == QuantizationConfig(), name


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_help_ends_with_targets_words_and_the_document(command: str) -> None:
    found = click.testing.CliRunner().invoke(commands, [command, "--help"], terminal_width=100)
    text = " ".join(found.stdout.split())
    for name in target_names():
        assert f"{name} {load_target(name).description}" in text
    for word in ("grid", "scaling", "bounds", "absorb", "SQNR"):
        assert f" {word} " in text.partition("Words:")[2]
    assert "docs/settings.md" in text
