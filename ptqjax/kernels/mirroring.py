"""What becomes of a grid when what it holds is multiplied: the same integers, mirrored where the factor is negative.

With codes q = clip(round(w / s) + z, qmin, qmax) and a factor k, the grid of k w has the scale s |k|. For k > 0 it
keeps z and all codes. For k < 0 its zero point is qmin + qmax - z and the codes are qmin + qmax - q: rounding half to
even is symmetric, so (q' - z') s' = k (q - z) s exactly. A grid with qmin < 0 and z = 0 keeps z = 0, since runtimes ask
that of weights: the codes are -q. Where such a grid reaches one step further down than up, its ends differ by that
step: -qmin is clipped to qmax, and what was clipped to qmax may reach qmin. For k = 0 the scale stays and every code is
the zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.kernels.namespace import array_namespace


def mirrored_zero_point(zero_point: Any, factor: Any, qmin: Any, qmax: Any) -> Any:
    """Returns the zero point of the grid of what is multiplied by `factor`."""
    xp = array_namespace(zero_point, factor, qmin, qmax)
    is_centred = (zero_point == 0) & (qmin < 0)
    return xp.where((factor < 0) & xp.logical_not(is_centred), qmin + qmax - zero_point, zero_point)


def mirrored_codes(codes: Any, zero_point: Any, factor: Any, qmin: Any, qmax: Any) -> Any:
    """Returns the codes of what is multiplied by `factor`, from those before; all arguments broadcast."""
    xp = array_namespace(codes, zero_point, factor, qmin, qmax)
    new = mirrored_zero_point(zero_point, factor, qmin, qmax)
    return xp.clip(new + xp.sign(factor) * (codes - zero_point), qmin, qmax)


def multiplied_scale(scale: Any, factor: Any) -> Any:
    """Returns s |k| in float32, at least its smallest normal number; s where k is 0."""
    xp = array_namespace(scale, factor)
    product = xp.maximum(scale * xp.abs(factor), np.finfo(np.float32).tiny)
    return xp.where(factor == 0, scale, product).astype(np.float32)
