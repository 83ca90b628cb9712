"""An I-BERT encoder taken apart: integer weights, and the scales of its quantizers, as quant_mode computes them from
the float weights and the ranges that training has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.values import Array

from .reader import SAVE, read

WORDS, POSITIONS, TYPES = (f"embeddings.{n}_embeddings" for n in ("word", "position", "token_type"))
# What a quantizer's range is before it has seen data, and the least that counts.
UNSEEN, LEAST = np.float32(1.1e-5), np.float32(1e-8)
BIAS_LIMIT = 2**31


@dataclass(frozen=True)
class Linear:
    """A layer's weight (int64, outputs first), its scales by output (float32) and its float bias."""

    weight: Array
    scale: Array
    bias: Array

    def integer_bias(self, x_scale: np.float32) -> Array:
        """The bias on the grid of the sums, for inputs of this scale, in float32 as quant_mode rounds it."""
        steps = np.rint(np.float32(1) / (self.scale * x_scale) * self.bias).astype(np.float64)
        integers: Array = np.clip(steps, 1 - BIAS_LIMIT, BIAS_LIMIT - 2).astype(np.int64)
        return integers


@dataclass(frozen=True)
class Model:
    """A checked encoder; tensors are read under their names behind the prefix that the whole model gives them."""

    where: str
    prefix: str
    tensors: dict[str, Array]
    config: dict[str, Any]
    layers: int
    hidden: int
    heads: int
    padding: int
    positions: int

    def array(self, name: str, shape: Sequence[int] | None = None) -> Array:
        """A tensor.  Raises ModelError where it is missing, has another shape, or holds what is no number."""
        full = self.prefix + name
        if full not in self.tensors:
            raise ModelError("has no such tensor", where=full, found=f"{len(self.tensors)} others", remedy=SAVE)
        value = self.tensors[full]
        if shape is not None and value.shape != tuple(shape):
            raise ModelError("has another shape", where=full, expected=str(list(shape)), found=str(list(value.shape)))
        if not np.isfinite(value).all():
            raise ModelError("holds what is no number", where=full, remedy="train it again, or correct the tensor")
        return value

    def scale(self, name: str, bits: int) -> np.float32:
        """The scale of a quantizer of activations.  Raises ModelError where its range has seen no data."""
        ends = [np.abs(self.array(f"{name}.{end}", (1,))[0]) for end in ("x_min", "x_max")]
        most = np.float32(max(ends))
        if most < UNSEEN:
            remedy = "run data through the model in training mode, then save it"
            raise ModelError("has no calibrated range", where=self.prefix + name, found=f"{most:g}", remedy=remedy)
        return np.float32(max(most, LEAST) / np.float32(2 ** (bits - 1) - 1))

    def table(self, name: str) -> tuple[Array, np.float32]:
        """The integers of an embedding and their scale."""
        weight = self.array(f"{name}.weight")
        if weight.ndim != 2 or weight.shape[1] != self.hidden:
            found = str(list(weight.shape))
            raise ModelError(
                "has another shape", where=f"{self.prefix}{name}.weight", expected=f"[rows, {self.hidden}]", found=found
            )
        scale = np.maximum(np.abs(weight).max(), LEAST) / np.float32(127)
        return _rounded(weight, np.float32(scale)), np.float32(scale)

    def linear(self, name: str, outputs: int | None = None, inputs: int | None = None) -> Linear:
        """A fully connected layer."""
        weight = self.array(f"{name}.weight")
        given = (outputs or weight.shape[0], inputs or weight.shape[-1])
        weight = self.array(f"{name}.weight", given)
        scale = np.maximum(np.abs(weight).max(axis=1), LEAST) / np.float32(127)
        return Linear(_rounded(weight, scale[:, None]), scale, self.array(f"{name}.bias", given[:1]))


def _rounded(weight: Array, scale: Any) -> Array:
    """Integers of 8 bits: of quantizers of weights the paper's range ends at -127 and its program's at 126."""
    integers: Array = np.clip(np.rint(np.float32(1) / scale * weight), -127, 126).astype(np.int64)
    return integers


def read_model(source: Any) -> Model:
    """The model of a folder or a module; a Model is returned as it is.

    Raises ModelError naming what is missing or wrong.
    """
    if isinstance(source, Model):
        return source
    tensors, config, where = read(source)
    end = f"{WORDS}.weight"
    prefix = next((name.removesuffix(end) for name in tensors if name.endswith(end)), None)
    if prefix is None:
        raise ModelError("has no embedding of words", where=where, expected=f"a tensor {end}", remedy=SAVE)
    dequantized = str(config.get("force_dequant", "none"))
    if dequantized != "none":
        raise ModelError(
            "computes some functions in float",
            where=where,
            expected='force_dequant "none"',
            found=dequantized,
            remedy="train it without force_dequant",
        )
    heads = config.get("num_attention_heads")
    hidden = tensors[prefix + end].shape[-1]
    if not isinstance(heads, int) or heads < 1 or hidden % heads:
        expected = f"num_attention_heads, a divisor of {hidden}"
        raise ModelError("has a configuration that does not fit", where=where, expected=expected, found=str(heads))
    layers = 0
    while f"{prefix}encoder.layer.{layers}.attention.self.query.weight" in tensors:
        layers += 1
    padding = int(config.get("pad_token_id") or 0)
    model = Model(where, prefix, tensors, config, layers, hidden, heads, padding, 0)
    positions = model.array(f"{POSITIONS}.weight").shape[0]
    return Model(where, prefix, tensors, config, layers, hidden, heads, padding, positions)
