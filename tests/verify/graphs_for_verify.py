"""Small modules for the tests of verification, built without the frontend and its passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import ops
from hawq_tvm.core.arith import QType
from hawq_tvm.verify.reference import evaluate

INT8 = QType.of("int8")
TARGET = tvm.target.Target({"kind": "llvm"})
Array = np.ndarray[Any, Any]
Emit = Callable[..., relax.Var]
Build = Callable[..., Any]


def graph(build: Build, *arrays: tuple[tuple[int, ...], str] | Array, **attrs: Any) -> tvm.IRModule:
    """`main` with inputs x0, x1 ... of the given shapes and types; build(emit, *inputs) returns its output or a list
    of them.
    """
    specs = [(a.shape, str(a.dtype)) if isinstance(a, np.ndarray) else a for a in arrays]
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(specs)]
    with builder.function("main", params):
        with builder.dataflow():
            outs = build(lambda e, name="v": builder.emit(e, name_hint=name), *params)
            outs = outs if isinstance(outs, list) else [outs]
            result = builder.emit_output(
                relax.Tuple([o if isinstance(o, relax.Var) else builder.emit(o) for o in outs])
            )
        builder.emit_func_output(result)
    func = builder.get()["main"]
    for key, value in {"hawq.output_names": [f"y{i}" for i in range(len(outs))], **attrs}.items():
        func = func.with_attr(key, value)
    return tvm.IRModule({"main": func})


def inputs(*arrays: Array) -> dict[str, Array]:
    """Arrays by the names that `graph` gives to its inputs."""
    return {f"x{i}": a for i, a in enumerate(arrays)}


def result(build: Build, *arrays: Array) -> Array:
    """What the reference makes of one expression."""
    return evaluate(graph(build, *arrays), inputs(*arrays))["y0"]


def full_range(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Random integers of the whole range of a type, both ends among them."""
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, size=shape, endpoint=True, dtype=dtype)
    values.flat[0], values.flat[-1] = info.min, info.max
    return values


def network(extra: int = 0) -> tvm.IRModule:
    """INTEGER: quantize, convolution, pool, residual sum, dequantize; extra: added to the bias of channel 1."""
    rng = np.random.default_rng(11)
    weights = ops.const(full_range(rng, (3, 2, 3, 3), "int8"), "int8")
    bias = rng.integers(-5000, 5000, (1, 3, 1, 1))
    bias[0, 1] += extra

    def build(emit: Emit, x: relax.Var) -> list[relax.Expr]:
        q = emit(ops.quantize(x, 0.05, 3, qtype=INT8), "input_q")
        y = emit(relax.op.nn.conv2d(q, weights, out_dtype="int32"), "conv_acc")
        y = emit(relax.op.add(y, ops.const(bias, "int32")), "conv_bias")
        multipliers = rng.integers(2**29, 2**31, (1, 3, 1, 1))
        y = emit(
            ops.requantize(
                [y], [multipliers], 0, 42, qtype=INT8, zero_point=-4, rounding="half_even", thresholds=300, differing=2
            ),
            "conv",
        )
        p = emit(relax.op.nn.max_pool2d(y, (2, 2), (1, 1)), "pool")
        s = emit(
            ops.requantize([p, p], [5, -3], 7, 1, qtype=INT8, zero_point=0, rounding="half_up", thresholds=50), "sum"
        )
        return [emit(ops.dequantize(s, np.float32(0.1), 0, qmin=-128, qmax=127), "out"), s]

    return graph(build, ((1, 2, 6, 6), "float32"))


def compiled(packed: tvm.IRModule, target: tvm.target.Target = TARGET) -> tuple[tvm.IRModule, relax.VMExecutable]:
    """The TIR module and the executable of a PACKED one."""
    tir, _ = schedules.lower_to_tir(packed, target)
    return tir, build.build(tir, target)


def floats(seed: int = 0) -> dict[str, Array]:
    """An input for `network`."""
    return {"x0": (np.random.default_rng(seed).normal(size=(1, 2, 6, 6)) * 4).astype(np.float32)}
