"""What XLA makes of a program for an NVIDIA H200, on a machine without one: kernels, bytes, operations, memory.

JAX compiles ahead of time for a device that is only described. The whole of XLA's pipeline for GPUs runs, but for
autotuning, and nothing can be executed: there are counts here, and no times. Needs `jax[cuda12]` and `ENVIRONMENT`.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # or the plugin looks for a driver, and is not registered
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
"""What the process environment must hold before JAX is imported."""

BANDWIDTH = 4.8e12
"""Bytes a second of the H200's memory."""
FLOAT_RATE = 67e12
"""Operations a second in float32 without tensor cores, as NVIDIA states it for the H200 SXM."""

_H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 150754820096
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
_WIDTHS = {"64": 8, "32": 4, "16": 2}
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"})
_PARTS = frozenset({"slice", "dynamic-slice", "gather"})
_WHOLE = frozenset({"dot", "scatter", "dynamic-update-slice", "sort", "reduce", "reduce-window", "convolution"})
_INNER = {"while": "body", "call": "to_apply", "async-start": "calls", "call-start": "to_apply"}
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ((?:\((?:[^()]|\([^()]*\))*\))|(?:\S+)) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a compiled program does in one run."""

    kernels: int
    """How many kernels are started."""
    num_bytes: int
    """What they read and write: the operands and results of each; of an operand of which parts are taken, those."""
    flops: float
    """Operations on floating-point numbers, as XLA counts them."""
    temporary: int
    """The largest sum of sizes of what lives between kernels, in bytes."""
    by_kind: Mapping[str, tuple[int, int]]
    """(kernels, bytes) by kind of kernel."""
    open_loops: int = 0
    """How many loops run a number of times that the program does not tell; they count once."""

    @property
    def seconds(self) -> float:
        """The time that bytes or operations take at the device's stated rates, whichever is longer."""
        return max(self.num_bytes / BANDWIDTH, self.flops / FLOAT_RATE)


@lru_cache
def described_device() -> NamedSharding:
    """Returns the place of arrays on the described device.

    Raises:
        RuntimeError: The plugin for CUDA is not there.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=_H200, topology="1x1x1"
    )
    return NamedSharding(Mesh(np.array(topology.devices).reshape(1), ("x",)), PartitionSpec())


def placed(tree: Any) -> Any:
    """Returns the shapes of a tree of arrays, on the described device."""
    place = described_device()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=place),
        tree,
    )


def count(compiled: Any) -> Counts:
    """Returns the counts of a compiled program."""
    text = compiled.as_text()
    computations = dict(_computations(text))
    entry = next(name for name, lines in computations.items() if lines[0].startswith("ENTRY"))
    found = list(_kernels(entry, computations))
    kinds: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for kind, moved, times in found:
        kinds[kind][0] += times
        kinds[kind][1] += moved * times
    cost = compiled.cost_analysis() or {}
    return Counts(
        kernels=sum(number for number, _ in kinds.values()),
        num_bytes=sum(moved for _, moved in kinds.values()),
        flops=float(cost.get("flops", 0.0)),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        by_kind={kind: (number, moved) for kind, (number, moved) in kinds.items()},
        open_loops=len(re.findall(r"= .* while\(", text)) - text.count('"known_trip_count"'),
    )


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of each computation, and its lines."""
    name, lines = "", []
    for line in text.splitlines():
        begins = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line) if not line.startswith(" ") else None
        if begins:
            name, lines = begins.group(1), [line]
        elif line.startswith("}") and name:
            yield name, lines
            name, lines = "", []
        elif name:
            lines.append(line)


def _kernels(name: str, computations: Mapping[str, list[str]], times: int = 1) -> Iterator[tuple[str, int, int]]:
    """Yields the kind of each kernel of a computation, the bytes that it moves, and how often it runs."""
    sizes: dict[str, int] = {}
    for line in computations[name][1:]:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        _, result, shape, operation, rest = match.groups()
        sizes[result] = _size(shape)
        inner = re.search(_INNER[operation] + r"=%?([\w.\-]+)", rest) if operation in _INNER else None
        if inner:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            yield from _kernels(inner.group(1), computations, times * int(trips.group(1) if trips else 1))
        elif operation == "conditional":
            yield from _longest_branch(rest, computations, times)
        elif operation not in _FREE and not operation.endswith("-done"):
            operands = [sizes.get(each, 0) for each in re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])]
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            if called and operation == "fusion":
                operands = _read(computations[called.group(1)], operands)
            yield _kind(result, operation, rest), sizes[result] + sum(operands), times


def _read(lines: list[str], operands: list[int]) -> list[int]:
    """Returns how many bytes a fusion reads of each operand: of one that it only takes parts of, those parts.

    From the result back: what takes parts wants as many elements as it has, what goes element by element as many as are
    wanted of it, anything else all.
    """
    found = [match.groups() for match in map(_INSTRUCTION.match, lines[1:]) if match]
    sizes = {result: _num_elements(shape) for _, result, shape, _, _ in found}
    wanted: dict[str, int] = collections.defaultdict(int)
    read = list(operands)
    for root, result, shape, operation, rest in reversed(found):
        inputs = re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
        share = sizes[result] if root else min(wanted[result], sizes[result])
        if operation == "parameter":
            position = int(rest.split(")", 1)[0])
            read[position] = min(operands[position], share * _size(shape) // max(sizes[result], 1))
        elif operation in _PARTS:
            wanted[inputs[0]] += share
            wanted.update({each: sizes.get(each, 0) for each in inputs[1:]})
        else:
            for each in inputs:
                size = sizes.get(each, 0)
                wanted[each] += share if size == sizes[result] and operation not in _WHOLE else size
    return read


def _longest_branch(rest: str, computations: Mapping[str, list[str]], times: int) -> Iterator[tuple[str, int, int]]:
    """Yields the kernels of the branch that moves the most."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    names = re.findall(r"%?([\w.\-]+)", listed.group(1)) if listed else re.findall(r"_computation=%?([\w.\-]+)", rest)
    branches = [list(_kernels(each, computations, times)) for each in names]
    yield from max(branches, key=lambda kernels: sum(moved for _, moved, _ in kernels), default=[])


def _kind(result: str, operation: str, rest: str) -> str:
    target = re.search(r'custom_call_target="([^"]+)"', rest)
    return target.group(1) if target else f"{operation}: {re.sub(r'[._]?[0-9]+$', '', result)}"


def _size(shape: str) -> int:
    return sum(
        _width(kind) * int(np.prod([int(size) for size in sizes.split(",") if size] or [1]))
        for kind, sizes in _SHAPE.findall(shape)
    )


def _num_elements(shape: str) -> int:
    return sum(
        int(np.prod([int(size) for size in sizes.split(",") if size] or [1])) for _, sizes in _SHAPE.findall(shape)
    )


def _width(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return _WIDTHS.get(digits.group(0), 1) if digits else 1
