"""Data fetched ahead: which cache lines, for which layers, and that it changes no result."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx

from hawq_tvm.compiler import tir_pipeline
from hawq_tvm.core import ops
from schedules.cpu import ahead
from schedules.cpu.loops import nodes
from schedules.cpu.x86_vnni import Vnni
from schedules.cpu.x86_vnni_depthwise import VnniDepthwise
from schedules.layer import Layer
from schedules.rule import Kernel

from .one_layer import layer_of, packed, run
from .test_cpu_contract import DOT, HOST, Conv, accumulate, convolve, full

pytestmark = pytest.mark.skipif(DOT != "x86.vnni", reason="this CPU has no VNNI")

JOINED = Conv(2, 28, 28, 128, 64, (1, 1))
SAME = Conv(2, 14, 14, 128, 64, pad=(1, 1, 1, 1))
HALVED = Conv(2, 16, 16, 64, 64, stride=(2, 2), pad=(1, 1, 1, 1))
SKIPPING = Conv(2, 16, 16, 128, 64, (1, 1), stride=(2, 2))
DEPTHWISE = Conv(2, 14, 14, 64, 64, groups=64, stride=(2, 2), pad=(1, 1, 1, 1))


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(ahead, "LARGE", 0)


def layer(c: Conv, dtype: str = "uint8") -> Layer:
    w = full("int8", *c.k, c.ci // c.groups, c.co)
    body = lambda emit, p: accumulate(emit, c, p, relax.const(w), 0, "int32")  # noqa: E731
    return layer_of(packed(body, [((c.n, c.h, c.w, c.ci), dtype)]))


def kernel(of: Layer, grouped: bool = False) -> Kernel:
    rule = VnniDepthwise() if grouped else Vnni()
    assert rule.applies(of, HOST) is None
    return rule.build(of, HOST)


def fetches(func: tirx.PrimFunc) -> list[tirx.Evaluate]:
    return [e for e in nodes(tirx.Evaluate, func) if "llvm.prefetch" in str(e.value)]


def fetched(c: Conv) -> np.ndarray:
    """The bytes of a convolution's data at which its kernel fetches: it runs, and writes a 1 there instead."""
    of = layer(c)
    made = kernel(of, c.groups > 1)
    data = made.func.params[0]
    marks = tirx.decl_buffer(data.shape, "uint8", "marks")

    def marked(statement: tirx.Evaluate) -> tirx.Stmt:
        if "llvm.prefetch" not in str(statement.value):
            return statement
        (read,) = nodes(tvm.ir.expr.TensorLoad, statement)
        assert read.source.same_as(data)
        return tirx.BufferStore(marks, tirx.const(1, "uint8"), list(read.indices))

    body = tvm_ffi.structural_map(made.func.body, [(tirx.Evaluate, marked)])
    attrs = {"global_symbol": "k", "tirx.noalias": True, "tirx.is_scheduled": True}
    func = tirx.PrimFunc([*made.func.params, marks], body).with_attr(attrs)
    run_ = tvm.tirx.build(tvm.IRModule({"k": func}), target=HOST, pipeline=tir_pipeline.CPU)
    seen = np.zeros([int(d) for d in data.shape], np.uint8)
    arrays = [full("uint8", *seen.shape), *made.arguments, np.zeros(ops.shape_of(of.anchor_call), np.int32), seen]
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    run_["k"](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize(
    ("c", "first", "pixels", "rows"),
    [(JOINED, 14, 1, 1), (SAME, 8, 1, 1), (HALVED, 8, 1, 1), (SKIPPING, 8, 2, 2), (DEPTHWISE, 2, 1, 1)],
    ids=["joined", "same", "halved", "skipping", "depthwise"],
)
def test_every_cache_line_is_fetched_once_but_those_of_the_first_task(any_size, c, first, pixels, rows):
    seen = fetched(c)
    lines = np.zeros((c.n * c.h, c.w, c.ci), np.uint8)
    lines[first::rows, ::pixels, ::64] = 1
    # From the last task on all that is asked for lies at the last byte.
    assert seen.flat[-1] == 1
    seen.flat[-1] = 0
    np.testing.assert_array_equal(seen.reshape(lines.shape), lines)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(
    "c",
    [
        *(JOINED, SAME, HALVED, SKIPPING, DEPTHWISE),
        Conv(1, 9, 13, 72, 33, pad=(2, 1, 0, 1)),
        Conv(3, 7, 5, 64, 96, (3, 1), dilation=(2, 1), pad=(5, 0, 5, 0)),
        Conv(2, 8, 9, 68, 32, (2, 2), stride=(3, 3)),
        Conv(1, 9, 31, 96, 96, (5, 5), stride=(2, 1), groups=96, pad=(2, 2, 2, 2)),
    ],
    ids=str,
)
def test_results_stay_the_same(any_size, c, dtype):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    (out,) = run(lambda emit, p: accumulate(emit, c, p, relax.const(w), 0, "int32"), x, target=HOST)
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


def test_only_large_data_with_long_pixels_are_fetched():
    large, small = Conv(8, 28, 28, 128, 64, (1, 1)), Conv(5, 28, 28, 128, 64, (1, 1))
    assert 5 * 28 * 28 * 128 < ahead.LARGE <= 8 * 28 * 28 * 128
    assert len(fetches(kernel(layer(large)).func)) == 1
    assert not fetches(kernel(layer(small)).func)
    assert not fetches(kernel(layer(Conv(8, 56, 56, 32, 64, (1, 1)))).func)


def test_data_that_are_copied_and_products_are_not_fetched(any_size):
    """A copy is in the cache when it is multiplied; a product's data have no lines."""
    assert not fetches(kernel(layer(Conv(2, 9, 13, 66, 48, pad=(1, 1, 1, 1)))).func)
    w = full("int8", 256, 64)
    product = packed(
        lambda emit, p: emit(relax.op.matmul(p, relax.const(w), out_dtype="int32")), [((64, 256), "uint8")]
    )
    assert not fetches(kernel(layer_of(product)).func)
