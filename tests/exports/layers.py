"""What several networks are made of, and weights under which every term of them matters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Tensor], *arguments: Any) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.arguments)


class Residual(nn.Module):
    """x + branch(x); the shortcut may have layers of its own, and so may the sum."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut, self.after = branch, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shortcut(x) + self.branch(x))


class SqueezeExcitation(nn.Module):
    """Scales each channel by a small network of the channels' means."""

    def __init__(self, channels: int, squeezed: int, inner: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.pool, self.inner, self.gate = nn.AdaptiveAvgPool2d(1), inner, gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.inner(self.reduce(self.pool(x)))))


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    then: nn.Module | None = None,
) -> nn.Sequential:
    """A convolution that keeps the size (but for the stride), its batch norm, and an activation."""
    padding = dilation * (kernel - 1) // 2
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, padding, groups=groups, dilation=dilation, bias=False
    )  # the norm has the bias
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([then] if then else []))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws all weights and statistics: no mean is 0, no factor 1, and epsilons show in the result."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, deviation: float) -> Tensor:
        return deviation * torch.randn(like.shape, generator=generator)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    state = module.state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        if name.endswith("running_var"):
            value.copy_(uniform(value, 0.5, 1.5))
        elif name.endswith("running_mean") or (value.ndim <= 1 and "weight" not in name):
            value.copy_(normal(value, 0.3))
        elif value.ndim <= 1:
            value.copy_(uniform(value, 0.5, 1.5) * torch.sign(normal(value, 1.0)))
        else:
            value.copy_(normal(value, 1.2 * value[0].numel() ** -0.5))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            layer.eps = 0.01
    return module
