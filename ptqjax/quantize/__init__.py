"""Grids, where they go, and how their ranges are found."""

from ptqjax.quantize.bias import BiasSite, bias_encoding, bias_sites, guard_biases
from ptqjax.quantize.calibrate import calibrate, calibrate_and_report, calibrate_each
from ptqjax.quantize.encodings import Encoding, Encodings, make_encoding
from ptqjax.quantize.fold_to_scale import fold_to_scale
from ptqjax.quantize.headroom import widened
from ptqjax.quantize.pairs import fit_pairs, pairs_for, saturating_layers
from ptqjax.quantize.placement import Placement, Site, Skipped, place
from ptqjax.quantize.search import choose_encoding
from ptqjax.quantize.tensors import check_not_quantized

__all__ = [
    "BiasSite",
    "Encoding",
    "Encodings",
    "Placement",
    "Site",
    "Skipped",
    "bias_encoding",
    "bias_sites",
    "calibrate",
    "calibrate_and_report",
    "calibrate_each",
    "check_not_quantized",
    "choose_encoding",
    "fit_pairs",
    "fold_to_scale",
    "guard_biases",
    "make_encoding",
    "pairs_for",
    "place",
    "saturating_layers",
    "widened",
]
