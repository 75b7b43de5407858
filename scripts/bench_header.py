"""What a measurement was taken on: a line for the head of a table."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("ptqjax", "jax", "onnx", "onnxruntime")
"""Packages whose versions a measurement depends on."""


def header(*, also: str = "") -> str:
    """Returns date, processor, number of usable cores, and versions, separated by semicolons; ends with `also`."""
    versions = ", ".join(f"{package} {version_of(package)}" for package in PACKAGES)
    parts = (
        dt.datetime.now(dt.UTC).date().isoformat(),
        f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        f"Python {platform.python_version()}, {versions}",
        also,
    )
    return "; ".join(part for part in parts if part)


def version_of(package: str) -> str:
    """Returns the installed version of `package`, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def processor() -> str:
    """Returns the processor's name and whether it has VNNI, on which ONNX Runtime's integer kernels depend."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vnni = "with" if "vnni" in facts.get("flags", "") else "without"
    return f"{facts.get('model name', platform.machine())} ({vnni} VNNI)"
