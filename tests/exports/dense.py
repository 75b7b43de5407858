"""Networks with an answer for every place of a picture: DeepLabV3 and an FCOS up to its suppression."""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn

from tests.exports.convolutional import basic_block, bottleneck, resnet_stages
from tests.exports.layers import conv_norm

_CLASSES = 5


class DeepLabV3(nn.Module):
    """A ResNet whose last stages are dilated instead of strided, pyramid pooling, and the picture's size again."""

    def __init__(self, *, width: int = 4, inner: int = 16, rates: tuple[int, ...] = (2, 4, 6)) -> None:
        super().__init__()
        stages, widths = resnet_stages(bottleneck, (1, 2, 2, 1), width=width, dilations=(1, 1, 2, 4))
        self.body = nn.Sequential(*stages)
        relu = nn.ReLU()
        self.branches = nn.ModuleList([conv_norm(widths[-1], inner, then=relu)])
        self.branches += [conv_norm(widths[-1], inner, 3, dilation=rate, then=relu) for rate in rates]
        self.picture = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm(widths[-1], inner, then=relu))
        self.join = nn.Sequential(conv_norm((2 + len(rates)) * inner, inner, then=relu), nn.Dropout(0.5))
        self.head = nn.Sequential(conv_norm(inner, inner, 3, then=relu), nn.Conv2d(inner, _CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        whole = F.interpolate(self.picture(features), features.shape[-2:], mode="bilinear", align_corners=False)
        joined = torch.cat([*(branch(features) for branch in self.branches), whole], dim=1)
        return F.interpolate(self.head(self.join(joined)), x.shape[-2:], mode="bilinear", align_corners=False)


class Fcos(nn.Module):
    """A feature pyramid on a ResNet, one head for all levels; scores, distances and centredness of every place."""

    def __init__(self, *, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        stages, widths = resnet_stages(basic_block, (1, 1, 1, 1), width=width)
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, inner, 1) for channels in widths[2:])
        self.smooth = nn.ModuleList(nn.Conv2d(inner, inner, 3, padding=1) for _ in widths[2:])
        self.coarser = nn.Conv2d(inner, inner, 3, stride=2, padding=1)
        self.classify, self.regress = _tower(inner), _tower(inner)
        self.scores = nn.Conv2d(inner, _CLASSES, 3, padding=1)
        self.distances, self.centred = nn.Conv2d(inner, 4, 3, padding=1), nn.Conv2d(inner, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        per_level = [self._head(level) for level in self._pyramid(features[2:])]
        scores, distances, centred = (torch.cat(parts, dim=1) for parts in zip(*per_level, strict=True))
        return scores, distances, centred

    def _pyramid(self, features: list[Tensor]) -> list[Tensor]:
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for index in range(len(levels) - 1, 0, -1):
            levels[index - 1] = levels[index - 1] + F.interpolate(levels[index], size=levels[index - 1].shape[-2:])
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        return [*levels, self.coarser(F.relu(levels[-1]))]

    def _head(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classified, regressed = self.classify(level), self.regress(level)
        scores = _places_last(self.scores(classified)).sigmoid()
        distances = F.relu(_places_last(self.distances(regressed))) * level.shape[-1]
        return scores, distances, _places_last(self.centred(regressed))


def _tower(channels: int) -> nn.Sequential:
    layers = [
        layer
        for _ in range(2)
        for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.ReLU())
    ]
    return nn.Sequential(*layers)


def _places_last(x: Tensor) -> Tensor:
    """[n, k, h, w] -> [n, h w, k]."""
    n, k, height, width = x.shape
    return x.view(n, -1, k, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, k)
