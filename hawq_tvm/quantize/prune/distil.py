"""The smaller network learns the full one's answers: all its weights at once, on the calibration data.

The loss is the Kullback-Leibler distance to the full network's answers, by Adam with a rate that falls to 0 as a
cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
import torch.nn.functional as F

from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.network.prepare import set_constant

RATE = 1e-3


def distil(
    model: onnx.ModelProto,
    full: FloatGraph,
    cut: FloatGraph,
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    seed: int,
    progress: Progress,
) -> tuple[float, float]:
    """Train the cut model's weights and biases in place for so many batches; the mean distance before and after, in
    nats: training that brought nothing is taken back, and both are the same.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        wanted = [_answers(full, batch) for batch in batches]
    names = dict.fromkeys(n for layer in cut.layers for n in (layer.weight, layer.bias) if n)
    learned = {name: cut.parameters[name].clone().requires_grad_() for name in names}
    before = _distance(cut, batches, wanted, learned)
    optimizer = torch.optim.Adam(learned.values(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=random).tolist()
        i = order.pop()
        loss = F.kl_div(_answers(cut, batches[i], learned), wanted[i], reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(Step("distilling", step + 1, steps))
    after = _distance(cut, batches, wanted, learned)
    if after >= before:
        return before, before
    for name, value in learned.items():
        cut.parameters[name] = value.detach()
        set_constant(model.graph, name, value.detach().numpy())
    return before, after


def _answers(graph: FloatGraph, batch: Mapping[str, Any], parameters: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The logarithms of the probabilities of a batch's classes."""
    return F.log_softmax(graph.run(batch, parameters=parameters)[graph.outputs[0]].flatten(1), 1)


def _distance(graph: FloatGraph, batches: Sequence[Any], wanted: Sequence[Any], parameters: Mapping[str, Any]) -> float:
    with torch.no_grad():
        each = [
            float(F.kl_div(_answers(graph, b, parameters), w, reduction="sum", log_target=True))
            for b, w in zip(batches, wanted, strict=True)
        ]
    return sum(each) / sum(len(w) for w in wanted)
