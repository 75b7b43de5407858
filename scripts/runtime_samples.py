"""Samples for the real networks that `bench_runtime.py` compares: pictures, texts, a synthetic voice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ptqjax.data.pictures import NORMALIZATIONS, Preprocessing, decode, read_list, to_input

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("PTQJAX_SHARED", ROOT.parent / "shared"))
NUM_CALIBRATION, NUM_EVALUATION = 32, 64
_RATE, _HOP = 16000, 160  # samples a second, and from frame to frame

Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a network is calibrated and evaluated on: batches of one sample."""

    calibration: list[Batch]
    evaluation: list[Batch]


def samples_of(network: str) -> Samples:
    """Returns the samples of a network of `NETWORKS`, 32 to calibrate and 64 others to evaluate on.

    Of sixteen, whether a rare value was clipped decided (ResNet-20 of the peer: 30 dB of the first 16, 24 of 1000).
    """
    found = NETWORKS[network]()
    return Samples(
        calibration=[next(found) for _ in range(NUM_CALIBRATION)],
        evaluation=[next(found) for _ in range(NUM_EVALUATION)],
    )


def path_of(network: str) -> Path:
    """Returns the network's file."""
    return SHARED / "models" / f"{network}.onnx"


# Pictures


def _photos(crop: int, normalize: Callable[[Any], Any] | str, name: str = "input") -> Callable[[], Iterator[Batch]]:
    """Returns a source of pictures, squares of `crop` pixels; the first are for calibration."""
    norm = NORMALIZATIONS[normalize] if isinstance(normalize, str) else normalize

    def source() -> Iterator[Batch]:
        for listing, count in (("calibration.tsv", NUM_CALIBRATION), ("evaluation.tsv", NUM_EVALUATION)):
            for picture in read_list(SHARED / "data" / "imagenet", listing)[:count]:
                rgb = decode(picture.path, crop=crop, short_side=max(crop, 256))[None]
                yield {name: to_input(rgb, Preprocessing(crop=crop, short_side=crop, normalize=norm))}

    return source


def _cut(source: Callable[[], Iterator[Batch]], change: Callable[[Any], Any]) -> Callable[[], Iterator[Batch]]:
    return lambda: ({name: change(value) for name, value in batch.items()} for batch in source())


def _luminance(pictures: np.ndarray) -> np.ndarray:
    return pictures.mean(1, keepdims=True)[:, :, :128, :128]


def _arrays(folder: str, stem: str, *names: str) -> Callable[[], Iterator[Batch]]:
    """Returns a source of samples from the two files `stem`calibration.npz and `stem`evaluation.npz."""

    def source() -> Iterator[Batch]:
        for part, count in (("calibration", NUM_CALIBRATION), ("evaluation", NUM_EVALUATION)):
            with np.load(SHARED / "data" / folder / f"{stem}{part}.npz") as file:
                arrays = {name: file[name][:count] for name in names}
            yield from ({name: value[i : i + 1] for name, value in arrays.items()} for i in range(count))

    return source


def _small_photos(change: Callable[[Any], Any], pixels: int) -> Callable[[], Iterator[Batch]]:
    """Returns a source of pictures of few pixels: every n-th of a larger one, averaged."""
    factor = 256 // pixels
    square = pixels * factor
    photos = _photos(square, "none")

    def reduced(values: np.ndarray) -> np.ndarray:
        blocks = values.reshape(1, 3, pixels, factor, pixels, factor)
        return np.ascontiguousarray(change(blocks.mean((3, 5))), np.float32)

    return _cut(photos, reduced)


def _digits() -> Iterator[Batch]:
    """Yields digits of 8 x 8 points in the middle of 28 x 28, 0 to 255."""
    for part in ("calibration", "evaluation"):
        with np.load(ROOT / "examples" / f"digits_{part}.npz") as file:
            digits = file["input"][: NUM_CALIBRATION if part == "calibration" else NUM_EVALUATION]
        for digit in digits:
            large = np.repeat(np.repeat(digit[0], 3, 0), 3, 1)
            yield {"Input3": np.pad(255 * large, 2)[None, None].astype(np.float32)}


# Sound


def voice(seconds: float, seed: int) -> np.ndarray:
    """Returns a synthetic voice of 16,000 samples a second: vowels of a wandering pitch, pauses, noise."""
    random = np.random.default_rng(seed)
    num = int(seconds * _RATE)
    time = np.arange(num) / _RATE
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * time + random.uniform(0, 6)) + random.uniform(-20, 60)
    phase = 2 * np.pi * np.cumsum(pitch) / _RATE
    formant = 700 + 500 * np.sin(2 * np.pi * 2.3 * time + random.uniform(0, 6))
    waves = sum(np.sin(k * phase) * np.exp(-(((k * pitch - formant) / 900) ** 2)) for k in range(1, 25))
    loudness = np.clip(np.sin(2 * np.pi * 1.1 * time + random.uniform(0, 6)) + 0.4, 0, None)
    noise = random.normal(size=num) * 10 ** random.uniform(-3, -1.5)
    return (0.15 * loudness * waves + noise).astype(np.float32)


def _spectra(sound: np.ndarray, size: int, hop: int) -> np.ndarray:
    frames = np.lib.stride_tricks.sliding_window_view(sound, size)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(size), axis=-1)).astype(np.float32)


def _mel_pictures() -> Iterator[Batch]:
    """Yields logarithmic spectra of 900 frames in 120 bands, as DNSMOS takes them."""
    points = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 122) / 2595) - 1)
    frequencies = np.linspace(0, 8000, 161)
    rising = (frequencies - points[:-2, None]) / np.diff(points)[:-1, None]
    falling = (points[2:, None] - frequencies) / np.diff(points)[1:, None]
    bank = np.clip(np.minimum(rising, falling), 0, None)
    for seed in range(NUM_CALIBRATION + NUM_EVALUATION):
        power = _spectra(voice(9.1, seed), 320, _HOP)[:900] ** 2 @ bank.T
        level = 10 * np.log10(np.maximum(power, 1e-10))
        yield {"input_1": ((np.maximum(level - level.max(), -80) + 40) / 40)[None].astype(np.float32)}


def _in_steps(
    network: str, frames: Callable[[int], Iterator[Batch]], states: Mapping[str, str], every: int
) -> Iterator[Batch]:
    """Yields the inputs of a network with memory, one step of `every`: what it remembers is its own."""
    session = onnxruntime.InferenceSession(path_of(network), providers=["CPUExecutionProvider"])
    shapes = {spec.name: [size if isinstance(size, int) else 1 for size in spec.shape] for spec in session.get_inputs()}
    for seed in range(NUM_CALIBRATION + NUM_EVALUATION):
        memory = {name: np.zeros(shapes[name], np.float32) for name in states}
        for index, frame in enumerate(frames(seed)):
            if index == every:
                yield {**frame, **memory}
                break
            found = session.run(list(states.values()), {**frame, **memory})
            memory = {name: np.asarray(value) for name, value in zip(states, found, strict=True)}


def _dtln() -> Iterator[Batch]:
    def frames(seed: int) -> Iterator[Batch]:
        return ({"input_2": each[None, None]} for each in _spectra(voice(1.0, seed), 512, 128))

    return _in_steps("other/dtln_1", frames, {"input_3": "tf_op_layer_stack_2"}, every=40)


def _silero() -> Iterator[Batch]:
    def frames(seed: int) -> Iterator[Batch]:
        sound = voice(2.0, seed)
        pieces = np.lib.stride_tricks.sliding_window_view(sound, 576)[::512]
        return ({"input": piece[None], "sr": np.array(_RATE, np.int64)} for piece in pieces)

    return _in_steps("other/silero_vad_16k_op15", frames, {"state": "stateN"}, every=20)


def _logarithmic() -> Iterator[Batch]:
    """Yields five frames of logarithmic spectra, 640 numbers in a row."""
    for seed in range(NUM_CALIBRATION + NUM_EVALUATION):
        spectra = _spectra(voice(1.0, seed), 256, 512)[:5, 1:129]
        yield {"input": 20 * np.log10(spectra + 1e-5).reshape(1, -1)}


def _bgr(rgb: Any) -> Any:
    return rgb[..., ::-1]


def _faces(rgb: Any) -> Any:
    return (rgb - 127) / 128


def _nanodet(rgb: Any) -> Any:
    return (rgb[..., ::-1] - np.array([103.53, 116.28, 123.675])) / np.array([57.375, 57.12, 58.395])


NETWORKS: Mapping[str, Callable[[], Iterator[Batch]]] = {
    "other/mnist_cntk": _digits,
    "other/superresolution_core_op18": _cut(_photos(224, "unit"), _luminance),
    "other/dnsmos_model_v8": _mel_pictures,
    "other/ultraface_rfb320_linzaer": _cut(_photos(320, _faces, "input"), lambda x: x[:, :, 40:280]),
    "other/yunet_n_320": _photos(320, _bgr, "input"),
    "other/nanodet_m": _photos(416, _nanodet, "input.1"),
    "other/dtln_1": _dtln,
    "other/silero_vad_16k_op15": _silero,
    "mobilenet_v2_1.0_224": _photos(224, "tf"),
    "mobilenet_v1_0.25_224": _photos(224, "tf"),
    "efficientnet_lite0": _photos(224, "tf"),
    "squeezenet_v1.1": _photos(227, "caffe"),
    "resnet20_cifar10": _arrays("cifar10", "", "input"),
    "tiny_vit_cifar10": _arrays("cifar10", "", "input"),
    "mlperf_resnet8_cifar10": _small_photos(lambda x: x, 32),
    "mlperf_vww_mobilenet_v1_0.25_96": _small_photos(lambda x: x / 255, 96),
    "mlperf_ad01_autoencoder": _logarithmic,
    "minilm_l6_sentiment": _arrays("text", "minilm_l6_sentiment_", "input_ids", "attention_mask"),
    "stories260k": _arrays("stories", "stories260k_", "input_ids"),
}
"""The networks by name, each with the source of its samples: first those to calibrate with, then the others."""
