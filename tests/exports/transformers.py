"""Transformers: of pictures (ViT, Swin) and of text (like BERT and GPT-2), with few channels and layers."""

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn

_CLASSES = 10
_VOCABULARY = 50


class ViT(nn.Module):
    """Patches, a class token, encoder blocks that norm first."""

    def __init__(self, *, width: int = 24, heads: int = 3, depth: int = 2, patch: int = 8, picture: int = 32) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (picture // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        patches = self.patches(x).reshape(n, self.width, -1).permute(0, 2, 1)
        tokens = torch.cat([self.token.expand(n, -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class _EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class Swin(nn.Module):
    """Attention inside windows that are shifted in every second block; four patches are merged between stages."""

    def __init__(self, *, width: int = 12, depths: tuple[int, ...] = (2, 2), window: int = 4) -> None:
        super().__init__()
        self.patches, self.patch_norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        layers: list[nn.Module] = []
        for index, depth in enumerate(depths):
            layers += [_Merge(width << (index - 1))] if index else []
            layers += [
                _SwinBlock(width << index, 3 << index, window, shift=window // 2 if position % 2 else 0)
                for position in range(depth)
            ]
        self.stages = nn.Sequential(*layers)
        last = width << (len(depths) - 1)
        self.norm, self.head = nn.LayerNorm(last), nn.Linear(last, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.stages(self.patch_norm(self.patches(x).permute(0, 2, 3, 1))))
        return self.head(F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), 1).flatten(1))


class _Merge(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduce(self.norm(torch.cat(corners, -1)))


class _SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _WindowAttention(width, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class _WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", _relative_positions(window))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        size = self.window
        padded = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = padded.shape[1] // size, padded.shape[2] // size
        shift = (self.shift if rows > 1 else 0, self.shift if columns > 1 else 0)
        rolled = torch.roll(padded, (-shift[0], -shift[1]), (1, 2)) if sum(shift) else padded
        windows = rolled.view(batch, rows, size, columns, size, channels).permute(0, 1, 3, 2, 4, 5)
        windows = windows.reshape(batch * rows * columns, size * size, channels)
        qkv = self.qkv(windows).reshape(windows.shape[0], size * size, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (channels // self.heads) ** -0.5).matmul(k.transpose(-2, -1))
        bias = self.bias_table[self.index].view(size * size, size * size, -1)
        scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if sum(shift):
            mask = self._mask(padded, rows, columns, shift)
            scores = scores.view(batch, rows * columns, self.heads, size * size, size * size) + mask
            scores = scores.view(-1, self.heads, size * size, size * size)
        mixed = F.softmax(scores, dim=-1).matmul(v).transpose(1, 2).reshape(windows.shape)
        mixed = self.project(mixed).view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5)
        mixed = mixed.reshape(batch, rows * size, columns * size, channels)
        back = torch.roll(mixed, shift, (1, 2)) if sum(shift) else mixed
        return back[:, :height, :width, :].contiguous()

    def _mask(self, x: Tensor, rows: int, columns: int, shift: tuple[int, int]) -> Tensor:
        """-100 between places of a window that were not neighbours before the shift."""
        size = self.window
        region = x.new_zeros((rows * size, columns * size))
        number = 0
        for top, bottom in ((0, -size), (-size, -shift[0]), (-shift[0], None)):
            for left, right in ((0, -size), (-size, -shift[1]), (-shift[1], None)):
                region[top:bottom, left:right] = number
                number += 1
        region = region.view(rows, size, columns, size).permute(0, 2, 1, 3).reshape(rows * columns, size * size)
        apart = region.unsqueeze(1) - region.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).unsqueeze(1).unsqueeze(0)


def _relative_positions(window: int) -> Tensor:
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    steps = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + window - 1
    return (steps[..., 0] * (2 * window - 1) + steps[..., 1]).flatten()


class Bert(nn.Module):
    """Sums of three embeddings, blocks that norm last, a mask that is added to the scores, a pooled first token."""

    def __init__(self, *, width: int = 24, heads: int = 2, depth: int = 2, longest: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_VOCABULARY, width), nn.Embedding(longest, width)
        self.kinds, self.norm = nn.Embedding(2, width), nn.LayerNorm(width)
        self.register_buffer("place_ids", torch.arange(longest).expand(1, -1))
        self.layers = nn.ModuleList(_BertLayer(width, heads) for _ in range(depth))
        self.pool = nn.Linear(width, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        places = self.places(self.place_ids[:, : input_ids.size(1)])
        x = self.norm(self.words(input_ids) + self.kinds(token_type_ids) + places)
        mask = attention_mask[:, None, None, :].to(x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pool(x[:, 0]))


class _BertLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project, self.attention_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.widen, self.narrow, self.mlp_norm = nn.Linear(width, 48), nn.Linear(48, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(*y.size()[:-1], self.heads, -1).permute(0, 2, 1, 3)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)) + mask
        mixed = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        x = self.attention_norm(self.project(mixed.view(x.size())) + x)
        return self.mlp_norm(self.narrow(F.gelu(self.widen(x))) + x)


class Gpt(nn.Module):
    """Causal attention over what the mask lets through, positions counted from the mask, weights tied to the head."""

    def __init__(self, *, width: int = 24, heads: int = 2, depth: int = 2, longest: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_VOCABULARY, width), nn.Embedding(longest, width)
        self.layers = nn.ModuleList(_GptLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        places = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        x = self.words(input_ids) + self.places(places)
        earlier = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = earlier[None, None] & attention_mask[:, None, None, :].bool()  # token 0 is never padding
        mask = torch.where(allowed, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return F.linear(self.norm(x), self.words.weight)


class _GptLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.attention_norm(x)).split(width, dim=2)
        q, k, v = (part.view(n, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, length, width)
        x = x + self.project(mixed)
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x)), approximate="tanh"))
