"""half_up where no tie can occur: the same integers, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.intervals import Interval
from hawq_tvm.verify.reference import evaluate
from relay_passes.drop_ties import drop_ties, settle_ties

rng = np.random.default_rng(9)
U8 = arith.QType.of("uint8")


def requantize(
    operands: int, multipliers, offset, shift, rounding: str = "half_even", zero_point: int = 3, qtype=U8, **proof
) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    rows = np.broadcast_shapes(np.shape(offset), np.shape(multipliers[0]), (1,))[0]
    params = [relax.Var(f"x{k}", relax.TensorType((rows, 256), "uint8")) for k in range(operands)]
    with builder.function("main", params, attrs={"hawq.output_names": ["y"]}):
        with builder.dataflow():
            y = builder.emit(
                ops.requantize(
                    params, multipliers, offset, shift, qtype=qtype, zero_point=zero_point, rounding=rounding, **proof
                ),
                "y",
            )
            result = builder.emit_output(relax.Tuple([y]))
        builder.emit_func_output(result)
    return builder.get()


def roundings(module: tvm.IRModule) -> list[str]:
    return [
        str(b.value.attrs["rounding"])
        for b in module["main"].body.blocks[0].bindings
        if ops.op_name(b.value) == "hawq.requantize"
    ]


@pytest.mark.parametrize(
    ("multipliers", "offset", "shift", "settled"),
    [
        ([2**30], 0, 31, {"half_away"}),  # x / 2: half of the ties are even below
        ([2**30], 1, 31, {"half_even", "half_away"}),  # never on the boundary
        ([2**30], 2**29, 30, {"half_away"}),  # x + 1/2: always, and x is not negative
        ([3], 0, 1, {"half_away"}),
        ([2**30], -(2**37), 31, {}),  # x / 2 - 64
        ([2**30, 2**30], 0, 31, {"half_away"}),
        ([1431655765], 0, 32, {"half_even", "half_away"}),  # x / 3
        ([2**29], 0, 31, {"half_away"}),  # x / 4: a tie at every fourth
        ([2**31 - 2**22], 2**41, 42, {"half_even", "half_away"}),  # one tie, at x = 0
        ([2**31 - 2**22], 2**42 + 2**41, 42, {"half_even", "half_away"}),
        ([2**30, 2**29], 1, 31, {"half_even", "half_away"}),
        ([5], 0, 0, {"half_even", "half_away"}),
    ],
)
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_ties_are_settled_and_values_kept(multipliers, offset, shift, settled, rounding):
    module = requantize(len(multipliers), multipliers, offset, shift, rounding)
    new, count = drop_ties(module)
    assert (count, roundings(new)) == ((1, ["half_up"]) if rounding in settled else (0, [rounding]))
    inputs = {f"x{k}": rng.permutation(256).astype(np.uint8)[None] for k in range(len(multipliers))}
    np.testing.assert_array_equal(evaluate(new, inputs)["y"], evaluate(module, inputs)["y"], strict=True)


def results(
    x: np.ndarray, m: int, offset: int, shift: int, rounding: str, zero_point: int, qtype: arith.QType
) -> list[int]:
    return arith.requantize(
        [x], [m], offset, shift, rounding=rounding, zero_point=zero_point, qmin=qtype.qmin, qmax=qtype.qmax
    ).tolist()


@pytest.mark.parametrize("rounding", ["half_even", "half_away", "half_toward_zero"])
def test_against_every_value_of_small_numbers(rounding):
    settled = 0
    for _ in range(400):
        m, shift = int(rng.integers(-40, 40)), int(rng.integers(0, 7))
        offset, low = int(rng.integers(-70, 70)), int(rng.integers(-60, 40))
        high, zero_point, qmin = low + int(rng.integers(0, 30)), int(rng.integers(-5, 20)), int(rng.integers(0, 30))
        qtype = arith.QType(qmin, qmin + int(rng.integers(1, 60)), "uint8")
        module = requantize(1, [m], offset, shift, rounding, zero_point, qtype)
        (call,) = [b.value for b in module["main"].body.blocks[0].bindings if ops.op_name(b.value) == "hawq.requantize"]
        change, x = settle_ties(call, [Interval.of_range(low, high)]), np.arange(low, high + 1)
        wanted = results(x, m, offset, shift, rounding, zero_point, qtype)
        fitting = [c for c in (0, -1) if results(x, m, offset + c, shift, "half_up", zero_point, qtype) == wanted]
        settled += change is not None
        assert (int(change) in fitting) if change is not None else not fitting, (
            m,
            offset,
            shift,
            low,
            high,
            zero_point,
            qtype,
        )
    assert settled > 100


def test_one_number_for_channels_of_different_intervals():
    (call,) = [
        b.value
        for b in requantize(1, [2**31 - 2**22], 2**41, 42)["main"].body.blocks[0].bindings
        if ops.op_name(b.value) == "hawq.requantize"
    ]
    interval = Interval(np.array([0, 1, -5]).reshape(1, 3, 1, 1), np.array([9, 9, -1]).reshape(1, 3, 1, 1))
    assert settle_ties(call, [interval]).tolist() == [[[[-1]], [[0]], [[0]]]]


def test_channels_are_settled_each_for_itself():
    m, offset = np.array([2**30, 3 * 2**29, 2**30 + 1])[:, None], np.array([2**40, 3 * 2**40, 7])[:, None]
    module = requantize(1, [m], offset, 41, zero_point=0)
    new, count = drop_ties(module)
    (call,) = [b.value for b in new["main"].body.blocks[0].bindings if ops.op_name(b.value) == "hawq.requantize"]
    assert count == 1 and ops.const_value(call.args[2]).tolist() == [[2**40 - 1], [3 * 2**40], [7]]
    inputs = {"x0": np.tile(np.arange(256, dtype=np.uint8), (3, 1))}
    np.testing.assert_array_equal(evaluate(new, inputs)["y"], evaluate(module, inputs)["y"], strict=True)


@pytest.mark.parametrize("rounding", ["floor", "ceil", "toward_zero", "away", "half_away", "half_toward_zero"])
@pytest.mark.parametrize("zero_point, qmin, changed", [(0, 0, True), (7, 9, True), (100, 0, False)])
def test_directed_roundings_become_half_up_with_another_constant(rounding, zero_point, qmin, changed):
    shift = np.array([0, 1, 2, 5])
    qtype = arith.QType(qmin, 250, "uint8")
    module = requantize(
        1,
        [np.array([3, -3, 2, 17])[:, None]],
        np.array([-90, 200, -120, 31])[:, None],
        shift[:, None],
        rounding,
        zero_point,
        qtype,
    )
    new, count = drop_ties(module)
    one_sided = rounding not in ("floor", "ceil")
    assert (count, roundings(new)) == ((1, ["half_up"]) if changed or not one_sided else (0, [rounding]))
    inputs = {"x0": np.tile(np.arange(256, dtype=np.uint8), (4, 1))}
    np.testing.assert_array_equal(evaluate(new, inputs)["y"], evaluate(module, inputs)["y"], strict=True)


def test_other_roundings_and_many_operands_stay():
    for module in (requantize(1, [5], 0, 1, "half_up"), requantize(3, [2**30, 2**29, 2**28], 1, 40)):
        new, count = drop_ties(module)
        assert count == 0 and roundings(new) == roundings(module)


@pytest.mark.parametrize(("rounding", "bound"), [("half_even", 0.25), ("floor", 0.75)])
def test_the_distance_from_the_real_formula_is_kept(rounding: str, bound: float) -> None:
    """Of thresholds that are not enumerated; half a step more where half_up stands for a rounding down."""
    module, count = drop_ties(requantize(1, [2**30], 1, 31, rounding, thresholds=-1, differing=-1, bound=0.25))
    (call,) = (b.value for b in module["main"].body.blocks[0].bindings if ops.op_name(b.value) == "hawq.requantize")
    assert count == 1 and str(call.attrs["rounding"]) == "half_up"
    assert float(call.attrs["bound"]) == bound and int(call.attrs["thresholds"]) == -1
