"""Exponents of (A24) from tables of 32 entries: the integers of its own tables, for every fraction and far beyond."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import s_tir, te

from hawq_tvm.core import softmax_wide
from hawq_tvm.targets import target as targets
from schedules.cpu.powers import Powers
from schedules.cpu.vector_unit import VectorUnit
from schedules.spelling.power_intrinsics import LANES, power_of, short_tables

HOST = targets.host()
rng = np.random.default_rng(24)


@pytest.mark.parametrize("fraction", range(softmax_wide.LEAST_FRACTION, softmax_wide.MOST_FRACTION + 1, 2))
@pytest.mark.parametrize("in_vectors", [False, True], ids=["meaning", "vpermi2d"])
def test_every_fraction_and_every_whole_part(fraction, in_vectors):
    if in_vectors and VectorUnit.of(HOST).packs != LANES:
        pytest.skip("this CPU has no registers of 16 int32")
    every = np.arange(1 << fraction)
    wholes = np.concatenate([(n << fraction) + rng.integers(0, 1 << fraction, 50) for n in range(34)])
    ends = np.array([2**31 - 1, 2**31 - 2, 2**30, 31 << fraction, (32 << fraction) - 1])
    d = np.concatenate([every, wholes[wholes < 2**31], ends])[:, None].ravel()
    top = 2**30 - 1
    x = (top - d).astype(np.int32)

    m, xs, t = (te.placeholder((n,), "int32", name) for n, name in ((1, "m"), (len(x), "x"), (192, "t")))
    out = te.compute((len(x),), lambda i: power_of(m[0] - xs[i], lambda k: t[k], fraction), name="exponents")
    sch = s_tir.Schedule(te.create_prim_func([m, xs, t, out]))
    func = Powers(fraction if in_vectors else 0).spelled(sch)
    if in_vectors:
        assert "vpermi2var" in func.script()
    arrays = [np.array([top], np.int32), x, short_tables(fraction), np.zeros(len(x), np.int32)]
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    tvm.tirx.build(func.with_attr("global_symbol", "main"), target=HOST)["main"](*tensors)

    coarse, fine = (table.astype(np.int64) for table in softmax_wide.tables(fraction))
    want = softmax_wide.exponents(np.append(top, top - d), 0, fraction, coarse, fine)[1:]
    np.testing.assert_array_equal(tensors[-1].numpy(), want.astype(np.int32), strict=True)
