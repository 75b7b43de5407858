"""What all tests share: JAX strict, compiled programs kept, where the real models are, and traces counted."""

import importlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import pytest

from tests import programs

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")


_own_programs: list[Path] = []  # this process's folder


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what this process compiles, for itself, for other processes and for later runs."""
    folder = programs.own_folder(programs.folder())
    _own_programs.append(folder.__enter__())
    config.add_cleanup(lambda: folder.__exit__(None, None, None))
    settings = {
        "jax_compilation_cache_dir": str(_own_programs[0]),
        "jax_persistent_cache_enable_xla_caches": "",  # by default keys hold the folder's name
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for processes that tests start


def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """Forgets all programs where one was damaged, which JAX compiles anew with this warning, and never writes."""
    if str(warning_message.message).startswith("Error reading persistent compilation cache"):
        programs.forget(*_own_programs, programs.folder())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what all tests took, and the files of tests that took the most: the slowest tests alone do not show it."""
    seconds: Counter[str] = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.location[0]] += report.duration
    if terminalreporter.config.option.durations:
        terminalreporter.section("slowest files")
        for name, duration in seconds.most_common(30):
            terminalreporter.line(f"{duration:.1f}s {name}")
        terminalreporter.line(f"{seconds.total():.1f}s in all")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and images; the test is skipped where it is missing."""
    folder = Path(os.environ.get("PTQJAX_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models: {folder}/models is missing (set PTQJAX_SHARED)")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _without_programs_of_other_files() -> Iterator[None]:
    """Frees compiled programs: some thousands reach the system's limit of memory mappings, and XLA then crashes."""
    yield
    jax.clear_caches()
    programs.exchange(*_own_programs, programs.folder())


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every trace of the step that observes a batch."""
    found: list[None] = []
    module = importlib.import_module("ptqjax.ranges.observing")
    original = module.interpret

    def counted(*arguments: Any, **settings: Any) -> object:
        found.append(None)
        return original(*arguments, **settings)

    monkeypatch.setattr(module, "interpret", counted)
    return found
