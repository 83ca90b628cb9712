"""The parts of a comparison: agreement of outputs, processors, and the count of multiplications."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.bench import agreement
from hawq_tvm.core import work
from hawq_tvm.core.errors import UsageError
from hawq_tvm.measure import pinning

SPEC: dict[str, Any] = {"name": "y", "quantization": {"scale": [0.5], "zero_point": [0]}}
LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can be pinned on Linux only")


def one(ours: list[float], theirs: list[float], spec: dict[str, Any] = SPEC) -> agreement.OutputAgreement:
    (row,) = agreement.compare({"y": np.array(ours, np.float32)}, {"y": np.array(theirs, np.float32)}, [spec])
    return row


def test_differences_are_in_steps() -> None:
    row = one([0, 1, 2, 3], [0.1, 1.5, 2, 4])
    assert (row.elements, row.differing, row.step, row.largest) == (4, 2, 0.5, 2) and row.same_network
    assert "2 of 4 elements differ (50.00 %), at most by 2 output steps" in row.sentence()
    row = one([0, 1, 2, 3], [0, 1, 2.125, 3], {"name": "y"})
    assert (row.differing, row.step, row.largest) == (1, 0, 0.125) and "(absolute)" in row.sentence()


@pytest.mark.parametrize(
    "ours, theirs, same",
    [
        ([0, 1, 2, 3], [3, 2, 1, 0], False),
        ([0, 1, 2, 3], [0, 1, float("nan"), 3], False),
        ([1, 1], [1, 1], True),
        ([1, 1], [1, 2], True),
        ([1, 1], [1, 9], False),
        ([5], [5.5], True),
        ([5], [50], False),
    ],
)
def test_the_same_network_or_not(ours: list[float], theirs: list[float], same: bool) -> None:
    assert one(ours, theirs).same_network is same


def test_other_outputs_have_a_sentence() -> None:
    with pytest.raises(ValueError, match="no output y, but z"):
        agreement.compare({"y": np.zeros(2)}, {"z": np.zeros(2)}, [SPEC])
    with pytest.raises(ValueError, match=r"shape \(3,\), ours \(2,\)"):
        agreement.compare({"y": np.zeros(2)}, {"y": np.zeros(3)}, [SPEC])


@LINUX
def test_every_thread_is_pinned_and_released() -> None:
    allowed = os.sched_getaffinity(0)
    (core,) = pinning.choose_cores(1)
    stop, ready = threading.Event(), threading.Event()
    inner: list[set[int]] = []
    thread = threading.Thread(target=lambda: (ready.set(), stop.wait(30), inner.append(os.sched_getaffinity(0))))
    thread.start()
    ready.wait(30)
    with pinning.restored_affinity():
        pinning.pin_all([core])
        assert pinning.pinned([core]) and os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == allowed
    stop.set()
    thread.join()
    assert inner == [allowed]
    assert len(pinning.choose_cores(len(allowed))) == len(allowed)
    with pytest.raises(UsageError, match="a processor of its own"):
        pinning.choose_cores(len(allowed) + 1)


@LINUX
def test_other_processes_are_a_share() -> None:
    with pinning.other_processes(sorted(os.sched_getaffinity(0))) as others:
        threading.Event().wait(0.1)
    assert len(others) == 1 and 0 <= others[0] < 1.5


def test_multiplications_are_those_of_the_definition() -> None:
    x, w = (
        relax.Var("x", relax.TensorType((1, 6, 6, 8), "uint8")),
        relax.Var("w", relax.TensorType((3, 3, 2, 12), "int8")),
    )
    conv = relax.op.nn.conv2d(x, w, groups=4, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32")
    a, b = relax.Var("a", relax.TensorType((2, 5, 7), "int8")), relax.Var("b", relax.TensorType((7, 3), "int8"))
    product = relax.op.matmul(a, b, out_dtype="int32")
    builder = relax.BlockBuilder()
    for name, params, call in [("conv", [x, w], conv), ("matmul", [a, b], product)]:
        with builder.function(name, params, attrs={"Primitive": 1}, private=True):
            with builder.dataflow():
                out = builder.emit_output(call)
            builder.emit_func_output(out)
    module = builder.get()
    outer = [relax.Var(n, v.ty) for n, v in zip("xwab", (x, w, a, b), strict=True)]
    builder = relax.BlockBuilder(module)
    with builder.function("main", outer):
        with builder.dataflow():
            first = builder.emit(relax.Call(module.get_global_var("conv"), outer[:2]))
            again = builder.emit(relax.Call(module.get_global_var("conv"), outer[:2]))
            last = builder.emit(relax.Call(module.get_global_var("matmul"), outer[2:]))
            out = builder.emit_output(relax.Tuple([first, again, last]))
        builder.emit_func_output(out)
    graph: tvm.IRModule = builder.get()
    assert work.products(graph) == 2 * (4 * 4 * 12 * 3 * 3 * 2) + 2 * 5 * 3 * 7
