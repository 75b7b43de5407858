"""How a recommendation is written for who follows it: names as a shell takes them, rules as settings files do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_WIDER = {2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8, 8: 16}  # bits -> the next width that files have


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


def exact_option(settings: Mapping[str, Any]) -> str:
    """Returns the option under which equalization keeps the function."""
    if settings.get("bounds") in ("relu", "auto"):
        return "--bounds exact"
    return "--absorb exact" if settings.get("absorb") == "statistics" else "--no-equalize"


def wider_type(dtype: str) -> tuple[str, float] | None:
    """Returns the next wider type of the same kind, and the part of the noise that is left with it."""
    found = re.fullmatch(r"(u?int)(\d+)", dtype)
    if found is None or int(found[2]) not in _WIDER:
        return None
    bits, wider = int(found[2]), _WIDER[int(found[2])]
    return f"{found[1]}{wider}", 4.0 ** (bits - wider)
