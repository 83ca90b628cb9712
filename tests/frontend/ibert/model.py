"""A small I-BERT encoder of random numbers, under the names that Hugging Face's modules give, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS, LONGEST, HIDDEN, INNER, HEADS, LAYERS, PADDING = 11, 9, 8, 12, 2, 2, 1
CONFIG = {
    "model_type": "ibert",
    "num_attention_heads": HEADS,
    "pad_token_id": PADDING,
    "layer_norm_eps": 1e-12,
    "quant_mode": True,
    "force_dequant": "none",
}


def tensors(prefix: str = "ibert.", seed: int = 5) -> dict[str, np.ndarray]:
    """What state_dict holds after training with quant_mode; weights that are no part of the encoder among it."""
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {}

    def act(name: str, most: float) -> None:
        # Ranges are not symmetric, and scales are no powers of two.
        made[f"{name}.x_min"], made[f"{name}.x_max"] = [-0.83 * most], [most * float(rng.uniform(1, 1.2))]
        made[f"{name}.act_scaling_factor"] = [0.0]

    def norm(name: str) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = rng.uniform(0.6, 1.5, HIDDEN), rng.normal(0, 0.2, HIDDEN)
        made[f"{name}.shift"] = [3.0]
        act(f"{name}.activation", 0)

    def linear(name: str, outputs: int, inputs: int) -> None:
        made[f"{name}.weight"] = rng.normal(0, 0.4, (outputs, inputs)) * rng.uniform(0.3, 1, (outputs, 1))
        made[f"{name}.bias"], made[f"{name}.fc_scaling_factor"] = rng.normal(0, 0.3, outputs), np.zeros(outputs)

    for name, rows in (("word", WORDS), ("position", LONGEST), ("token_type", 2)):
        made[f"embeddings.{name}_embeddings.weight"] = rng.normal(0, 1, (rows, HIDDEN))
    act("embeddings.embeddings_act1", 5)
    act("embeddings.embeddings_act2", 0)
    norm("embeddings.LayerNorm")
    act("embeddings.output_activation", 3)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        own, output = f"{layer}.attention.self", f"{layer}.attention.output"
        for part in ("query", "key", "value"):
            linear(f"{own}.{part}", HIDDEN, HIDDEN)
            act(f"{own}.{part}_activation", 2.5)
        act(f"{own}.output_activation", 2)
        act(f"{own}.softmax.act", 0)
        linear(f"{output}.dense", HIDDEN, HIDDEN)
        linear(f"{layer}.intermediate.dense", INNER, HIDDEN)
        linear(f"{layer}.output.dense", HIDDEN, INNER)
        for part in (output, f"{layer}.output"):
            act(f"{part}.ln_input_act", 6)
            norm(f"{part}.LayerNorm")
            act(f"{part}.output_activation", 3)
        act(f"{layer}.pre_intermediate_act", 3)
        act(f"{layer}.intermediate.output_activation", 3)
        act(f"{layer}.pre_output_act", 3)
    named = {prefix + k: np.asarray(v, np.float32) for k, v in made.items()}
    return named | {"classifier.weight": np.zeros((2, HIDDEN), np.float32)}


def folder(path: Path, content: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A folder as save_pretrained writes it."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in (tensors() if content is None else content).items():
        ends = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": ends}
        data += value.tobytes()
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
