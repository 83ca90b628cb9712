"""What an I-BERT encoder contains, for `inspect`."""

from __future__ import annotations

from typing import Any

from .importer import ACT_BITS, EMBEDDED_BITS, IDS, MASK, NORM_BITS, OUTPUT, TOKENS, longest
from .model import POSITIONS, TYPES, WORDS, read_model

TABLES = (WORDS, POSITIONS, TYPES)
# Quantizers that no integer goes through: of softmax's exponents, of LayerNorm's 32 bits, and one that is not called.
UNUSED = (".softmax.act", ".LayerNorm.activation", ".embeddings_act2")


def describe_ibert(source: Any) -> dict[str, Any]:
    """A JSON-ready description: sizes, what is quantized how, and the tensors that are no part of the encoder."""
    model = read_model(source)
    acts = sorted(n.removesuffix(".x_min") for n in model.tensors if n.endswith(".x_min"))
    linear = sorted(n.removesuffix(".fc_scaling_factor") for n in model.tensors if n.endswith(".fc_scaling_factor"))
    encoder = tuple(model.prefix + part for part in ("embeddings.", "encoder."))
    rest = [n for n in model.tensors if not n.startswith(encoder)]
    default = f"1x{min(TOKENS, longest(model))}"
    return {
        "format": "I-BERT encoder",
        "inputs": [{"name": n, "dtype": "int64", "shape": ["N", "L"], "default": default} for n in (IDS, MASK)],
        "outputs": [{"name": OUTPUT}],
        "layers": model.layers,
        "heads": model.heads,
        "parameters": sum(int(v.size) for n, v in model.tensors.items() if n.endswith((".weight", ".bias"))),
        "not of the encoder": ", ".join(rest) or "nothing",
        "quantized": [_entry(model.prefix + n, "QuantEmbedding", "weight", 8, "per tensor") for n in TABLES]
        + [_entry(n, "QuantLinear", "weight", 8, "per channel") for n in linear]
        + [_entry(n, "QuantAct", "output", _bits(n), "per tensor") for n in acts if not n.endswith(UNUSED)],
    }


def _bits(name: str) -> int:
    if name.endswith("ln_input_act"):
        return NORM_BITS
    return EMBEDDED_BITS if name.endswith("embeddings_act1") else ACT_BITS


def _entry(name: str, op: str, role: str, bits: int, grain: str) -> dict[str, Any]:
    return {
        "name": name,
        "op": op,
        "role": role,
        "type": f"int{bits}",
        "bits": bits,
        "granularity": grain,
        "symmetric": True,
    }
