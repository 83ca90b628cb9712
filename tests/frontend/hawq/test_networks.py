"""HAWQ's networks against a reimplementation of its training side: every quantizer's integers and the classes,
exactly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

import hawq_tvm as ht
from hawq_tvm.core import stages
from hawq_tvm.frontend.hawq import import_checkpoint
from hawq_tvm.frontend.hawq.bits import with_activations
from hawq_tvm.frontend.hawq.networks import network
from hawq_tvm.frontend.hawq.schemes import four_bit_layers
from hawq_tvm.verify.compare import layer_calls
from hawq_tvm.verify.reference import evaluate

from ...models import needs_time
from ...oracle import integer_module
from .fake_quant import FakeQuant, checkpoint, float_network, torch, train_norms, trained, training_checkpoint


def scheme(name: str, which: str) -> dict[str, int]:
    net = network(name)
    four = four_bit_layers(net, which)
    assert four is not None
    return with_activations(net, {w.layer: 4 if w.layer in four else 8 for w in net.weighted})


def saved(f: FakeQuant, name: str, path: Path) -> Path:
    """The checkpoint in the layout that says everything: HAWQ's own for deployment leaves MobileNetV2's last scale
    out.
    """
    torch.save(training_checkpoint(f, name) if name.startswith("mobilenet") else checkpoint(f), path)
    return path


def wanted(f: FakeQuant) -> dict[str, np.ndarray]:
    """The integers of the last run under our layers' names: of ResNet's stem HAWQ quantizes the maxima, and we take
    the maxima of integers.
    """
    stem = {"quant_act_int32": "pool"} if "quant_output" in f.layers else {}
    return {stem.get(k, k): v for k, v in f.integers().items()}


def compare(module: tvm.IRModule, f: FakeQuant, image: np.ndarray) -> tuple[int, int]:
    """Elements compared, and how many differ, over every quantizer and pool and the classes of one INTEGER module."""
    classes = f(image)
    found: dict[str, Any] = {}
    output = evaluate(module, {"input": image}, lambda layer, value: found.__setitem__(layer, value))["output"]
    elements = different = 0
    for layer, integers in [*wanted(f).items(), ("classes", classes)]:
        ours = output if layer == "classes" else found[layer]
        assert ours.shape == integers.shape, layer
        elements, different = elements + ours.size, different + int((ours != integers).sum())
    return elements, different


@pytest.fixture(scope="module")
def resnet18() -> tuple[FakeQuant, np.ndarray, tvm.IRModule]:
    """ResNet-18 in HAWQ's mixed scheme for half of the bit operations, on 32 pixels."""
    f, image = trained("resnet18", scheme("resnet18", "bops_0.5"), 32)
    module = import_checkpoint(_bytes(checkpoint(f)), {"input": (1, 3, 32, 32)})
    return f, image, integer_module(module)


def _bytes(content: Any) -> bytes:
    import io

    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.slow
def test_mixed_bits_layer_by_layer(resnet18: tuple[FakeQuant, np.ndarray, tvm.IRModule]) -> None:
    f, image, module = resnet18
    assert {4, 8} == {w.bits for w in f.layers.values()}
    elements, different = compare(module, f, image[:1])
    assert (elements, different) == (elements, 0) and elements > 50_000
    assert not any(q.beyond for q in f.quantizers.values())


def test_sums_saturate_at_16_bits(resnet18: tuple[FakeQuant, np.ndarray, tvm.IRModule]) -> None:
    """HAWQ lets sums run past their 16 bits, here they saturate at 2^16 - 1, twice the calibrated range: images far
    outside of it show that.
    """
    f, image, module = resnet18
    between = np.float32(1.3) * image[:1]
    assert compare(module, f, between)[1] == 0
    assert any(q.integers.max() >= 2**15 for q in f.quantizers.values()) and not any(
        q.beyond for q in f.quantizers.values()
    )
    bright = np.float32(8) * image[:1]
    assert compare(module, replace(f, saturate=True), bright)[1] == 0
    elements, different = compare(module, f, bright)
    beyond = sum(q.beyond for q in f.quantizers.values())
    print(
        f"\nimages 8 times as bright as those of the calibration: {beyond} sums beyond 16 bits, {different} of"
        f" {elements} elements differ from HAWQ"
    )
    assert beyond > 0 and different > 0


def test_float32_of_the_training_side(resnet18: tuple[FakeQuant, np.ndarray, tvm.IRModule]) -> None:
    """HAWQ carries real numbers in float32, whose sums reach 24 bits: what that alone changes against the exact
    integers.
    """
    f, image, module = resnet18
    elements, different = compare(module, replace(f, real=torch.float32), image[:1])
    print(f"\nHAWQ in float32: {different} of {elements} elements differ from exact integers")
    assert different <= elements // 1000


@pytest.mark.slow
def test_dead_channels() -> None:
    """Channels whose BatchNorm training left at zero, or nearly: HAWQ gives them scales of 1e-10 and biases of 2^31,
    one past int32.
    """
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    net = float_network("resnet18")
    train_norms(net, image)
    body = net.features.stage2.unit1.body
    with torch.no_grad():
        for norm, channel, gamma, beta in (
            (body.conv1.bn, 3, 0.0, 0.3),
            (body.conv1.bn, 4, 0.0, -0.3),
            (body.conv2.bn, 5, 0.0, 0.3),
            (body.conv2.bn, 6, 2e-8, -0.3),
        ):
            norm.weight[channel], norm.bias[channel] = gamma, beta
    f = FakeQuant(scheme("resnet18", "uniform8"), net)
    f(image)
    assert [float(b) for b in f.layers["stage2.unit1.quant_convbn2"].bias[5:7]] == [2.0**31, -(2.0**31)]
    assert f.layers["stage2.unit1.quant_convbn2"].integers[6].abs().max() > 0
    module = import_checkpoint(_bytes(checkpoint(f)), {"input": (1, 3, 32, 32)})
    assert compare(integer_module(module), f.frozen(), image[:1])[1] == 0


def test_integers_only(resnet18: tuple[FakeQuant, np.ndarray, tvm.IRModule]) -> None:
    _, _, module = resnet18
    rounding = {
        str(b.value.attrs["rounding"])
        for b in stages.bindings(module["main"])
        if str(getattr(getattr(b.value, "op", None), "name", "")) == "hawq.requantize"
    }
    # Half to even is kept where a tie is within reach; the pool's cut is a rounding of its shifted sum.
    assert rounding <= {"half_up", "half_even"}


# Small images that leave something of every map, and no map as wide as it has channels: its layout could not be told.
CASES = [
    ("resnet18", "uniform8", 48),
    ("resnet18", "uniform4", 32),
    ("resnet18", "bops_0.5", 64),
    ("resnet50", "bops_0.5", 32),
    ("mobilenetv2_w1", "bops_0.5", 36),
    ("mobilenetv2_w1", "uniform4", 36),
    ("inceptionv3", "uniform4", 75),
]
USUAL = {("resnet18", "bops_0.5"), ("mobilenetv2_w1", "bops_0.5")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "which", "pixels"), CASES, ids=lambda v: str(v))
def test_compiled(name: str, which: str, pixels: int, tmp_path: Path) -> None:
    """The library's own kernels: what each writes that HAWQ has a name for, and the classes; then our own
    verification and proof.
    """
    needs_time((name, which) in USUAL)
    f, image = trained(name, scheme(name, which), pixels, seed=1)
    path = saved(f, name, tmp_path / "quantized_checkpoint.pth.tar")
    shape = {"input": (1, 3, pixels, pixels)}
    package = ht.compile(ht.hawq_checkpoint(path, network=name if "50" in name else None, bits=which), shapes=shape)
    elements = layers = 0
    for x in (image[:1], image[1:], np.float32(1.2) * image[:1]):
        classes = f(x)
        run = package.run_layers({"input": x})
        assert run.outputs["output"].dtype == np.float32 and np.array_equal(run.outputs["output"], classes)
        integers = wanted(f)
        for call, value in zip(layer_calls(package.graph), run.layers, strict=True):
            want = integers.get(call.var.name)
            if want is not None and not isinstance(value, tuple):
                want = want.transpose(0, 2, 3, 1) if want.shape != value.shape and want.ndim == 4 else want
                assert np.array_equal(value, want), call.var.name
                elements, layers = elements + want.size, layers + 1
    print(
        f"\n{name} {which}, {pixels} pixels: {elements} elements of {layers // 3} layers equal HAWQ's integers on three"
        " images"
    )
    assert not any(q.beyond for q in f.quantizers.values())
    assert layers // 3 >= len(f.quantizers) // 2
    assert package.verify({"input": image[:1]}).ok and package.prove().ok
