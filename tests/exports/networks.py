"""The networks that tests export: each with the inputs that it takes at any batch size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tests.exports import convolutional, dense, recurrent, transformers
from tests.exports.layers import randomized

_LENGTH = 9  # of a text
Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network to export."""

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], Inputs]
    """By name, in the order of `forward`, for a batch size; the first axis is the batch."""

    traced: tuple[str, ...] = ("traced",)
    """How it is traced, besides the files of the other exporter; see `exporters.TRACED`."""

    def module(self, *, training: bool = False) -> torch.nn.Module:
        """The network with its random weights; in training nothing is dropped, so that its function is known."""
        module = randomized(self.make()).train(training)
        for layer in module.modules():
            if training and isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        return module


def pictures(size: int) -> Callable[[int], Inputs]:
    def inputs(batch: int) -> Inputs:
        return {"input": np.random.default_rng(batch).normal(size=(batch, 3, size, size)).astype(np.float32)}

    return inputs


def texts(*names: str) -> Callable[[int], Inputs]:
    """Tokens; with masks, each text but the first ends in padding."""

    def inputs(batch: int) -> Inputs:
        random = np.random.default_rng(batch)
        ends = random.integers(_LENGTH // 2, _LENGTH, size=batch)
        ends[0] = _LENGTH
        made = {
            "input_ids": random.integers(0, 50, size=(batch, _LENGTH)),
            "attention_mask": (np.arange(_LENGTH) < ends[:, None]).astype(np.int64),
            "token_type_ids": (np.arange(_LENGTH) > ends[:, None] // 2).astype(np.int64),
            "state": random.normal(size=(batch, 1, 10)).astype(np.float32),
        }
        return {name: made[name] for name in names}

    return inputs


_PRESERVED = ("traced, mode preserved",)
_OLD = ("traced for opset 9",)

NETWORKS: Mapping[str, Network] = {
    "ResNet-18": Network(make=convolutional.resnet18, inputs=pictures(64)),
    "ResNet-50": Network(make=convolutional.resnet50, inputs=pictures(64), traced=_OLD),
    "MobileNetV2": Network(make=convolutional.mobilenet_v2, inputs=pictures(64), traced=_PRESERVED),
    "MobileNetV3": Network(make=convolutional.mobilenet_v3, inputs=pictures(64), traced=_OLD),
    "EfficientNet-B0": Network(make=convolutional.efficientnet_b0, inputs=pictures(64), traced=_PRESERVED),
    "ShuffleNetV2": Network(make=convolutional.shufflenet_v2, inputs=pictures(64)),
    "ConvNeXt-tiny": Network(make=convolutional.convnext_tiny, inputs=pictures(64)),
    "ViT-B/16": Network(make=transformers.ViT, inputs=pictures(32), traced=_PRESERVED),
    "Swin-T": Network(make=transformers.Swin, inputs=pictures(52)),
    "DeepLabV3": Network(make=dense.DeepLabV3, inputs=pictures(60)),
    "FCOS": Network(make=dense.Fcos, inputs=pictures(72), traced=_PRESERVED),
    "BERT": Network(
        make=transformers.Bert,
        inputs=texts("input_ids", "attention_mask", "token_type_ids"),
        traced=("traced", *_PRESERVED),
    ),
    "GPT": Network(
        make=transformers.Gpt,
        inputs=texts("input_ids", "attention_mask"),
        traced=("traced", *_PRESERVED),
    ),
    "LSTM tagger": Network(make=recurrent.LstmTagger, inputs=texts("input_ids"), traced=("traced", *_OLD)),
    "GRU tagger": Network(make=recurrent.GruTagger, inputs=texts("input_ids", "state"), traced=_PRESERVED),
}

TRAINED = ("ResNet-18", "MobileNetV2")
"""Networks that are also exported in training: their batch norms use the batch's statistics, and nothing is dropped."""
