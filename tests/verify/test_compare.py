"""The comparison finds planted differences: the right layer, element, accumulator, in whatever way they come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.verify.compare import (
    LayerRow,
    LayerRun,
    MismatchError,
    VerifyReport,
    layer_calls,
    run_with_layers,
    verify_executable,
)
from hawq_tvm.verify.reference import evaluate
from relay_passes.fuse_epilogues import fuse_epilogues

from .graphs_for_verify import INT8, Array, compiled, floats, graph, inputs, network


def packed_network(extra: int = 0) -> tvm.IRModule:
    packed, _ = fuse_epilogues(network(extra))
    stages.verify(packed, stages.Stage.PACKED)
    return packed


def library(packed: tvm.IRModule) -> Callable[[Mapping[str, Array]], LayerRun]:
    """The compiled library of a PACKED module, as a function of its inputs."""
    _, executable = compiled(packed)
    vm, kernels = relax.VirtualMachine(executable, tvm.cpu()), set(stages.private_functions(packed))
    return lambda batch: run_with_layers(vm, packed, batch, kernels)


def pretended(
    packed: tvm.IRModule, change: Callable[[LayerRun], LayerRun]
) -> Callable[[Mapping[str, Array]], LayerRun]:
    """A library that computes what the reference computes, but for a planted change."""

    def run(batch: Mapping[str, Array]) -> LayerRun:
        seen: dict[str, Any] = {}
        outputs = evaluate(packed, batch, seen.__setitem__)
        copies = [np.array(seen[b.var.name]) for b in layer_calls(packed)]
        return change(LayerRun({k: np.array(v) for k, v in outputs.items()}, copies))

    return run


def test_a_compiled_network_is_equal_in_every_layer() -> None:
    packed = packed_network()
    report = verify_executable(packed, library(packed), [floats(0), floats(1)])
    assert report.ok and report.first is None and report.inputs == 2
    assert [r.layer for r in report.rows] == ["input_q", "conv", "pool", "sum", "out", "output y0", "output y1"]
    assert [r.elements for r in report.rows] == [2 * n for n in (72, 48, 27, 27, 27, 27, 27)]
    assert report.summary() == "bit-exact: 7 layers, 510 elements over 2 inputs, 0 different"
    report.raise_if_mismatch()
    assert report.to_dict()["first_difference"] is None


def test_a_library_with_another_bias_is_caught_in_its_layer() -> None:
    wanted, other = packed_network(), packed_network(extra=3000)
    report = verify_executable(wanted, library(other), [floats()])
    seen: dict[str, Array] = {}
    evaluate(network(), floats(), seen.__setitem__)
    changed: dict[str, Array] = {}
    evaluate(network(3000), floats(), changed.__setitem__)
    different = seen["conv"] != changed["conv"]
    index = tuple(int(i) for i in np.argwhere(different)[0])
    assert index[1] == 1
    first = report.first
    assert first is not None and not report.ok
    assert (first.layer, first.index, first.accumulator) == ("conv", index, [int(seen["conv_bias"][index])])
    assert (first.expected, first.found) == (int(seen["conv"][index]), int(changed["conv"][index]))
    row = {r.layer: r for r in report.rows}
    assert row["input_q"].different == 0 and row["conv"].different == int(different.sum())
    assert row["conv"].first == first and row["input_q"].first is None
    with pytest.raises(
        MismatchError, match=r"first: layer conv, index \[0, 1, .*accumulator \[-?\d+\]: expected"
    ) as caught:
        report.raise_if_mismatch()
    assert caught.value.exit_code == 1
    assert report.to_dict()["first_difference"]["index"] == list(index)


def test_the_accumulators_of_a_residual_sum_are_all_reported() -> None:
    packed = packed_network()

    def change(run: LayerRun) -> LayerRun:
        run.layers[3][0, 2, 1, 1] ^= 1
        return run

    report = verify_executable(packed, pretended(packed, change), [floats()])
    seen: dict[str, Array] = {}
    evaluate(packed, floats(), seen.__setitem__)
    assert report.first is not None
    value = int(seen["pool"][0, 2, 1, 1])
    assert (report.first.layer, report.first.index, report.first.accumulator) == ("sum", (0, 2, 1, 1), [value, value])
    assert sum(r.different for r in report.rows) == 1


def test_an_output_that_is_not_what_its_layer_wrote_is_caught() -> None:
    packed = packed_network()

    def change(run: LayerRun) -> LayerRun:
        run.outputs["y1"][0, 0, 0, 0] ^= 1
        return run

    report = verify_executable(packed, pretended(packed, change), [floats()])
    assert report.first is not None and report.first.layer == "output y1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.astype(np.int16), r"expected int8\[1, 3, 3, 3\], found int16\[1, 3, 3, 3\]"),
        (lambda a: a[:, :, :2], r"expected int8\[1, 3, 3, 3\], found int8\[1, 3, 2, 3\]"),
    ],
)
def test_another_type_or_shape_is_a_difference(change: Callable[[Array], Array], reason: str) -> None:
    packed = packed_network()

    def planted(run: LayerRun) -> LayerRun:
        run.layers[2] = change(run.layers[2])
        return run

    report = verify_executable(packed, pretended(packed, planted), [floats()])
    with pytest.raises(MismatchError, match=f"layer pool: {reason}"):
        report.raise_if_mismatch()


@pytest.mark.parametrize(("planted", "ok"), [(0.0, True), (-0.0, False), (np.nan, False)])
def test_floats_are_compared_bit_by_bit(planted: float, ok: bool) -> None:
    x = np.array([0, 5], np.int8)
    packed, _ = fuse_epilogues(graph(lambda emit, a: ops.dequantize(a, np.float32(0.1), 0, qmin=-128, qmax=127), x))

    def change(run: LayerRun) -> LayerRun:
        run.layers[0][0] = planted
        return run

    assert verify_executable(packed, pretended(packed, change), [inputs(x)]).ok == ok


def test_a_library_of_another_graph_is_refused() -> None:
    packed = packed_network()

    def shorter(run: LayerRun) -> LayerRun:
        return LayerRun(run.outputs, run.layers[:-1])

    with pytest.raises(MismatchError, match="4 layers where the graph has 5"):
        verify_executable(packed, pretended(packed, shorter), [floats()])
    vm = relax.VirtualMachine(compiled(packed)[1], tvm.cpu())
    with pytest.raises(MismatchError, match="ran 4 layers where the graph has 5"):
        run_with_layers(vm, packed, floats(), set(stages.private_functions(packed)) - {"quantize"})


def test_a_layer_with_several_results_is_compared_in_each() -> None:
    def build(emit: Any, x: relax.Var) -> list[relax.Expr]:
        parts = emit(relax.op.split(x, 2, 1), "halves")
        return [emit(relax.TupleGetItem(parts, i), f"half{i}") for i in range(2)]

    x = np.arange(12, dtype=np.int8).reshape(2, 6)
    packed, _ = fuse_epilogues(graph(build, x))
    report = verify_executable(packed, library(packed), [inputs(x)])
    assert report.ok and {r.layer: r.elements for r in report.rows}["halves"] == 12


def test_an_index_means_nothing_after_elements_have_moved() -> None:
    """A requantize inside a concatenation has no element at the index of the result."""

    def build(emit: Any, x: relax.Var) -> relax.Expr:
        y = emit(ops.requantize([x], [1], 0, 1, qtype=INT8, zero_point=0, rounding="half_even"), "half")
        return emit(relax.op.concat([y, x], 1), "joined")

    x = np.arange(12, dtype=np.int8).reshape(2, 6)
    packed, _ = fuse_epilogues(graph(build, x))
    assert len(layer_calls(packed)) == 1

    def change(run: LayerRun) -> LayerRun:
        run.layers[0][1, 1] += 1
        return run

    report = verify_executable(packed, pretended(packed, change), [inputs(x)])
    assert report.first is not None and report.first.index == (1, 1) and report.first.accumulator == []
    assert "accumulator none" in report.summary()


def test_a_float_head_and_tail_are_set_apart() -> None:
    """Their float32 arithmetic is the library's own: the integer layers are compared on what the head really made."""

    def build(emit: Any, x: relax.Var) -> list[relax.Expr]:
        head = emit(relax.op.divide(x, relax.const(np.float32(0.3))), "head")
        q = emit(ops.quantize(head, 0.1, 0, qtype=INT8), "q")
        y = emit(ops.requantize([q], [3], 0, 1, qtype=INT8, zero_point=0, rounding="half_even"), "layer")
        z = emit(ops.dequantize(y, np.float32(0.1), 0, qmin=-128, qmax=127), "z")
        return [emit(relax.op.nn.softmax(z, 1), "tail"), z]

    # Ties of the quantize in float32: in float64 these inputs round the other way.
    x = (np.arange(-2000, 2000).reshape(1, -1) * np.float32(0.015)).astype(np.float32)
    module = graph(build, x, **{"hawq.float_tail": ["head", "tail"]})
    packed, _ = fuse_epilogues(module)
    report = verify_executable(packed, library(packed), [inputs(x)])
    report.raise_if_mismatch()
    assert report.not_compared == ("y0",)
    assert [r.layer for r in report.rows] == ["q", "layer", "z", "output y1"]
    assert report.summary().endswith("float tail not compared: y0")
    seen: dict[str, Array] = {}
    evaluate(packed, inputs(x), seen.__setitem__)
    assert np.any(library(packed)(inputs(x)).layers[0] != seen["q"]), "the case is too easy to show the difference"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_float_head_goes_through_the_whole_compiler(dynamic: bool) -> None:
    weights = ops.const(np.random.default_rng(3).integers(-128, 128, (6, 5)), "int8")

    def build(emit: Any, x: relax.Var) -> list[relax.Expr]:
        head = emit(relax.op.exp(emit(relax.op.multiply(x, relax.const(np.float32(0.37))), "scaled")), "head")
        if dynamic:
            q = emit(relax.TupleGetItem(emit(ops.dynamic_quantize(head), "dynamic"), 0), "q")
            return [emit(relax.op.nn.max_pool2d(emit(relax.op.reshape(q, (1, 1, 4, 6))), (2, 2)), "pool")]
        q = emit(ops.quantize(head, 0.013, 3, qtype=INT8), "q")
        real = emit(ops.dequantize(q, np.float32(0.013), 3, qmin=-128, qmax=127))
        y = emit(
            relax.op.matmul(real, emit(ops.dequantize(weights, np.float32(0.01), 0, qmin=-128, qmax=127))), "product"
        )
        y = emit(
            ops.dequantize(emit(ops.quantize(y, 0.07, -5, qtype=INT8), "y"), np.float32(0.07), -5, qmin=-128, qmax=127)
        )
        return [emit(relax.op.nn.softmax(y, 1), "tail"), y]

    x = np.random.default_rng(4).normal(size=(4, 6)).astype(np.float32)
    packed = pipeline.to_packed(graph(build, x, **{"hawq.allow_float_tail": 1}))
    run = library(packed)
    report = verify_executable(packed, run, [inputs(x)])
    report.raise_if_mismatch()
    assert list(run(inputs(x)).head) == ["head"]
    assert report.not_compared == (() if dynamic else ("y0",)) and report.elements > 20


def test_a_comparison_of_nothing_is_never_ok() -> None:
    for report in (
        VerifyReport((), 0),
        VerifyReport((LayerRow("a", 4, 0),), 0),
        VerifyReport((), 2, not_compared=("y",)),
    ):
        assert not report.ok and report.to_dict()["ok"] is False and "nothing was compared" in report.summary()
        with pytest.raises(MismatchError, match="nothing was compared"):
            report.raise_if_mismatch()
    assert VerifyReport((LayerRow("a", 4, 0),), 1).ok
