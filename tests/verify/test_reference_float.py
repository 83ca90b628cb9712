"""The float operators of the reference against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tvm import relax

from hawq_tvm.verify.reference import evaluate

from .graphs_for_verify import graph, inputs

RNG = np.random.default_rng(5)
X = RNG.normal(size=(2, 4, 9, 8)).astype(np.float32) * 3
W = RNG.normal(size=(6, 2, 3, 2)).astype(np.float32)
WT = RNG.normal(size=(4, 3, 3, 2)).astype(np.float32)
STATISTICS = [RNG.uniform(0.5, 2, 4).astype(np.float32) for _ in range(4)]


def const(array: Any) -> relax.Expr:
    return relax.const(np.asarray(array, np.float32))


def t(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


nn = relax.op.nn
CASES: dict[str, tuple[Callable[[relax.Expr], relax.Expr], Callable[[torch.Tensor], torch.Tensor]]] = {
    "conv": (
        lambda x: nn.conv2d(x, const(W), strides=[2, 1], padding=[1, 0, 2, 1], dilation=[1, 2], groups=2),
        lambda x: F.conv2d(F.pad(x, (0, 1, 1, 2)), t(W), stride=(2, 1), dilation=(1, 2), groups=2),
    ),
    "conv_transpose": (
        lambda x: nn.conv2d_transpose(
            x, const(WT), strides=[2, 3], padding=[1, 1, 1, 1], output_padding=[1, 0], dilation=[1, 2], groups=2
        ),
        lambda x: F.conv_transpose2d(
            x, t(WT), stride=(2, 3), padding=1, output_padding=(1, 0), dilation=(1, 2), groups=2
        ),
    ),
    "max_pool_ceil": (
        lambda x: nn.max_pool2d(x, [3, 2], [2, 2], [1, 0, 1, 0], ceil_mode=True),
        lambda x: F.max_pool2d(x, (3, 2), 2, (1, 0), ceil_mode=True),
    ),
    "avg_pool_counting_padding": (
        lambda x: nn.avg_pool2d(x, [3, 3], [2, 2], padding=[1, 1, 1, 1], ceil_mode=True, count_include_pad=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=True),
    ),
    "avg_pool_without_padding": (
        lambda x: nn.avg_pool2d(x, [3, 3], [2, 2], padding=[1, 1, 1, 1], ceil_mode=True, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    ),
    "batch_norm": (
        lambda x: relax.TupleGetItem(nn.batch_norm(x, *(const(s) for s in STATISTICS), axis=1, epsilon=1e-3), 0),
        lambda x: F.batch_norm(x, t(STATISTICS[2]), t(STATISTICS[3]), t(STATISTICS[0]), t(STATISTICS[1]), eps=1e-3),
    ),
    "prelu": (lambda x: nn.prelu(x, const(STATISTICS[0]), 1), lambda x: F.prelu(x, t(STATISTICS[0]))),
    "leakyrelu": (lambda x: nn.leakyrelu(x, 0.1), lambda x: F.leaky_relu(x, 0.1)),
    "softmax": (lambda x: nn.softmax(x, 1), lambda x: F.softmax(x, 1)),
    "log_softmax": (lambda x: nn.log_softmax(x, -1), lambda x: F.log_softmax(x, -1)),
    "gelu": (nn.gelu, F.gelu),
    "gelu_tanh": (nn.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (nn.silu, F.silu),
    "softplus": (lambda x: nn.softplus(x, 2.0), lambda x: F.softplus(x, 2.0)),
    "erf": (relax.op.erf, torch.erf),
    "sigmoid": (relax.op.sigmoid, torch.sigmoid),
    "rsqrt": (lambda x: relax.op.rsqrt(relax.op.square(x)), lambda x: 1 / x.abs()),
    "mean": (lambda x: relax.op.mean(x, [2, 3], keepdims=True), lambda x: x.mean((2, 3), keepdim=True)),
    "reflect": (
        lambda x: nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1], "reflect"),
        lambda x: F.pad(x, (0, 1, 1, 2), mode="reflect"),
    ),
    "replicate": (
        lambda x: nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 1], "replicate"),
        lambda x: F.pad(x, (0, 1, 1, 2), mode="replicate"),
    ),
    "clip": (lambda x: relax.op.clip(x, -0.5, 1.25), lambda x: x.clamp(-0.5, 1.25)),
    "slice": (
        lambda x: relax.op.strided_slice(x, [2, 3], [7, 0], [-10, 8], [-2, 3]),
        lambda x: x.flip(2)[:, :, 1::2, ::3],
    ),
    "take": (lambda x: relax.op.take(x, relax.const(np.array([2, 0])), 1), lambda x: x[:, [2, 0]]),
    "tile": (lambda x: relax.op.tile(x, [1, 2, 1, 1]), lambda x: x.tile(1, 2, 1, 1)),
    "flip": (lambda x: relax.op.flip(x, 3), lambda x: x.flip(3)),
    "repeat": (lambda x: relax.op.repeat(x, 2, 3), lambda x: x.repeat_interleave(2, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_float_operator_equals_torch(name: str) -> None:
    build, expected = CASES[name]

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        expr = build(x)
        return (
            emit(relax.TupleGetItem(emit(expr.tuple_value), expr.index))
            if isinstance(expr, relax.TupleGetItem)
            else emit(expr)
        )

    y = evaluate(graph(body, X), inputs(X))["y0"]
    wanted = expected(t(X)).numpy()
    assert y.shape == wanted.shape
    # Outputs are narrowed to float32, and the two sides sum in another order before that.
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)
