"""Mutated models, bounded and seeded: a right answer, or one refusal in the same words from `inspect` and `compile`;
never a crash or a hang.

HAWQ_TVM_MUTANTS=2500 makes so many of them; HAWQ_TVM_MUTANTS_FROM=N begins at another number than 0.
"""

from __future__ import annotations

import os
import time

import onnx
import pytest

import hawq_tvm as ht

from ..agreement import agreed
from ..mutants import mutant
from .seeds import SEEDS

COUNT, FIRST, CHUNK = (
    int(os.environ.get("HAWQ_TVM_MUTANTS", "240")),
    int(os.environ.get("HAWQ_TVM_MUTANTS_FROM", "0")),
    40,
)
# Of the mutants that are accepted, one in so many is built, run and compared with the reference in every layer.
BUILT = 12
# Processor seconds: a mutant of a small model that takes longer hangs, or would with one number more.
SECONDS = 15


@pytest.fixture(scope="module")
def models() -> list[tuple[str, onnx.ModelProto]]:
    return [(name, build()) for name, build in SEEDS.items()]


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, CHUNK))
def test_mutants(first: int, models: list[tuple[str, onnx.ModelProto]]) -> None:
    faults, accepted = [], 0
    for number in range(first, min(first + CHUNK, FIRST + COUNT)):
        data, what = mutant(number, models)
        start = time.process_time()
        try:
            error = agreed(data)
            accepted += error is None
            if error is None and accepted % BUILT == 0:
                ht.compile(data).verify(random=1).raise_if_mismatch()
        except Exception as e:  # whatever it is, the next mutants say more about it
            faults.append(f"mutant {number} ({what}): {type(e).__name__}: {e}")
        if time.process_time() - start > SECONDS:
            faults.append(f"mutant {number} ({what}) takes {time.process_time() - start:.0f} s")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_agree(name: str) -> None:
    assert agreed(SEEDS[name]()) is None or name in ("handlers, opset 13", "handlers, opset 18", "float")
