"""Rows that a layer's weights multiply, and integers fitted to them: beside the layers themselves, all integers that
there are, and what is known to be lost.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from hawq_tvm.quantize.network.float_graph import Layer
from hawq_tvm.quantize.ptq import reads
from hawq_tvm.quantize.ptq.fitted import SHARES, Covariance, fit
from hawq_tvm.quantize.ptq.reads import matrices, rows, unfolded
from hawq_tvm.quantize.ptq.weights import nearest

Tensor = torch.Tensor


def matmul(axis: int = 1) -> Layer:
    return Layer("m", "m", "matmul", "x", "y", "w", "", axis)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


# -- rows
# -----------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    # channels in and out, groups, taps, strides, dilations, before, after, sizes
    (4, 6, 1, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (7, 5)),
    (4, 6, 2, (3, 2), (2, 1), (1, 3), (1, 0), (0, 2), (9, 8)),
    (5, 5, 5, (3, 3), (2, 2), (1, 1), (0, 0), (1, 1), (8, 8)),
    (3, 4, 1, (1,), (1,), (1,), (0,), (0,), (6,)),
    (4, 2, 2, (2, 1, 3), (1, 2, 1), (2, 1, 1), (1, 0, 1), (1, 0, 1), (4, 5, 3)),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_rows_of_a_convolution(case: tuple) -> None:
    into, out, group, taps, strides, dilations, before, after, sizes = case
    layer = Layer("c", "c", "conv", "x", "y", "w", "", 0, group, strides, dilations, before, after)
    x, w = integers(3, into, *sizes, seed=1), integers(out, into // group, *taps, seed=2)
    pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(taps)]
    y = convolve(F.pad(x, pads), w, None, strides, 0, dilations, group)
    held, weights = rows(x, w, layer, 3), matrices(w, layer)
    assert weights is not None and torch.equal(unfolded(weights, w, layer).float(), w)
    found = torch.einsum("gipk,gok->igop", held.double(), weights)
    assert torch.equal(found.flatten(1, 2).float(), y.flatten(2))  # all positions are held of so few


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_a_matrix_product(axis: int) -> None:
    x, w = integers(3, 5, 4, seed=1), integers(*((6, 4) if axis == 0 else (4, 6)), seed=2)
    held, weights = rows(x, w, matmul(axis), 3), matrices(w, matmul(axis))
    assert weights is not None and torch.equal(unfolded(weights, w, matmul(axis)).float(), w)
    found = torch.einsum("gipk,gok->ipo", held.double(), weights)
    assert torch.equal(found.float(), x @ (w.T if axis == 0 else w))


def test_rows_are_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "ROWS", 8)
    x, w = torch.arange(2.0 * 10).reshape(2, 10, 1), torch.ones(1, 1)
    held = rows(x, w, matmul(), 2)
    assert held.tolist() == [[[[0.0], [2.0], [5.0], [7.0]], [[10.0], [12.0], [15.0], [17.0]]]]


def test_what_is_not_fitted_has_no_rows() -> None:
    assert matrices(torch.ones(reads.WIDEST, 1), matmul()) is not None
    assert matrices(torch.ones(reads.WIDEST + 1, 1), matmul()) is None
    assert matrices(torch.ones(2, 3, 2, 2), Layer("d", "d", "deconv", "x", "y", "w", "", 1)) is None


# -- integers
# -------------------------------------------------------------------------------------------------------------


def error(codes: Tensor, scale: Tensor, weight: Tensor, read: Tensor, real: Tensor) -> Tensor:
    """By output, of centred results."""
    x, y = (v.double().flatten(0, 2) for v in (read, real))
    off = (y - y.mean(0)) @ weight.double() - (x - x.mean(0)) @ (codes * scale)
    return off.square().mean(0)


def test_fitted_integers_are_near_the_best_there_are() -> None:
    """All 2-bit integers of four weights at all the scales that are tried, each with its best scale near by."""
    mix, w = draws(4, 4, seed=3), draws(4, 6, seed=4)
    x = (draws(1000, 4, 4, seed=5) @ mix)[None]  # of so many images that their covariance is hardly drawn
    start = nearest(w, None, matmul(), 2, True, 1e-3)
    made, free = fit(start, w, x, x)
    codes = torch.tensor(list(product(range(-2, 2), repeat=4)), dtype=torch.float64)
    centred = x.double().flatten(0, 2)
    centred = (codes @ (centred - centred.mean(0)).T, (centred - centred.mean(0)) @ w.double())
    best = torch.full((6,), float("inf"), dtype=torch.float64)
    for share in SHARES:
        for factor in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35):
            off = centred[0][:, :, None] * (start.scale * share * factor).double() - centred[1][None]
            best = torch.minimum(best, off.square().mean(1).amin(0))
    ours = error(made.codes.double(), made.scale.double(), w, x, x)
    plain = error(start.codes.double(), start.scale.double(), w, x, x)
    # Five of the six rows end at the best; one integer at a time does not lead there from everywhere.
    assert (ours < 1.05 * best).sum() >= 5 and ours.sum() < 0.7 * plain.sum()
    assert made.codes.min() >= -2 and made.codes.max() <= 1 and made.codes.dtype == torch.int8
    assert bool(((free - made.codes).abs() < 0.5).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_fitted_is_nearer_than_nearest(bits: int) -> None:
    mix, w = draws(24, 24, seed=1) + torch.eye(24), draws(24, 10, seed=2)
    x = (draws(32, 20, 24, seed=3) @ mix + 1)[None]
    start = nearest(w, None, matmul(), bits, True, 1e-3)
    made, _ = fit(start, w, x, x)
    plain = error(start.codes.double(), start.scale.double(), w, x, x)
    ours = error(made.codes.double(), made.scale.double(), w, x, x)
    assert ours.sum() < 0.5 * plain.sum()


def test_a_mean_that_no_bias_makes_good_is_fitted() -> None:
    """What is read has a mean several times its deviation, as behind a GELU."""
    w = draws(24, 10, seed=2)
    x = (draws(32, 20, 24, seed=3) + 4 * draws(24, seed=4).abs())[None]
    start = nearest(w, None, matmul(), 4, True, 1e-3)

    def whole(centred: bool) -> float:
        made, _ = fit(start, w, x, x, centred)
        off = x.double().flatten(0, 2) @ (w.double() - made.codes.double() * made.scale.double())
        return float(off.square().mean())

    # Of the mean alone a fit that leaves it to a bias is off by as much as its many roundings add up to.
    assert whole(False) < 0.2 * whole(True)


def test_what_is_read_wrong_is_made_good() -> None:
    """A layer that reads a known linear function of what the float network's reads."""
    away = torch.eye(8) + 0.1 * draws(8, 8, seed=1)
    real, w = draws(1, 32, 50, 8, seed=2), draws(8, 5, seed=3)
    known, given = Covariance(real @ away, real), w.T.double()[None]
    exact = torch.linalg.solve(away.double(), w.double()).T
    # The least ridge there is leaves some thousandths.
    assert float((known.compensated(given, 127)[0] - exact).norm() / (exact - given[0]).norm()) < 0.05


def test_compensation_pays_for_larger_weights() -> None:
    """A channel that has lost 95 % of its signal is made good by weights of 8 bits, and not by 4, whose other weights
    would be rounded away.
    """
    real = draws(1, 16, 64, 8)
    known, weight = Covariance(real * torch.tensor([1.0] * 7 + [0.05]), real), torch.ones(1, 4, 8, dtype=torch.float64)
    assert float(known.compensated(weight, 127)[..., 7].min()) > 15
    assert float(known.compensated(weight, 7)[..., 7].max()) < 5


def test_noise_is_not_made_good() -> None:
    """Where few images tell nothing, weights stay."""
    real, w = draws(1, 4, 2, 64, seed=1), draws(64, 5, seed=2)
    given = w.T.double()[None]
    for seed in range(5):
        read = real + 0.3 * draws(1, 4, 2, 64, seed=10 + seed)
        moved = Covariance(read, real).compensated(given, 127)
        assert float((moved - given).norm() / given.norm()) < 0.5


def test_few_images_are_drawn_to_their_diagonal() -> None:
    one = draws(1, 64, 4, 32, seed=1)
    apart = [
        float((held - torch.diag_embed(held.diagonal(dim1=-2, dim2=-1))).norm())
        for held in (Covariance(one[:, :count], one[:, :count]).drawn for count in (1, 4, 64))
    ]
    # What varies apart: all that is told is noise.
    assert apart[0] == 0 and all(a < 0.5 for a in apart[1:])


@pytest.mark.parametrize("dead", [slice(0, 3), slice(None)])
def test_what_never_varies_is_rounded_to_something(dead: slice) -> None:
    x, w = draws(1, 8, 10, 6, seed=1), draws(6, 4, seed=2)
    x[..., dead] = 1.5
    made, _ = fit(nearest(w, None, matmul(), 4, True, 1e-3), w, x, x)
    assert bool(made.scale.isfinite().all()) and bool((made.scale > 0).all())
