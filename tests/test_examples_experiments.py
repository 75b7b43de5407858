"""The examples of experiments, run as a user runs them: what they print is what they are there to show."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
LIMIT = 120
"""Seconds of processor time: on two cores an example is done in two minutes, whatever else the machine does then."""


def run(name, directory):
    """What an example prints, run from a directory of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # a user has compiled nothing before
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < LIMIT
    assert done.stderr == ""  # no log, no warning: it is what a user sees
    return done.stdout


def shares(printed):
    """The percentages that a table's lines begin with, by what stands before them."""
    return {name: float(share) for name, share in re.findall(r"^(\S+) +([\d.]+) %", printed, re.MULTILINE)}


def test_fine_tuning_recovers_what_three_bits_lose(tmp_path):
    found = shares(run("fine_tuning", tmp_path))
    assert found["float"] > 97
    assert found["post-training"] < found["float"] - 8
    # 597 digits: the standard error at 95 % is 0.9 points
    assert found["fine-tuned"] > found["post-training"] + 5
    assert (
        found["simulated"] > 99.5
    )  # as good as every answer: float sums in another order flip a rounding now and then
    assert not list(tmp_path.iterdir())  # where no --out is given, nothing stays


def test_four_bits_that_are_solved_for_lose_less(tmp_path):
    printed = run("four_bits", tmp_path)
    found = shares(printed)
    noise = {name: float(db) for name, db in re.findall(r"^(\S+) .* ([\d.]+) dB", printed, re.MULTILINE)}
    assert noise["solved"] > noise["nearest"] + 1.5
    assert found["solved"] >= found["nearest"] > 90


def test_mixed_precision_spends_the_same_bits_better(tmp_path):
    printed = run("mixed_precision", tmp_path)
    found, noise, size = shares(printed), {}, {}
    for name, decibels, bits, num_bytes in re.findall(
        r"^(\S+) .* ([\d.]+) dB; ([\d.]+) bits[^,\n]*(?:, (\d+) bytes)?", printed, re.MULTILINE
    ):
        noise[name], size[name] = float(decibels), (float(bits), int(num_bytes or 0))
    assert size["budget"][0] <= size["uniform"][0] == 3
    assert noise["budget"] > noise["uniform"] + 2
    assert found["budget"] >= found["uniform"] > 90
    assert size["drop"][1] < size["budget"][1]
    # at most 1 % on 128 calibration pictures; on 597 others the standard error of a share near 98 % is 0.6 points
    assert found["drop"] > 96


def test_a_sweep_compiles_once_and_marks_its_front(tmp_path):
    printed = run("sweep", tmp_path)
    assert "24 configurations, 1 compiled program;" in printed
    row = r"^(W\dA\d \w+) +([\d.]+) +([\d.]+) +([\d.]+) +(\d+) +[\d.]+( \*)?$"
    rows = {name: values for name, *values in re.findall(row, printed, re.MULTILINE)}
    assert len(rows) == 24
    noise, same, right = ({name: float(values[i]) for name, values in rows.items()} for i in range(3))
    size = {name: int(values[3]) for name, values in rows.items()}
    assert noise["W8A8 channel"] > noise["W4A8 channel"] + 6 > noise["W3A4 channel"] + 6
    assert same["W8A8 channel"] > 99
    assert right["W8A8 channel"] > 97
    best = {name for name in rows if not any(size[o] <= size[name] and noise[o] > noise[name] for o in rows)}
    assert {name for name, values in rows.items() if values[4]} <= best  # dB are printed with one decimal: ties


def test_a_recipe_is_resumed_replayed_and_compared(tmp_path):
    printed = run("replay", tmp_path)
    done, there = re.findall(
        r"^run: +(\d+) stages in|^again: +(\d+ of \d+) stages there already", printed, re.MULTILINE
    )
    assert there[1] == f"{done[0]} of {done[0]}"
    assert re.search(r"^replay: +all files of the same bytes$", printed, re.MULTILINE)
    assert "settings.config.ranges: sqnr then, min-max now" in printed
    assert re.search(r"first stage that differs: calibrate$", printed, re.MULTILINE)
    assert re.search(r"top-1 9[78]\.\d%", printed)


def test_widening_what_one_pass_finds_loudest_takes_most_noise_away(tmp_path):
    printed = run("sensitivity", tmp_path)
    alone = [float(value) for value in re.findall(r"(?:weight|activation) +([\d.]+) dB  #*$", printed, re.MULTILINE)]
    assert len(alone) == 18  # 8 weights, 10 activations
    assert alone == sorted(alone)
    before, after = (float(value) for value in re.findall(r": (-?[\d.]+) dB on pictures", printed))
    assert after > before + 4
