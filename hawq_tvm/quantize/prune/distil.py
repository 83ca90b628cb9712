"""The smaller network learns the full one's answers: all its weights at once, on the calibration data.

The loss is how far they are from the full network's (`Apart`), by Adam with a rate that falls to 0 as a cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F

from hawq_tvm.quantize.allocate.loss import Loss
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.network.prepare import set_constant

RATE = 1e-3


class Apart:
    """How far answers are from the full network's, summed over images: for a classifier the Kullback-Leibler distance
    in nats, else the squared change of each output as a share of its mean square, the mean of all its numbers.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def answers(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is compared of a batch's outputs: the logarithms of the probabilities of classes, or all numbers."""
        if self.loss.answers.classes:
            name = self.loss.graph.outputs[0]
            return {name: self.loss.answers.logarithms(outputs[name].flatten(1))}
        return dict(outputs)

    def of(self, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
        """Of the answers of a batch of that size."""
        if self.loss.answers.classes:
            name = self.loss.graph.outputs[0]
            return F.kl_div(found[name], wanted[name], reduction="sum", log_target=True)
        return self.loss.changed(found, wanted, size).square().mean(1).sum()


def distil(
    model: onnx.ModelProto,
    loss: Loss,
    cut: FloatGraph,
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    seed: int,
    progress: Progress,
) -> tuple[float, float]:
    """Train the cut model's weights and biases in place for so many batches; the mean distance of images before and
    after: training that brought nothing is taken back, and both are the same.

    loss: of the full network.
    """
    random, apart = torch.Generator().manual_seed(seed), Apart(loss)
    with torch.no_grad():
        wanted = [apart.answers(loss.graph.run(batch)) for batch in batches]
    names = dict.fromkeys(n for layer in cut.layers for n in (layer.weight, layer.bias) if n)
    learned = {name: cut.parameters[name].clone().requires_grad_() for name in names}
    sizes = [len(next(iter(batch.values()))) for batch in batches]

    def distance(i: int) -> torch.Tensor:
        return apart.of(apart.answers(cut.run(batches[i], parameters=learned)), wanted[i], sizes[i])

    def mean() -> float:
        with torch.no_grad():
            return sum(float(distance(i)) for i in range(len(batches))) / sum(sizes)

    before = mean()
    optimizer = torch.optim.Adam(learned.values(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=random).tolist()
        i = order.pop()
        optimizer.zero_grad()
        (distance(i) / sizes[i]).backward()
        optimizer.step()
        schedule.step()
        progress(Step("distilling", step + 1, steps))
    after = mean()
    if not after < before:
        return before, before
    for name, value in learned.items():
        cut.parameters[name] = value.detach()
        set_constant(model.graph, name, value.detach().numpy())
    return before, after
