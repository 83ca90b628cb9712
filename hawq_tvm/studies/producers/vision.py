"""Detectors, segmentation networks and classifiers of the kinds that are met in the field, small, for any weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(
    into: int, out: int, size: int, act: nn.Module | None, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Module:
    """Convolution, BatchNorm and an activation; the image keeps its size, divided by the stride."""
    border = dilation * (size - 1) // 2
    layers = [
        nn.Conv2d(into, out, size, stride, border, dilation, groups, bias=False),
        nn.BatchNorm2d(out),
        *([act] if act is not None else []),
    ]
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with a sum around them where asked for."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.body = nn.Sequential(conv(width, width, 3, nn.SiLU()), conv(width, width, 3, nn.SiLU()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class C2f(nn.Module):
    """YOLOv8's block: the channels are cut in two, one half goes through bottlenecks, and every result is joined."""

    def __init__(self, into: int, out: int, shortcut: bool) -> None:
        super().__init__()
        half = out // 2
        self.first = conv(into, out, 1, nn.SiLU())
        self.blocks = nn.ModuleList([Bottleneck(half, shortcut)])
        self.last = conv(half * 3, out, 1, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Three maximum pools one after the other, joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = conv(width, width // 2, 1, nn.SiLU()), conv(width * 2, width, 1, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A YOLOv8-like detector: C2f and SPPF, a feature pyramid of three levels, and a head of distance distributions.

    Images [1, 3, 64, 64]; the result is [1, 4 + classes, 84]: boxes (centre, size) in pixels and scores.
    """

    BINS, SIZE = 8, 64
    anchors: Tensor
    strides: Tensor
    bins: Tensor

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        a, b, c = 16, 32, 64
        self.stem = nn.Sequential(conv(3, 8, 3, nn.SiLU(), 2), conv(8, a, 3, nn.SiLU(), 2), C2f(a, a, True))
        self.low = nn.Sequential(conv(a, a, 3, nn.SiLU(), 2), C2f(a, a, True))
        self.middle = nn.Sequential(conv(a, b, 3, nn.SiLU(), 2), C2f(b, b, True))
        self.high = nn.Sequential(conv(b, c, 3, nn.SiLU(), 2), C2f(c, c, True), SPPF(c))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.down_to_middle, self.down_to_low = C2f(b + c, b, False), C2f(a + b, a, False)
        self.step_low, self.up_to_middle = conv(a, a, 3, nn.SiLU(), 2), C2f(a + b, b, False)
        self.step_middle, self.up_to_high = conv(b, b, 3, nn.SiLU(), 2), C2f(b + c, c, False)
        self.boxes = nn.ModuleList(self._head(width, 4 * self.BINS) for width in (a, b, c))
        self.scores = nn.ModuleList(self._head(width, classes) for width in (a, b, c))
        self.classes = classes
        anchors, strides = [], []
        for stride in (8, 16, 32):
            n = self.SIZE // stride
            y, x = torch.meshgrid(torch.arange(n) + 0.5, torch.arange(n) + 0.5, indexing="ij")
            anchors.append(torch.stack((x, y)).reshape(2, -1))
            strides.append(torch.full((1, n * n), float(stride)))
        self.register_buffer("anchors", torch.cat(anchors, 1)[None])
        self.register_buffer("strides", torch.cat(strides, 1))
        self.register_buffer("bins", torch.arange(self.BINS, dtype=torch.float32).reshape(1, self.BINS, 1, 1))

    @staticmethod
    def _head(width: int, out: int) -> nn.Module:
        return nn.Sequential(conv(width, 16, 3, nn.SiLU()), nn.Conv2d(16, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.stem(x))
        middle = self.middle(low)
        high = self.high(middle)
        middle = self.down_to_middle(torch.cat((self.up(high), middle), 1))
        low = self.down_to_low(torch.cat((self.up(middle), low), 1))
        middle = self.up_to_middle(torch.cat((self.step_low(low), middle), 1))
        high = self.up_to_high(torch.cat((self.step_middle(middle), high), 1))
        levels = [
            torch.cat((box(level), score(level)), 1).flatten(2)
            for level, box, score in zip((low, middle, high), self.boxes, self.scores)
        ]
        boxes, scores = torch.cat(levels, 2).split((4 * self.BINS, self.classes), 1)
        sides = boxes.reshape(1, 4, self.BINS, -1).transpose(1, 2).softmax(1)
        before, after = F.conv2d(sides, self.bins).reshape(1, 4, -1).chunk(2, 1)
        start, end = self.anchors - before, self.anchors + after
        return torch.cat((torch.cat(((start + end) / 2, end - start), 1) * self.strides, scores.sigmoid()), 1)


class SSD(nn.Module):
    """A single-shot detector of two levels: boxes [1, n, 4] in corners, and class probabilities [1, n, classes]."""

    SIZE, PRIORS = 64, 3
    priors: Tensor

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.low = nn.Sequential(
            conv(3, 16, 3, nn.ReLU6(), 2), conv(16, 32, 3, nn.ReLU6(), 2), conv(32, 32, 3, nn.ReLU6(), 2)
        )
        self.high = nn.Sequential(conv(32, 16, 1, nn.ReLU6()), conv(16, 64, 3, nn.ReLU6(), 2))
        self.box = nn.ModuleList(nn.Conv2d(width, 4 * self.PRIORS, 3, padding=1) for width in (32, 64))
        self.score = nn.ModuleList(nn.Conv2d(width, classes * self.PRIORS, 3, padding=1) for width in (32, 64))
        self.classes = classes
        priors = []
        for n, wide in ((8, 0.2), (4, 0.5)):
            y, x = torch.meshgrid((torch.arange(n) + 0.5) / n, (torch.arange(n) + 0.5) / n, indexing="ij")
            shapes = torch.tensor([[wide, wide], [wide * 1.4, wide / 1.4], [wide / 1.4, wide * 1.4]])
            centres = torch.stack((x, y), -1).reshape(-1, 1, 2).expand(-1, self.PRIORS, 2)
            priors.append(torch.cat((centres, shapes.expand(n * n, -1, 2)), -1).reshape(-1, 4))
        self.register_buffer("priors", torch.cat(priors)[None])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x)
        levels = (low, self.high(low))
        boxes = [box(y).permute(0, 2, 3, 1).reshape(1, -1, 4) for y, box in zip(levels, self.box)]
        scores = [score(y).permute(0, 2, 3, 1).reshape(1, -1, self.classes) for y, score in zip(levels, self.score)]
        found, chosen = torch.cat(boxes, 1), torch.cat(scores, 1).softmax(-1)
        centre = self.priors[..., :2] + found[..., :2] * 0.1 * self.priors[..., 2:]
        size = self.priors[..., 2:] * torch.exp(found[..., 2:] * 0.2)
        return torch.cat((centre - size / 2, centre + size / 2), -1), chosen


class UNet(nn.Module):
    """Two levels down and up with transposed convolutions and joined shortcuts: [1, 3, 32, 32] to [1, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = 8, 16, 32
        self.first, self.second, self.bottom = self._pair(3, a), self._pair(a, b), self._pair(b, c)
        self.up_second, self.up_first = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)
        self.second_again, self.first_again = self._pair(2 * b, b), self._pair(2 * a, a)
        self.head = nn.Conv2d(a, 3, 1)

    @staticmethod
    def _pair(into: int, out: int) -> nn.Module:
        return nn.Sequential(conv(into, out, 3, nn.ReLU()), conv(out, out, 3, nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        y = self.up_second(self.bottom(F.max_pool2d(second, 2)))
        y = self.second_again(torch.cat((y, second), 1))
        return self.head(self.first_again(torch.cat((self.up_first(y), first), 1)))


class DeepLab(nn.Module):
    """Dilated convolutions, pyramid pooling at three rates and over the whole image, bilinear up to [1, 5, 48, 48]."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(conv(3, 16, 3, nn.ReLU(), 2), conv(16, 24, 3, nn.ReLU(), 2))
        self.high = nn.Sequential(conv(24, 32, 3, nn.ReLU(), 2), conv(32, 32, 3, nn.ReLU(), dilation=2))
        self.branches = nn.ModuleList(
            [conv(32, 16, 1, nn.ReLU()), *(conv(32, 16, 3, nn.ReLU(), dilation=d) for d in (2, 4))]
        )
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 16, 1), nn.ReLU())
        self.joined, self.from_low = conv(64, 32, 1, nn.ReLU()), conv(24, 8, 1, nn.ReLU())
        self.head = nn.Sequential(conv(40, 32, 3, nn.ReLU()), nn.Conv2d(32, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        whole = F.interpolate(self.whole(high), size=high.shape[2:], mode="bilinear", align_corners=False)
        y = self.joined(torch.cat([*(branch(high) for branch in self.branches), whole], 1))
        y = F.interpolate(y, size=low.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(torch.cat((y, self.from_low(low)), 1))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class Inverted(nn.Module):
    """An inverted residual: wider, depthwise, weighed by its own means (squeeze and excitation), narrower."""

    def __init__(
        self, into: int, out: int, stride: int, size: int, act: type[nn.Module], gate: type[nn.Module]
    ) -> None:
        super().__init__()
        wide = into * 3
        self.same = stride == 1 and into == out
        self.wider = conv(into, wide, 1, act())
        self.depthwise = conv(wide, wide, size, act(), stride, groups=wide)
        inner = nn.SiLU() if act is nn.SiLU else nn.ReLU()
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide // 4, 1), inner, nn.Conv2d(wide // 4, wide, 1), gate()
        )
        self.narrower = conv(wide, out, 1, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.wider(x))
        y = self.narrower(y * self.squeeze(y))
        return x + y if self.same else y


class Mobile(nn.Module):
    """Four inverted residuals, [1, 3, 48, 48] to 10 classes: EfficientNet's or MobileNetV3's by act and gate."""

    def __init__(self, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, act(), 2)
        self.blocks = nn.Sequential(
            Inverted(16, 16, 1, 3, act, gate),
            Inverted(16, 24, 2, 3, act, gate),
            Inverted(24, 24, 1, 5, act, gate),
            Inverted(24, 40, 2, 5, act, gate),
        )
        self.last, self.pool = conv(40, 64, 1, act()), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(64, 32), act(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.last(self.blocks(self.stem(x)))).flatten(1))
