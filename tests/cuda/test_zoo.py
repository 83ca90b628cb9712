"""Whole networks compiled for every architecture, without a GPU: every layer on a CUDA kernel, none of them float,
products on tensor cores, nothing spilled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import hawq_tvm as ht
from hawq_tvm.verify import sass

from ..models import needs_time

SIZES = {"resnet18": 64, "resnet50": 64, "mobilenetv2": 64, "inceptionv3": 139}
WITH_INT4 = {"sm_75": "IMMA.8832", "sm_80": "IMMA.16864", "sm_86": "IMMA.16864", "sm_89": "IMMA.16864"}
INT8 = {
    "sm_75": "IMMA.8816",
    "sm_80": "IMMA.16832",
    "sm_86": "IMMA.16832",
    "sm_89": "IMMA.16832",
    "sm_90": "IMMA.16832",
}


def tensor_products(library: Path) -> dict[str, Counter[str]]:
    """The matrix instructions of a library, by architecture."""
    found: dict[str, Counter[str]] = {}
    for image in sass.fat_binaries(library.read_bytes()):
        for arch, _, _, text in sass.listing(image, str(library)):
            if text.startswith("IMMA"):
                found.setdefault(arch, Counter())[text.split()[0]] += 1
    return found


EVERY = [(name, weights, data) for name in SIZES for weights, data in ((8, 8), (4, 8), (4, 4))]
# Ten minutes on two cores for all; `make test` takes those that between them have every rule, form and architecture.
USUAL = [("resnet18", 8, 8), ("resnet18", 4, 4), ("mobilenetv2", 4, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weights", "data"), EVERY)
def test_networks_compile(name: str, weights: int, data: int, compiler: Path, tmp_path: Path) -> None:
    needs_time((name, weights, data) in USUAL)
    pytest.importorskip("torch", reason="the zoo's networks come from PyTorch")
    from hawq_tvm.bench import zoo

    model = tmp_path / f"{name}.onnx"
    zoo.make(name, model, size=SIZES[name], weight_bits=weights, activation_bits=data)
    package = ht.compile(model, "cuda")
    assert package.certificate()["ok"], package.certificate()["code_offenders"][:5]
    rows = package.report()
    assert all(row["rule"].startswith("cuda.") for row in rows)
    contractions = [row for row in rows if row["rule"] == "cuda.mma"]
    assert contractions and not [u for row in rows for u in row["usage"] if u["spill_stores"] or u["spill_loads"]]
    assert not [u for row in contractions for u in row["usage"] if u["stack"]]
    products = tensor_products(package.library)
    assert set(products) == set(INT8)
    for arch, found in products.items():
        assert any(n.startswith(INT8[arch]) for n in found)
        fours = [n for n in found if arch in WITH_INT4 and n.startswith(WITH_INT4[arch])]
        assert bool(fours) == ((weights, data) == (4, 4) and arch in WITH_INT4), (arch, found)
