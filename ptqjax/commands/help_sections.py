"""What stands at the end of a command's --help: targets and what they mean, and the words of this field."""

from __future__ import annotations

import click

_WORDS = {
    "grid": "The values that a tensor may have once it is rounded, scale x (integer - zero point): 256 in 8 bits.",
    "scaling": "Channel i of a layer is divided by a number s_i, and what the next layer makes of it multiplied by it. "
    "The network computes the same, and channels become alike, so that one grid serves all of them.",
    "bounds": "What a ReLU6, or another Clip, between scaled channels becomes: 6 / s_i for each channel is exact.",
    "absorb": "What a channel never falls below is taken out of it and added to the next layer's bias: the grid need "
    "not reach that far. Exact unless by statistics.",
    "SQNR": "How far the outputs are from the float model's, in dB: at 20 the error is a tenth of the output, at 40 a "
    "hundredth.",
}
_SETTINGS = "All that --config FILE may hold, and the rules for single tensors and layers: docs/settings.md."


class WithTargets(click.Command):
    """A command that takes settings: its help ends with the targets, the words and the document of settings."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the sections."""
        from ptqjax.config import load_target, target_names

        with formatter.section("Targets"):
            formatter.write_dl([(name, load_target(name).description) for name in target_names()])
        with formatter.section("Words"):
            formatter.write_dl(list(_WORDS.items()))
        with formatter.section("Settings files"):
            formatter.write_text(_SETTINGS)
        super().format_epilog(ctx, formatter)
