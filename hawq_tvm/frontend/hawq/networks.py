"""HAWQ's quantized networks as lists of steps: which quantizer stands where, what convolutions look like, and how
their modules are called.

HAWQ's files hold tensors by module and nothing of the graph. The base networks are pytorchcv's; the quantizers are
those of HAWQ-V3's q_resnet, q_mobilenetv2 and q_inceptionv3, in the order in which data passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

CONVBN, CONV, FC = "convbn_scaling_factor", "conv_scaling_factor", "fc_scaling_factor"


@dataclass(frozen=True)
class Weighted:
    """A convolution (shape of four) or the last linear layer (of two), output first; None stands for any number of
    classes.

    x: the layer that it reads.  scale: what HAWQ calls its scales.  fixed: HAWQ never gives it 4 bits.
    """

    layer: str
    x: str
    shape: tuple[int | None, ...]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    scale: str = CONVBN
    bias: bool = True
    fixed: bool = False


@dataclass(frozen=True)
class Act:
    """A quantizer of activations: of the image, one tensor, a sum of two (A14) or a concatenation.

    sources: the layers that it reads, none for the image; a Weighted is read by exactly one Act.  high: the bound of
    the ReLU between, None without one.  wide: part of the residual stream, 16 bits in HAWQ's configurations.
    joined: the sources are concatenated, not added.
    """

    layer: str
    sources: tuple[str, ...]
    high: float | None = None
    wide: bool = False
    joined: bool = False


@dataclass(frozen=True)
class MaxPool:
    """A maximum over windows of 3 x 3 with stride 2."""

    layer: str
    x: str
    padding: int


@dataclass(frozen=True)
class MeanPool:
    """A mean over windows of 3 x 3 with stride 1 and a padding of 1 that counts, or over the whole map."""

    layer: str
    x: str
    whole: bool


Step: TypeAlias = Weighted | Act | MaxPool | MeanPool


@dataclass(frozen=True)
class Network:
    """A network: the steps in order, the last one gives the classes; pixels: the side of the images that HAWQ feeds
    it.
    """

    name: str
    pixels: int
    steps: tuple[Step, ...]

    @property
    def weighted(self) -> list[Weighted]:
        """The layers with weights, in order."""
        return [s for s in self.steps if isinstance(s, Weighted)]

    @property
    def acts(self) -> list[Act]:
        """The quantizers of activations, in order."""
        return [s for s in self.steps if isinstance(s, Act)]

    def readers(self, layer: str) -> list[Weighted]:
        """The layers with weights that read `layer`, directly or through a pool."""
        found: list[Weighted] = []
        for step in self.steps:
            if isinstance(step, Weighted) and step.x == layer:
                found.append(step)
            elif isinstance(step, MaxPool | MeanPool) and step.x == layer:
                found += self.readers(step.layer)
        return found


RELU = math.inf


def _convolution(
    layer: str,
    x: str,
    outputs: int,
    inputs: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    **more: object,
) -> Weighted:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = (padding, padding) if isinstance(padding, int) else padding
    return Weighted(layer, x, (outputs, inputs, height, width), stride, pads, **more)  # type: ignore[arg-type]


# -- ResNet ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ResNet:
    stem: str
    units: tuple[int, int, int, int]
    bottleneck: bool
    stride_first: bool = True


_RESNETS = {
    "resnet18": _ResNet("quant_init_block_convbn", (2, 2, 2, 2), False),
    "resnet50": _ResNet("quant_init_convbn", (3, 4, 6, 3), True),
    "resnet50b": _ResNet("quant_init_convbn", (3, 4, 6, 3), True, stride_first=False),
    "resnet101": _ResNet("quant_init_convbn", (3, 4, 23, 3), True),
}


def _resnet(form: _ResNet) -> Iterator[Step]:
    yield Act("quant_input", ())
    yield _convolution(form.stem, "quant_input", 64, 3, 7, 2, 3, fixed=True)
    # HAWQ pools, rounds, then applies ReLU: all three are monotone, so their order changes no integer.
    yield Act("quant_act_int32", (form.stem,), RELU, wide=True)
    yield MaxPool("pool", "quant_act_int32", 1)
    x, inputs = "pool", 64
    for stage, count in enumerate(form.units, 1):
        middle = 32 * 2**stage
        outputs = 4 * middle if form.bottleneck else middle
        for unit in range(1, count + 1):
            stride = 2 if unit == 1 and stage > 1 else 1
            at = f"stage{stage}.unit{unit}"
            yield from _residual_unit(at, x, inputs, middle, outputs, stride, form)
            x, inputs = f"{at}.quant_act_int32", outputs
    yield MeanPool("final_pool", x, whole=True)
    yield Act("quant_act_output", ("final_pool",))
    yield Weighted("quant_output", "quant_act_output", (None, inputs), scale=FC, fixed=True)


def _residual_unit(
    at: str, x: str, inputs: int, middle: int, outputs: int, stride: int, form: _ResNet
) -> Iterator[Step]:
    yield Act(f"{at}.quant_act", (x,))
    first, second = (stride, 1) if form.stride_first or not form.bottleneck else (1, stride)
    kernels = (
        [(1, first, 0, middle), (3, second, 1, middle), (1, 1, 0, outputs)]
        if form.bottleneck
        else [(3, first, 1, middle), (3, 1, 1, outputs)]
    )
    read, width = f"{at}.quant_act", inputs
    for i, (kernel, step, padding, made) in enumerate(kernels, 1):
        yield _convolution(f"{at}.quant_convbn{i}", read, made, width, kernel, step, padding)
        if i < len(kernels):
            yield Act(f"{at}.quant_act{i}", (f"{at}.quant_convbn{i}",), RELU)
        read, width = f"{at}.quant_act{i}", made
    identity = x
    if inputs != outputs or stride != 1:
        identity = f"{at}.quant_identity_convbn"
        yield _convolution(identity, f"{at}.quant_act", outputs, inputs, 1, stride)
    yield Act(f"{at}.quant_act_int32", (f"{at}.quant_convbn{len(kernels)}", identity), RELU, wide=True)


# -- MobileNetV2 -------------------------------------------------------------------------------------------

_MOBILE_STAGES = ((16,), (24, 24), (32, 32, 32), (64, 64, 64, 64, 96, 96, 96), (160, 160, 160, 320))


def _mobilenetv2() -> Iterator[Step]:
    yield Act("quant_input", ())
    yield _convolution("init_block", "quant_input", 32, 3, 3, 2, 1, fixed=True)
    yield Act("quant_act_int32", ("init_block",), 6.0, wide=True)
    x, inputs = "quant_act_int32", 32
    for stage, channels in enumerate(_MOBILE_STAGES, 1):
        for unit, outputs in enumerate(channels, 1):
            at, stride = f"features.stage{stage}.unit{unit}", 2 if unit == 1 and stage > 1 else 1
            middle = inputs if stage == unit == 1 else 6 * inputs
            yield Act(f"{at}.quant_act", (x,))
            yield _convolution(f"{at}.conv1", f"{at}.quant_act", middle, inputs, 1)
            yield Act(f"{at}.quant_act1", (f"{at}.conv1",), 6.0)
            yield _convolution(f"{at}.conv2", f"{at}.quant_act1", middle, 1, 3, stride, 1, groups=middle)
            yield Act(f"{at}.quant_act2", (f"{at}.conv2",), 6.0)
            yield _convolution(f"{at}.conv3", f"{at}.quant_act2", outputs, middle, 1)
            identity = (x,) if stride == 1 and inputs == outputs else ()
            yield Act(f"{at}.quant_act_int32", (f"{at}.conv3", *identity), wide=True)
            x, inputs = f"{at}.quant_act_int32", outputs
    yield Act("quant_act_before_final_block", (x,))
    yield _convolution("features.final_block", "quant_act_before_final_block", 1280, 320, 1, fixed=True)
    yield Act("quant_act_int32_final", ("features.final_block",), 6.0, wide=True)
    yield MeanPool("features.final_pool", "quant_act_int32_final", whole=True)
    yield Act("quant_act_output", ("features.final_pool",))
    yield Weighted("output", "quant_act_output", (None, 1280, 1, 1), scale=CONV, bias=False, fixed=True)


# -- InceptionV3 -------------------------------------------------------------------------------------------

# A convolution: its outputs, kernel, stride and padding.
_Conv: TypeAlias = tuple[int, int | tuple[int, int], int, int | tuple[int, int]]
# A branch: convolutions in sequence ("split": at last two side by side, of 1 x 3 and 3 x 1, joined), a number for a
# mean pool and a convolution with so many outputs, 0 for a max pool.
_Branch: TypeAlias = int | tuple[_Conv | str, ...]
_SPLIT = "split"
_ROW, _COLUMN = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))


def _one(outputs: int) -> _Conv:
    return (outputs, 1, 1, 0)


def _inception_a(pooled: int) -> tuple[_Branch, ...]:
    return ((_one(64),), (_one(48), (64, 5, 1, 2)), (_one(64), (96, 3, 1, 1), (96, 3, 1, 1)), pooled)


def _inception_b(middle: int) -> tuple[_Branch, ...]:
    long = (_one(middle), (middle, *_COLUMN), (middle, *_ROW), (middle, *_COLUMN), (192, *_ROW))
    return ((_one(192),), (_one(middle), (middle, *_ROW), (192, *_COLUMN)), long, 192)


_INCEPTION_C: tuple[_Branch, ...] = ((_one(320),), (_one(384), _SPLIT), (_one(448), (384, 3, 1, 1), _SPLIT), 192)
_INCEPTION_STAGES: tuple[tuple[tuple[_Branch, ...], ...], ...] = (
    (_inception_a(32), _inception_a(64), _inception_a(64)),
    (
        (((384, 3, 2, 0),), (_one(64), (96, 3, 1, 1), (96, 3, 2, 0)), 0),
        *(_inception_b(n) for n in (128, 160, 160, 192)),
    ),
    (
        ((_one(192), (320, 3, 2, 0)), (_one(192), (192, *_ROW), (192, *_COLUMN), (192, 3, 2, 0)), 0),
        _INCEPTION_C,
        _INCEPTION_C,
    ),
)


def _inceptionv3() -> Iterator[Step]:
    at = "features.q_init_block"
    yield Act(f"{at}.q_input_activ", ())
    x, inputs = f"{at}.q_input_activ", 3
    stem = ((32, 3, 2, 0), (32, 3, 1, 0), (64, 3, 1, 1), _one(80), (192, 3, 1, 0))
    for i, form in enumerate(stem, 1):
        yield from _activated(f"{at}.q_conv{i}", x, inputs, form, wide=i == len(stem), fixed=i == 1)
        x, inputs = f"{at}.q_conv{i}.q_activ", form[0]
        if i in (3, 5):
            yield MaxPool(f"{at}.q_pool{1 if i == 3 else 2}", x, 0)
            x = f"{at}.q_pool{1 if i == 3 else 2}"
    for stage, units in enumerate(_INCEPTION_STAGES, 1):
        for unit, branches in enumerate(units, 1):
            at = f"features.stage{stage}.unit{unit}"
            parts, widths = [], []
            for i, branch in enumerate(branches, 1):
                steps, made, width = _branch(f"{at}.branches.branch{i}", x, inputs, branch)
                yield from steps
                parts.append(made)
                widths.append(width)
            x, inputs = f"{at}.q_rescaling_activ", sum(widths)
            yield Act(x, tuple(parts), wide=True, joined=True)
    yield MeanPool("features.q_final_pool", x, whole=True)
    yield Act("features.q_concat_activ", ("features.q_final_pool",))
    yield Weighted("output.q_fc", "features.q_concat_activ", (None, inputs), scale=FC, fixed=True)


def _activated(at: str, x: str, inputs: int, form: _Conv, *, wide: bool = False, fixed: bool = False) -> Iterator[Step]:
    outputs, kernel, stride, padding = form
    yield _convolution(f"{at}.q_convbn", x, outputs, inputs, kernel, stride, padding, fixed=fixed)
    yield Act(f"{at}.q_activ", (f"{at}.q_convbn",), RELU, wide=wide)


def _branch(at: str, x: str, inputs: int, branch: _Branch) -> tuple[list[Step], str, int]:
    """The steps of a branch, the layer that it ends in, and its channels."""
    steps: list[Step] = [Act(f"{at}.q_input_act", (x,), wide=isinstance(branch, int))]
    x = f"{at}.q_input_act"
    if branch == 0:
        return [*steps, MaxPool(f"{at}.q_pool", x, 0)], f"{at}.q_pool", inputs
    if isinstance(branch, int):
        steps += [MeanPool(f"{at}.q_pool", x, whole=False), Act(f"{at}.q_pool_act", (f"{at}.q_pool",))]
        steps += _activated(f"{at}.q_conv", f"{at}.q_pool_act", inputs, _one(branch), wide=True)
        return steps, f"{at}.q_conv.q_activ", branch
    for i, form in enumerate(branch, 1):
        if isinstance(form, str):
            for name, kernel, padding in (("q_conv1x3", (1, 3), (0, 1)), ("q_conv3x1", (3, 1), (1, 0))):
                steps += _activated(f"{at}.{name}", x, inputs, (inputs, kernel, 1, padding), wide=True)
            steps.append(
                Act(
                    f"{at}.q_rescaling_activ",
                    (f"{at}.q_conv1x3.q_activ", f"{at}.q_conv3x1.q_activ"),
                    wide=True,
                    joined=True,
                )
            )
            return steps, f"{at}.q_rescaling_activ", 2 * inputs
        name = f"{at}.q_conv" if len(branch) == 1 and form[1] == 1 else f"{at}.q_conv_list.q_conv{i}"
        steps += _activated(name, x, inputs, form, wide=i == len(branch))
        x, inputs = f"{name}.q_activ", form[0]
    return steps, x, inputs


# ----------------------------------------------------------------------------------------------------------

_BUILDERS: dict[str, tuple[int, Callable[[], Iterator[Step]]]] = {
    **{name: (224, lambda form=form: _resnet(form)) for name, form in _RESNETS.items()},  # type: ignore[misc]
    "mobilenetv2_w1": (224, _mobilenetv2),
    "inceptionv3": (299, _inceptionv3),
}
NAMES = tuple(_BUILDERS)


@cache
def network(name: str) -> Network:
    """The network of that name, one of NAMES."""
    pixels, build = _BUILDERS[name]
    return Network(name, pixels, tuple(build()))
