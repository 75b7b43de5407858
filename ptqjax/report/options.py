"""How a recommendation is written for who follows it: names as a shell takes them, rules as settings files do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence


def rule_text(tensors: Sequence[str], **settings: str) -> str:
    """Returns the rule of a settings file that sets something for these tensors."""
    names = json.dumps([_pattern(name) for name in tensors], ensure_ascii=False)
    return "\n".join(["[[rules]]", f"tensors = {names}", *(f'{key} = "{value}"' for key, value in settings.items())])


def _pattern(name: str) -> str:
    """Returns the pattern that matches this name alone; some names hold what has a meaning in patterns."""
    return "re:" + re.escape(name) if re.search(r"[*?\[]", name) or name.startswith("re:") else name


def quoted(name: str) -> str:
    """Returns the name as a shell takes it."""
    return "'" + _pattern(name).replace("'", "'\"'\"'") + "'"
