"""Where a command computes: the option, and what it makes JAX do."""

from __future__ import annotations

import click

from ptqjax.errors import ConfigError

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto takes an NVIDIA GPU where there is one.",
)
"""The option of commands that compute."""


def use_device(device: str) -> str:
    """Makes JAX compute on `device`; returns the name of what it computes on.

    Raises:
        ConfigError: A GPU is asked for, and JAX sees none.
    """
    import jax  # noqa: PLC0415  (--help does not wait for it)

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if device == "cuda":
        try:
            jax.config.update("jax_default_device", jax.devices("cuda")[0])
        except RuntimeError as error:
            raise ConfigError(
                "--device cuda: JAX sees no NVIDIA GPU; install ptqjax[cuda12] on a machine that has one, or leave "
                "--device at auto"
            ) from error
    chosen = jax.devices()[0]
    return f"{chosen.platform}: {chosen.device_kind}"
