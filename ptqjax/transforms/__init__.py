"""Rewrites of a model that keep its function: Model -> (Model, report). They run nothing."""

from ptqjax.transforms.absorb import absorb_biases
from ptqjax.transforms.constant_channels import remove_constant_channels
from ptqjax.transforms.equalize import equalize, prepare, without_absorption
from ptqjax.transforms.fold import fold_batch_norms
from ptqjax.transforms.scaling import scale_channels

__all__ = [
    "absorb_biases",
    "equalize",
    "fold_batch_norms",
    "prepare",
    "remove_constant_channels",
    "scale_channels",
    "without_absorption",
]
