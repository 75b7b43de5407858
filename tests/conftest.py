"""Settings of every test: JAX strict, shapes checked, and where the real models are."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")


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
