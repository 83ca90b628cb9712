"""Small modules for the tests of verification, built without the frontend and its passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.verify.reference import evaluate

Array = np.ndarray[Any, Any]
Emit = Callable[..., relax.Var]
Build = Callable[..., Any]


def graph(build: Build, *arrays: tuple[tuple[int, ...], str] | Array, **attrs: Any) -> tvm.IRModule:
    """`main` with inputs x0, x1 ... of the given shapes and types; build(emit, *inputs) returns its output or a list of them."""
    specs = [(a.shape, str(a.dtype)) if isinstance(a, np.ndarray) else a for a in arrays]
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(specs)]
    with builder.function("main", params):
        with builder.dataflow():
            outs = build(lambda e, name="v": builder.emit(e, name_hint=name), *params)
            outs = outs if isinstance(outs, list) else [outs]
            result = builder.emit_output(relax.Tuple([o if isinstance(o, relax.Var) else builder.emit(o) for o in outs]))
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
