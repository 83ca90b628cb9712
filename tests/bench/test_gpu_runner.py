"""The GPU runner without a GPU: comparison, noise, the order within a budget, and timing with a driver that only
pretends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.gpu_check import compare, plan, timing
from deploy.gpu_check.noise import image, noise, weights
from deploy.machine import driver
from deploy.machine.refusal import Refusal


def test_noise_is_splitmix64() -> None:
    # The generator's published first outputs for state 0; our seed n begins n steps later.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert noise(0, 24).tobytes() == b"".join(x.to_bytes(8, "little") for x in first)
    assert noise(1, 8).tobytes() == first[1].to_bytes(8, "little")
    assert noise(3, 21).tobytes() == noise(3, 64).tobytes()[:21]


def test_images_and_weights_have_their_ranges() -> None:
    made = image(1, (2, 3, 32, 32))
    assert made.dtype == np.float32 and 1.7 < made.max() < 1.74 and abs(made.std() - 1) < 0.02
    eight = weights("int8", 5, 10000).view(np.int8)
    assert (eight.min(), eight.max()) == (-16, 15)
    four = weights("nibbles", 5, 10000)
    assert {int(v) for v in four & 15} == {int(v) for v in four >> 4} == {15, 0, 1}


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "float32"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_difference_is_found_in_any_sample(dtype: str, whole: bool) -> None:
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 100, (1, 9, 31, 33)).astype(dtype) for _ in range(2)]
    wanted = compare.expected(samples, whole)
    assert ("values" in wanted) is whole
    batch = np.concatenate([samples[i % 2] for i in range(5)])
    assert compare.difference(wanted, batch, 2) is None
    batch[3, 7, 2, 1] += 1
    found = compare.difference(wanted, batch, 2)
    assert found is not None and found.startswith("sample 3, ")
    assert ("index [7, 2, 1]: expected" if whole else "row 7: ") in found
    other = compare.difference(wanted, batch.astype("int16"), 2)
    assert other is not None and other.startswith(f"expected {dtype}[9, 31, 33] for every sample, found int16")


def test_floats_differ_by_their_bits() -> None:
    values = np.array([[0.0, np.nan, 1.5]], np.float32)
    wanted = compare.expected([values], True)
    assert compare.difference(wanted, values.copy(), 1) is None
    assert compare.difference(wanted, np.array([[-0.0, np.nan, 1.5]], np.float32), 1) is not None


def _entries() -> list[dict[str, Any]]:
    made = [{"name": "case-u8s8", "net": "", "precision": "u8s8", "size": 0, "batch": 3, "verifiable": True}]
    for net in ("resnet18", "resnet50"):
        for precision in ("w4a4", "w8a8"):
            for batch in (8, 1):
                made.append(
                    {
                        "name": f"{net}-{precision}-b{batch}",
                        "net": net,
                        "precision": precision,
                        "size": 224,
                        "batch": batch,
                        "verifiable": batch == 1,
                    }
                )
    return made


def test_what_matters_most_comes_first() -> None:
    steps = [s.name for s in plan.steps(_entries(), ["eager", "compile"], timed=True)]
    assert steps[0] == "verify case-u8s8"
    assert all(s.startswith("verify") for s in steps[:5]) and steps[5:8] == [
        "limits",
        "time resnet50-w8a8-b1",
        "time resnet50-w8a8-b8",
    ]
    order = [s for s in steps if s.startswith("time")]
    assert [s.split()[1].rpartition("-")[0] for s in order[::2]] == [
        "resnet50-w8a8",
        "resnet50-w4a4",
        "resnet18-w8a8",
        "resnet18-w4a4",
    ]
    assert "peer resnet50-b8/compile" in steps and steps.index("peer resnet50-b1/compile") < steps.index(
        "peer resnet50-b1/eager"
    )
    assert not [s for s in steps if s == "verify resnet50-w8a8-b8"]  # its weights are not in the bundle
    assert len(set(steps)) == len(steps)
    assert {s.kind for s in plan.steps(_entries(), ["eager"], timed=False)} == {"verify"}


def _run(seconds: float, report: dict[str, Any], do: Callable[[plan.Step], Any]) -> list[str]:
    clock = SimpleNamespace(now=0.0)
    said: list[str] = []

    def work(step: plan.Step) -> Any:
        clock.now += step.seconds
        return do(step)

    steps = [plan.Step("verify", "a", 4), plan.Step("layers", "slow", 50), plan.Step("verify", "b", 4)]
    plan.Run(report, seconds, lambda: None, said.append, lambda: clock.now).go(steps, work)
    return said


OK = {"ok": True, "layers": 1, "elements": 9, "first_difference": None}


def test_a_budget_leaves_out_what_does_not_fit_and_resuming_does_it() -> None:
    report: dict[str, Any] = {}
    _run(10, report, lambda _: OK)
    assert report["left_out"] == ["layers slow"] and set(report["verify"]) == {"a", "b"}
    said = _run(100, report, lambda step: [{"us": 2.0}])
    assert report["left_out"] == [] and report["layers"] == {"slow": [{"us": 2.0}]}
    assert len(said) == 1 and said[0].startswith("layers slow: 1 kernels")


def test_a_failing_step_is_named_and_the_others_go_on() -> None:
    report: dict[str, Any] = {}

    def do(step: plan.Step) -> Any:
        if step.key == "a":
            raise RuntimeError("Traceback\nCUDA: an illegal memory access was encountered\nend")
        return OK if step.kind == "verify" else []

    _run(100, report, do)
    assert report["failed"] == {"verify a": "RuntimeError: CUDA: an illegal memory access was encountered"}
    assert set(report["verify"]) == {"b"}


class Functions:
    """A driver whose clock goes on by what the fake machine launches: 2 ms for kernels, 0.5 ms for a graph."""

    def __init__(
        self,
        *,
        capability: tuple[int, int] = (9, 0),
        version: int = 13000,
        count: int = 1,
        start: int = 0,
        capture: int = 0,
    ) -> None:
        self.capability, self.version, self.count, self.start, self.capture = capability, version, count, start, capture
        self.clock, self.events, self.capturing, self.alive = 0.0, {}, False, 0  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *args: 0

    def cuInit(self, flags: int) -> int:
        return self.start

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = self.version
        return 0

    def cuDeviceGetAttribute(self, out: Any, which: int, device: Any) -> int:
        out._obj.value = {75: self.capability[0], 76: self.capability[1], 38: 50 << 20, 16: 132}[which]
        return 0

    def cuStreamCreate(self, out: Any, flags: int) -> int:
        out._obj.value = 77
        return 0

    def cuEventCreate(self, out: Any, flags: int) -> int:
        out._obj.value = len(self.events) + 1
        self.events[out._obj.value] = 0.0
        self.alive += 1
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:
        self.alive -= 1
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        assert stream.value == 77
        self.events[event.value] = self.clock
        return 0

    def cuEventElapsedTime(self, out: Any, a: Any, b: Any) -> int:
        out._obj.value = self.events[b.value] - self.events[a.value]
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        self.capturing = True
        return self.capture

    def cuStreamEndCapture(self, stream: Any, out: Any) -> int:
        self.capturing = False
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        self.clock += 0.5
        return 0


class FakeMachine:
    """A machine of two kernels."""

    def __init__(self, functions: Functions) -> None:
        self.functions, self.device = functions, None
        self.ffi = SimpleNamespace(use_raw_stream=lambda device, handle: nullcontext())

    def tensor(self, array: Any) -> Any:
        return array

    numpy = tensor

    def main(self, x: Any) -> list[Any]:
        if not self.functions.capturing:
            self.functions.clock += 2
        return [x + 1]

    def watch(self, observe: Callable[..., Any], *tensors: Any) -> None:
        for name in ("first", "second"):
            assert observe(lambda *a: None, name, True, None, *tensors) == timing.SKIP


def test_times_come_from_events() -> None:
    functions = Functions()
    cuda = driver.Driver(functions)
    assert (cuda.gpu.capability, cuda.gpu.l2, cuda.gpu.processors) == (90, 50 << 20, 132)
    entry = {
        "inputs": [{"shape": [16, 3, 64, 64]}],
        "layers": [{"layer": n, "kernel": n, "products": 5, "rule": "r"} for n in ("first", "second")],
    }
    inputs = timing.images(entry, cuda.gpu.l2)
    assert sum(a.nbytes for one in inputs for a in one) > cuda.gpu.l2
    stream, machine = cuda.stream(), FakeMachine(functions)
    fields = timing.ours(machine, inputs, stream, seconds=0, warmup=0)
    assert (fields["launched"]["median_ms"], fields["graph"]["median_ms"], fields["graph"]["p90_ms"]) == (2.0, 0.5, 0.5)
    assert fields["graph_equal"] and fields["inputs_rotated"] == len(inputs) and fields["graph"]["iterations"] >= 20
    rows = timing.layers(machine, entry, stream)
    assert [(r["layer"], r["us"]) for r in rows] == [("first", 25.0), ("second", 25.0)]
    assert functions.alive == 0


def test_a_graph_that_cannot_be_had_is_explained() -> None:
    functions = Functions(capture=900)
    cuda = driver.Driver(functions)
    fields = timing.ours(FakeMachine(functions), [[np.zeros(3)]], cuda.stream(), seconds=0, warmup=0)
    assert fields["graph"] is None and "cuStreamBeginCapture_v2 fails with CUDA error 900" in fields["graph_error"]
    assert fields["launched"]["median_ms"] == 2.0


def test_a_failing_capture_is_closed() -> None:
    functions = Functions()
    stream = driver.Driver(functions).stream()

    def work() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        stream.captured(work)
    assert not functions.capturing


@pytest.mark.parametrize(
    ("functions", "sentence"),
    [
        (Functions(start=100), "finds no GPU"),
        (Functions(count=0), "finds no GPU"),
        (Functions(start=3), r"does not start \(CUDA error 3\)"),
    ],
)
def test_a_driver_without_a_gpu_is_one_sentence(functions: Functions, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence) as e:
        driver.Driver(functions)
    assert e.value.exit_code == 3


@pytest.mark.parametrize(
    ("functions", "sentence"),
    [
        (Functions(version=12080), "too old: expected one for CUDA 13.0 or newer, found one for CUDA 12.8"),
        (Functions(capability=(8, 0)), "older than the libraries' code: expected sm_90, found , sm_80"),
        (Functions(capability=(10, 0)), "of another generation than the libraries' code"),
    ],
)
def test_what_cannot_run_the_libraries_is_one_sentence(functions: Functions, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        driver.check(driver.Driver(functions).gpu, ["sm_90"], "13.0")


def test_a_full_memory_is_one_sentence() -> None:
    functions = Functions()
    functions.cuGraphLaunch = lambda graph, stream: 2  # type: ignore[method-assign]
    graph = driver.Driver(functions).stream().captured(lambda: None)
    with pytest.raises(Refusal, match="the GPU's memory is full"):
        graph.launch()
