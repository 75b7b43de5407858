"""Many configurations in one compiled program, and what they tell: sweeps, sensitivities, widths.

The names are those of the stub beside this file, and also those of `ptqjax` itself.
"""

from ptqjax.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
