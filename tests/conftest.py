"""What all tests share: JAX strict, compiled programs kept, where the real models are, and traces counted."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session", autouse=True)
def _programs_are_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what this process compiles for tests that compile it again, in a folder that no other process writes."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # what was compiled while tests were collected has decided that there is none


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


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every trace of the step that observes a batch."""
    found: list[None] = []
    module = importlib.import_module("ptqjax.quantize.observing")
    original = module.interpret

    def counted(*arguments: Any, **settings: Any) -> object:
        found.append(None)
        return original(*arguments, **settings)

    monkeypatch.setattr(module, "interpret", counted)
    return found
