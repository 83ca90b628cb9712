"""choose_layout, pack_int4, fuse_epilogues, fold_constants, remove_dead_code: structure, counts and equal values."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from relay_passes.choose_layout import choose_layout
from relay_passes.fold_constants import fold_constants
from relay_passes.fuse_epilogues import fuse_epilogues
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.pack_int4 import pack_int4
from relay_passes.remove_dead_code import remove_dead_code

from .modules import RNG, S4, U8, Build, dq, module, op_names, q, same_values, weight


def integers(build: Build, inputs: dict[str, Any]) -> tvm.IRModule:
    lowered, _ = lower_to_integer(module(build, inputs))
    return remove_dead_code(lowered)[0]


def block(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
    """A residual block, a pool, a concat of two scales, a softmax over channels and a classifier."""
    x = dq(bb, p[0], 0.0531, 100)
    y = bb.emit(
        relax.op.nn.relu(bb.emit(relax.op.nn.conv2d(x, bb.emit(weight((4, 4, 3, 3), 0.011, qtype=S4)), padding=1)))
    )
    y = dq(bb, q(bb, y, 0.0317, 0), 0.0317, 0)
    r = dq(bb, q(bb, bb.emit(relax.op.add(y, x)), 0.0612, 99), 0.0612, 99)
    m = bb.emit(relax.op.nn.max_pool2d(r, (2, 2), (2, 2)))
    a = bb.emit(relax.op.nn.avg_pool2d(y, (2, 2), (2, 2)))
    c = dq(bb, q(bb, bb.emit(relax.op.concat([m, a], 1)), 0.07, 80), 0.07, 80)
    s = dq(bb, q(bb, bb.emit(relax.op.nn.softmax(c, 1)), 1 / 256, 0), 1 / 256, 0)
    t = bb.emit(relax.op.permute_dims(s, [0, 2, 3, 1]))
    g = bb.emit(relax.op.reshape(t, (2, 8 * 3 * 4)))
    f = bb.emit(relax.op.matmul(g, bb.emit(weight((96, 5), 0.02))))
    picked = bb.emit(relax.op.strided_slice(c, [1, 3], [1, 0], [7, 3], [2, 1]))
    return [
        q(bb, f, 0.1, 128),
        q(bb, bb.emit(relax.op.mean(picked, [2, 3], False)), 0.05, 80),
        bb.emit(relax.op.argmax(c, 1)),
    ]


INPUT = {"x": ((2, 4, 6, 8), "uint8")}


def test_everything_in_a_row_keeps_every_value() -> None:
    mod = integers(block, INPUT)
    for function, stage in (
        (fold_constants, stages.Stage.INTEGER),
        (choose_layout, stages.Stage.INTEGER),
        (pack_int4, stages.Stage.INTEGER),
        (fuse_epilogues, stages.Stage.PACKED),
    ):
        new, _ = function(mod)
        stages.verify(new, stage)
        same_values(mod, new)
        mod = new


def test_layout_is_channels_last_with_two_conversions() -> None:
    after, count = choose_layout(integers(block, INPUT))
    calls = [b.value for b in stages.bindings(after["main"])]
    convs = [c for c in calls if ops.op_name(c) == "relax.nn.conv2d"]
    assert count > 0 and all(c.attrs.data_layout == "NHWC" and c.attrs.kernel_layout == "HWIO" for c in convs)
    # One into channels-last for the input; the model's own NHWC permutation cancels; argmax's result goes back.
    assert op_names(after).count("permute_dims") <= 2


def test_a_model_without_images_keeps_its_layout() -> None:
    mod = integers(
        lambda bb, p: q(bb, bb.emit(relax.op.matmul(dq(bb, p[0], 0.1, 3), bb.emit(weight((6, 5), 0.02)))), 0.1, 128),
        {"x": ((3, 6), "uint8")},
    )
    after, count = choose_layout(mod)
    assert count == 0 and op_names(after) == op_names(mod)


def test_four_bit_weights_are_packed_and_wide_or_tiny_ones_not() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.1, 3)
        kinds = [(S4, 16), (U8, 16), (S4, 2)]
        return [q(bb, bb.emit(relax.op.matmul(x, bb.emit(weight((6, n), 0.02, qtype=k)))), 0.1, 128) for k, n in kinds]

    mod = integers(build, {"x": ((3, 6), "uint8")})
    after, count = pack_int4(mod)
    assert count == 1 and op_names(after).count("unpack_int4") == 1
    (packed,) = [b.value for b in stages.bindings(after["main"]) if ops.op_name(b.value) == "hawq.unpack_int4"]
    assert ops.const_value(packed.args[0]).size == 48
    same_values(mod, after)


def test_a_convolution_takes_its_padding_bias_requantize_and_residual() -> None:
    mod = integers(block, INPUT)
    after, joined = fuse_epilogues(mod)
    functions = stages.private_functions(after)
    bodies = [[ops.op_name(b.value).split(".")[-1] for b in stages.bindings(f)] for f in functions.values()]
    (conv,) = [b for b in bodies if "conv2d" in b]
    assert conv[0] == "pad" and conv[1] == "conv2d" and conv[-1] == "requantize" and joined > 0
    assert all(str(f.attrs["hawq.layer"]) and int(f.attrs["Primitive"]) == 1 for f in functions.values())
    assert not {"conv2d", "requantize"} & set(op_names(after))


def test_constants_are_folded_and_dequantized_weights_kept() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        w = bb.emit(ops.quantize(relax.const(RNG.normal(size=(6, 5)).astype("float32")), 0.02, 0, qtype=U8))
        w = bb.emit(relax.op.permute_dims(bb.emit(relax.op.reshape(w, (5, 6))), [1, 0]))
        return q(bb, bb.emit(relax.op.matmul(dq(bb, p[0], 0.1, 3), dq(bb, w, 0.02, 0))), 0.1, 128)

    before = module(build, {"x": ((3, 6), "uint8")})
    after, count = fold_constants(before)
    assert count == 3
    after, _ = remove_dead_code(after)
    assert op_names(after) == ["dequantize", "dequantize", "matmul", "quantize", ""]
    same_values(before, after)


def test_dead_code_goes_and_inputs_stay() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        bb.emit(relax.op.nn.relu(dq(bb, p[1], 0.1, 3)))
        return q(bb, dq(bb, p[0], 0.1, 3), 0.2, 3)

    before = module(build, {"x": ((2, 3), "uint8"), "unused": ((2, 3), "uint8")})
    after, count = remove_dead_code(before)
    assert count == 2 and [p.name for p in after["main"].params] == ["x", "unused"]
    same_values(before, after)
    assert remove_dead_code(after) == (after, 0)


def test_wide_constants_stay_wide() -> None:
    """Relax makes int32 of an int64 array unless told: a bias beyond int32 must survive the layout pass."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.5, 255), bb.emit(weight((4, 3, 3, 3), 0.25))))
        bias = np.array([2**31 - 1, -(2**31), 5, 0]).reshape(1, 4, 1, 1)
        b = bb.emit(ops.dequantize(ops.const(bias, "int32"), np.float32(0.125), 0, qmin=-(2**31), qmax=2**31 - 1))
        return q(bb, bb.emit(relax.op.add(y, b)), 2.0**20, 128)

    mod = integers(build, {"x": ((1, 3, 5, 5), "uint8")})
    after, _ = choose_layout(mod)
    same_values(mod, after)


def test_a_cast_goes_with_the_sum_that_reads_it() -> None:
    """In the producer's kernel it would be written to memory as int32."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.5, 3), bb.emit(weight((4, 3, 3, 3), 0.25))))
        y = dq(bb, q(bb, y, 90.0, 128), 90.0, 128)
        return q(bb, bb.emit(relax.op.mean(y, [2, 3], True)), 11.0, 128)

    mod = integers(build, {"x": ((1, 3, 5, 5), "uint8")})
    after, _ = fuse_epilogues(mod)
    assert [str(ops.dtype_of(f.body.body)) for f in stages.private_functions(after).values()] == ["uint8", "uint8"]
    same_values(mod, after)


def test_a_long_chain_of_roundings_is_cut_and_a_short_one_is_not() -> None:
    """Every requantize doubles or triples the expression of the one before it: ten of them in one kernel never
    compile.
    """

    def chain(length: int) -> list[list[str]]:
        def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
            x = dq(bb, p[0], 0.5, 3)
            y = x
            for i in range(length):
                y = dq(bb, q(bb, bb.emit(relax.op.multiply(x, y)), 100.0 + i, 128), 0.5, 128)
            return q(bb, y, 0.75, 128)

        mod = integers(build, {"x": ((3, 6), "uint8")})
        after, _ = fuse_epilogues(mod)
        same_values(mod, after)
        return [[ops.op_name(b.value) for b in stages.bindings(f)] for f in stages.private_functions(after).values()]

    assert len(chain(1)) == 1
    # 1 / 400 and other ratios of a chain have ties: two requantizes each, of which the first is a shift.
    assert 1 < len(chain(10)) < 10 and max(body.count("hawq.requantize") for body in chain(10)) <= 6


def signal(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
    """One-dimensional convolutions as importers write them, a residual sum, a pad, a pool, slices, joins, a softmax
    over channels, a transposition, means with and without the axis.
    """

    def conv1d(x: relax.Expr, w: relax.Expr, groups: int = 1) -> relax.Expr:
        wide = bb.emit(relax.op.expand_dims(x, [2]))
        return bb.emit(relax.op.squeeze(bb.emit(relax.op.nn.conv2d(wide, bb.emit(w), groups=groups)), [2]))

    x = dq(bb, p[0], 0.0531, 100)
    padded = bb.emit(relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1], "constant", 0.0))
    y = dq(bb, q(bb, conv1d(padded, weight((4, 1, 1, 3), 0.011), groups=4), 0.0317, 7), 0.0317, 7)
    y = dq(bb, q(bb, bb.emit(relax.op.nn.relu(conv1d(y, weight((4, 4, 1, 1), 0.02)))), 0.04, 0), 0.04, 0)
    r = dq(bb, q(bb, bb.emit(relax.op.add(y, x)), 0.0612, 99), 0.0612, 99)
    wide = bb.emit(relax.op.expand_dims(r, [2]))
    m = bb.emit(relax.op.squeeze(bb.emit(relax.op.nn.max_pool2d(wide, (1, 2), (1, 2))), [2]))
    half = bb.emit(relax.op.strided_slice(r, [2], [1], [9], [2]))
    c = dq(bb, q(bb, bb.emit(relax.op.concat([m, half], 1)), 0.07, 80), 0.07, 80)
    s = q(bb, bb.emit(relax.op.nn.softmax(c, 1)), 1 / 256, 0)
    t = bb.emit(relax.op.permute_dims(c, [0, 2, 1]))
    f = bb.emit(relax.op.matmul(t, bb.emit(weight((8, 5), 0.02))))
    return [
        q(bb, f, 0.1, 128),
        s,
        q(bb, bb.emit(relax.op.mean(c, [2], False)), 0.05, 80),
        q(bb, bb.emit(relax.op.mean(c, [1], False)), 0.05, 80),
        q(bb, bb.emit(relax.op.mean(c, [2], True)), 0.05, 80),
        q(bb, bb.emit(relax.op.reshape(c, (2, 32))), 0.07, 80),
        bb.emit(relax.op.argmax(c, 1, True)),
        q(bb, bb.emit(relax.op.permute_dims(c, [1, 2, 0])), 0.07, 80),
        q(bb, bb.emit(relax.op.take(c, relax.const(np.array([3, 0, 3])), 2)), 0.07, 80),
    ]


SIGNAL = {"x": ((2, 4, 8), "uint8")}


def test_a_signal_is_an_image_of_height_one_from_end_to_end() -> None:
    before = integers(signal, SIGNAL)
    after, _ = choose_layout(before)
    stages.verify(after, stages.Stage.INTEGER)
    same_values(before, after)
    names = op_names(after)
    assert "expand_dims" not in names and "squeeze" not in names
    packed, _ = fuse_epilogues(after)
    bodies = [
        [ops.op_name(b.value).split(".")[-1] for b in stages.bindings(f)]
        for f in stages.private_functions(packed).values()
    ]
    assert [b for b in bodies if "conv2d" in b and b[-1] != "requantize"] == []
    same_values(before, packed)


def test_a_signal_between_matrix_products_keeps_its_form() -> None:
    """What has the shape of a signal without a convolution near it is moved by nothing."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(relax.op.expand_dims(dq(bb, p[0], 0.1, 3), [2]))
        y = bb.emit(relax.op.matmul(x, bb.emit(weight((8, 5), 0.02))))
        return q(bb, bb.emit(relax.op.squeeze(y, [2])), 0.1, 128)

    before = integers(build, SIGNAL)
    after, _ = choose_layout(before)
    assert [n.replace("reshape", "") for n in op_names(after)].count("permute_dims") == 0
    assert len(op_names(after)) == len(op_names(before))
    same_values(before, after)
