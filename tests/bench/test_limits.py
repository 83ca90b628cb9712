"""The machine's limits: the kernels compute what they mean, numbers are measured, and absent instructions are
refused.
"""

from __future__ import annotations

import platform

import numpy as np
import pytest
import tvm

from hawq_tvm.compiler import tir_pipeline
from hawq_tvm.core.errors import UsageError
from hawq_tvm.measure import limit_kernels as kernels
from hawq_tvm.measure import limits
from hawq_tvm.targets import cpu, target

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the int8 limits are written for x86-64")
HERE = [k for k in kernels.KINDS if platform.machine() == "x86_64" and set(k.features) <= target.host_features()]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET", 0.01)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 1 << 20)


@pytest.mark.parametrize("kind", HERE, ids=lambda k: k.name)
def test_the_kernels_compute_what_they_mean(kind: kernels.Kind) -> None:
    if "amx-int8" in kind.features and (refused := target.permit_tiles()):
        pytest.skip(refused)
    data, weights = kind.operands(np.random.default_rng(0))
    sums = tvm.runtime.tensor(np.zeros(kind.sums, np.int32))
    limits.compiled(kind)(tvm.runtime.tensor(data), tvm.runtime.tensor(weights), sums, 3)
    np.testing.assert_array_equal(sums.numpy(), kind.expected(data, weights, 3))


@X86
def test_every_kernel_keeps_its_sums_in_registers() -> None:
    """Also those that this machine cannot run: TVM's usual place for buffers would cost a store for every product."""
    for kind in kernels.KINDS:
        module = tvm.tirx.build(kind.func(), target=limits._target(kind.features), pipeline=tir_pipeline.CPU)
        assert kind.name.split()[0] in module.inspect_source("s"), kind.name
        assert "TVMBackendAllocWorkspace" not in module.inspect_source("ll"), kind.name


def test_operands_stay_in_the_first_cache() -> None:
    for kind in kernels.KINDS:
        data, weights = kind.operands(np.random.default_rng(0))
        assert 12 << 10 < data.nbytes + weights.nbytes <= 16 << 10, kind.name


def test_the_reader_reads_everything() -> None:
    run = kernels.build(kernels.reader(), target.host())
    blocks = 5
    buffer = np.random.default_rng(0).integers(-1000, 1000, blocks * kernels.BLOCK_BYTES // 4).astype(np.int32)
    sums = tvm.runtime.tensor(np.zeros(kernels.READ_LANES, np.int32))
    run(tvm.runtime.tensor(buffer), sums, blocks, 3)
    expected = sum((buffer ^ r).reshape(-1, kernels.READ_LANES).sum(0) for r in range(3))
    np.testing.assert_array_equal(sums.numpy(), expected)


def test_measure() -> None:
    found = limits.measure()
    assert found.memory > 1e6 and found.l2 > 1e6 and found.l2_bytes > 0
    assert {p.instruction for p in found.peaks} == {name for name, why in limits.instructions().items() if why is None}
    assert all(p.products > 1e6 for p in found.peaks)
    assert [p.products for p in found.peaks] == sorted((p.products for p in found.peaks), reverse=True)
    if found.peaks:
        assert found.tops(3) == pytest.approx(6e-12 * found.peaks[0].products)
        assert set(found.to_dict()["int8_tops_per_core"]) == {p.instruction for p in found.peaks}


def test_without_a_written_kernel_there_is_no_number() -> None:
    found = limits.Limits((), 1e9, 1e9, 1)
    assert found.tops(2) is None and found.to_dict()["int8_tops_per_core"] == {}


@X86
def test_an_instruction_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_features", lambda: {"avx2"})
    assert [name for name, why in limits.instructions().items() if why is None] == ["pmaddwd 256"]
    with pytest.raises(UsageError, match="missing avx512bw, avx512f, avx512vnni"):
        limits.peak("vpdpbusd 512")
    with pytest.raises(UsageError, match="missing amx-int8, amx-tile"):
        limits.peak("tdpbusd tiles")
    with pytest.raises(UsageError, match="no such instruction"):
        limits.peak("vpdpbusd 1024")
