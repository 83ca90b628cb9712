"""Small networks with the parts of detectors, segmenters and mobile classifiers, as they are written in torch."""

from __future__ import annotations

import io
import warnings
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Sequential):
    """YOLO's convolution, BatchNorm and SiLU."""

    def __init__(self, into: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.SiLU())


class C2f(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        half = out // 2
        self.first, self.last = Conv(into, out), Conv(half * 3, out)
        self.body = nn.Sequential(Conv(half, half, 3), Conv(half, half, 3))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        return self.last(torch.cat([*parts, parts[-1] + self.body(parts[-1])], 1))


class Sppf(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = Conv(channels, channels // 2), Conv(channels * 2, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Two scales, boxes by distributions over 16 bins (DFL), boxes and scores in one output."""

    def __init__(self, classes: int = 3, size: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), C2f(16, 16))
        self.deep = nn.Sequential(Conv(16, 16, 3, 2), C2f(16, 16), Sppf(16))
        self.up, self.neck = nn.Upsample(scale_factor=2), C2f(32, 16)
        self.boxes = nn.ModuleList(nn.Sequential(Conv(16, 16, 3), nn.Conv2d(16, 64, 1)) for _ in range(2))
        self.scores = nn.ModuleList(nn.Sequential(Conv(16, 16, 3), nn.Conv2d(16, classes, 1)) for _ in range(2))
        self.dfl = nn.Conv2d(16, 1, 1, bias=False)
        self.dfl.weight.data[:] = torch.arange(16.0).reshape(1, 16, 1, 1)
        grids = [torch.arange(size // s) + 0.5 for s in (4, 8)]
        points = [torch.stack([r.repeat(len(r)), r.repeat_interleave(len(r))]) for r in grids]
        self.register_buffer("anchors", torch.cat(points, 1)[None])
        self.register_buffer("strides", torch.cat([torch.full((len(r) ** 2,), 32.0 / len(r)) for r in grids]))

    def forward(self, x: Tensor) -> Tensor:
        near = self.stem(x)
        far = self.deep(near)
        near = self.neck(torch.cat([self.up(far), near], 1))
        heads = [
            torch.cat([box(f), score(f)], 1).flatten(2)
            for f, box, score in zip((near, far), self.boxes, self.scores, strict=True)
        ]
        box, score = torch.cat(heads, 2).split((64, heads[0].shape[1] - 64), 1)
        batch, _, count = box.shape
        sides = self.dfl(box.view(batch, 4, 16, count).transpose(2, 1).softmax(1)).view(batch, 4, count)
        first, second = sides.chunk(2, 1)
        low, high = self.anchors - first, self.anchors + second
        return torch.cat([torch.cat([(low + high) / 2, high - low], 1) * self.strides, score.sigmoid()], 1)


def _block(into: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU6())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.deep = _block(3, 8), _block(8, 16), _block(16, 16)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, 2), _block(16, 8)
        self.wide = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(F.avg_pool2d(x, 2))
        b = self.deep(self.down(F.max_pool2d(a, 2)))
        y = self.join(torch.cat([self.up(b), a], 1))
        y = F.interpolate(self.last(self.wide(y)), scale_factor=2, mode="bilinear")
        return y.softmax(1)


class Ssd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(_block(3, 8, 2), _block(8, 16, 2))
        self.far = _block(16, 16, 2)
        self.boxes = nn.ModuleList(nn.Conv2d(16, 4 * 3, 3, padding=1) for _ in range(2))
        self.scores = nn.ModuleList(nn.Conv2d(16, 5 * 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near = self.near(x)
        maps = near, self.far(near)

        def joined(heads: nn.ModuleList, columns: int) -> Tensor:
            rows = [h(m).permute(0, 2, 3, 1).reshape(len(m), -1, columns) for h, m in zip(heads, maps, strict=True)]
            return torch.cat(rows, 1)

        return joined(self.boxes, 4), joined(self.scores, 5).softmax(-1)


class Mobile(nn.Module):
    """The blocks of MobileNetV3 and EfficientNet: squeeze and excite, hard-swish, SiLU, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 5, 1, 2, groups=16), nn.BatchNorm2d(16), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project, self.fc, self.last = nn.Conv2d(16, 8, 1), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y * gate)
        return self.last(F.hardswish(self.fc(x.mean((2, 3)))))


def settled(net: nn.Module, size: int = 32) -> nn.Module:
    """The network in evaluation mode, with the statistics of noise."""
    net.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(8, 3, size, size))
    return net.eval()


def exported(net: nn.Module, size: int = 32, **options: Any) -> onnx.ModelProto:
    """The network as ONNX, for one image."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its own deprecation
        torch.onnx.export(
            net, (torch.randn(1, 3, size, size),), stream, opset_version=17, dynamo=False, input_names=["x"], **options
        )
    return onnx.load_from_string(stream.getvalue())
