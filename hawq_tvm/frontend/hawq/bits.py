"""Bit configurations: how many bits every layer has, read from JSON, by the name of a scheme of HAWQ, or from the
weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.json_files import read_json
from hawq_tvm.frontend.common.values import Array

from .networks import Act, Network, Weighted
from .schemes import four_bit_layers, schemes
from .source import Bits

WIDE = 16
MAX_WEIGHT_BITS, MAX_ACT_BITS = 8, 16


def configuration(net: Network, bits: Bits, weights: Mapping[str, Array]) -> tuple[dict[str, int], str]:
    """The bits of every layer of `net`, and where they come from.

    weights: the integer weights by layer.  Raises UsageError for a configuration that is wrong in itself, ModelError
    for weights that have another width than it says.
    """
    if bits is None:
        found = {w.layer: _width(w, weights[w.layer]) for w in net.weighted}
        return with_activations(net, found), "the weights; activations have the width of the layer that reads them"
    if isinstance(bits, str) and not bits.endswith(".json"):
        config, origin = _named(net, bits), f"HAWQ's scheme {net.name}_{_short(net, bits)}"
    else:
        given = _read(Path(bits)) if isinstance(bits, str | Path) else dict(bits)
        origin = str(bits) if isinstance(bits, str | Path) else "the given configuration"
        config = _checked(net, given, "bits" if isinstance(bits, Mapping) else origin)
    for w in net.weighted:
        _agree(w, config[w.layer], weights[w.layer])
    return config, origin


def with_activations(net: Network, weights: Mapping[str, int]) -> dict[str, int]:
    """A configuration from the bits of the layers with weights: HAWQ's own give an activation the bits of its
    reader, and its residual stream 16.
    """
    return {**weights, **{a.layer: _activation(net, a, weights) for a in net.acts}}


def _activation(net: Network, act: Act, weights: Mapping[str, int]) -> int:
    if act.wide:
        return WIDE
    widths = {w.layer: weights[w.layer] for w in net.readers(act.layer)}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{k} {v}" for k, v in widths.items())
        raise ModelError(
            "is read by layers of different widths",
            where=act.layer,
            expected="one width",
            found=found,
            remedy="say the bits of every layer with a configuration (--bits FILE.json)",
        )
    return next(iter(widths.values()))


def _levels(bits: int) -> int:
    return (1 << bits - 1) - 1


def _width(step: Weighted, weight: Array) -> int:
    """HAWQ scales the greatest weight of a channel to 2^(b-1) - 1, so the greatest of a layer tells b; percentiles
    may clip one step below -that.
    """
    greatest = int(np.max(np.abs(weight), initial=0))
    for bits in range(2, MAX_WEIGHT_BITS + 1):
        if greatest in (_levels(bits), _levels(bits) + 1) and (
            greatest == _levels(bits) or np.any(weight == -greatest)
        ):
            return bits
    raise ModelError(
        "does not tell its width",
        where=f"{step.layer}.weight_integer",
        expected="a greatest magnitude of 127 (8 bits) or 7 (4 bits)",
        found=str(greatest),
        remedy="say the bits of every layer with a configuration (--bits FILE.json)",
    )


def _agree(step: Weighted, bits: int, weight: Array) -> None:
    low, high = int(np.min(weight)), int(np.max(weight))
    most, where = _levels(bits), f"{step.layer}.weight_integer"
    if low < -most - 1 or high > most:
        raise ModelError(
            f"does not fit the {bits} bits of the configuration",
            where=where,
            expected=f"{-most - 1} to {most}",
            found=f"{low} to {high}",
            remedy="use the configuration that the checkpoint was trained with",
        )
    # All zero: a dead layer fits every width.
    if max(-low, high) < most and (low or high):
        raise ModelError(
            f"was not quantized to the {bits} bits of the configuration",
            where=where,
            expected=f"a greatest magnitude of {most}, which HAWQ scales every layer to",
            found=str(max(-low, high)),
            remedy="use the configuration that the checkpoint was trained with",
        )


def _short(net: Network, name: str) -> str:
    return name.removeprefix("bit_config_").removeprefix(f"{net.name}_")


def _named(net: Network, name: str) -> dict[str, int]:
    four = four_bit_layers(net, _short(net, name))
    if four is None:
        raise UsageError(
            "is no bit configuration",
            where=f"--bits {name}",
            expected=f"a file NAME.json, or for {net.name} one of {', '.join(schemes(net))}",
            found=name,
        )
    return with_activations(net, {w.layer: 4 if w.layer in four else 8 for w in net.weighted})


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, '{"LAYER": BITS, ...}', UsageError)
    if not isinstance(content, dict):
        raise UsageError(
            "is no bit configuration", where=str(path), expected='{"LAYER": BITS, ...}', found=type(content).__name__
        )
    return content


def _checked(net: Network, given: Mapping[str, Any], where: str) -> dict[str, int]:
    """Every layer's bits; as HAWQ writes them, bits may be a pair with "hook", and a layer's conv and bn may be
    listed again.
    """
    layers = {w.layer: MAX_WEIGHT_BITS for w in net.weighted} | {a.layer: MAX_ACT_BITS for a in net.acts}
    config: dict[str, int] = {}
    for name, value in given.items():
        inner, _, part = str(name).rpartition(".")
        if name not in layers and part in ("conv", "bn") and inner in layers:
            continue
        if name not in layers:
            near = difflib.get_close_matches(str(name), layers, 1)
            raise UsageError(
                "names a layer that the network does not have",
                where=where,
                expected=f"layers of {net.name}" + (f", such as {near[0]}" if near else ""),
                found=str(name),
            )
        bits = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= layers[name]:
            raise UsageError(
                "has bits out of range", where=f"{where}, {name}", expected=f"2 to {layers[name]}", found=str(bits)
            )
        config[name] = bits
    missing = [n for n in layers if n not in config]
    if missing:
        raise UsageError(
            "does not say every layer's bits",
            where=where,
            expected=f"{len(layers)} layers of {net.name}",
            found=f"{len(missing)} missing, first {missing[0]}",
        )
    return config
