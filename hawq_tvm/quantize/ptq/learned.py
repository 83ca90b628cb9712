"""Roundings, biases and steps of a block, learned together so that its outputs move least.

* A weight w with scale s becomes s (floor(w / s) + h(v)), h the sigmoid stretched to [-0.1, 1.1] and cut to [0, 1];
  a penalty of 1 - |2 h - 1|^b, b from 20 to 2, pushes every h to 0 or 1 (Nagel et al., "Up or Down?", 2020).
* The distance is that of the whole block's outputs (Li et al., "BRECQ", 2021).
* At random elements what the block reads is the float network's, and what it computes with few bits stays
  unrounded, so that roundings do not fit to one noise alone (Wei et al., "QDrop", 2022). Of what it reads with 8 bits
  most is the quantized network's: the block then makes good what those before it have lost.
* A factor of every output channel's scale is learned beside the roundings: with the bias, all that a channel has.
* The steps of tensors with few bits are learned with the straight-through gradient (Esser et al., "LSQ", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.qat.straight import straight

from .blocks import Block
from .observers import Grid
from .simulated import Grids, Key, Values, fake, through
from .weights import Rounded, along

Tensor = torch.Tensor
# Adam's rates: of logits, of biases in root mean squares of the layer's result, of steps and of weights' scales in
# natural logarithms.
RATE, BIAS_RATE, STEP_RATE, SCALE_RATE = 5e-2, 1e-3, 3e-3, 1e-3
PENALTY, WARM = 1.0, 0.2
# A learned step or scale stays within this factor of what calibration chose, as those of others rest on that.
APART = 2.0
# Shares of what is dropped: of few bits, and of what is read with 8.
DROPPED, DROPPED_AT_8 = 0.5, 0.25
# Tensors of fewer bits are few: at 8 the roundings of weights move a block's outputs much more.
FEW = 8


@dataclass(frozen=True)
class Case:
    """A batch of images before a block: what the float network reads and gives, and what the quantized one reads."""

    real: Values
    integer: Values
    wanted: Values

    @property
    def size(self) -> int:
        """How many images, where the first dimension counts them."""
        return len(next(iter(self.wanted.values())))

    def images(self, at: Sequence[int]) -> Case:
        """Some of the images."""
        index = torch.tensor(at)
        return Case(*({n: v[index] for n, v in held.items()} for held in (self.real, self.integer, self.wanted)))


class Learner:
    """What is learned of one block.

    sizes: the root mean square of every layer's result in the float network, by layer.  free: where weights begin, in
    units of their scale, by layer; where the real ones are, for a layer that is not there.
    """

    def __init__(
        self,
        block: Block,
        graph: FloatGraph,
        rounded: Mapping[str, Rounded],
        grids: Grids,
        sizes: Mapping[str, float],
        free: Values,
    ) -> None:
        self.block, self.graph, self.grids, self.sizes = block, graph, grids, sizes
        self.rounded = {layer.name: rounded[layer.name] for layer in block.layers}
        self.scales = {
            n: along(r.scale, r.layer, graph.parameters[r.layer.weight].ndim) for n, r in self.rounded.items()
        }
        self.floors, self.logits = dict[str, Tensor](), dict[str, Tensor]()
        for name, ours in self.rounded.items():
            if ours.bits < FEW:
                ratio = free[name] if name in free else graph.parameters[ours.layer.weight] / self.scales[name]
                self.floors[name] = ratio.floor()
                part = (ratio - self.floors[name]).clamp(0.01, 0.99)
                self.logits[name] = torch.log((part + 0.1) / (1.1 - part)).requires_grad_()
        self.factors = {n: torch.zeros_like(self.scales[n]).requires_grad_() for n in self.logits}
        self.shifts = {
            n: torch.zeros_like(r.bias).requires_grad_() for n, r in self.rounded.items() if r.bias is not None
        }
        made = {grids.tensors[n] for node in block.nodes for n in node.outputs if n in grids.tensors}
        read = {grids.reads[x.name] for x in block.layers if x.name in grids.reads}
        own = {k for k in made if any(k[0] in node.outputs for node in block.nodes)} | read
        few = sorted(k for k in own if k[1] < FEW)
        self.steps = {k: torch.zeros(()).requires_grad_() for k in few}

    @property
    def learns(self) -> bool:
        """Whether anything has few bits."""
        return bool(self.logits or self.steps)

    def run(self, cases: Sequence[Case], together: int, stacks: bool, iterations: int, seed: int) -> None:
        """Learn for so many iterations, each on `together` images at random, or on batches where those do not stack."""
        draws = torch.Generator().manual_seed(seed)
        groups = [
            {"params": list(values.values()), "lr": rate, "full": rate, "falls": values is not self.logits}
            for values, rate in (
                (self.logits, RATE),
                (self.factors, SCALE_RATE),
                (self.shifts, BIAS_RATE),
                (self.steps, STEP_RATE),
            )
            if values
        ]
        optimizer = torch.optim.Adam(groups)
        power = {
            n: max(sum(float(c.wanted[n].square().mean()) for c in cases) / len(cases), 1e-30)
            for n in self.block.outputs
            if cases[0].wanted[n].is_floating_point()
        }
        pool = _stacked(cases) if stacks else None
        count = pool.size if pool else len(cases)
        start, order = 0.0, list[int]()
        for i in range(iterations):
            gone = i / iterations
            for group in optimizer.param_groups:  # those that fall do so along half a cosine
                group["lr"] = group["full"] * (0.5 * (1 + math.cos(math.pi * gone)) if group["falls"] else 1)
            while len(order) < together:
                order = torch.randperm(count, generator=draws).tolist() + order
            chosen = [order.pop() for _ in range(together)]
            drawn = [pool.images(chosen)] if pool else [cases[at] for at in chosen]
            distance = sum((self._distance(c, power, draws) for c in drawn), torch.zeros(())) / len(drawn)
            start = start or max(float(distance.detach()), 1e-30)
            loss = distance / start
            if gone > WARM and self.logits:
                loss = loss + PENALTY * self._undecided(20 - 18 * (gone - WARM) / (1 - WARM))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _undecided(self, power: float) -> Tensor:
        ups = torch.cat([_up(v).flatten() for v in self.logits.values()])
        return (1 - (2 * ups - 1).abs().pow(power)).mean()

    def _distance(self, case: Case, power: dict[str, float], draws: torch.Generator) -> Tensor:
        inputs = {
            n: _mixed(case.integer[n], case.real[n], draws, self._dropped(n))
            if n in self.grids.tensors
            else case.integer[n]
            for n in self.block.inputs
        }

        def on(value: Tensor, key: Key) -> Tensor:
            grid = self.grids.by_key[key]
            low, high = grid.low - grid.zero, grid.high - grid.zero
            if key not in self.steps:
                held = F.hardtanh(value, low * grid.scale, high * grid.scale) if value.requires_grad else value
                return straight(held, fake(value.detach(), grid))
            step = grid.scale * _factor(self.steps[key])
            held = (value / step).clamp(low, high)
            return _mixed(straight(held, held.detach().round()) * step, value, draws, DROPPED)

        found = through(self.block, self.graph, inputs, self._weights(), self._biases(), self.grids, on)
        total = torch.zeros(())
        for name, mean in power.items():
            total = total + (found[name] - case.wanted[name]).square().mean() / mean
        return total

    def _dropped(self, name: str) -> float:
        return DROPPED if self.grids.tensors[name][1] < FEW else DROPPED_AT_8

    def _weights(self) -> dict[str, Tensor]:
        made = {n: r.weight for n, r in self.rounded.items() if n not in self.logits}
        for name, logit in self.logits.items():
            top = 2 ** (self.rounded[name].bits - 1) - 1
            scale = self.scales[name] * _factor(self.factors[name])
            made[name] = (self.floors[name] + _up(logit)).clamp(-top - 1, top) * scale
        return made

    def _biases(self) -> dict[str, Tensor | None]:
        return {
            n: r.bias + self.shifts[n] * self.sizes[n] if r.bias is not None else None for n, r in self.rounded.items()
        }

    def decided(self) -> tuple[dict[str, Rounded], Grids]:
        """The learned weights, scales and biases, and the grids of the network with those of this block as learned."""
        made = {}
        with torch.no_grad():
            biases = self._biases()
            for name, ours in self.rounded.items():
                codes, scale = ours.codes, ours.scale
                if name in self.logits:
                    top = 2 ** (ours.bits - 1) - 1
                    codes = (self.floors[name] + (self.logits[name] >= 0)).clamp(-top - 1, top).to(torch.int8)
                    scale = scale * _factor(self.factors[name]).reshape(-1)
                made[name] = replace(ours, codes=codes, scale=scale, bias=biases[name])
            learned = {k: _moved(self.grids.by_key[k], float(v)) for k, v in self.steps.items()}
        return made, replace(self.grids, by_key={**self.grids.by_key, **learned})


def _stacked(cases: Sequence[Case]) -> Case:
    """Several batches as one."""
    fields = ([c.real for c in cases], [c.integer for c in cases], [c.wanted for c in cases])
    return Case(*({n: torch.cat([v[n] for v in held]) for n in held[0]} for held in fields))


def _up(logit: Tensor) -> Tensor:
    return (torch.sigmoid(logit) * 1.2 - 0.1).clamp(0, 1)


def _factor(logarithm: Tensor) -> Tensor:
    return logarithm.clamp(-math.log(APART), math.log(APART)).exp()


def _moved(grid: Grid, logarithm: float) -> Grid:
    """A grid with its step as a file holds it."""
    factor = min(max(math.exp(logarithm), 1 / APART), APART)
    return replace(grid, scale=float(torch.tensor(grid.scale * factor, dtype=torch.float32)))


def _mixed(one: Tensor, other: Tensor, draws: torch.Generator, share: float) -> Tensor:
    """At every element one or, with a chance of `share`, a number of 256ths, the other."""
    count = one.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=draws)
    return torch.where(words.view(torch.int8)[:count].reshape(one.shape) < 128 - round(256 * share), one, other)
