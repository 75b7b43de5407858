"""Classifiers made of convolutions: the published structures with few channels and small pictures."""

from functools import partial

import torch
from torch import Tensor, nn

from tests.exports.layers import Apply, Residual, SqueezeExcitation, conv_norm

_CLASSES = 10


def basic_block(inputs: int, width: int, stride: int, dilation: int = 1) -> tuple[nn.Module, int]:
    """Two 3x3 convolutions and a shortcut; returns the block and its number of channels."""
    branch = nn.Sequential(
        conv_norm(inputs, width, 3, stride=stride, then=nn.ReLU(inplace=True)),
        conv_norm(width, width, 3, dilation=dilation),
    )
    return Residual(branch, _projection(inputs, width, stride), nn.ReLU(inplace=True)), width


def bottleneck(inputs: int, width: int, stride: int, dilation: int = 1) -> tuple[nn.Module, int]:
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut."""
    branch = nn.Sequential(
        conv_norm(inputs, width, then=nn.ReLU(inplace=True)),
        conv_norm(width, width, 3, stride=stride, dilation=dilation, then=nn.ReLU(inplace=True)),
        conv_norm(width, 4 * width),
    )
    return Residual(branch, _projection(inputs, 4 * width, stride), nn.ReLU(inplace=True)), 4 * width


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    return conv_norm(inputs, outputs, stride=stride) if stride != 1 or inputs != outputs else None


def resnet_stages(
    block: type, depths: tuple[int, ...], *, width: int = 8, dilations: tuple[int, ...] = (1, 1, 1, 1)
) -> tuple[list[nn.Module], list[int]]:
    """The stem and the stages of a ResNet, with their numbers of channels; a dilated stage keeps the size."""
    stem = nn.Sequential(conv_norm(3, width, 7, stride=2, then=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1))
    stages, widths, channels = [stem], [width], width
    for index, (depth, dilation) in enumerate(zip(depths, dilations, strict=True)):
        blocks = []
        for position in range(depth):
            stride = 2 if position == 0 and index > 0 and dilation == 1 else 1
            layer, channels = block(channels, width << index, stride, dilation)
            blocks.append(layer)
        stages.append(nn.Sequential(*blocks))
        widths.append(channels)
    return stages, widths


def resnet18() -> nn.Module:
    stages, widths = resnet_stages(basic_block, (2, 2, 2, 2))
    return nn.Sequential(*stages, *_classifier(widths[-1]))


def resnet50() -> nn.Module:
    stages, widths = resnet_stages(bottleneck, (1, 2, 2, 1), width=4)
    return nn.Sequential(*stages, *_classifier(widths[-1]))


def _classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, _CLASSES)]


def mobilenet_v2() -> nn.Module:
    relu6 = partial(nn.ReLU6, inplace=True)
    layers: list[nn.Module] = [conv_norm(3, 8, 3, stride=2, then=relu6())]
    channels = 8
    for expansion, width, repeats, first in (
        (1, 4, 1, 1),
        (6, 6, 2, 2),
        (6, 8, 1, 2),
        (6, 12, 1, 2),
        (6, 12, 1, 1),
        (6, 16, 2, 2),
        (6, 20, 1, 1),
    ):
        for stride in (first, *(1,) * (repeats - 1)):
            hidden = expansion * channels
            layers.append(_inverted(channels, hidden, width, kernel=3, stride=stride, activation=relu6()))
            channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(0.2), nn.Linear(32, _CLASSES)]
    return nn.Sequential(*layers, conv_norm(channels, 32, then=relu6()), *head)


def mobilenet_v3() -> nn.Module:
    swish = partial(nn.Hardswish, inplace=True)
    layers: list[nn.Module] = [conv_norm(3, 8, 3, stride=2, then=swish())]
    channels = 8
    for kernel, hidden, width, squeezed, activation, stride in (
        (3, 8, 8, 4, nn.ReLU, 2),
        (3, 24, 8, 0, nn.ReLU, 2),
        (3, 24, 8, 0, nn.ReLU, 1),
        (5, 32, 12, 8, nn.Hardswish, 2),
        (5, 48, 12, 12, nn.Hardswish, 1),
        (5, 48, 16, 12, nn.Hardswish, 2),
        (5, 64, 16, 16, nn.Hardswish, 1),
    ):
        excitation = SqueezeExcitation(hidden, squeezed, nn.ReLU(), nn.Hardsigmoid()) if squeezed else None
        layer = _inverted(
            channels,
            hidden,
            width,
            kernel=kernel,
            stride=stride,
            activation=activation(),
            excitation=excitation,
        )
        layers.append(layer)
        channels = width
    head = [nn.Linear(64, 48), swish(), nn.Dropout(0.2), nn.Linear(48, _CLASSES)]
    return nn.Sequential(*layers, conv_norm(channels, 64, then=swish()), nn.AdaptiveAvgPool2d(1), nn.Flatten(1), *head)


def efficientnet_b0() -> nn.Module:
    layers: list[nn.Module] = [conv_norm(3, 8, 3, stride=2, then=nn.SiLU(inplace=True))]
    channels = 8
    for expansion, kernel, width, repeats, first in (
        (1, 3, 4, 1, 1),
        (6, 3, 6, 2, 2),
        (6, 5, 8, 1, 2),
        (6, 3, 12, 1, 2),
        (6, 5, 16, 1, 1),
        (6, 5, 20, 2, 2),
        (6, 3, 24, 1, 1),
    ):
        for stride in (first, *(1,) * (repeats - 1)):
            hidden = expansion * channels
            excitation = SqueezeExcitation(hidden, max(1, channels // 4), nn.SiLU(), nn.Sigmoid())
            silu = nn.SiLU(inplace=True)
            layer = _inverted(
                channels, hidden, width, kernel=kernel, stride=stride, activation=silu, excitation=excitation
            )
            layers.append(layer)
            channels = width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Dropout(0.2), nn.Linear(48, _CLASSES)]
    return nn.Sequential(*layers, conv_norm(channels, 48, then=nn.SiLU(inplace=True)), *head)


def _inverted(
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    kernel: int,
    stride: int,
    activation: nn.Module,
    excitation: nn.Module | None = None,
) -> nn.Module:
    """Widens, filters each channel, excites where told, and narrows without an activation."""
    layers = [conv_norm(inputs, hidden, then=activation)] if hidden != inputs else []
    layers += [conv_norm(hidden, hidden, kernel, stride=stride, groups=hidden, then=activation)]
    layers += [excitation] if excitation else []
    branch = nn.Sequential(*layers, conv_norm(hidden, outputs))
    return Residual(branch) if stride == 1 and inputs == outputs else branch


def shufflenet_v2() -> nn.Module:
    layers: list[nn.Module] = [conv_norm(3, 8, 3, stride=2, then=nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    channels = 8
    for width, repeats in ((12, 2), (24, 2), (48, 1)):
        layers.append(_ShuffleUnit(channels, width, 2))
        layers += [_ShuffleUnit(width, width, 1) for _ in range(repeats - 1)]
        channels = width
    last = conv_norm(channels, 64, then=nn.ReLU(inplace=True))
    return nn.Sequential(*layers, last, Apply(Tensor.mean, [2, 3]), nn.Linear(64, _CLASSES))


class _ShuffleUnit(nn.Module):
    """Half of the channels pass (or are made smaller), half are filtered; then the halves are interleaved."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.stride = outputs // 2, stride
        relu = partial(nn.ReLU, inplace=True)
        depthwise = partial(conv_norm, kernel=3, stride=stride)
        self.kept = nn.Identity()
        if stride > 1:
            self.kept = nn.Sequential(depthwise(inputs, inputs, groups=inputs), conv_norm(inputs, half, then=relu()))
        self.filtered = nn.Sequential(
            conv_norm(inputs if stride > 1 else half, half, then=relu()),
            depthwise(half, half, groups=half),
            conv_norm(half, half, then=relu()),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, filtered = (x, x) if self.stride > 1 else x.chunk(2, dim=1)
        joined = torch.cat((self.kept(kept), self.filtered(filtered)), dim=1)
        batch, channels, height, width = joined.shape
        halves = joined.view(batch, 2, channels // 2, height, width)
        return torch.transpose(halves, 1, 2).contiguous().view(batch, channels, height, width)


def convnext_tiny() -> nn.Module:
    widths = (8, 16, 24, 32)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _ChannelNorm(widths[0])]
    for index, depth in enumerate((1, 1, 1, 1)):
        if index:
            layers += [_ChannelNorm(widths[index - 1]), nn.Conv2d(widths[index - 1], widths[index], 2, 2)]
        layers += [_ConvNextBlock(widths[index]) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), _ChannelNorm(widths[-1]), nn.Flatten(1), nn.Linear(widths[-1], _CLASSES)]
    return nn.Sequential(*layers, *head)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over axis 1 of a picture."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.filter = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mix(self.filter(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
