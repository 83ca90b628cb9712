"""What one batch tells of layers by derivatives of the loss: Hutchinson's v^T H v, and squared gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hawq_tvm.quantize.network.data import Batch
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .loss import Loss
from .sensitivity import SIDES
from .traces import PAIR

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor


class Gradients:
    """Derivatives of a network's loss by every layer's weights and by what it reads."""

    def __init__(self, graph: FloatGraph, loss: Loss) -> None:
        self.graph, self.loss = graph, loss
        nodes = {n.name: n.inputs for n in graph.nodes}
        # The numbers of the operands that are a layer's input and its weight.
        self.operands = {
            one.node: (nodes[one.node].index(one.input), nodes[one.node].index(one.weight)) for one in graph.layers
        }

    def probed(self, batch: Batch, chosen: Array, number: int, seed: int) -> tuple[Array, Array]:
        """v^T H v of the chosen layers' weights, and of their inputs, for one batch and the PAIR of random signs from
        that number on [sign, layer].  A layer's signs are its own, whichever others are chosen.
        """
        losses, weights, activations = self._variables(batch, chosen)
        # Activations stand once per image: the mean loss's Hessian by them holds each image's, divided by the number of
        # images.
        variables = [*weights, *activations]
        gradients = torch.autograd.grad(losses.mean(), variables, create_graph=True)
        values = np.zeros((PAIR, len(SIDES), len(chosen)))
        for k in range(PAIR):
            for i, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
                side, place = divmod(i, len(chosen))
                told = f"{seed} {number + k} {side} {chosen[place]}".encode()
                random = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(told).digest()[:7], "big"))
                sign = torch.randint(0, 2, variable.shape, generator=random, dtype=variable.dtype).mul_(2).sub_(1)
                (product,) = torch.autograd.grad(gradient, variable, sign, retain_graph=True, materialize_grads=True)
                values[k, side, place] = float((sign * product).sum(dtype=torch.float64))
        return values[:, 0], values[:, 1]

    def squares(self, batch: Batch) -> Array:
        """The sums over a batch of the squared norm of every image's gradient, by weights and by inputs [2, layer]."""
        total: Array = np.zeros((2, len(self.graph.layers)))
        losses, weights, activations = self._variables(batch, range(len(self.graph.layers)))
        for i in range(batch.size):
            gradients = torch.autograd.grad(losses[i], [*weights, *activations], retain_graph=i + 1 < batch.size)
            total = total + np.reshape([float(g.square().sum(dtype=torch.float64)) for g in gradients], (2, -1))
        return total

    def _variables(self, batch: Batch, chosen: Sequence[int] | Array) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The losses of a batch, and the weights and inputs of the chosen layers as what they can be differentiated by.

        A tensor that two layers read counts for each on its own.
        """
        ours = [self.graph.layers[i] for i in chosen]
        weights = [self.graph.parameters[one.weight].detach().clone().requires_grad_() for one in ours]
        activations: list[Any] = [None] * len(weights)
        places = {one.node: i for i, one in enumerate(ours)}

        def feed(node: str, operand: int, value: Any) -> Any:
            i = places.get(node)
            if i is None or operand not in self.operands[node]:
                return None
            if operand == self.operands[node][1]:
                return weights[i]
            activations[i] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            return activations[i]

        return self.loss.of(batch, feed=feed), weights, activations
