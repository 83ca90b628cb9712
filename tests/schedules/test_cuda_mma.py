"""Tensor-core kernels whose threads run one after the other on the CPU, every intrinsic as its meaning, against the
arithmetic.
"""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops, stages
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.verify.reference import evaluate
from relay_passes.pack_activations import pack_activations
from schedules import lower
from schedules.cpu.generic import Generic
from schedules.gpu.cuda_mma import Mma
from schedules.gpu.mma_model import GPUS, cycles, gpu_of, ranked_tiles
from schedules.gpu.mma_tiles import MmaTile, Problem, pack_weights
from schedules.layer import Layer
from schedules.spelling.mma_intrinsics import Form

from . import test_cpu_contract as contract
from .one_layer import packed, run
from .test_cpu_contract import Conv, accumulate, convolve, full, with_epilogue

R = relax.op
TILES = [MmaTile((2, 1), 1, 2), MmaTile((1, 2), 2, 1, slices=2, depth=4), MmaTile((1, 1), 1, 4, slices=4)]
CONVS = [c for c in contract.CONVS if c.groups == 1 or c.groups != c.ci]
GPU, HOST = cuda.make(["sm_80"]), tvm.target.Target({"kind": "llvm"})
rng = np.random.default_rng(8)


@pytest.fixture
def on_cpu(monkeypatch):
    """Lower with the tensor-core rule, its threads as loops; no tile: the model's choice."""

    def use(tile: MmaTile | None = None) -> None:
        rule = Mma(threads=False)
        monkeypatch.setattr(rule, "tiles", lambda layer, target: [tile] if tile else Mma().tiles(layer, GPU))
        monkeypatch.setattr(lower, "rules_for", lambda target: (rule, Generic()))

    return use


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("c", CONVS, ids=str)
def test_conv2d_with_bias_residual_requantize_and_lookup(c: Conv, tile: MmaTile, on_cpu) -> None:
    on_cpu(tile)
    dtype = "uint8" if c.co % 2 else "int8"
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    body, residual, expected = with_epilogue(c, x, w, 3 * (c.ci % 3))
    (out,) = run(body, x, residual, rule="cuda.mma")
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    "c", [*CONVS[::4], Conv(1, 5, 6, 16, 40, pad=(1, 1, 1, 1)), Conv(2, 3, 3, 64, 24, (1, 1))], ids=str
)
def test_weights_of_4_bits_are_opened_as_16_times_their_values(c: Conv, tile: MmaTile, on_cpu) -> None:
    on_cpu(tile)
    x, w = full("int8" if c.co % 3 else "uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co) >> 4
    acc = convolve(c, x, w, 0)
    bias, m, shift = (
        rng.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32),
        rng.integers(2**30, 2**31, (1, 1, 1, c.co)),
        40,
    )

    def body(emit, p):
        weights = emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True))
        a = emit(R.add(accumulate(emit, c, p, weights, 0, "int32"), relax.const(bias)))
        return ops.requantize([a], [m], 0, shift, qtype=arith.QType.of("uint8"), zero_point=9, rounding="half_up")

    (out,) = run(body, x, rule="cuda.mma")
    expected = arith.requantize([acc + bias], [m], 0, shift, rounding="half_up", zero_point=9, qmin=0, qmax=255)
    np.testing.assert_array_equal(out, expected.astype(np.uint8), strict=True)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("pixels", "depth", "channels"), [(1, 40, 1), (33, 17, 65), (7, 256, 8)])
def test_matmul_without_an_epilogue_and_into_floats(
    pixels: int, depth: int, channels: int, tile: MmaTile, on_cpu
) -> None:
    on_cpu(tile)
    x, w = full("int8", pixels, depth), full("int8", depth, channels)
    acc = (x.astype(np.int64) @ w.astype(np.int64)).astype(np.int32)
    (out,) = run(lambda emit, p: R.matmul(p, relax.const(w), out_dtype="int32"), x, rule="cuda.mma")
    np.testing.assert_array_equal(out, acc, strict=True)
    scale = np.float32(0.037)

    def body(emit, p):
        return ops.dequantize(
            emit(R.matmul(p, relax.const(w), out_dtype="int32")), scale, 0, qmin=-(2**31), qmax=2**31 - 1
        )

    (out,) = run(body, x, rule="cuda.mma")
    np.testing.assert_array_equal(out, acc.astype(np.float32) * scale, strict=True)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "c",
    [Conv(1, 5, 6, 32, 24, pad=(1, 1, 1, 1)), Conv(2, 7, 3, 8, 16, (1, 1), (2, 2)), Conv(1, 4, 5, 40, 40, (1, 1))],
    ids=str,
)
def test_layers_of_4_bits_with_a_residual_packed_in_memory(c: Conv, signed: bool, on_cpu) -> None:
    """Two convolutions, the second of which may add its data to its result: what is between them is packed."""
    on_cpu()
    first, second = full("int8", 1, 1, c.ci, c.ci) >> 4, full("int8", *c.k, c.ci, c.co) >> 4
    q = arith.QType(-8, 7, "int8") if signed else arith.QType(0, 15, "uint8")
    x = full("uint8", c.n, c.h, c.w, c.ci)
    packed_module = two_layers(c, first, second, q)
    module, count = pack_activations(packed_module)
    assert count == 1
    data = next(stages.bindings(module["main"])).var
    assert (ops.shape_of(data), ops.dtype_of(data)) == ((c.n, c.h, c.w, c.ci // 2), "uint8")
    expected = list(evaluate(packed_module, {"x": x}).values())
    np.testing.assert_array_equal(list(evaluate(module, {"x": x}).values()), expected)
    tir, _ = schedules.lower_to_tir(module, HOST)
    assert [r["rule"] for r in schedules.report(tir)] == ["cuda.mma"] * 2
    vm = relax.VirtualMachine(build.build(tir, HOST), tvm.cpu())
    np.testing.assert_array_equal([r.numpy() for r in vm["main"](tvm.runtime.tensor(x))], expected)


def two_layers(c: Conv, first: np.ndarray, second: np.ndarray, q: arith.QType) -> tvm.IRModule:
    """A PACKED module: a 1x1 convolution `first` to 4 bits, then `c` on its result."""
    builder = relax.BlockBuilder()

    def layer(
        name: str, shape: tuple[int, ...], dtype: str, conv: Conv, w: np.ndarray, qtype: arith.QType
    ) -> tvm.ir.GlobalVar:
        p = relax.Var("p0", relax.TensorType(shape, dtype))
        inner = relax.BlockBuilder()
        with inner.function(name, [p], attrs={"Primitive": 1, "hawq.layer": name}, private=True):
            with inner.dataflow():
                weights = inner.emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True))
                a = accumulate(lambda e: inner.emit(e), conv, p, weights, 0, "int32")
                y = ops.requantize([a], [1 << 30], 0, 37, qtype=qtype, zero_point=0, rounding="half_up")
                if conv.k == (1, 1) and conv.stride == (1, 1) and name == "second":
                    y = ops.requantize(
                        [inner.emit(y), p], [1 << 30, 1 << 30], 0, 31, qtype=qtype, zero_point=0, rounding="half_up"
                    )
                result = inner.emit_output(y)
            inner.emit_func_output(result)
        return builder.add_func(inner.get()[name], name)

    x = relax.Var("x", relax.TensorType((c.n, c.h, c.w, c.ci), "uint8"))
    one = layer("first", (c.n, c.h, c.w, c.ci), "uint8", Conv(c.n, c.h, c.w, c.ci, c.ci, (1, 1)), first, q)
    two = layer("second", (c.n, c.h, c.w, c.ci), q.storage, c, second, arith.QType.of("int8"))
    with builder.function("main", [x], attrs={"hawq.output_names": ["y"]}):
        with builder.dataflow():
            data = builder.emit(relax.Call(one, [x]), name_hint="first")
            y = builder.emit(relax.Call(two, [data]), name_hint="second")
            result = builder.emit_output(relax.Tuple([y]))
        builder.emit_func_output(result)
    module = builder.get()
    stages.verify(module, stages.Stage.PACKED)
    return module


@pytest.mark.parametrize("form", Form)
def test_packed_weights_hold_every_weight_once(form: Form) -> None:
    """What the meaning of `multiply_step` reads of them is the product of data and weights; here, that nothing is
    lost.
    """
    problem, tile = Problem((1, 3, 3), 21, 2, 16, form, (2, 1)), MmaTile((1, 2), 1, 2, slices=2, depth=2)
    w = rng.integers(1, 7, (2, 16 * (2 if form.is_packed else 1), 42)).astype(np.int8)
    packed_weights = pack_weights(w, problem, tile)
    values = packed_weights.astype(np.int64)
    total = ((values & 15) + (values >> 4)).sum() if form.is_packed or form.opens_weights else values.sum()
    assert total == int(w.astype(np.int64).sum())


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem((1, 7, 7), 512, 1, 512, Form.U8S8, (3, 3)),
        Problem((32, 56, 56), 64, 1, 64, Form.U8S4, (1, 1)),
        Problem((1,), 1000, 1, 2048, Form.S8S8),
        Problem((1, 112, 112), 64, 1, 3, Form.U8S8, (7, 7), (2, 2)),
        Problem((8, 14, 14), 4, 32, 4, Form.U4S4, (3, 3)),
    ],
    ids=str,
)
def test_ranked_tiles_fit_the_gpu(problem: Problem, arch: str) -> None:
    gpu = gpu_of([arch])
    tiles = ranked_tiles(problem, gpu)
    times = [cycles(problem, t, gpu) for t in tiles]
    assert times == sorted(times) and all(
        t.threads <= 256 and t.shared_bytes(problem.form) <= gpu.shared for t in tiles
    )


def test_reasons_to_refuse() -> None:
    def why(body, *inputs: tuple[tuple[int, ...], str]) -> str | None:
        module = packed(body, inputs)
        gv = module.get_global_var("fused")
        return Mma().applies(Layer.of(gv, module[gv]), GPU)

    w = relax.const(full("int8", 16, 8))
    assert why(lambda e, x: R.matmul(x, w, out_dtype="int32"), ((3, 16), "int8")) is None
    assert "run time" in str(
        why(lambda e, x, y: R.matmul(x, y, out_dtype="int32"), ((3, 16), "int8"), ((16, 8), "int8"))
    )
    assert "8 bits" in str(why(lambda e, x: R.matmul(x, w, out_dtype="int32"), ((3, 16), "int16")))
    assert "beyond 127" in str(
        why(
            lambda e, x: R.matmul(x, relax.const(np.full((16, 8), 200, np.uint8)), out_dtype="int32"), ((3, 16), "int8")
        )
    )
    assert "several results" in str(
        why(lambda e, x: relax.Tuple([e(R.matmul(x, w, out_dtype="int32")), x]), ((3, 16), "int8"))
    )
    constant = relax.const(np.arange(24, dtype=np.int32).reshape(3, 8))
    assert "pixel to pixel" in str(
        why(lambda e, x: R.add(e(R.matmul(x, w, out_dtype="int32")), constant), ((3, 16), "int8"))
    )


@pytest.mark.parametrize("most", [15, 127])
def test_unsigned_weights_that_fit_seven_bits(most: int, on_cpu) -> None:
    """As uint8 constants, which the instructions of signed weights would not take."""
    x, w = full("uint8", 5, 40), rng.integers(0, most + 1, (40, 24)).astype(np.uint8)

    def body(emit, p):
        return R.matmul(p, relax.const(w), out_dtype="int32")

    module = packed(body, [((5, 40), "uint8")])
    gv = module.get_global_var("fused")
    assert Mma().build(Layer.of(gv, module[gv]), GPU).arguments[0].dtype == np.int8
    on_cpu()
    (out,) = run(body, x, rule="cuda.mma")
    np.testing.assert_array_equal(out, x.astype(np.int32) @ w.astype(np.int32), strict=True)


def test_a_tile_checks_itself() -> None:
    for bad in (dict(depth=3), dict(depth=0), dict(slices=0), dict(stages=0)):
        with pytest.raises(ValueError, match="not a tile"):
            MmaTile((1, 1), 1, 2, **bad)
