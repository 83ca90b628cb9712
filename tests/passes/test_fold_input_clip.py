"""A ReLU or clip of a float input folds into the range of its quantize, with the same integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core.arith import QType
from hawq_tvm.verify.reference import evaluate
from relay_passes.fold_input_clip import fold_input_clip
from relay_passes.remove_dead_code import remove_dead_code

from .modules import S8, U8, module, op_names, q

CLIPS: dict[str, Any] = {
    "relu": lambda bb, x: bb.emit(relax.op.nn.relu(x)),
    "clip": lambda bb, x: bb.emit(relax.op.clip(x, -1.3, 2.6)),
    "both": lambda bb, x: bb.emit(relax.op.nn.relu(bb.emit(relax.op.clip(x, -1.3, 2.6)))),
    "beyond the range": lambda bb, x: bb.emit(relax.op.clip(x, 1e4, 2e4)),
}

F = np.float32
LIMITS = {
    "relu": (F(0), F(np.inf)),
    "clip": (F(-1.3), F(2.6)),
    "both": (F(0), F(2.6)),
    "beyond the range": (F(1e4), F(2e4)),
}


def edges() -> np.ndarray:
    """Both sides of every boundary of steps of 0.1, and far outside."""
    at = (np.arange(-300, 300) * np.float32(0.05)).astype(np.float32)
    more = np.array([1e30, -1e30, 1e-45, -1e-45, 0.0, -0.0], np.float32)
    return np.concatenate([at, np.nextafter(at, np.float32(9)), np.nextafter(at, np.float32(-9)), more])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("qtype, zero", [(U8, 0), (U8, 100), (S8, -3), (QType(-8, 7, "int8"), 0)])
@pytest.mark.parametrize(
    "rounding, form", [("half_even", "divide"), ("floor", "affine"), ("away", "affine"), ("half_even", "reciprocal")]
)
def test_the_integers_stay(clip: str, qtype: QType, zero: int, rounding: str, form: str) -> None:
    x = edges()
    before = module(
        lambda bb, p: q(bb, CLIPS[clip](bb, p[0]), 0.1, zero, qtype, rounding=rounding, form=form),
        {"x": (x.shape, "float32")},
    )
    after, count = fold_input_clip(before)
    after, _ = remove_dead_code(after)
    assert count == (2 if clip == "both" else 1) and [n for n in op_names(after) if n] == ["quantize"]
    # The reference would compute the clip in float64; on values clipped by NumPy in float32 it is the border's own
    # formula.
    plain = module(
        lambda bb, p: q(bb, p[0], 0.1, zero, qtype, rounding=rounding, form=form), {"x": (x.shape, "float32")}
    )
    np.testing.assert_array_equal(
        evaluate(after, {"x": x})["out0"], evaluate(plain, {"x": np.clip(x, *LIMITS[clip])})["out0"], strict=True
    )


def test_what_is_left_alone() -> None:
    scales = np.array([0.1, 0.2], np.float32)

    def per_channel(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return [
            q(bb, bb.emit(relax.op.clip(p[0], 0.0, 3.0)), scales, 0),
            q(bb, bb.emit(relax.op.nn.relu(p[0])), scales, 0),
        ]

    before = module(per_channel, {"x": ((3, 2), "float32")})
    after, count = fold_input_clip(before)  # the ReLU's level is 0 in both channels, the clip's is not one number
    assert count == 1 and op_names(after).count("clip") == 1
    inside = module(
        lambda bb, p: q(bb, bb.emit(relax.op.nn.relu(bb.emit(relax.op.abs(p[0])))), 0.1, 0), {"x": ((3,), "float32")}
    )
    assert fold_input_clip(inside)[1] == 0
