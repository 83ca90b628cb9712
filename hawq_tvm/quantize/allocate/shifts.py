"""What rounding a layer costs by the Hessian, and what rounding two layers costs besides: in the direction of the error
that is really made.

KL(p || q) of a network's answers p and the quantized one's q is 0 and without a slope at q = p, and its Hessian by the
scores z is F = diag(p) - p p^T. So an error e of all weights and inputs of layers costs, to second order,

    Omega = 1/2 e^T H e = 1/2 mean over images (J e)^T F (J e),    J: the scores' derivatives by weights and inputs,

and of an error in parts, e = sum of e_l, Omega is the sum over all pairs of 1/2 (J e_l)^T F (J e_m). J e_l is how far
the scores move when layer l alone is rounded. HAWQ-V2 has e_l^T H e_l at its mean over all directions of e_l,
Tr(H) / n ||e_l||^2, and leaves out what pairs cost: errors that push the scores the same way cost more together.

Outputs that are no classes stand at the Kullback-Leibler distance of normal distributions whose variance is the
output's mean square over all data: F is 1 over that. Of several outputs all count then; where the first is a
classifier's, it counts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hawq_tvm.core.errors import ModelError
from hawq_tvm.quantize.network.data import Batch
from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.ptq.observers import Grid
from hawq_tvm.quantize.ptq.simulated import fake

from .loss import Loss

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor
# Products of longer shifts are estimated, without bias, from sums of this many random signs of their numbers.
LONGEST = 2**14


class Shifts:
    """The shifts of a network's answers by the rounding of each layer in each choice.

    weights: rounded, by layer and bits.  grids: of inputs, by layer and bits.  choices: bits of weights and of inputs.
    """

    def __init__(
        self,
        graph: FloatGraph,
        loss: Loss,
        choices: Sequence[tuple[int, int]],
        weights: Sequence[dict[int, Tensor]],
        grids: Sequence[dict[int, Grid]],
    ) -> None:
        self.graph, self.loss, self.choices, self.weights, self.grids = graph, loss, choices, weights, grids
        self.nodes = {node.name: node for node in graph.nodes}

    def of(self, batch: Batch) -> tuple[Array, Array, float]:
        """Half the sums over a batch of (J e_l)^T F (J e_m) [layer and choice, layer and choice]; the squares of the
        output's changes [layer and choice], and of the output.

        What is infinite in the output itself is left out of its squares.
        Raises InputError for a label that a classifier does not have, ModelError for outputs that a rounded layer makes
        infinite or not a number.
        """
        values: dict[str, Any] = {}
        with torch.no_grad():
            outputs = self.graph.run(batch.inputs, lambda name, value: values.__setitem__(name, value))
            metric = _metric(self.loss, outputs, batch)
            rows, squares, given = [], [], outputs[self.graph.outputs[0]].double()
            kept = ~given.isinf()
            for layer, weights, grids in zip(self.graph.layers, self.weights, self.grids, strict=True):
                node = self.nodes[layer.node]
                x = values[layer.input]
                for weight_bits, activation_bits in self.choices:
                    new = {layer.input: fake(x, grids[activation_bits]), layer.weight: weights[weight_bits]}
                    operands = [new.get(n, values.get(n, self.graph.parameters.get(n))) for n in node.inputs]
                    found = self.graph.rerun(values, node.name, operands)
                    rows.append(metric(found).flatten().float())
                    squares.append(float((found[self.graph.outputs[0]].double() - given)[kept].square().sum()))
            made = torch.stack(rows)
            pairs = (made @ made.T).double().numpy() / 2
            bad = np.flatnonzero(~np.isfinite(np.diagonal(pairs) + squares))
            if len(bad):
                raise ModelError(
                    "makes the network's output infinite, or not a number, when it is rounded",
                    where=self.graph.layers[bad[0] // len(self.choices)].name,
                    expected="an output that moves by finite numbers",
                    remedy="end the model before what makes numbers infinite",
                )
            return pairs, np.array(squares), float(given[kept].square().sum())


def _metric(loss: Loss, outputs: Mapping[str, Tensor], batch: Batch) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """What turns other outputs of a batch into vectors (images, numbers) whose products are (J e_l)^T F (J e_m)."""
    size, name, answers = batch.size, loss.graph.outputs[0], loss.answers
    if answers.classes:
        scores = outputs[name].flatten(1)
        loss.check(batch, scores)
        logs = answers.logarithms(scores).double()
        p = logs.exp()

        def moved(found: Mapping[str, Tensor]) -> Tensor:
            # A class that is ruled out (a score of -inf) has no part in the distance.
            d = torch.where(p == 0, 0, answers.logarithms(found[name].flatten(1)).double() - logs)
            return p.sqrt() * (d - (p * d).sum(1, keepdim=True))

        return moved
    return lambda found: _folded(loss.changed(found, outputs, size))


def _folded(vectors: Tensor) -> Tensor:
    """Vectors of at most LONGEST numbers with the same products but for what random signs leave: their mean is 0."""
    length = vectors.shape[1]
    if length <= LONGEST:
        return vectors
    signs = torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    padded = torch.nn.functional.pad(vectors * signs, (0, -length % LONGEST))
    return padded.reshape(len(vectors), -1, LONGEST).sum(1)
