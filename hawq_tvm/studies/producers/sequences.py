"""Transformer blocks and speech networks of the kinds that are met in the field, small, for any weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Heads(nn.Module):
    """Attention of several heads, its projections apart or as one; a mask is added to the scores or chosen by."""

    def __init__(self, width: int, heads: int, joined: bool) -> None:
        super().__init__()
        self.heads, self.part = heads, width // heads
        self.into = nn.ModuleList([nn.Linear(width, 3 * width)] if joined else [nn.Linear(width, width) for _ in "qkv"])
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, added: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        given = self.into[0](x).split(width, 2) if len(self.into) == 1 else [layer(x) for layer in self.into]
        q, k, v = (y.view(batch, length, self.heads, self.part).transpose(1, 2) for y in given)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.part)
        if added is not None:
            scores = scores + added
        if allowed is not None:
            scores = torch.where(allowed, scores, torch.finfo(torch.float32).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Encoder(nn.Module):
    """BERT's layer: the normalization stands behind each sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.first = Heads(width, heads, joined=False), nn.LayerNorm(width, 1e-12)
        self.wider, self.narrower = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.second = nn.GELU(), nn.LayerNorm(width, 1e-12)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.first(x + self.attention(x, added=mask))
        return self.second(x + self.narrower(self.act(self.wider(x))))


class BertBody(nn.Module):
    """Two of BERT's layers on embeddings [1, 16, 64], without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Encoder(64, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, None)
        return x


class Bert(nn.Module):
    """BERT from word numbers [1, 16] and their mask [1, 16], both int64, to every word's vector and the pooled one."""

    WORDS, LENGTH = 200, 16

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.word, self.place = nn.Embedding(self.WORDS, width), nn.Embedding(64, width)
        self.norm, self.layers = nn.LayerNorm(width, 1e-12), nn.ModuleList(Encoder(width, 4) for _ in range(2))
        self.pooler = nn.Linear(width, width)
        self.register_buffer("places", torch.arange(self.LENGTH)[None])

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.word(ids) + self.place(self.places))
        added = (1 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, added)
        return x, torch.tanh(self.pooler(x[:, 0]))


class PreNorm(nn.Module):
    """ViT's and GPT-2's layer: the normalization stands before each branch."""

    def __init__(self, width: int, heads: int, approximate: str) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(width, 1e-6), Heads(width, heads, joined=True)
        self.second, self.act = nn.LayerNorm(width, 1e-6), nn.GELU(approximate)
        self.wider, self.narrower = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.first(x), allowed=allowed)
        return x + self.narrower(self.act(self.wider(self.second(x))))


class ViT(nn.Module):
    """A vision transformer: patches by a convolution, a class token, two layers, [1, 3, 32, 32] to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        width, patch = 48, 8
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width) / 4)
        self.layers = nn.Sequential(*(PreNorm(width, 3, "none") for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.place
        return self.head(self.norm(self.layers(x))[:, 0])


class GPT(nn.Module):
    """One of GPT-2's layers on embeddings [1, 16, 64], causal by a choice between scores and the least float."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PreNorm(64, 4, "tanh")
        self.register_buffer("allowed", torch.ones(1, 1, 16, 16, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.allowed)


class Conformer(nn.Module):
    """A Conformer layer on [1, 16, 48]: two half feed-forwards around attention, Transformer-XL's or plain, and a
    convolution.
    """

    LENGTH = 16

    def __init__(self, relative: bool) -> None:
        super().__init__()
        width, self.heads, self.part, self.relative = 48, 4, 12, relative
        self.before, self.after = self._feed(width), self._feed(width)
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in "qkvo")
        self.position = nn.Linear(width, width, bias=False)
        self.u, self.w = (nn.Parameter(torch.randn(1, 1, self.heads, self.part) / 8) for _ in "uw")
        self.register_buffer("places", torch.randn(1, 2 * self.LENGTH - 1, width) / 2)
        self.norm_conv, self.pointwise = nn.LayerNorm(width), nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Sequential(nn.Conv1d(width, width, 7, padding=3, groups=width), nn.BatchNorm1d(width))
        self.project = nn.Conv1d(width, width, 1)

    @staticmethod
    def _feed(width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        """Scores by content and, where relative, by distance: rows of distances are shifted into rows of places."""
        batch, length, width = x.shape
        q, k, v = (y(x).view(batch, length, self.heads, self.part) for y in (self.q, self.k, self.v))
        scores = (q + self.u).transpose(1, 2) @ k.permute(0, 2, 3, 1)
        if self.relative:
            p = self.position(self.places).view(1, -1, self.heads, self.part).permute(0, 2, 3, 1)
            far = F.pad((q + self.w).transpose(1, 2) @ p, (1, 0))
            far = far.view(batch, self.heads, 2 * length, length)[:, :, 1:]
            scores = scores + far.reshape(batch, self.heads, length, 2 * length - 1)[..., :length]
        weights = (scores / math.sqrt(self.part)).softmax(-1)
        return self.out((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self.attention(self.norm(x))
        y = F.glu(self.pointwise(self.norm_conv(x).transpose(1, 2)), 1)
        x = x + self.project(F.silu(self.depthwise(y))).transpose(1, 2)
        return self.last(x + 0.5 * self.after(x))


class QuartzNet(nn.Module):
    """Jasper's and MarbleNet's 1-D blocks of separable convolutions: [1, 32, 64] features to [1, 12, 32] scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self._separable(32, 32, 11, stride=2)
        self.body = nn.Sequential(self._separable(32, 32, 13), self._separable(32, 32, 13, act=False))
        self.around = nn.Sequential(nn.Conv1d(32, 32, 1, bias=False), nn.BatchNorm1d(32))
        self.last, self.head = self._separable(32, 48, 15, dilation=2), nn.Conv1d(48, 12, 1)

    @staticmethod
    def _separable(into: int, out: int, size: int, stride: int = 1, dilation: int = 1, act: bool = True) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(into, into, size, stride, dilation * (size - 1) // 2, dilation, into, bias=False),
            nn.Conv1d(into, out, 1, bias=False),
            nn.BatchNorm1d(out),
            *([nn.ReLU()] if act else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.last(F.relu(self.body(x) + self.around(x))))
