"""The integers of a layer that keep its results nearest to the float network's, on the data, in closed form.

* What a layer reads is off by what was rounded before it. The weights w' = w + w D (C + r diag C)^-1 make good what
  they can, C the covariance of what is read, D that of what it is off by with it (Li et al., "GPTAQ", 2025); r is the
  one with which what half of the images tells serves the other half best, less what rounding larger weights costs, and
  w stays where none serves it.
* A covariance of few images is drawn to its diagonal by how far off it is, images being the samples: neighbours in an
  image are alike. What is nearest to the real covariance is drawn by the square of that (Ledoit and Wolf, "A
  well-conditioned estimator", 2004); errors are moved to where data vary least, of which few images tell least.
* Rounding goes by channels of falling variance, and what it errs by is passed on to those that follow (Frantar et al.,
  "GPTQ", 2023), for several scales; then every integer moves to where the others want it, and the scale to where the
  integers want it, until none does. Every output channel takes the scale that ends nearest.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .reads import matrices, unfolded
from .weights import Rounded

Tensor = torch.Tensor
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Scales that are tried, as shares of the given one, as many of them as take about so many products.
SHARES = (1.0, 0.85, 0.7, 0.95, 0.9, 0.8, 0.75, 1.05, 0.65, 1.1, 0.6)
LEAST_TRIES, WORK = 3, 2**32
SWEEPS = 4
# Of the mean variance, added to every one.
DAMPING = 0.01
# A scale stays within this factor of the tried one.
APART = 2.0


class Covariance:
    """Of what a layer reads, by group: of each half of the images, and how far images differ in it."""

    def __init__(self, read: Tensor, real: Tensor, centred: bool = True) -> None:
        """read, real: rows of the quantized and the float network, (groups, images, positions, weights).

        centred: what results lose of their mean costs nothing, as a bias makes it good.
        """
        groups, images, _, width = read.shape
        mean, other = (_mean(v) * centred for v in (read, real))
        own, off = torch.zeros(2, groups, width, width), torch.zeros(2, groups, width, width)
        squares, counts = torch.zeros(groups, width, width), [len(range(half, images, 2)) for half in (0, 1)]
        for image in range(images):
            x, y = read[:, image] - mean, real[:, image] - other
            one = x.mT @ x / x.shape[1]
            own[image % 2] += one / counts[image % 2]
            off[image % 2] += (y - x).mT @ x / x.shape[1] / counts[image % 2]
            squares += one.square() / images
        self.halves = list(zip(own.double(), off.double(), strict=True))[:images]
        shares = [count / images for count in counts]
        self.own, self.off = (sum(s * m for s, m in zip(shares, held.double(), strict=True)) for held in (own, off))
        self.drawn = self._drawn(squares.double(), images)
        self.order = torch.argsort(self.drawn.diagonal(dim1=-2, dim2=-1).sum(0), descending=True)
        inverse = torch.linalg.inv(self.drawn[:, self.order][..., self.order])
        self.factor = torch.linalg.cholesky(inverse, upper=True)

    def _drawn(self, squares: Tensor, images: int) -> Tensor:
        """The covariance, drawn to its diagonal by what images tell of its noise; positive definite."""
        diagonal = self.own.diagonal(dim1=-2, dim2=-1)
        apart = self.own - torch.diag_embed(diagonal)
        noise = (squares - self.own.square()) / max(images - 1, 1)
        noise = noise.sum((1, 2)) - noise.diagonal(dim1=-2, dim2=-1).sum(1)
        share = noise / apart.square().sum((1, 2)).clamp_min(1e-300) if images > 1 else torch.ones_like(noise)
        kept = (1 - share.clamp(0, 1).sqrt())[:, None, None]
        return kept * apart + torch.diag_embed(diagonal + DAMPING * _scale(diagonal)[:, None])

    def compensated(self, weight: Tensor, top: int) -> Tensor:
        """Weights (groups, outputs, weights) that make good what the layer reads wrong, where images agree on them."""
        if len(self.halves) < 2:
            return weight
        losses = [-2 * self._rounding(weight, top)] * len(RIDGES)
        for (own, off), (other, wrong) in (self.halves, self.halves[::-1]):
            for i, ridge in enumerate(RIDGES):
                more = _solved(weight, own, off, ridge)
                losses[i] += float(((more @ other) * more).sum() - 2 * (more * (weight @ wrong)).sum())
                losses[i] += self._rounding(weight + more, top)
        best = min(range(len(RIDGES)), key=losses.__getitem__)
        return weight + _solved(weight, self.own, self.off, RIDGES[best]) if losses[best] < 0 else weight

    def _rounding(self, weight: Tensor, top: int) -> float:
        """What rounding errs by, each weight by a twelfth of a squared step and what it passes on not counted."""
        steps = weight.abs().amax(2) / top
        passed = self.factor.diagonal(dim1=-2, dim2=-1).square().reciprocal().sum(1)
        return float((steps.square().sum(1) * passed).sum() / 12)


def fit(ours: Rounded, weight: Tensor, read: Tensor, real: Tensor, centred: bool = True) -> tuple[Rounded, Tensor]:
    """The layer with fitted codes and scales, and where each weight would be if the others stayed, in steps of the
    scale and within half of one.

    weight: of the float network.  read, real, centred: as for `Covariance`.  The layer has `matrices`.
    """
    given = matrices(weight, ours.layer)
    assert given is not None
    known = Covariance(read, real, centred)
    top = 2 ** (ours.bits - 1) - 1
    wanted = known.compensated(given, top)
    most, grown = given.abs().amax(2), wanted.abs().amax(2)
    start = ours.scale.double().reshape(most.shape) * torch.where((most > 0) & (grown > 0), grown / most, 1)
    tries = max(LEAST_TRIES, WORK // (wanted.numel() * wanted.shape[2]))
    best: tuple[Tensor, ...] = ()
    for share in SHARES[:tries]:
        found = _descended(wanted, known, (start * share).float().double(), top)
        nearer = found[-1] < best[-1] if best else torch.ones_like(found[-1], dtype=torch.bool)
        best = tuple(_chosen(nearer, *pair) for pair in zip(found, best or found, strict=True))
    codes, scale, free, _ = best
    made = replace(ours, codes=unfolded(codes, weight, ours.layer).to(torch.int8), scale=scale.reshape(-1).float())
    return made, unfolded(free.clamp(codes - 0.49, codes + 0.49), weight, ours.layer).float()


def _descended(wanted: Tensor, known: Covariance, scale: Tensor, top: int) -> tuple[Tensor, ...]:
    """Codes, scales, where codes would be if others stayed, and errors e'He of every row, from one start of scales."""
    h, order = known.drawn, known.order.tolist()
    codes = _passed_on(wanted, known, scale, top)
    first, variances = scale, h.diagonal(dim1=-2, dim2=-1)[:, None]
    for _ in range(SWEEPS):
        error = wanted - codes * scale[..., None]
        pull, moved = error @ h, False
        for j in order:
            free = (wanted[..., j] - error[..., j] + pull[..., j] / variances[..., j]) / scale
            code = free.round().clamp(-top - 1, top)
            change = (codes[..., j] - code) * scale
            if change.any():
                codes[..., j], moved = code, True
                error[..., j] += change
                pull.baddbmm_(change[..., None], h[:, j, None])
        along = codes @ h
        best = (along * wanted).sum(-1) / (along * codes).sum(-1).clamp_min(1e-300)
        scale = torch.where((best > first / APART) & (best < first * APART), best, scale).float().double()
        if not moved:
            break
    error = wanted - codes * scale[..., None]
    pull = error @ h
    return codes, scale, (wanted - error + pull / variances) / scale[..., None], (error * pull).sum(-1)


def _passed_on(wanted: Tensor, known: Covariance, scale: Tensor, top: int) -> Tensor:
    """Codes, rounded in order, with the error of each passed on to those that follow."""
    factor, left, codes = known.factor, wanted[..., known.order], torch.empty_like(wanted)
    for i, j in enumerate(known.order.tolist()):
        codes[..., j] = (left[..., i] / scale).round().clamp(-top - 1, top)
        error = (left[..., i] - codes[..., j] * scale) / factor[:, i, i, None]
        left[..., i:] -= error[..., None] * factor[:, i, None, i:]
    return codes


def _solved(weight: Tensor, own: Tensor, off: Tensor, ridge: float) -> Tensor:
    diagonal = own.diagonal(dim1=-2, dim2=-1)
    firm = own + torch.diag_embed(ridge * diagonal + 1e-6 * _scale(diagonal)[:, None])
    return torch.linalg.solve(firm, (weight @ off).mT).mT


def _mean(rows: Tensor) -> Tensor:
    """Of rows (groups, images, positions, weights) in every weight's place, (groups, 1, weights), image by image: in
    float64 all of them would take twice what they do.
    """
    each = [rows[:, i].double().mean(1, keepdim=True) for i in range(rows.shape[1])]
    return torch.stack(each).mean(0).float()


def _scale(variances: Tensor) -> Tensor:
    """The mean variance of every group, 1 where nothing varies."""
    mean = variances.mean(1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _chosen(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.reshape(*rows.shape, *[1] * (one.ndim - rows.ndim)), one, other)
