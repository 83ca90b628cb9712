"""Every layer of a library beside what is expected of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.machine.vm import Machine

from .compare import difference
from .noise import image

Array = NDArray[Any]


def inputs(entry: Mapping[str, Any]) -> list[Array]:
    """The arrays of an entry's inputs: images by their seeds, repeated for larger batches."""
    made = []
    for i in entry["inputs"]:
        seeds = [i["seeds"][n % len(i["seeds"])] for n in range(i["shape"][0])]
        made.append(np.concatenate([image(s, (1, *i["shape"][1:])) for s in seeds]))
    return made


def verify(machine: Machine, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Compare every layer of one inference with the expected integers: {"ok", "layers", "elements",
    "first_difference"}.
    """
    layers: Sequence[dict[str, Any]] = entry["layers"]
    kernels = {layer["kernel"] for layer in layers}
    seen = elements = different = 0
    first: str | None = None

    def observe(function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> None:
        nonlocal seen, elements, different, first
        del function, result
        if before or symbol not in kernels:
            return
        seen += 1
        if seen > len(layers):
            return
        layer = layers[seen - 1]
        for wanted, tensor in zip(layer["results"], arguments[-len(layer["results"]) :], strict=True):
            found = machine.numpy(tensor)
            elements += found.size
            text = (
                f"the library calls {symbol}, expected {layer['kernel']}"
                if symbol != layer["kernel"]
                else difference(wanted, found, entry["samples"])
            )
            if text is not None:
                different += 1
                first = first or f"layer {layer['layer']} ({seen} of {len(layers)}): {text}"

    machine.watch(observe, *(machine.tensor(a) for a in inputs(entry)))
    if seen != len(layers):
        first = first or f"the library ran {seen} layers, expected {len(layers)}"
    return {
        "ok": first is None and elements > 0,
        "layers": seen,
        "elements": elements,
        "different_results": different,
        "first_difference": first,
    }
