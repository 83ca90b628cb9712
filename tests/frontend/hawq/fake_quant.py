"""HAWQ's quantized inference as its training side computes it, written anew from the published method, on
pytorchcv's float networks.

Tensors are real numbers beside a scale, and integers are recovered by dividing, as in HAWQ: a quantizer rescales by
31-bit mantissas and powers of two in float64, rounds half to even, and rounds the two branches of a sum on their
own. Nothing here knows the importer. HAWQ carries real numbers in float32, whose sums are no integers any more
beyond 2^24; `real` chooses float64, in which everything stays exact, or float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'hawq-tvm[torch]'")
F = torch.nn.functional
WIDE = 16


def mantissa_and_exponent(ratio: Any) -> tuple[Any, Any]:
    """ratio (float64) as m / 2^e with a mantissa of 31 bits, rounded half up in decimal."""
    parts, exponents = np.frexp(ratio.numpy())
    rounded = [int(Decimal(p * 2**31).quantize(Decimal(1), rounding=ROUND_HALF_UP)) for p in parts.ravel().tolist()]
    return torch.tensor(rounded, dtype=torch.float64).reshape(parts.shape), 31.0 - torch.tensor(
        exponents, dtype=torch.float64
    )


def rescaled(z: Any, scales: tuple[Any, Any], target: Any) -> Any:
    """Real z at the grid of scales[0] scales[1] as integers at the grid of `target`, unclamped."""
    spread = (1, -1, *[1] * (z.dim() - 2))
    a, b = (s.reshape(spread) for s in scales)
    wide = [torch.as_tensor(v, dtype=z.dtype) for v in (a, b)]
    steps = z / wide[0] / wide[1]
    # What ReLU6 cut off lies on no grid: float32, in which HAWQ divides, decides which integer it is.
    steps = torch.where(z == 6, (z.float() / a / b).to(z.dtype), steps)
    integers = torch.round(steps)
    if z.dtype == torch.float64:
        assert torch.all((steps - integers).abs()[(z != 6) & (z.abs() > 0)] < 0.25), "the integers cannot be told"
    product = (a.double() * b.double()).float().double()
    m, e = mantissa_and_exponent(product / target.double())
    return torch.round(integers.double() * m / 2.0**e)


@dataclass
class Quantizer:
    """A quantizer of activations: 4 bits are unsigned, others signed; ranges grow while `learning`."""

    bits: int
    low: float = 0.0
    high: float = 0.0
    integers: Any = None
    beyond: int = 0

    @property
    def limits(self) -> tuple[int, int]:
        return (0, 15) if self.bits == 4 else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    @property
    def scale(self) -> Any:
        low, high = torch.tensor([self.low]), torch.tensor([self.high])
        if self.bits == 4:
            return torch.clamp(high - low, min=1e-8) / 15.0
        return torch.clamp(torch.maximum(low.abs(), high.abs()), min=1e-8) / (2 ** (self.bits - 1) - 1)


@dataclass
class Weights:
    """A layer with weights: folded with its BatchNorm, then quantized per channel (per tensor where HAWQ does)."""

    bits: int
    conv: Any
    norm: Any = None
    per_tensor: bool = False
    kind: str = "convbn_scaling_factor"
    scale: Any = None
    integers: Any = None
    bias: Any = None

    def quantize(self, x_scale: Any) -> None:
        weight, bias = self.conv.weight.detach(), self.conv.bias
        bias = torch.zeros(weight.shape[0]) if bias is None else bias.detach()
        if self.norm is not None:
            factor = self.norm.weight.detach() / torch.sqrt(self.norm.running_var + self.norm.eps)
            weight = weight * factor.reshape(-1, 1, 1, 1)
            bias = (bias - self.norm.running_mean) * factor + self.norm.bias.detach()
        flat = weight.reshape(1 if self.per_tensor else weight.shape[0], -1)
        levels = 2 ** (self.bits - 1) - 1
        self.scale = torch.clamp(flat.abs().max(dim=1).values, min=1e-8) / levels
        spread = self.scale.reshape(-1, *[1] * (weight.dim() - 1))
        self.integers = torch.clamp(torch.round(1.0 / spread * weight), -levels - 1, levels)
        self.bias = torch.clamp(torch.round(1.0 / (self.scale * x_scale) * bias), -(2**31), 2**31 - 1)


Pair = tuple[Any, Any]


@dataclass
class FakeQuant:
    """One quantized network: its quantizers and layers under HAWQ's names, made when they are first met.

    bits: of every layer by name.  learning: ranges of activations follow the data.  real: the float type of tensors.
    saturate: sums of two branches are clamped to 16 unsigned bits where ReLU follows, and to 32 where not; HAWQ does
    not.
    """

    bits: dict[str, int]
    net: Any
    learning: bool = True
    real: Any = None
    saturate: bool = False
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    layers: dict[str, Weights] = field(default_factory=dict)

    def act(
        self,
        name: str,
        x: Any,
        before: Pair | None = None,
        identity: Any = None,
        other: Pair | None = None,
        rectified: bool = False,
    ) -> Pair:
        """Quantize x; before: the two scales whose product is its grid, None for the image; identity: the branch of
        `other`'s grid that x holds too.

        rectified: ReLU follows.
        """
        q = self.quantizers.setdefault(name, Quantizer(self.bits[name]))
        if self.learning:
            q.low, q.high = min(q.low, float(x.min())), max(q.high, float(x.max()))
        scale, (low, high) = q.scale, q.limits
        if before is None:
            integers = torch.round(1.0 / scale * x.float()).double()
        elif identity is None:
            integers = rescaled(x, before, scale)
        else:
            integers = rescaled(x - identity, before, scale) + rescaled(identity, other, scale)  # type: ignore[arg-type]
            low, high = (0, 2**16 - 1) if rectified else (-(2**31), 2**31 - 1)
            q.beyond = int((integers > high).sum() + (0 if rectified else (integers < low).sum()))
        if identity is None or self.saturate:
            integers = torch.clamp(integers, low, high)
        q.integers = integers
        return integers.to(self.real or torch.float64) * scale.to(self.real or torch.float64), scale

    def joined(self, name: str, parts: Sequence[Pair]) -> Pair:
        """Concatenated channels, each rescaled from its own grid."""
        q = self.quantizers.setdefault(name, Quantizer(self.bits[name]))
        if self.learning:
            q.low, q.high = (
                min(q.low, *(float(x.min()) for x, _ in parts)),
                max(q.high, *(float(x.max()) for x, _ in parts)),
            )
        one = torch.ones(1)
        q.integers = torch.clamp(torch.cat([rescaled(x, (s, one), q.scale) for x, s in parts], 1), *q.limits)
        return q.integers.to(parts[0][0].dtype) * q.scale.to(parts[0][0].dtype), q.scale

    def conv(self, name: str, block: Any, x: Pair) -> tuple[Any, Pair]:
        """A convolution folded with its BatchNorm: real sums, and the two scales of their grid."""
        layer = self.layers.setdefault(name, Weights(self.bits[name], block.conv, block.bn))
        if self.learning:
            layer.quantize(x[1])
        integers = torch.round(x[0] / x[1].to(x[0].dtype))
        conv, kind = layer.conv, x[0].dtype
        sums = F.conv2d(
            integers,
            layer.integers.to(kind),
            layer.bias.to(kind),
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        return sums * (layer.scale * x[1]).to(kind).reshape(1, -1, 1, 1), (x[1], layer.scale)

    def classes(
        self, name: str, module: Any, x: Pair, kind: str = "fc_scaling_factor", per_tensor: bool = False
    ) -> Any:
        """The last layer, of matrix or 1 x 1 convolution: float32, as HAWQ returns it."""
        layer = self.layers.setdefault(name, Weights(self.bits[name], module, None, per_tensor, kind))
        if self.learning:
            layer.quantize(x[1])
        integers = torch.round(x[0] / x[1].to(x[0].dtype)).flatten(1)
        sums = torch.round(integers @ layer.integers.to(integers.dtype).flatten(1).T + layer.bias.to(integers.dtype))
        return sums.float() * (layer.scale * x[1]).reshape(1, -1)

    def relu(self, name: str, x: Pair) -> Pair:
        """ReLU after a quantizer, of its integers too."""
        self.quantizers[name].integers = torch.relu(self.quantizers[name].integers)
        return torch.relu(x[0]), x[1]

    def mean(self, name: str, x: Pair, whole: bool = True) -> Pair:
        """A mean of the integers, cut off after 0.01 was added."""
        integers = torch.round(x[0] / x[1].to(x[0].dtype))
        pooled = F.avg_pool2d(integers, integers.shape[2:]) if whole else F.avg_pool2d(integers, 3, 1, 1)
        cut = torch.trunc(pooled + 0.01)
        self.quantizers[name] = Quantizer(WIDE, integers=cut)
        return cut * x[1].to(cut.dtype), x[1]

    def frozen(self, real: Any = None, saturate: bool = False) -> FakeQuant:
        """The same network after training."""
        return FakeQuant(self.bits, self.net, False, real, saturate, self.quantizers, self.layers)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The classes of images (N, 3, H, W); afterwards every quantizer has its integers."""
        return np.asarray(FORWARD[type(self.net).__name__](self, torch.tensor(image)).numpy())

    def integers(self) -> dict[str, np.ndarray]:
        """The integers of the last run by layer."""
        return {k: q.integers.numpy().astype(np.int64) for k, q in self.quantizers.items()}


ONE = torch.ones(1)


def resnet(f: FakeQuant, image: Any) -> Any:
    features = f.net.features
    stages = [s for n, s in features.named_children() if n.startswith("stage")]
    deep = hasattr(stages[0].unit1.body, "conv3")
    x = f.act("quant_input", image)
    z, grid = f.conv("quant_init_convbn" if deep else "quant_init_block_convbn", features.init_block.conv, x)
    x = f.relu("quant_act_int32", f.act("quant_act_int32", F.max_pool2d(z, 3, 2, 1), grid))
    for i, stage in enumerate(stages, 1):
        for j, unit in enumerate(stage.children(), 1):
            at = f"stage{i}.unit{j}"
            narrow = f.act(f"{at}.quant_act", x[0], (x[1], ONE))
            identity, other = x[0], (x[1], ONE)
            if unit.resize_identity:
                identity, other = f.conv(f"{at}.quant_identity_convbn", unit.identity_conv, narrow)
            inner = narrow
            count = 3 if deep else 2
            for k in range(1, count + 1):
                z, grid = f.conv(f"{at}.quant_convbn{k}", getattr(unit.body, f"conv{k}"), inner)
                if k < count:
                    inner = f.act(f"{at}.quant_act{k}", torch.relu(z), grid)
            x = f.relu(
                f"{at}.quant_act_int32",
                f.act(f"{at}.quant_act_int32", z + identity, grid, identity, other, rectified=True),
            )
    x = f.mean("final_pool", x)
    return f.classes("quant_output", f.net.output, f.act("quant_act_output", x[0], (x[1], ONE)), per_tensor=True)


def mobilenetv2(f: FakeQuant, image: Any) -> Any:
    def relu6(z: Any) -> Any:
        return torch.clamp(z, 0, 6)

    features = f.net.features
    z, grid = f.conv("init_block", features.init_block, f.act("quant_input", image))
    x = f.act("quant_act_int32", relu6(z), grid)
    for i, stage in enumerate((s for n, s in features.named_children() if n.startswith("stage")), 1):
        for j, unit in enumerate(stage.children(), 1):
            at, inner = f"features.stage{i}.unit{j}", x
            inner = f.act(f"{at}.quant_act", x[0], (x[1], ONE))
            for k in (1, 2):
                z, grid = f.conv(f"{at}.conv{k}", getattr(unit, f"conv{k}"), inner)
                inner = f.act(f"{at}.quant_act{k}", relu6(z), grid)
            z, grid = f.conv(f"{at}.conv3", unit.conv3, inner)
            x = (
                f.act(f"{at}.quant_act_int32", z + x[0], grid, x[0], (x[1], ONE))
                if unit.residual
                else f.act(f"{at}.quant_act_int32", z, grid)
            )
    narrow = f.act("quant_act_before_final_block", x[0], (x[1], ONE))
    z, grid = f.conv("features.final_block", features.final_block, narrow)
    x = f.mean("features.final_pool", f.act("quant_act_int32_final", relu6(z), grid))
    return f.classes("output", f.net.output, f.act("quant_act_output", x[0], (x[1], ONE)), "conv_scaling_factor")


def inceptionv3(f: FakeQuant, image: Any) -> Any:
    def block(at: str, module: Any, x: Pair) -> Pair:
        z, grid = f.conv(f"{at}.q_convbn", module, x)
        return f.act(f"{at}.q_activ", torch.relu(z), grid)

    def branch(at: str, module: Any, x: Pair) -> Pair:
        x = f.act(f"{at}.q_input_act", x[0], (x[1], ONE))
        kind = type(module).__name__
        if kind == "MaxPoolBranch":
            return F.max_pool2d(x[0], 3, 2), x[1]
        if kind == "AvgPoolBranch":
            x = f.mean(f"{at}.q_pool", x, whole=False)
            return block(f"{at}.q_conv", module.conv, f.act(f"{at}.q_pool_act", x[0], (x[1], ONE)))
        if kind == "Conv1x1Branch":
            return block(f"{at}.q_conv", module.conv, x)
        for k, conv in enumerate(module.conv_list.children(), 1):
            x = block(f"{at}.q_conv_list.q_conv{k}", conv, x)
        if kind == "ConvSeqBranch":
            return x
        return f.joined(
            f"{at}.q_rescaling_activ",
            [block(f"{at}.q_conv1x3", module.conv1x3, x), block(f"{at}.q_conv3x1", module.conv3x1, x)],
        )

    features, at = f.net.features, "features.q_init_block"
    x = f.act(f"{at}.q_input_activ", image)
    for k in range(1, 6):
        x = block(f"{at}.q_conv{k}", getattr(features.init_block, f"conv{k}"), x)
        if k in (3, 5):
            x = (F.max_pool2d(x[0], 3, 2), x[1])
    for i, stage in enumerate((s for n, s in features.named_children() if n.startswith("stage")), 1):
        for j, unit in enumerate(stage.children(), 1):
            at = f"features.stage{i}.unit{j}"
            parts = [branch(f"{at}.branches.{n}", m, x) for n, m in unit.branches.named_children()]
            x = f.joined(f"{at}.q_rescaling_activ", parts)
    x = f.mean("features.q_final_pool", x)
    return f.classes(
        "output.q_fc", f.net.output.fc, f.act("features.q_concat_activ", x[0], (x[1], ONE)), per_tensor=True
    )


FORWARD = {"ResNet": resnet, "MobileNetV2": mobilenetv2, "InceptionV3": inceptionv3}


def float_network(name: str, seed: int = 0) -> Any:
    """pytorchcv's float network with random weights and BatchNorms as of training: means and variances are those of
    the data, scales and shifts vary.
    """
    from pytorchcv.models import inceptionv3, mobilenetv2, resnet

    make = {"inceptionv3": inceptionv3, "mobilenetv2_w1": mobilenetv2}.get(name, resnet)
    torch.manual_seed(seed)
    net = getattr(make, name)()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.4, 1.6)
            torch.nn.init.normal_(m.bias, 0.0, 0.4)
            m.momentum = 1.0
    return net


def train_norms(net: Any, image: np.ndarray) -> None:
    """One pass that gives the BatchNorms the statistics of `image`."""
    net.train()
    with torch.no_grad():
        net.features(torch.tensor(image)) if not hasattr(net.features, "final_pool") else _without_pool(net, image)
    net.eval()


def _without_pool(net: Any, image: np.ndarray) -> None:
    x = torch.tensor(image)
    for name, module in net.features.named_children():
        if name != "final_pool":
            x = module(x)


def checkpoint(f: FakeQuant) -> dict[str, dict[str, Any]]:
    """What HAWQ's validation saves: five dictionaries, names with "module." in front; the scale of a plain
    convolution is in none of them.
    """
    sections: dict[str, dict[str, Any]] = {
        k: {}
        for k in ("convbn_scaling_factor", "fc_scaling_factor", "weight_integer", "bias_integer", "act_scaling_factor")
    }
    for name, layer in f.layers.items():
        sections["weight_integer"][f"module.{name}.weight_integer"] = layer.integers
        if layer.kind != "conv_scaling_factor":
            sections[layer.kind][f"module.{name}.{layer.kind}"] = layer.scale
            sections["bias_integer"][f"module.{name}.bias_integer"] = layer.bias
    for name, q in f.quantizers.items():
        if name in f.bits:
            sections["act_scaling_factor"][f"module.{name}.act_scaling_factor"] = q.scale
    return sections


def training_checkpoint(f: FakeQuant, arch: str) -> dict[str, Any]:
    """checkpoint.pth.tar: the whole state, with the scale of the plain convolution."""
    state = {k: v for section in checkpoint(f).values() for k, v in section.items()}
    state |= {
        f"module.{n}.conv_scaling_factor": w.scale for n, w in f.layers.items() if w.kind == "conv_scaling_factor"
    }
    return {
        "epoch": 1,
        "arch": arch,
        "state_dict": state,
        "best_acc1": torch.tensor(70.0),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
    }


def trained(
    name: str, bits: dict[str, int], pixels: int, images: int = 2, seed: int = 0
) -> tuple[FakeQuant, np.ndarray]:
    """A network with calibrated quantizers, frozen, and the images that it was calibrated on."""
    image = np.random.default_rng(seed).standard_normal((images, 3, pixels, pixels)).astype(np.float32)
    net = float_network(name, seed)
    train_norms(net, image)
    quantized = FakeQuant(bits, net)
    quantized(image)
    return quantized.frozen(), image
