"""The bit configurations that HAWQ published with its code, by name: which layers have 4 bits, all others 8.

Layers are numbered from 1 in the order of the network's description, without the first and the last, as in HAWQ-V3's
allocation problems. The numbers are results of HAWQ-V3 (bit_config.py, github.com/Zhen-Dong/HAWQ).
"""

from __future__ import annotations

from .networks import Network


def _spans(text: str) -> frozenset[int]:
    """The numbers of a text like "4 6 8-19"."""
    numbers: set[int] = set()
    for part in text.split():
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


_LAYERS = {
    "resnet18": {
        "modelsize_0.75": "14 19",
        "modelsize_0.5": "16 18 19",
        "modelsize_0.25": "15-19",
        "bops_0.75": "9 14 16 19",
        "bops_0.5": "4 9 13-19",
        "bops_0.25": "4 6 8-19",
        "latency_0.75": "9 14 16 19",
        "latency_0.5": "6 9 13 14 16 18 19",
        "latency_0.25": "4 6 8-19",
    },
    "resnet50": {
        "modelsize_0.75": "44 48 51",
        "modelsize_0.5": "25 32 33 38 41 44 48 49 51 52",
        "modelsize_0.25": "25 29 30 32 33 35 36 38-44 46-49 51 52",
        "bops_0.75": "9 22 25 32 33 35 38 41 44",
        "bops_0.5": "9 12 16 19 20 22 25 29 30 32 33 35 36 38 39 41 44 48 51",
        "bops_0.25": "2 5 6 9 10 12 15-20 22 23 25 28-42 44 48 49 51 52",
        "latency_0.75": "9 12 22 25 32 38 41 44",
        "latency_0.5": "9 10 12 19 22 25 28-30 32 33 35 36 38 39 41 42 44 48 51",
        "latency_0.25": "6 9 10 12 15-20 22-25 27-39 41 42 44 48 49 51 52",
    },
    "mobilenetv2_w1": {
        "modelsize_0.5": "13 16 22 24 25 27 28 30 34 36 37 39 43 45",
        "bops_0.5": "4 7 10 13 16 22 25 27 28 30 34 36 37 40 43 46 49 50",
    },
}


def schemes(net: Network) -> list[str]:
    """The names that `four_bit_layers` knows for a network."""
    return ["uniform8", "uniform4", *_LAYERS.get(net.name, {})]


def four_bit_layers(net: Network, scheme: str) -> frozenset[str] | None:
    """The layers with 4-bit weights (and activations, where they read them); None for an unknown name."""
    inner = [w for w in net.weighted if not w.fixed]
    if scheme in ("uniform8", "uniform4"):
        return frozenset(w.layer for w in inner) if scheme == "uniform4" else frozenset()
    text = _LAYERS.get(net.name, {}).get(scheme)
    return None if text is None else frozenset(inner[n - 1].layer for n in _spans(text))
