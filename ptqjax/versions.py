"""What computes: versions of packages, and the class of machines that compute the same bits."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

PACKAGES = (
    *("ptqjax", "jax", "jaxlib", "numpy", "onnx", "flax", "optax", "scipy", "ml_dtypes"),
    *("onnxruntime", "onnxruntime-gpu"),
)
"""Packages that decide what is computed, or measure it."""
_SIMD = ("avx", "fma", "f16c", "amx", "sse4", "neon", "asimd", "sve", "bf16", "fphp")  # what vector code is chosen by
_LASTING = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")  # lines of `_CPU` that stay as they are
_CPU = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of the packages, those that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def source_digest() -> str:
    """Returns a hash of ptqjax's own source and data files: a working tree changes without a change of version."""
    root = Path(str(resources.files("ptqjax")))
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in {".py", ".toml", ".css"}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def device_class(device: Any) -> dict[str, Any]:
    """Returns what a machine must have in common with another to compute the same bits, as plain data.

    Float sums depend on their order, and that on the vector instructions that XLA compiles for, on the number of cores
    that work is divided among, on the sizes of caches that it is cut to, and on flags that were given to XLA and JAX;
    on a CPU also on whether there is a GPU beside it, since programs are then made for either.

    Args:
        device: The JAX device that computes.
    """
    import jax  # noqa: PLC0415  (what starts no backend does not wait for it)
    from jax.extend.backend import backends  # noqa: PLC0415

    found: dict[str, Any] = {"platform": device.platform, "device": device.device_kind, "machine": platform.machine()}
    if device.platform == "cpu":
        found |= {"cores": num_cores(), **_processor()}
    found["platforms"] = sorted(backends())
    flags = os.environ.get("XLA_FLAGS", "").split()
    found["xla_flags"] = sorted(flag for flag in flags if not _is_harmless(flag, device.platform))
    found["jax_enable_x64"] = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return found | {"jax_default_matmul_precision": precision and str(precision)}


def num_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_digest() -> str:
    """Returns a hash of what compiled programs depend on beside their source: the processor and its cores.

    Programs use instructions by the processor that compiles them, and divide work among its cores.
    """
    told = _CPU.read_text().split("\n\n")[0] if _CPU.is_file() else platform.processor()
    lines = [line for line in told.splitlines() if line.startswith(_LASTING) or ":" not in line]
    return hashlib.sha256(repr((platform.machine(), num_cores(), lines)).encode()).hexdigest()[:16]


def _is_harmless(flag: str, platform_name: str) -> bool:
    others = ("--xla_gpu",) if platform_name == "cpu" else ()
    return flag.startswith(("--xla_force_host_platform_device_count", "--xla_dump", *others))


def _processor() -> dict[str, Any]:
    if not _CPU.is_file():
        return {"processor": platform.processor()}
    lines = (line.partition(":") for line in _CPU.read_text().split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name", facts.get("CPU part", ""))
    family = [facts[key] for key in ("vendor_id", "cpu family", "model") if key in facts]
    caches = {path.parent.name: path.read_text().strip() for path in sorted(_CACHES.glob("index*/size"))}
    vectors = sorted(flag for flag in flags if flag.startswith(_SIMD))
    return {"processor": " ".join([*family, name]), "vectors": " ".join(vectors), "caches": " ".join(caches.values())}
