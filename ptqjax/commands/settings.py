"""The options of `quantize` that are settings of `QuantizationConfig`, from types to roundings."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

_OPTIONS = (
    click.option(
        "--weights",
        default="int8",
        show_default=True,
        metavar="TYPE",
        help="int2 to int16, uint2 to uint16, float8_e4m3fn, float8_e5m2, float16, bfloat16.",
    ),
    click.option(
        "--activations",
        default="uint8",
        show_default=True,
        metavar="TYPE",
        help="The same types, float (left alone) or dynamic (grids found at run time).",
    ),
    click.option(
        "--granularity",
        default="channel",
        show_default=True,
        metavar="tensor|channel|block:N|lpbq:N",
        help="What shares one scale in a weight.",
    ),
    click.option(
        "--ranges",
        default="sqnr",
        show_default=True,
        metavar="RULE",
        help="How a range is chosen: min-max, moving-average, sqnr (least noise), percentile:P, mse, entropy.",
    ),
    click.option(
        "--equalize/--no-equalize",
        default=True,
        show_default=True,
        help="Make channels alike across layers; --no-equalize leaves out absorption as well, which is a part of it.",
    ),
    click.option(
        "--absorb",
        default="exact",
        show_default=True,
        metavar="exact|statistics|off",
        help="Move biases on where that is exact; a part of equalization.",
    ),
    click.option(
        "--scaling",
        default="auto",
        show_default=True,
        metavar="auto|off|weights|ranges|noise|learned",
        help="What channels are scaled for: equal weights, weights and activations together, the least predicted "
        "noise, the output itself (by learning), or what turns out best.",
    ),
    click.option(
        "--bounds",
        default="exact",
        show_default=True,
        metavar="exact|relu|leave|auto",
        help="What becomes of a Clip (ReLU6) between scaled channels: a bound per channel, a Relu, nothing is scaled "
        "there, or one of the last two, layer by layer.",
    ),
    click.option(
        "--correct",
        default=None,
        metavar="none|analytic|empirical",
        help="Take out the mean error that quantization leaves in each layer: as batch norms tell, or as measured on "
        "the samples.  [default: empirical; analytic without samples]",
    ),
    click.option(
        "--effort",
        default="balanced",
        show_default=True,
        metavar="fast|balanced|thorough",
        help="How much is tried before it is chosen. fast: nothing, a formula decides; two passes over the samples, "
        "about as long as AIMET's tool takes. balanced: what the formula says may win, on samples held back, and with "
        "--granularity tensor roundings solved for. thorough: everything, and with --granularity tensor learned "
        "scales, minutes on a CPU.",
    ),
    click.option(
        "--rounding",
        default=None,
        metavar="nearest|solved|learned",
        help="How weights are rounded: each to the integer next to it, or all of a layer's for the least error of its "
        "output on the samples, or from there on by gradient descent, block by block, in minutes.  [default: solved "
        "for fewer than 8 bits, with --granularity tensor, and with --effort thorough]",
    ),
)


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the command with these options, in their order."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)
