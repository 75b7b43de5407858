"""Weights at which no sum of two products exceeds 16 bits, for kernels that add them so (`kernels.pair_sums`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.encodings.encoding import Encoding, Encodings, concrete, dequantize, quantize
from ptqjax.ir import Model, Node, Record, Report
from ptqjax.kernels.pair_sums import Fitted, fitted, paired, saturates, without_saturation
from ptqjax.placement.tables import tied_weights
from ptqjax.transforms.saturation import in_order_of_terms, in_order_of_weight, is_depthwise

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_BYTES = ("int8", "uint8")
_OFFSET = 128  # from int8 to uint8
_AS_WELL = 1.5  # times the squared error under the best scales
_REASON = "two neighbouring products would exceed 16 bits on an x86 without VNNI"


class Pairs(NamedTuple):
    """Weights and grids whose pairs of products do not saturate."""

    weights: dict[str, np.ndarray]
    """The parameters that changed, by name: those moved by whole steps stand on their grids."""
    encodings: Encodings
    """All encodings, with raised scales where that was better."""
    report: Report
    """A record for each weight that changed, or cannot."""

    def applied(self, model: Model) -> Model:
        """Returns the model with these weights."""
        return model.replace(params={**model.params, **self.weights})

    @property
    def has_changed(self) -> bool:
        """Whether any weight or grid is another."""
        return any(record.done for record in self.report)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """A layer whose kernel adds products in pairs."""

    op_type: str
    """Its operator."""
    is_turned: bool
    """Whether its weight is [m, k]."""
    output: str
    """What it computes."""

    def terms(self, weight: Any) -> np.ndarray:
        """Returns a weight in the order of its sums."""
        return in_order_of_terms(np.asarray(weight), self.op_type, is_turned=self.is_turned)

    def weight(self, terms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a weight of `shape` from its terms."""
        return in_order_of_weight(terms, shape, self.op_type, is_turned=self.is_turned)

    def pairs(self, weight: Any) -> np.ndarray:
        """Returns the pairs of a weight that are added, [sums, pairs, 2]."""
        return paired(self.terms(weight))


def pairs_for(config: QuantizationConfig, model: Model, encodings: Encodings, *, kept: Collection[str] = ()) -> Pairs:
    """Returns what `fit_pairs` returns where the target's kernels ask for it, else everything as it is."""
    target = load_target(config.target)
    if not target.pairs_in_16_bits:
        return Pairs({}, encodings, ())
    pairs = fit_pairs(model, encodings, kept=kept)
    for weight, table in tied_weights(model, target).items():
        if weight in encodings and table in encodings and weight not in kept and table not in kept:
            pairs = _with_table(pairs, model, encodings, (weight, table))
    return pairs


def _with_table(pairs: Pairs, model: Model, encodings: Encodings, tied: tuple[str, str]) -> Pairs:
    """Returns the pairs with the table that a weight is transposed on the weight's grid, where they shared one."""
    weight, table = tied
    old, other, new = (concrete(each) for each in (encodings[weight], encodings[table], pairs.encodings[weight]))
    was_shared = np.array_equal(np.transpose(old.scale), other.scale)
    if not was_shared or (np.array_equal(old.scale, new.scale) and weight not in pairs.weights):
        return pairs
    grid = other.replace(scale=np.transpose(new.scale), zero_point=np.transpose(new.zero_point))
    grid = grid.replace(qmin=new.qmin, qmax=new.qmax)
    moved = np.transpose(pairs.weights.get(weight, np.asarray(model.params[weight])))
    return Pairs({**pairs.weights, table: moved}, {**pairs.encodings, table: grid}, pairs.report)


def fit_pairs(model: Model, encodings: Mapping[str, Encoding], *, kept: Collection[str] = ()) -> Pairs:
    """Returns weights and encodings under which x86 kernels without VNNI compute what all others do.

    Such kernels add products of uint8 inputs and int8 weights two by two in 16 bits, saturating: a pair of weights of
    one sign has to have |q1| + |q2| <= 128. Where pairs have not, a weight's scale (of those channels) is raised, or
    single weights are moved to other integers, or both: whichever leaves the least squared error of the weights.
    Integers with a zero point, whose pairs do not shrink with the scale, are stored as uint8 on the same grid, which
    kernels widen first. What is computed is exact then on every processor, and what is simulated, the moved weights
    being parameters.

    Looked at are weights in int8 of Conv, Gemm and MatMul whose input is quantized to 8 bits; depthwise ones and blocks
    are left alone. Needs concrete arrays.

    Args:
        model: The float model.
        encodings: Its grids.
        kept: Weights whose encodings are to stay, by name: they are moved where that costs about as little as other
            scales would, such as under the grids of an earlier run; else left, and a record says so.
    """
    changed, grids, report = {}, dict(encodings), []
    for name, readers in _readers(model, encodings).items():
        weight, encoding = np.asarray(model.params[name]), concrete(encodings[name])
        if not _num_saturating(quantize(weight, encoding), readers):
            continue
        if name in kept and not _fit_their_scales(weight, encoding, readers):
            report.append(_left(name, readers))
        elif np.any(encoding.zero_point):
            grids[name] = _unsigned(encoding)
            report.append(_stored_unsigned(name, readers))
        else:
            grids[name] = encoding if name in kept else _best_grid(weight, encoding, readers)
            changed[name] = _moved_for_all(weight, grids[name], readers)
            report.append(_record(name, readers, (weight, encoding), (changed[name], grids[name])))
    return Pairs(changed, grids, tuple(report))


def moves_for(
    config: QuantizationConfig, model: Model, encodings: Encodings
) -> Callable[[str, np.ndarray], np.ndarray] | None:
    """Returns what moves the weights of `fit_pairs` on their grids, by name and value; None where nothing has to.

    For who rounds otherwise than to nearest: scales are what they are, and single weights make room.
    """
    if not load_target(config.target).pairs_in_16_bits:
        return None
    readers = _readers(model, encodings)

    def moved(name: str, weight: np.ndarray) -> np.ndarray:
        encoding = concrete(encodings[name])
        can_move = name in readers and not np.any(encoding.zero_point)
        return _moved_for_all(weight, encoding, readers[name]) if can_move else weight

    return moved


def saturating_layers(model: Model, encodings: Mapping[str, Encoding], config: QuantizationConfig) -> tuple[str, ...]:
    """Returns the weights at which the exported file may saturate on an x86 without VNNI, in the order of the graph.

    None for targets that are no ordinary processor: those that multiply sums in fixed point, or add biases in float.
    """
    target = load_target(config.target)
    if target.fixed_point or target.biases == "float":
        return ()
    return tuple(
        name
        for name, readers in _readers(model, encodings).items()
        if _num_saturating(quantize(np.asarray(model.params[name]), concrete(encodings[name])), readers)
    )


def _readers(model: Model, encodings: Mapping[str, Encoding]) -> dict[str, list[_Reader]]:
    found: dict[str, list[_Reader]] = {}
    for node in model.graph.nodes:
        if node.op_type in _PRODUCTS and not node.domain and _adds_in_pairs(model, encodings, node):
            turned = bool(node.attribute("transB", 0))
            reader = _Reader(op_type=node.op_type, is_turned=turned, output=node.output)
            found.setdefault(node.inputs[1], []).append(reader)
    return found


def _adds_in_pairs(model: Model, encodings: Mapping[str, Encoding], node: Node) -> bool:
    x, w = (encodings.get(name) for name in node.inputs[:2])
    if x is None or w is None or node.inputs[1] not in model.params or not (np.all(x.enabled) and np.all(w.enabled)):
        return False
    shape = np.shape(model.params[node.inputs[1]])
    if len(shape) < 2 or (node.op_type == "Conv" and is_depthwise(shape, int(node.attribute("group", 1)))):  # noqa: PLR2004
        return False
    if w.block_size is not None or (w.axis is not None and w.axis % len(shape) != _output_axis(node, len(shape))):
        return False
    return x.dtype in _BYTES and w.dtype == "int8"


def _output_axis(node: Node, rank: int) -> int:
    return 0 if node.op_type == "Conv" or node.attribute("transB", 0) else rank - 1


def _num_saturating(codes: Any, readers: list[_Reader]) -> int:
    return max(int(np.count_nonzero(saturates(reader.pairs(codes)))) for reader in readers)


def _best_grid(weight: np.ndarray, encoding: Encoding, readers: list[_Reader]) -> Encoding:
    for reader in readers:
        encoding = encoding.replace(scale=_raised(weight, encoding, reader))
    return encoding


def _moved_for_all(weight: np.ndarray, encoding: Encoding, readers: list[_Reader]) -> np.ndarray:
    for reader in readers:  # no magnitude grows: what is safe for one reader stays safe
        weight = _moved(weight, encoding, reader)
    return weight


def _fit_their_scales(weight: np.ndarray, encoding: Encoding, readers: list[_Reader]) -> bool:
    """Tells whether weights may as well move under the scales that they have: those of an earlier run, most often."""
    if np.any(encoding.zero_point):
        return False
    found = [fit for fit in (_search(weight, encoding, reader)[1] for reader in readers) if fit is not None]
    return all(fit.unraised.sum() <= _AS_WELL * fit.error.sum() for fit in found)


def _search(weight: np.ndarray, encoding: Encoding, reader: _Reader) -> tuple[np.ndarray, Fitted | None]:
    """Returns the sums with a pair to move, and the best scales for them; with one scale for all, every sum."""
    scale = np.asarray(encoding.scale, np.float32)
    terms, along = reader.terms(weight), reader.terms(_spread(scale, encoding, weight.shape))[:, :1]
    rows = np.flatnonzero(saturates(reader.pairs(quantize(weight, encoding))).any(axis=1))
    if not rows.size:
        return rows, None
    is_shared = scale.ndim == 0
    rows = np.arange(len(terms)) if is_shared else rows
    return rows, fitted(terms[rows], along[:1] if is_shared else along[rows], float(encoding.qmin))


def _raised(weight: np.ndarray, encoding: Encoding, reader: _Reader) -> np.ndarray:
    """Returns the scales that are best for a reader, of those that have pairs to move; float32."""
    scale = np.asarray(encoding.scale, np.float32)
    rows, found = _search(weight, encoding, reader)
    if found is None:
        return scale
    factor = np.ones(reader.terms(weight).shape, np.float32)
    factor[rows] = found.factor
    return np.asarray(scale * _gathered(reader.weight(factor, weight.shape), encoding), np.float32)


def _spread(scale: np.ndarray, encoding: Encoding, shape: tuple[int, ...]) -> np.ndarray:
    if scale.ndim == 0 or encoding.axis is None:
        return np.broadcast_to(scale.reshape(()), shape)
    axis = encoding.axis % len(shape)
    return np.broadcast_to(scale.reshape(*(-1 if i == axis else 1 for i in range(len(shape)))), shape)


def _gathered(factors: np.ndarray, encoding: Encoding) -> Any:
    """Returns the largest factor along each scale, of one for each weight."""
    if encoding.axis is None:
        return factors.max()
    axis = encoding.axis % factors.ndim
    return factors.max(axis=tuple(i for i in range(factors.ndim) if i != axis))


def _moved(weight: np.ndarray, encoding: Encoding, reader: _Reader) -> np.ndarray:
    codes = quantize(weight, encoding)
    quotients = weight / _spread(np.asarray(encoding.scale, np.float32), encoding, weight.shape)
    safe = without_saturation(reader.pairs(codes), reader.pairs(quotients))
    terms = reader.terms(codes).shape
    safe = reader.weight(safe.reshape(terms[0], -1)[:, : terms[1]], weight.shape)
    return np.where(safe == codes, weight, dequantize(safe, encoding)).astype(weight.dtype)


def _unsigned(encoding: Encoding) -> Encoding:
    offset = np.float32(_OFFSET)
    return encoding.replace(
        zero_point=encoding.zero_point + offset, qmin=encoding.qmin + offset, qmax=encoding.qmax + offset
    )


def _record(name: str, readers: list[_Reader], old: tuple[Any, Encoding], new: tuple[Any, Encoding]) -> Record:
    """Returns the record of a weight; `old` and `new` are its values and its grid."""
    steps = np.asarray(old[1].scale)
    num_raised = int(np.count_nonzero(np.asarray(new[1].scale) > steps))
    num_moved = int(np.count_nonzero(np.asarray(new[0]) != np.asarray(old[0])))
    return Record(
        transform="fit_pairs",
        done=True,
        what=f"raised the scale in {num_raised} of {steps.size} places, moved {num_moved} of {np.size(old[0])} weights",
        where=(name, *(reader.output for reader in readers)),
        reason=_REASON,
        before={"pairs that may saturate": float(_num_saturating(quantize(*old), readers))},
        after={"pairs that may saturate": float(_num_saturating(quantize(*new), readers))},
    )


def _stored_unsigned(name: str, readers: list[_Reader]) -> Record:
    reason = f"{_REASON}, and its zero point is not 0"
    return _unmoved(name, readers, "stored as uint8, on the same grid", reason, done=True)


def _left(name: str, readers: list[_Reader]) -> Record:
    reason = "its encoding is given; on an x86 without VNNI, pairs of products may saturate"
    return _unmoved(name, readers, "left as it is", reason, done=False)


def _unmoved(name: str, readers: list[_Reader], what: str, reason: str, *, done: bool) -> Record:
    where = (name, *(reader.output for reader in readers))
    return Record(transform="fit_pairs", done=done, what=what, where=where, reason=reason)
