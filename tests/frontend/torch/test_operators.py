"""Every operator between a dequantize and a quantize: the integer graph against PyTorch's own float32, element by
element.

They may differ by one step where the value in float64 lies on a rounding boundary, as far as float32 can tell;
nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hawq_tvm.compiler import pipeline
from hawq_tvm.frontend.torch import import_exported, known_operators
from hawq_tvm.verify.reference import evaluate

from ...oracle import explained
from .programs import IN_SCALE, IN_ZERO, OUT_ZERO, Between, export, quantize, torch, weight

F = torch.nn.functional
IMAGE, VECTORS = (2, 6, 7, 8), (3, 5, 6)
RNG = np.random.default_rng(0)


def check(function: Any, *shapes: tuple[int, ...], model: Any = None, lossy: float = 0.0, **options: Any) -> Any:
    """Compare all outputs on random inputs; lossy: steps that the integer arithmetic may be off besides (A17)."""
    model = model or Between(function, **options)
    program = export(model, *shapes)
    packed = pipeline.to_packed(import_exported(program))
    xs = [RNG.uniform(-6, 6.5, s).astype(np.float32) for s in shapes]
    ours = evaluate(packed, {i.name: x for i, x in zip(packed["main"].params, xs, strict=True)})
    with torch.no_grad():
        theirs = [t.numpy() for t in model(*map(torch.tensor, xs))]
        exact = [(quantize(torch.tensor(x), IN_SCALE, IN_ZERO).double() - IN_ZERO) * IN_SCALE for x in xs]
        real = model.double().function(*exact)
    reals = [r.detach().numpy() for r in (real if isinstance(real, tuple | list) else (real,))]
    assert len(ours) == len(theirs) == len(reals)
    for mine, their, r in zip(ours.values(), theirs, reals, strict=True):
        assert mine.dtype == their.dtype and mine.shape == their.shape
        steps = np.clip(r / model.out_scale, -OUT_ZERO - 0.25, 255 - OUT_ZERO + 0.25)
        different = mine != their
        assert not np.any(different & ~explained(steps, mine, their, lossy)), (
            mine[different][:8],
            their[different][:8],
            steps[different][:8],
        )
    return packed


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "relu_": lambda x: F.relu(x * 1.0, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.7, 1.3),
    "clamp": lambda x: x.clamp(-1.25, 2.0),
    "clamp_min": lambda x: x.clamp(min=-0.4),
    "clamp_max": lambda x: torch.clamp_max(x, 0.9),
    "clamp with min above max": lambda x: x.clamp(2.0, 1.0),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "mish": F.mish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.13),
    "elu": lambda x: F.elu(x, 0.8),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.3),
    "softplus": F.softplus,
    "abs": torch.abs,
    "neg": torch.neg,
    "exp": lambda x: torch.exp(x.clamp(max=1.0)),
    "square": torch.square,
    "sqrt": lambda x: torch.sqrt(F.relu(x)),
    "pow": lambda x: x**3,
    "add number": lambda x: x + 0.37,
    "rsub": lambda x: 1.5 - x,
    "mul number": lambda x: x * 0.73,
    "div number": lambda x: x / 1.7,
    "sub alpha": lambda x: torch.sub(x, 0.3, alpha=2),
    "sin": torch.sin,
    "x times sigmoid": lambda x: x * torch.sigmoid(x),
    "erf": torch.erf,
    "reciprocal": lambda x: torch.reciprocal(F.relu(x) + 0.5),
    "round": lambda x: torch.round(x),
    "floor": torch.floor,
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "contiguous": lambda x: x.contiguous(),
    "hard sigmoid by hand": lambda x: F.relu6(x + 3) / 6,
    "clip, then negative": lambda x: F.relu(x) * -0.7,
    "log": lambda x: torch.log(F.relu(x) + 0.5),
    "rsqrt": lambda x: torch.rsqrt(F.relu(x) + 0.5),
    "ceil": torch.ceil,
    "cos": torch.cos,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_of_one_tensor(name: str) -> None:
    check(ELEMENTWISE[name], IMAGE)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a + b,
        lambda a, b: torch.add(a, b, alpha=0.5),
        lambda a, b: a - b,
        lambda a, b: a * b * 0.1,
        torch.maximum,
        torch.minimum,
    ],
    ids=["add", "add alpha", "sub", "mul", "maximum", "minimum"],
)
def test_two_tensors(function: Any) -> None:
    check(function, IMAGE, IMAGE)
    check(function, IMAGE, (6, 1, 1))


MOVEMENT: dict[str, Callable[..., Any]] = {
    "view": lambda x: x.view(2, -1),
    "reshape": lambda x: x.reshape(-1, 8),
    "flatten": lambda x: x.flatten(1),
    "flatten all": torch.flatten,
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "unsqueeze": lambda x: x.unsqueeze(-1).squeeze(-1),
    "squeeze": lambda x: x[:1].squeeze(),
    "slice": lambda x: x[:, 1:5:2, -3:],
    "select": lambda x: x[:, -1],
    "narrow": lambda x: x.narrow(1, 2, 3),
    "chunk": lambda x: x.chunk(4, 1),
    "split": lambda x: x.split(4, 1),
    "split sizes": lambda x: x.split([1, 2, 3], 1),
    "unbind": lambda x: x[:, :2].unbind(1),
    "cat": lambda x: torch.cat([x, x * 0.5, x[:, :1]], 1),
    "stack": lambda x: torch.stack([x, x], 2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3)),
    "pad reflect": lambda x: F.pad(x, (2, 1, 1, 3), mode="reflect"),
    "pad replicate": lambda x: (
        F.pad(x, (2, 1), mode="replicate") if x.dim() == 3 else F.pad(x, (2, 1, 0, 3), mode="replicate")
    ),
    "pad crop": lambda x: F.pad(x, (-1, 2, 0, -3)),
    "expand": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "flip": lambda x: x.flip(2, 3),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4], 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :6], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 3),
    "shuffle by view": lambda x: x.view(2, 3, 2, 7, 8).transpose(1, 2).contiguous().view(2, 6, 7, 8),
    "cat, then shuffle": lambda x: F.channel_shuffle(torch.cat([x, x * 0.5], 1), 2)[:, 1:],
    "cat, then view": lambda x: torch.cat([x, -x], 1).view(2, 3, -1).relu(),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "expand_as": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("name", MOVEMENT)
def test_movement(name: str) -> None:
    check(MOVEMENT[name], IMAGE)


POOLS: dict[str, Callable[..., Any]] = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max ceil": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max dilated": lambda x: F.max_pool2d(x, 3, 1, 1, 2),
    "max with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average without pads": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "average ceil without pads": lambda x: F.avg_pool2d(x, (2, 3), ceil_mode=True, count_include_pad=False),
    "adaptive 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x[:, :, :6], (3, 2)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, 1),
    "mean": lambda x: x.mean((2, 3)),
    "adaptive max windows": lambda x: F.adaptive_max_pool2d(x[:, :, :6], (3, 2)),
    "mean keepdim": lambda x: x.mean([-1, 2], keepdim=True),
    "mean all": lambda x: x.mean(),
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin(1, keepdim=True),
    "sum": lambda x: x.sum(1) * 0.2,
}


DEEP: dict[str, Callable[..., Any]] = {
    "max": lambda x: F.max_pool3d(x, 2, (1, 2, 2), (1, 0, 1)),
    "average": lambda x: F.avg_pool3d(x, (2, 2, 3), 1),
    "average without pads": lambda x: F.avg_pool3d(x, (2, 3, 3), 2, 1, count_include_pad=False),
    "adaptive": lambda x: F.adaptive_avg_pool3d(x, 1),
}


@pytest.mark.parametrize("name", DEEP)
def test_pools_in_depth(name: str) -> None:
    check(DEEP[name], (2, 3, 4, 6, 5))


@pytest.mark.parametrize("name", POOLS)
def test_pools_and_reductions(name: str) -> None:
    check(POOLS[name], IMAGE)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool1d(x, 3, 2, 1),
        lambda x: F.avg_pool1d(x, 2),
        lambda x: F.adaptive_avg_pool1d(x, 2),
        lambda x: F.adaptive_max_pool1d(x, 3),
    ],
)
def test_pools_of_one_dimension(function: Any) -> None:
    check(function, VECTORS)


RESIZES: dict[str, Callable[..., Any]] = {
    "nearest x2": lambda x: F.interpolate(x, scale_factor=2),
    "nearest x3": lambda x: F.interpolate(x, scale_factor=3),
    "nearest size": lambda x: F.interpolate(x, size=(5, 11)),
    "nearest x1.7": lambda x: F.interpolate(x, scale_factor=1.7),
    "nearest-exact": lambda x: F.interpolate(x, size=(10, 3), mode="nearest-exact"),
    "bilinear x2": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear size": lambda x: F.interpolate(x, size=(9, 5), mode="bilinear"),
    "bilinear corners": lambda x: F.interpolate(x, size=(13, 15), mode="bilinear", align_corners=True),
}


@pytest.mark.parametrize("name", RESIZES)
def test_resizes(name: str) -> None:
    # Bilinear weights are float32 numbers in PyTorch, float64 here: 2^-24 of the greatest value, 150 steps.
    check(RESIZES[name], IMAGE, lossy=1e-4 if "bilinear" in name else 0.0)


def test_resizes_of_one_dimension() -> None:
    check(lambda x: F.interpolate(x, scale_factor=2), VECTORS)
    check(lambda x: F.interpolate(x, size=11, mode="linear"), VECTORS, lossy=1e-4)  # as above


class Weighted(Between):
    """An operator with a quantized weight, and a float bias of one value per output channel."""

    def __init__(self, function: Any, shape: tuple[int, ...], outputs: int = 0, bits: int = 8) -> None:
        super().__init__(lambda *xs: self.apply_to(*xs), 0.1)
        self.operator, self.weight = function, weight(shape, bits=bits)
        values = np.random.default_rng(1).uniform(-1, 1, outputs or shape[0]).astype(np.float32)
        self.bias = torch.nn.Parameter(torch.tensor(values))

    def apply_to(self, x: Any) -> Any:
        w = self.weight()
        if x.dtype == torch.float64:
            w = (
                (self.weight.q - self.weight.z[0]).double()
                * self.weight.s.reshape(-1, *(1,) * (self.weight.q.dim() - 1)).double()
            ).double()
        return self.operator(x, w, self.bias)


CONVOLUTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...], int, tuple[int, ...]]] = {
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 1, 1), (8, 6, 3, 3), 0, IMAGE),
    "no bias": (lambda x, w, b: F.conv2d(x, w), (8, 6, 3, 3), 0, IMAGE),
    "stride and dilation": (lambda x, w, b: F.conv2d(x, w, b, (2, 1), (0, 2), (1, 2)), (8, 6, 3, 3), 0, IMAGE),
    "groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2), (8, 3, 1, 1), 0, IMAGE),
    "depthwise": (lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=6), (6, 1, 3, 3), 0, IMAGE),
    "same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), (4, 6, 2, 3), 0, IMAGE),
    "valid": (lambda x, w, b: F.conv2d(x, w, b, padding="valid"), (4, 6, 2, 3), 0, IMAGE),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), (4, 5, 3), 0, VECTORS),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b, (2, 1, 1), (1, 0, 1)), (4, 3, 3, 2, 2), 0, (2, 3, 5, 4, 6)),
    "linear": (F.linear, (7, 8), 0, IMAGE),
    "linear of rows": (F.linear, (7, 6), 0, (3, 6)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), (7, 6), 0, (3, 6)),
    "matmul": (lambda x, w, b: torch.matmul(x, w.t()), (7, 6), 0, (2, 3, 6)),
    "mm": (lambda x, w, b: torch.mm(x, w.transpose(0, 1)), (7, 6), 0, (3, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bits", [8, 4])
def test_weights(name: str, bits: int) -> None:
    function, shape, outputs, data = CONVOLUTIONS[name]
    packed = check(None, data, model=Weighted(function, shape, outputs, bits))
    assert ("hawq.unpack_int4" in packed.script()) == (bits == 4 and int(np.prod(shape)) >= 64)


def test_transposed_convolution() -> None:
    class Transposed(Between):
        def __init__(self) -> None:
            super().__init__(lambda x: self.apply_to(x), 0.1)
            self.register_buffer(
                "q", torch.tensor(np.random.default_rng(0).integers(-127, 128, (6, 4, 3, 3)).astype(np.int8))
            )

        def apply_to(self, x: Any) -> Any:
            scale = float(np.float32(0.0093))
            w = torch.ops.quantized_decomposed.dequantize_per_tensor(self.q, scale, 0, -127, 127, torch.int8)
            return F.conv_transpose2d(x, w if x.dtype == torch.float32 else self.q.double() * scale, None, 2, 1, 1)

    check(None, IMAGE, model=Transposed())


def test_batch_norm_left_unfolded() -> None:
    class Net(Weighted):
        def __init__(self) -> None:
            super().__init__(lambda x, w, b: self.norm(F.conv2d(x, w, b, padding=1)), (8, 6, 3, 3))
            self.norm = torch.nn.BatchNorm2d(8)
            for i, tensor in enumerate(
                (self.norm.weight.data, self.norm.bias.data, self.norm.running_mean, self.norm.running_var)
            ):
                tensor.copy_(torch.tensor(np.random.default_rng(i).uniform(0.4, 1.6, 8).astype(np.float32)))

    check(None, IMAGE, model=Net().eval())


def test_products_of_tensors() -> None:
    check(lambda a, b: torch.matmul(a, b) * 0.05, (2, 3, 5), (2, 5, 4))
    check(lambda a, b: torch.bmm(a, b) * 0.05, (2, 3, 5), (2, 5, 4))


def test_softmax() -> None:
    # (A17) makes its exponentials from a table of 22 bits.
    check(lambda x: F.softmax(x, -1), VECTORS, out_scale=float(np.float32(1 / 140)), lossy=0.01)


WEIGHT, BIAS = torch.linspace(0.6, 1.4, 6), torch.linspace(-0.3, 0.3, 6)
NORMALIZED: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), VECTORS),
    "layer_norm with weights": (lambda x: F.layer_norm(x, (6,), WEIGHT.to(x.dtype), BIAS.to(x.dtype)), VECTORS),
    "layer_norm of two axes": (lambda x: F.layer_norm(x, (5, 6)), VECTORS),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), WEIGHT.to(x.dtype), 1e-5), VECTORS),
    "group_norm": (lambda x: F.group_norm(x, 3, WEIGHT.to(x.dtype), BIAS.to(x.dtype)), IMAGE),
    "instance_norm": (lambda x: F.instance_norm(x, weight=WEIGHT.to(x.dtype), bias=BIAS.to(x.dtype)), IMAGE),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_normalizations(name: str) -> None:
    function, shape = NORMALIZED[name]
    check(function, shape, lossy=1e-5)


def test_gates_and_choices() -> None:
    allowed = torch.ones(5, 6, dtype=torch.bool).tril()
    check(lambda x: F.glu(x, 1), IMAGE)
    check(lambda x: torch.where(allowed, x, -3.0), VECTORS)
    check(lambda x, y: torch.where(allowed, x, y), VECTORS, VECTORS)
    check(lambda x: x.masked_fill(allowed, 0.7), VECTORS)


def test_embedding() -> None:
    """Words and a position that is added, normalized, all in float: one fixed-point value (A26) before the norm."""

    class Words(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = torch.nn.Embedding(20, 6), torch.nn.LayerNorm(6)

        def forward(self, ids: Any) -> Any:
            return quantize(self.norm(self.words(ids) + self.words.weight[0]), IN_SCALE, IN_ZERO)

    torch.manual_seed(0)
    model, ids = Words().eval(), torch.tensor(RNG.integers(0, 20, (2, 5)))
    packed = pipeline.to_packed(import_exported(torch.export.export(model, (ids,))))
    (name,) = (p.name for p in packed["main"].params)
    (ours,) = evaluate(packed, {name: ids.numpy()}).values()
    with torch.no_grad():
        np.testing.assert_array_equal(ours, model(ids).numpy())
    assert [int(v) for v in packed["main"].attrs["hawq.input_ranges"]] == [0, 19]


def test_prelu() -> None:
    slopes = torch.tensor([0.1, 0.2, 0.3, -0.1, 0.5, 0.25])
    check(lambda x: F.prelu(x, slopes.to(x.dtype)), IMAGE)


@pytest.mark.parametrize(
    "dtype, low, high, zero",
    [
        (torch.int8, -8, 7, -2),
        (torch.uint8, 0, 15, 3),
        (torch.uint8, 0, 3, 1),
        (torch.int8, -127, 127, 0),
        (torch.uint8, 0, 127, 64),
        (torch.int16, -32768, 32767, 100),
        (torch.int16, -512, 511, 0),
        (torch.uint16, 0, 65535, 30000),
    ],
)
def test_types_and_ranges(dtype: Any, low: int, high: int, zero: int) -> None:
    """The quantize of an input equals PyTorch's everywhere, with every rounding boundary and its float32 neighbours
    among the values.
    """
    q = torch.ops.quantized_decomposed

    class Net(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Any) -> Any:
            y = q.quantize_per_tensor(x, self.scale, zero, low, high, dtype)
            return y, q.dequantize_per_tensor(y, self.scale, zero, low, high, dtype)

    steps = RNG.integers(low - zero - 3, high - zero + 3, 300).astype(np.float64)
    for scale in (float(np.float32(0.0437)), float(np.float32(1 / 3)), 0.5, float(np.float32(7e-5))):
        exact = np.concatenate([(steps + 0.5) * scale, steps * scale]).astype(np.float32)
        x = np.stack([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
        model = Net(scale)
        packed = pipeline.to_packed(import_exported(export(model, x.shape)))
        ours = list(evaluate(packed, {"x": x}).values())
        for mine, theirs in zip(ours, model(torch.tensor(x)), strict=True):
            np.testing.assert_array_equal(mine, theirs.numpy())


def test_operators_are_listed() -> None:
    known = known_operators()
    assert len(known) > 100 and "aten.conv2d" in known and "quantized_decomposed.quantize_per_channel" in known
