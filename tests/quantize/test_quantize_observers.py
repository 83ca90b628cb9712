"""The observers beside brute force on the values themselves, and the grids and weight scales that come of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hawq_tvm.quantize.network.float_graph import Layer
from hawq_tvm.quantize.ptq.observers import BINS, STEPS, Grid, Histogram, entropy, grid, minmax, mse, percentile
from hawq_tvm.quantize.ptq.weights import LOW_SHARES, SHARES, nearest

Array = np.ndarray[Any, Any]
LAYER = Layer("c", "c", "conv", "x", "y", "w", "", 0)


def seen(values: Array) -> Histogram:
    made = Histogram(float(values.min()), float(values.max()))
    for part in np.array_split(values, 3):
        made.add(part)
    return made


def make(bits: int, signed: bool = False, symmetric: bool = False) -> Any:
    return lambda low, high: grid(low, high, bits, signed, symmetric)


def samples(kind: str, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    if kind == "relu":
        return np.maximum(rng.standard_normal(20000), 0).astype(np.float32)
    if kind == "heavy":
        return rng.standard_t(3, 20000).astype(np.float32)
    return np.concatenate([rng.normal(0, 1, 20000), rng.uniform(-30, 30, 20)]).astype(np.float32)


KINDS = ("relu", "heavy", "outliers")


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_and_percentile(kind: str) -> None:
    values = samples(kind)
    assert minmax(seen(values), make(8), 99) == (values.min(), values.max())
    low, high = percentile(seen(values), make(8), 99.0)
    width = (values.max() - values.min()) / BINS
    # A histogram knows values to the width of a bin.
    assert abs(high - np.percentile(values, 99.0)) <= 1.01 * width
    assert abs(low - min(np.percentile(values, 1.0), 0)) <= 1.01 * width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_as_good_as_brute_force(kind: str, bits: int, symmetric: bool) -> None:
    values = samples(kind)
    made = make(bits, symmetric and kind != "relu", symmetric)

    def error(low: float, high: float) -> float:
        return float(((made(low, high).rounded(values) - values) ** 2).mean())

    found = error(*mse(seen(values), made, 0))
    low, high = min(values.min(), 0), values.max()
    steps = np.arange(1, STEPS + 1, 4) / STEPS
    best = min(error(low * a, high * b) for a in (steps if low < 0 else [1]) for b in steps)
    # Ends are searched in turns and on bins, not all pairs on values: within 3 % of the best pair.
    assert found <= 1.03 * best
    assert found <= error(low, high)


def dumb_divergence(values: Array, made: Grid, low: float, high: float) -> float:
    """Kullback-Leibler by loops over bins, as the docstring of `entropy` says it."""
    histogram = seen(values)
    centers, counts = histogram.centers, histogram.counts.astype(float)
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    counts[next((i for i in range(BINS) if edges[i] <= 0 < edges[i + 1]), 0)] = 0
    inside = [i for i in range(BINS) if low <= centers[i] <= high]
    if len(inside) < min(made.high - made.low, BINS // 2):
        return float("inf")
    p = [counts[i] for i in inside]
    p[0] += sum(counts[: inside[0]])
    p[-1] += sum(counts[inside[-1] + 1 :])
    groups: dict[float, list[int]] = {}
    for k, i in enumerate(inside):
        groups.setdefault(float(made.rounded(centers[i])), []).append(k)
    q = [0.0] * len(inside)
    for members in groups.values():
        filled = [k for k in members if counts[inside[k]] > 0]
        for k in filled:
            q[k] = sum(counts[inside[j]] for j in members) / len(filled)
    total_p, total_q = sum(p), sum(q)
    return sum(a / total_p * np.log(a / total_p / max(b / total_q, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("kind", ["relu", "outliers"])
def test_entropy_takes_the_least_divergence(kind: str) -> None:
    values = samples(kind)
    made = make(4, kind != "relu", True)
    low, high = entropy(seen(values), made, 0)
    ends = [(min(values.min(), 0) * f, values.max() * f) for f in np.arange(5, 101, 5) / 100]
    assert (
        dumb_divergence(values, made(low, high), low, high)
        <= min(dumb_divergence(values, made(a, b), a, b) for a, b in ends) + 1e-9
    )
    if kind == "outliers":
        assert high < 15  # a thousandth of the values reaches to 30


def test_degenerate_tensors() -> None:
    for values in (np.zeros(5, np.float32), np.full(5, 3.0, np.float32), np.full(5, -3.0, np.float32)):
        for observer in (minmax, percentile, mse, entropy):
            low, high = observer(seen(values), make(8), 99.9)
            made = grid(low, high, 8, False, False)
            assert made.scale > 0 and abs(made.rounded(values) - values).max() <= 0.02 * abs(values).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_grids_hold_zero_and_their_range(bits: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = sorted(rng.normal(0, 10, 2))
        for signed, symmetric in ((False, False), (True, False), (True, True)):
            made = grid(low, high, bits, signed, symmetric)
            assert made.low <= made.zero <= made.high and made.rounded(np.array([0.0])) == 0
            assert np.float32(made.scale) == made.scale and (made.zero == 0 or not symmetric)
            values = np.linspace(min(low, 0), max(high, 0), 50)
            # The zero point is rounded, which may cut half a step off either end.
            assert np.abs(made.rounded(values) - values).max() <= made.scale * 1.001


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_scales(bits: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(3, (6, 5, 3, 3)).astype(np.float32))
    weight[2] = 0
    top = 2 ** (bits - 1) - 1
    plain, searched = (nearest(weight, None, LAYER, bits, search, 0.1) for search in (False, True))
    rows = weight.reshape(6, -1).numpy().astype(np.float64)
    np.testing.assert_array_equal(
        plain.scale.numpy()[[0, 1, 3, 4, 5]], (np.abs(rows).max(1) / top).astype(np.float32)[[0, 1, 3, 4, 5]]
    )
    assert int(plain.codes.max()) <= top and int(searched.codes.min()) >= -top - 1 and not plain.codes[2].any()
    for c in (0, 1, 3, 4, 5):

        def error(scale: float, row: Array = rows[c]) -> float:
            return float(((np.clip(np.rint(row / scale), -top - 1, top) * scale - row) ** 2).sum())

        shares = (*SHARES, *(LOW_SHARES if bits < 4 else ()))
        best = min(error(float(np.float32(np.abs(rows[c]).max() * f / top))) for f in shares)
        assert error(float(searched.scale[c])) == pytest.approx(best, rel=1e-9)  # the same sums in torch's order
    assert searched.error(weight) <= plain.error(weight)


def test_a_bias_fits_its_scale() -> None:
    weight, bias = torch.zeros(2, 3), torch.tensor([5.0, -1e6])
    made = nearest(weight, bias, Layer("f", "f", "matmul", "x", "y", "w", "b", 0), 8, False, 1e-6)
    assert (bias.abs().double() / (1e-6 * made.scale.double()) <= 2**30 * 1.001).all()  # scales are float32
