"""Writers of small ANNOTATED modules and the comparison that every pass must stand: the same values before and
after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.arith import QType
from hawq_tvm.verify.reference import evaluate

RNG = np.random.default_rng(7)
U8, S8, S4, U4 = (QType.of(n) for n in ("uint8", "int8", "int4", "uint4"))
Build = Callable[[relax.BlockBuilder, list[relax.Expr]], Any]


def module(build: Build, inputs: dict[str, tuple[tuple[int, ...], str]], **attrs: Any) -> tvm.IRModule:
    """An ANNOTATED module whose body is made by `build` from parameters of the given shapes and dtypes."""
    bb = relax.BlockBuilder()
    params = [relax.Var(n, relax.TensorType(s, d)) for n, (s, d) in inputs.items()]
    with bb.function("main", params):
        with bb.dataflow():
            outs = build(bb, params)
            outs = outs if isinstance(outs, list) else [outs]
            result = bb.emit_output(relax.Tuple(outs))
        bb.emit_func_output(result)
    func = bb.get()["main"]
    names = [f"out{i}" for i in range(len(outs))]
    for key, value in {"hawq.output_names": names, **attrs}.items():
        func = func.with_attr(key, value)
    return tvm.IRModule({"main": func})


def q(
    bb: relax.BlockBuilder, x: relax.Expr, scale: Any, zero: Any, qtype: QType = U8, name: str = "q", **kw: Any
) -> relax.Expr:
    return bb.emit(ops.quantize(x, scale, zero, qtype=qtype, **kw), name)


def dq(bb: relax.BlockBuilder, x: relax.Expr, scale: Any, zero: Any, qtype: QType = U8) -> relax.Expr:
    return bb.emit(ops.dequantize(x, np.asarray(scale, np.float32), zero, qmin=qtype.qmin, qmax=qtype.qmax))


def weight(shape: tuple[int, ...], scale: Any, zero: Any = 0, qtype: QType = S8) -> relax.Expr:
    values = RNG.integers(qtype.qmin, qtype.qmax, size=shape, endpoint=True)
    values.flat[0], values.flat[-1] = qtype.qmin, qtype.qmax
    return ops.dequantize(
        ops.const(values, qtype.storage), np.asarray(scale, np.float32), zero, qmin=qtype.qmin, qmax=qtype.qmax
    )


def full_range(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype.startswith("float"):
        return (RNG.standard_normal(shape) * 4).astype(dtype)
    info = np.iinfo(dtype)
    x = RNG.integers(info.min, info.max, size=shape, endpoint=True, dtype=np.int64).astype(dtype)
    x.flat[:2] = (info.min, info.max)[: x.flat[:2].size]
    return x


def same_values(before: tvm.IRModule, after: tvm.IRModule, runs: int = 2) -> None:
    """Both modules give equal outputs, exactly, on full-range inputs."""
    for _ in range(runs):
        feed = {p.name: full_range(ops.shape_of(p), ops.dtype_of(p)) for p in before["main"].params}
        wanted, got = evaluate(before, feed), evaluate(after, feed)
        for name in wanted:
            assert got[name].dtype == wanted[name].dtype
            np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def op_names(mod: tvm.IRModule) -> list[str]:
    return [ops.op_name(b.value).split(".")[-1] for b in stages.bindings(mod["main"])]
