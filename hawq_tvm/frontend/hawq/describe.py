"""What a checkpoint contains, for `inspect`."""

from __future__ import annotations

from typing import Any

from .importer import INPUT, OUTPUT, act_type
from .model import read_model


def describe_checkpoint(source: Any) -> dict[str, Any]:
    """A JSON-ready description: the network, where the bits come from, every quantized tensor's bits and grain."""
    model = read_model(source)
    net = model.net
    return {
        "format": "HAWQ checkpoint",
        "network": net.name,
        "bits from": model.origin,
        "inputs": [
            {
                "name": INPUT,
                "dtype": "float32",
                "shape": ["N", 3, "H", "W"],
                "default": f"1x3x{net.pixels}x{net.pixels}",
            }
        ],
        "outputs": [{"name": OUTPUT}],
        "nodes": len(net.steps),
        "parameters": sum(int(layer.weight.size) for layer in model.layers.values()),
        "quantized": [_weight(model, w.layer) for w in net.weighted] + [_act(model, a.layer) for a in net.acts],
    }


def _weight(model: Any, name: str) -> dict[str, Any]:
    count = model.layers[name].scale.size
    grain = "per tensor" if count == 1 else f"per channel ({count})"
    return {
        "name": name,
        "op": "weight_integer",
        "role": "weight",
        "type": f"int{model.bits[name]}",
        "bits": model.bits[name],
        "granularity": grain,
        "symmetric": True,
    }


def _act(model: Any, name: str) -> dict[str, Any]:
    bits = model.bits[name]
    kind = "int" if act_type(bits).qmin else "uint"
    return {
        "name": name,
        "op": "QuantAct",
        "role": "output",
        "type": f"{kind}{bits}",
        "bits": bits,
        "granularity": "per tensor",
        "symmetric": True,
    }
