"""Rewrites of a model that keep its function: Model -> (Model, report). They run nothing."""

from ptqjax.transforms.fold import fold_batch_norms

__all__ = ["fold_batch_norms"]
