"""A model as a Flax module, so that what trains Flax modules trains it; and back, so that it can be exported."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.encodings.encoding import Encoding, Encodings, concrete
from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Model, Node
from ptqjax.lowering import apply
from ptqjax.placement.granularity import weight_uses
from ptqjax.qdq.insert import check_tensors
from ptqjax.simulation import simulate

_PARAMS, _INTEGERS, _ENCODINGS = "params", "integers", "encodings"
_FACTOR, _OFFSET = "log_factor", "offset"
_SMALLEST_LEARNED = 2  # bytes: floating parameters of one byte are a quantized file's codes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Source:
    """What a module was made of; equal to itself alone, so that it can be hashed without a look at arrays."""

    model: Model
    """The model; its arrays are what `init` returns."""
    encodings: Encodings | None
    """Its grids; None: not quantized."""
    learned: Mapping[str, str]
    """For each tensor whose grid is learned, the tensor that the grid's variables are named after."""


class GraphModule(nn.Module):
    """A model as a Flax module, see `to_flax`."""

    source: _Source = field(repr=False)
    """What it was made of."""

    def __call__(self, inputs: Any) -> Any:
        """Returns the outputs for inputs by name by name; for one array, where that is all, one array.

        Raises:
            DataError: Inputs or variables do not fit the model; the message names the first that does not.
        """
        if self.is_initializing():
            for collection, values in _start(self.source).items():
                for name, value in values.items():
                    self.put_variable(collection, name, _as_jax(value))
        params, encodings = _arrays(self.source, self.variables)
        graph = self.source.model.graph
        by_name = inputs if isinstance(inputs, Mapping) else {_only_input(self.source.model): inputs}
        if encodings is None:
            outputs = apply(graph, params, by_name)
        else:
            outputs = simulate(self.source.model, encodings)(params, encodings, by_name)
        return outputs if isinstance(inputs, Mapping) or len(outputs) > 1 else next(iter(outputs.values()))


def to_flax(model: Model, encodings: Encodings | None = None, *, learn_scales: bool = False) -> GraphModule:
    """Returns a Flax (linen) module that computes what the model computes, its parameters as the module's variables.

        module = ptqjax.to_flax(model, encodings)
        variables = module.init(jax.random.key(0), x)        # the model's own arrays; the key plays no part
        logits = module.apply(variables, x)
        model, encodings = ptqjax.from_flax(module, variables)

    `apply` equals `ptqjax.apply` to the bit, or the float program of `ptqjax.simulate` where there are encodings: fake
    quantization, whose gradients pass straight through. Inputs are a mapping by name, and outputs then as well; where
    the graph has one input, its array will do, and one output then comes as an array.

    Variables are in up to three collections, each flat: a key is a tensor's name, whatever characters it has. What
    comes with names cut at "/" (`traverse_util.unflatten_dict(..., sep="/")`) is taken too.

    - "params": floating parameters. This is all there are in most models. Among them are bounds of Clips, and means
      and variances of batch norms, which stay in inference mode: fold them before, and leave the others out of
      training by a mask.
    - "integers": codes and zero points of a model that is quantized already. No gradient reaches them.
    - "encodings": with `learn_scales`, how far each grid has moved, zeros at first: "TENSOR/log_factor" in the shape of
      the scale, and "TENSOR/offset".

    Args:
        model: The model. Its graph and `statistics` are not variables.
        encodings: The grids by tensor, concrete. Part of the module, not of its variables.
        learn_scales: Whether grids are variables too: scale = (scale of `encodings`) * exp(log_factor), so that it
            stays above 0; zero point = that of `encodings` + offset, rounded straight-through and kept on the grid.
            Where 0 is in the middle or at an end of all of a tensor's grids it stays there, without offset. Tensors
            that share a grid across an operator without weights (a pool, a Reshape, a bound) keep one. Left as they
            are: grids that are not enabled, float formats of 16 bits, low-power blocks.

    Raises:
        ConfigError: An encoding is for a tensor that the model has not, or there are none whose scales to learn.

    Source: Esser et al., Learned Step Size Quantization (2020), for the gradient of a scale; ours is learned as a
        logarithm, and without their gradient scale, which optimizers that normalize do not need.
    """
    if encodings is not None:
        check_tensors(model.graph, encodings)
        encodings = {name: concrete(encoding) for name, encoding in encodings.items()}
    learned = _learned(model, encodings or {}) if learn_scales else {}
    if learn_scales and not learned:
        raise ConfigError("learn_scales=True, but no grid can be learned; expected encodings that are enabled")
    return GraphModule(source=_Source(model=model, encodings=encodings, learned=learned))


def from_flax(module: GraphModule, variables: Mapping[str, Any]) -> tuple[Model, Encodings]:
    """Returns the module's model with the arrays of `variables`, and its encodings, as `export` takes them.

    The encodings are those that `to_flax` was given, moved as far as they were learned, {} where it was given none.
    Collections that the module has not are passed over. The model's statistics are kept only where no parameter has
    changed: they are what the old ones implied.

    Args:
        module: What `to_flax` returned.
        variables: As `module.init` returns them, with concrete arrays.

    Raises:
        DataError: A variable is missing, unknown, or of another shape or type than the model's; the message names it.
    """
    model = module.source.model
    params, encodings = _arrays(module.source, variables)
    params = {name: _in_own_type(name, value, model.params[name]) for name, value in params.items()}
    is_changed = any(not np.array_equal(params[name], np.asarray(model.params[name])) for name in params)
    found = model.replace(params=params, statistics={} if is_changed else model.statistics)
    return found, {name: concrete(encoding) for name, encoding in (encodings or {}).items()}


def _only_input(model: Model) -> str:
    names = [spec.name for spec in model.graph.inputs]
    if len(names) != 1:
        raise DataError(f"one array was given, but the graph has the inputs {names}; give a mapping by name")
    return names[0]


def _in_own_type(name: str, value: Any, own: Any) -> np.ndarray:
    """Returns a variable in the type of the model's parameter; 64 bits may have been narrowed by JAX."""
    value = np.asarray(value)
    if value.dtype not in (own.dtype, jax.dtypes.canonicalize_dtype(own.dtype)):
        raise DataError(
            f"variable '{name}' is of type {value.dtype}; expected {own.dtype}, the model's: convert it with astype"
        )
    return value.astype(own.dtype)


# Variables: what there are, and what they stand for


def _start(source: _Source) -> dict[str, dict[str, Any]]:
    """Returns the module's variables as they are at first, by collection and name."""
    found: dict[str, dict[str, Any]] = {_PARAMS: {}, _INTEGERS: {}, _ENCODINGS: {}}
    for name, value in source.model.params.items():
        found[_PARAMS if _is_learnable(value) else _INTEGERS][name] = value
    for root in source.learned.values():
        found[_ENCODINGS] |= _unmoved(root, (source.encodings or {})[root])
    return {collection: values for collection, values in found.items() if values}


def _is_learnable(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating) and np.dtype(value.dtype).itemsize >= _SMALLEST_LEARNED


def _as_jax(value: Any) -> jax.Array:
    """Returns a copy, so that no one's changes reach the model, of the same type whatever the caller's setting."""
    with jax.enable_x64(np.dtype(value.dtype).itemsize == 8):  # noqa: PLR2004  (bytes)
        return jnp.array(value)


def _arrays(source: _Source, variables: Mapping[str, Any]) -> tuple[dict[str, Any], Encodings | None]:
    """Returns the parameters and encodings that the variables stand for.

    Raises:
        DataError: A variable is missing, unknown, or of another shape.
    """
    found = _checked(source, variables)
    params = {name: found[_PARAMS if _is_learnable(v) else _INTEGERS][name] for name, v in source.model.params.items()}
    if source.encodings is None:
        return params, None
    moves = found.get(_ENCODINGS, {})
    return params, {name: _moved(e, moves, source.learned.get(name)) for name, e in source.encodings.items()}


def _checked(source: _Source, variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the module's collections, flat, held against what `init` returns."""
    checked: dict[str, dict[str, Any]] = {}
    for collection, values in _start(source).items():
        if collection not in variables:
            raise DataError(
                f"collection '{collection}' is missing; found {sorted(variables)[:5]}, expected the variables that "
                "`module.init` returns, such as {'params': ...}"
            )
        found = dict(_flat(variables[collection]))
        _check_names(collection, found, values)
        _check_shapes(collection, found, values)
        checked[collection] = found
    return checked


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested mappings under their keys joined by "/"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _check_names(collection: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in sorted({*found} - {*expected}):
        near = difflib.get_close_matches(name, expected, 1)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise DataError(f"variable '{name}' of '{collection}' is unknown; expected what `module.init` returns{hint}")
    for name in expected:
        if name not in found:
            raise DataError(f"variable '{name}' of '{collection}' is missing; expected what `module.init` returns")


def _check_shapes(collection: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        shape = list(np.shape(found[name]))
        if shape != list(np.shape(value)):
            raise DataError(
                f"variable '{name}' of '{collection}' has shape {shape}; expected {list(np.shape(value))}, as in what "
                "`module.init` returns"
            )


# Grids that are learned


def _unmoved(root: str, encoding: Encoding) -> dict[str, np.ndarray]:
    """Returns the variables of a grid at the start, by name."""
    zeros = np.zeros(np.shape(encoding.scale), np.float32)
    return {f"{root}/{what}": zeros for what in ((_FACTOR,) if _keeps_zero(encoding) else (_FACTOR, _OFFSET))}


def _keeps_zero(encoding: Encoding) -> bool:
    """Tells whether 0 has the middle or an end of the grid, as with weights and behind a Relu, and stays there."""
    middle = np.floor((encoding.qmin + encoding.qmax + 1) / 2)
    places = np.stack([middle, encoding.qmin, encoding.qmax])
    return encoding.float_format is not None or any(np.all(encoding.zero_point == place) for place in places)


def _moved(encoding: Encoding, moves: Mapping[str, Any], root: str | None) -> Encoding:
    """Returns the grid as far from `encoding` as the variables named after `root` say."""
    if root is None:
        return encoding
    moved = encoding.replace(scale=encoding.scale * jnp.exp(moves[f"{root}/{_FACTOR}"]))
    if _keeps_zero(encoding):
        return moved
    wanted = encoding.zero_point + moves[f"{root}/{_OFFSET}"]
    rounded = jnp.clip(jnp.round(wanted), encoding.qmin, encoding.qmax)
    # rounded + 0, exactly; the gradient is that of `wanted`
    return moved.replace(zero_point=jax.lax.stop_gradient(rounded) + (wanted - jax.lax.stop_gradient(wanted)))


def _learned(model: Model, encodings: Encodings) -> dict[str, str]:
    """Returns the tensors whose grids are learned, each with the first of those that share its grid."""
    learnable = {name: encoding for name, encoding in encodings.items() if _can_move(encoding)}
    roots = {name: name for name in learnable}
    weights = weight_uses(model)
    for node in model.graph.nodes:
        if not weights.keys() & set(node.inputs):
            _tie(node, learnable, roots)
    return roots


def _can_move(encoding: Encoding) -> bool:
    is_fixed = encoding.scale_bits is not None or encoding.float_format in ("float16", "bfloat16")
    return bool(encoding.enabled) and not is_fixed


def _tie(node: Node, encodings: Encodings, roots: dict[str, str]) -> None:
    """Gives what the node reads and writes on equal grids one root."""
    first: dict[Any, str] = {}
    for name in dict.fromkeys((*node.inputs, *node.outputs)):
        if name in encodings:
            root = first.setdefault(_values(encodings[name]), roots[name])
            roots.update({other: root for other, own in roots.items() if own == roots[name]})


def _values(encoding: Encoding) -> tuple[Any, ...]:
    """Returns what makes grids equal, hashable."""
    leaves = (encoding.scale, encoding.zero_point, encoding.qmin, encoding.qmax)
    return (*(np.asarray(leaf).tobytes() for leaf in leaves), encoding.axis, encoding.block_size, encoding.float_format)
