"""Which tensors of 4 bits are packed between layers, which are left as they are, and that the integers stay the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.verify.reference import evaluate
from relay_passes.pack_activations import pack_activations

rng = np.random.default_rng(4)
R = relax.op
UINT4, INT4 = arith.QType(0, 15, "uint8"), arith.QType(-8, 7, "int8")


def weights(channels: tuple[int, int], size: int, bits: int, groups: int = 1) -> relax.Expr:
    """HWIO weights of 4 bits, packed, or of 8."""
    w = rng.integers(-(1 << bits - 1), 1 << bits - 1, (size, size, channels[0] // groups, channels[1])).astype(np.int8)
    return ops.unpack_int4(arith.pack_int4(w), w.shape, True) if bits == 4 else relax.const(w)


class Net:
    """A PACKED module, written layer by layer."""

    def __init__(self, channels: int) -> None:
        self.builder, self.count = relax.BlockBuilder(), 0
        self.x = relax.Var("x", relax.TensorType((1, 6, 6, channels), "uint8"))

    def layer(self, source: relax.Var, body: Any) -> tuple[tvm.ir.GlobalVar, relax.Var]:
        self.count += 1
        name, inner = f"layer{self.count}", relax.BlockBuilder()
        p = relax.Var("p0", source.ty)
        with inner.function(name, [p], attrs={"Primitive": 1, "hawq.layer": name}, private=True):
            with inner.dataflow():
                result = inner.emit_output(body(lambda e: inner.emit(e), p))
            inner.emit_func_output(result)
        return self.builder.add_func(inner.get()[name], name), source

    def module(self, bodies: Sequence[Any], returns: Sequence[int] = (-1,)) -> tvm.IRModule:
        """Every body reads the first body's result; returns: of which layers main gives the results."""
        shapes: list[relax.Var] = []
        with self.builder.function("main", [self.x], attrs={"hawq.output_names": [f"y{i}" for i in returns]}):
            with self.builder.dataflow():
                for i, body in enumerate(bodies):
                    gv, source = self.layer(self.x if i == 0 else shapes[0], body)
                    shapes.append(self.builder.emit(relax.Call(gv, [source]), name_hint=f"v{i}"))
                result = self.builder.emit_output(relax.Tuple([shapes[i] for i in returns]))
            self.builder.emit_func_output(result)
        module = self.builder.get()
        stages.verify(module, stages.Stage.PACKED)
        return module


def conv(
    channels: tuple[int, int],
    q: arith.QType,
    *,
    size: int = 1,
    bits: int = 4,
    border: float | None = None,
    groups: int = 1,
) -> Any:
    """A convolution to q; border: what is written around its data, None for nothing."""

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        w = weights(channels, size, bits, groups)
        if bits == 4:
            w = emit(w)
        if border is not None:
            x = emit(R.nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0], pad_value=border))
        acc = emit(R.nn.conv2d(x, w, groups=groups, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"))
        return ops.requantize([acc], [1 << 30], 0, 37, qtype=q, zero_point=0, rounding="half_up")

    return body


def scaled(q: arith.QType) -> Any:
    return lambda emit, x: ops.requantize([x], [1 << 30], 0, 30, qtype=q, zero_point=0, rounding="half_up")


def to_float(emit: Any, x: relax.Expr) -> relax.Expr:
    return ops.dequantize(x, np.float32(0.5), 0, qmin=0, qmax=15)


OUT = arith.QType.of("int8")
FIRST = conv((16, 16), UINT4)


@pytest.mark.parametrize(
    ("channels", "bodies", "returns"),
    [
        (16, [FIRST, conv((16, 8), OUT, size=3, border=0)], (-1,)),
        (16, [conv((16, 16), INT4), conv((16, 8), OUT)], (-1,)),
        (16, [FIRST, conv((16, 8), OUT), scaled(OUT)], (1, 2)),
        (16, [FIRST, conv((16, 8), OUT), to_float], (1, 2)),
    ],
    ids=["border of zeros", "signed", "beside an element-wise reader", "beside a dequantize"],
)
def test_packed(channels: int, bodies: list[Any], returns: tuple[int, ...]) -> None:
    module = Net(channels).module(bodies, returns)
    after, count = pack_activations(module)
    stages.verify(after, stages.Stage.PACKED)
    assert count == 1
    between = next(stages.bindings(after["main"])).var
    assert (ops.shape_of(between), ops.dtype_of(between)) == ((1, 6, 6, channels // 2), "uint8")
    x = {"x": rng.integers(0, 255, (1, 6, 6, channels), np.uint8, endpoint=True)}
    for found, expected in zip(evaluate(after, x).values(), evaluate(module, x).values(), strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize(
    ("channels", "bodies", "returns"),
    [
        (16, [FIRST, conv((16, 8), OUT)], (0, 1)),
        (16, [FIRST, conv((16, 8), OUT, bits=8)], (-1,)),
        (16, [FIRST, conv((16, 8), OUT), conv((16, 8), OUT, bits=8)], (1, 2)),
        (16, [FIRST, conv((16, 8), OUT, size=3, border=3)], (-1,)),
        (16, [FIRST, conv((16, 16), OUT, groups=2)], (-1,)),
        (16, [FIRST, scaled(OUT)], (-1,)),
        (12, [conv((12, 12), UINT4), conv((12, 8), OUT)], (-1,)),
        (16, [conv((16, 16), arith.QType(0, 16, "uint8")), conv((16, 8), OUT)], (-1,)),
    ],
    ids=[
        "an output",
        "8-bit weights",
        "8-bit weights too",
        "another border",
        "groups",
        "no contraction reads it",
        "channels",
        "more than 4 bits",
    ],
)
def test_left_as_they_are(channels: int, bodies: list[Any], returns: tuple[int, ...]) -> None:
    module = Net(channels).module(bodies, returns)
    after, count = pack_activations(module)
    assert count == 0 and after is module
