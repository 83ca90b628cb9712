"""GPU kernels run on the CPU: a scheduled PrimFunc with its threads as loops, one after the other.

At the level of schedules every stage has its own loops over threads, and it ends before the next begins: run in
order they compute what the threads of a GPU compute with barriers between stages. So indices, guards and storage are
tested; races and barriers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from hawq_tvm.targets import gpu as cuda
from hawq_tvm.verify.reference import evaluate
from schedules.gpu.cuda_depthwise import CudaDepthwise
from schedules.gpu.cuda_products import CudaProducts
from schedules.rule import choose
from schedules.rules import rules_for
from schedules.spelling.cuda_prelude import MEANINGS

from ..schedules.one_layer import Array, Body, layer_of, packed, zeros_for

TARGET = cuda.make(cuda.ARCHITECTURES)
CPU = tvm.target.Target({"kind": "llvm"})


def without_threads(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with its loops over blocks and threads as plain loops, and the prelude's functions as what they
    mean.
    """

    def plain(loop: tirx.For) -> tirx.For:
        if int(loop.kind) != tirx.ForKind.THREAD_BINDING:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body, None, loop.annotations)

    def meant(call: tvm.ir.Call) -> Any:
        if str(getattr(call.op, "name", "")) != "tirx.call_extern":
            return call
        return MEANINGS[str(call.args[0].value)](*call.args[1:])

    return tvm_ffi.structural_map(func, [(tirx.For, plain), (tvm.ir.Call, meant)])


def compiled(func: tirx.PrimFunc) -> Callable[..., Any]:
    """A GPU kernel as a function of this CPU."""
    return tvm.tirx.build(without_threads(func).with_attr("global_symbol", "main"), target=CPU, pipeline="s_tir")[
        "main"
    ]


def execute(func: tirx.PrimFunc, inputs: Sequence[Array], results: Sequence[Array]) -> None:
    """Execute a GPU kernel on this CPU; its results are filled."""
    given, written = ([tvm.runtime.tensor(np.asarray(a, order="C")) for a in arrays] for arrays in (inputs, results))
    compiled(func)(*given, *written)
    for array, tensor in zip(results, written, strict=True):
        array[...] = tensor.numpy()


def run(module: tvm.IRModule, *arrays: Array, rule: str = "", target: tvm.target.Target = TARGET) -> list[Array]:
    """The results of the CUDA kernel of a PACKED module of one layer on `arrays`; rule: the name of the rule that
    must make it.
    """
    layer = layer_of(module)
    chosen = choose(rules_for(target), layer, target).rule
    assert rule in ("", chosen.name)
    meant = {"cuda.depthwise": CudaDepthwise(spelled=False), "cuda.products": CudaProducts(threads=False)}
    kernel = meant.get(chosen.name, chosen).build(layer, target)
    results = zeros_for(layer)
    execute(kernel.func, [*arrays, *kernel.arguments], results)
    return results


def check(body: Body, *arrays: Array, rule: str = "", target: tvm.target.Target = TARGET) -> None:
    """One layer's CUDA kernel gives what the reference says, on `arrays`."""
    module = packed(body, [(a.shape, str(a.dtype)) for a in arrays])
    wanted = evaluate(module, {f"x{i}": a for i, a in enumerate(arrays)}).values()
    for found, expected in zip(run(module, *arrays, rule=rule, target=target), wanted, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
