"""PyTorch on the same GPU: the float networks, integer matrix products, and what the device reaches at best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from deploy.machine.driver import Stream
from deploy.machine.refusal import FAILURES, Refusal, sentence

from .timing import measure, rotation

PEERS = ("eager-fp32", "eager-fp16", "compile-fp16-channels-last")
_MODELS = {
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
    "mobilenetv2": ("mobilenet_v2", {}),
    "inceptionv3": ("inception_v3", {"init_weights": False, "aux_logits": False}),
}
LARGEST = 8192  # of the matrix product whose rate stands for the device's


def torch() -> Any:
    """PyTorch with a GPU.

    Raises Refusal when it is not installed or has none.
    """
    try:
        import torch as found
    except ImportError as e:
        raise Refusal(f"PyTorch cannot be imported: {sentence(e)}") from e
    if not found.cuda.is_available():
        raise Refusal("PyTorch finds no GPU")
    return found


def missing() -> str | None:
    """Why PyTorch cannot stand beside, or None."""
    try:
        torch()
    except Refusal as e:
        return str(e)
    return None


def network(
    net: str, peer: str, shape: tuple[int, ...], stream: Stream, l2: int, seconds: float = 1.0
) -> dict[str, Any]:
    """The times of torchvision's float network: launched kernel by kernel, and as a CUDA graph, as ours.

    Raises Refusal when PyTorch or torchvision is missing.
    """
    t = torch()
    try:
        import torchvision
    except ImportError as e:
        raise Refusal(f"torchvision cannot be imported: {sentence(e)}") from e
    name, options = _MODELS[net]
    t.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, **options).eval().cuda()
    half = peer != "eager-fp32"
    last = peer == "compile-fp16-channels-last"
    if half:
        model = model.half()
    if last:
        model = t.compile(model.to(memory_format=t.channels_last), dynamic=False)
    count = rotation((2 if half else 4) * int(np.prod(shape)), l2)

    def given(i: int) -> Any:
        x = t.randn(
            shape, device="cuda", generator=t.Generator("cuda").manual_seed(i), dtype=t.float16 if half else t.float32
        )
        return x.to(memory_format=t.channels_last) if last else x

    own = t.cuda.ExternalStream(stream.handle)
    with t.inference_mode(), t.cuda.stream(own):
        inputs = [given(i) for i in range(count)]
        for _ in range(3):
            model(inputs[0])
        own.synchronize()
        fields: dict[str, Any] = {
            "model": f"torchvision.models.{name}",
            "torch": t.__version__,
            "torchvision": torchvision.__version__,
            "inputs_rotated": count,
            "bytes_rotated": sum(x.numel() * x.element_size() for x in inputs),
            "cudnn_tf32": bool(t.backends.cudnn.allow_tf32),
            "launched": measure(stream, [partial(model, x) for x in inputs], seconds),
        }
        try:
            graphs, pool = [], t.cuda.graph_pool_handle()
            t.cuda.synchronize()
            for x in inputs:
                # Not `with torch.cuda.graph(...)`, which collects garbage and waits before every one of up to 128.
                graph = t.cuda.CUDAGraph()
                graph.capture_begin(pool=pool)
                try:
                    model(x)
                finally:
                    graph.capture_end()
                graphs.append(graph)
            fields["graph"] = measure(stream, [g.replay for g in graphs], seconds)
        except FAILURES as e:
            fields |= {"graph": None, "graph_error": sentence(e)}
    t.cuda.empty_cache()
    return fields


def products(shapes: Iterable[tuple[int, int, int]], stream: Stream) -> dict[str, Any]:
    """`torch._int_mm`, [m, k] times [k, n], for every (m, n, k): microseconds in a graph, or why it refuses the
    shape.
    """
    return {f"{m}x{n}x{k}": _product(m, n, k, stream) for m, n, k in shapes}


def _product(m: int, n: int, k: int, stream: Stream, repeats: int = 20) -> dict[str, Any]:
    t = torch()
    own = t.cuda.ExternalStream(stream.handle)
    with t.inference_mode(), t.cuda.stream(own):
        a = t.randint(-32, 32, (m, k), device="cuda", dtype=t.int8)
        b = t.randint(-32, 32, (n, k), device="cuda", dtype=t.int8).t()
        try:
            t._int_mm(a, b)
            own.synchronize()
            graph = t.cuda.CUDAGraph()
            with t.cuda.graph(graph):
                for _ in range(repeats):
                    t._int_mm(a, b)
            found = measure(stream, [graph.replay], seconds=0.05, warmup=0.02, most=200)
        except FAILURES as e:
            return {"error": sentence(e)}
    micros = 1000 * found["median_ms"] / repeats
    return {"us": round(micros, 3), "tops": round(2e-6 * m * n * k / micros, 2)}


def limits(stream: Stream) -> dict[str, Any]:
    """What the device reaches: int8 operations (two per multiplication) in its library's largest product, bytes
    copied per second.
    """
    fields: dict[str, Any] = {
        "int8": f"torch._int_mm of {LARGEST} x {LARGEST} x {LARGEST}, operands between -32 and 31"
    }
    best = _product(LARGEST, LARGEST, LARGEST, stream, repeats=4)
    fields |= {"int8_tops": best["tops"]} if "tops" in best else {"int8_tops": None, "int8_error": best["error"]}
    return {**fields, "memory": "a copy of 4 GiB, bytes read and written", "memory_gb_per_s": _copied(stream)}


def _copied(stream: Stream) -> float:
    """Gigabytes per second that a copy in the device's memory reads and writes."""
    t = torch()
    with t.inference_mode(), t.cuda.stream(t.cuda.ExternalStream(stream.handle)):
        source = t.ones(1 << 30, device="cuda", dtype=t.int32)  # 4 GiB
        copy = t.empty_like(source)
        found = measure(stream, [lambda: copy.copy_(source)], seconds=0.3, warmup=0.1, most=200)
    return round(2 * source.numel() * source.element_size() / found["median_ms"] / 1e6, 1)


def shapes_of(entry: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The different matrix products of an entry's 1x1 convolutions."""
    return sorted({tuple(int(v) for v in layer["matrix"]) for layer in entry["layers"] if "matrix" in layer})  # type: ignore[misc]


def versions() -> dict[str, str]:
    """PyTorch's and its parts' versions, or why they are not there."""
    try:
        import torch as found
    except ImportError as e:
        return {"torch": f"not importable: {sentence(e)}"}
    return {"torch": str(found.__version__), "torch_cuda": str(found.version.cuda), "numpy": np.__version__}
