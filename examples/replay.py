"""A recipe, run, run again, replayed, and compared with another: `python examples/replay.py`.

What a run does is in `digits.toml`; its results go to a folder named by a hash of model, data, settings, versions and
machine. `ptqjax run` and `ptqjax replay` do the same on the command line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ptqjax

HERE = Path(__file__).parent


def main(out: Path) -> None:
    """Runs the recipe under `out` and says what each step shows."""
    first = ptqjax.run_recipe(HERE / "digits.toml", out)
    print(f"run:       {len(first.stages)} stages in {sum(stage.seconds for stage in first.stages):.0f} s")
    print(f"           {first.folder}")
    print(f"           top-1 {first.metrics['top1']:.1%}, SQNR {first.metrics['sqnr_db']:.1f} dB in ONNX Runtime")

    again = ptqjax.run_recipe(HERE / "digits.toml", out)
    print(f"again:     {sum(not stage.is_new for stage in again.stages)} of {len(again.stages)} stages there already")

    same = ptqjax.replay(first.folder)
    print(f"replay:    {'all files of the same bytes' if same.is_same else 'differs'}")

    text = (HERE / "digits.toml").read_text(encoding="utf-8")
    changed = out / "changed.toml"
    text = text.replace('ranges = "sqnr"', 'ranges = "min-max"').replace('"digits', f'"{HERE.as_posix()}/digits')
    changed.write_text(text, encoding="utf-8")
    other = ptqjax.replay(first.folder, recipe=changed)
    print(f"changed:   {'; '.join(other.reasons)}")
    print(f"           first stage that differs: {other.first.name if other.first else 'none'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
