"""What is refused, and with which sentence: files, tensors, networks and bit configurations."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import HawqError, ModelError, UsageError
from hawq_tvm.frontend.formats import frontend_of
from hawq_tvm.frontend.hawq import hawq_checkpoint, import_checkpoint, read_model
from hawq_tvm.frontend.hawq.bits import with_activations
from hawq_tvm.frontend.hawq.networks import NAMES, network
from hawq_tvm.frontend.hawq.schemes import four_bit_layers, schemes

from ...models import residual_net
from ...quantize.published import RESNET18_IN_4_BITS
from .fake_quant import float_network, torch

Content = dict[str, dict[str, Any]]


def uniform(name: str, bits: int = 8) -> Content:
    """A checkpoint of constants, which takes no room: every weight is the greatest of its width."""
    sections: Content = {
        k: {}
        for k in ("convbn_scaling_factor", "fc_scaling_factor", "weight_integer", "bias_integer", "act_scaling_factor")
    }
    net = network(name)
    for w in net.weighted:
        shape = [1000 if d is None else d for d in w.shape]
        greatest = 127.0 if w.fixed or bits == 8 else 7.0
        sections["weight_integer"][f"module.{w.layer}.weight_integer"] = torch.full((1,), greatest).expand(shape)
        if w.scale in sections:
            sections[w.scale][f"module.{w.layer}.{w.scale}"] = torch.full((1,), 0.01).expand(shape[:1])
        if w.bias:
            sections["bias_integer"][f"module.{w.layer}.bias_integer"] = torch.full((1,), 5.0).expand(shape[:1])
    for a in net.acts:
        sections["act_scaling_factor"][f"module.{a.layer}.act_scaling_factor"] = torch.tensor([0.05])
    return sections


def stored(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def refused(content: Any, kind: type[HawqError] = ModelError, **options: Any) -> Any:
    with pytest.raises(kind) as caught:
        read_model(hawq_checkpoint(content if isinstance(content, bytes) else stored(content), **options))
    assert caught.value.where and caught.value.message
    return caught.value


# -- files ---------------------------------------------------------------------------------------------------


class Stranger:
    """What a pickle would need code for."""


def test_files_with_code_are_not_opened() -> None:
    error = refused({**uniform("resnet18"), "optimizer": Stranger()})
    assert "pickled code" in error.message and "Stranger" in error.found and "torch.save" in error.remedy


def test_files_of_others() -> None:
    assert "none of HAWQ" in refused(torch.nn.Linear(2, 2).state_dict()).message
    assert "none of HAWQ" in refused([1, 2]).message
    error = refused({"state_dict": {"module.quant_input.act_scaling_factor": torch.ones(1)}})
    assert "no integer weights" in error.message and "quant_train.py" in error.remedy
    assert (
        "not known here" in refused({"weight_integer": {"module.conv1.weight_integer": torch.ones(1, 1, 1, 1)}}).message
    )
    assert "no plain tensor" in refused({"weight_integer": {"module.conv1.weight_integer": 3}}).message


def test_truncated_file() -> None:
    with pytest.raises(ModelError):
        ht.inspect(stored(uniform("mobilenetv2_w1"))[:5000])


def test_files_of_old_pytorch(tmp_path: Path) -> None:
    path = tmp_path / "quantized_checkpoint.pth.tar"
    path.write_bytes(stored(uniform("resnet18"), _use_new_zipfile_serialization=False))
    assert frontend_of(path).describe(path)["network"] == "resnet18"


# -- tensors -------------------------------------------------------------------------------------------------

CONV = "stage2.unit1.quant_convbn1"


def changed(change: Callable[[Content], object], name: str = "resnet18") -> Content:
    content = uniform(name)
    change(content)
    return content


def of(section: str, value: Any, layer: str = CONV) -> Callable[[Content], object]:
    """Another tensor, or none, in a section."""
    key = f"module.{layer}.{section}"

    def change(content: Content) -> None:
        if value is None:
            del content[section][key]
        else:
            content[section][key] = torch.as_tensor(value)

    return change


@pytest.mark.parametrize(
    ("section", "value", "layer", "says", "found"),
    [
        ("weight_integer", None, CONV, "missing", "bias_integer"),
        ("bias_integer", None, CONV, "missing", "weight_integer"),
        ("convbn_scaling_factor", None, CONV, "missing", "weight_integer"),
        ("fc_scaling_factor", None, "quant_output", "missing", "bias_integer"),
        ("act_scaling_factor", None, "stage1.unit1.quant_act", "missing", "nothing"),
        ("weight_integer", np.full((128, 64, 1, 3), 127.0), CONV, "wrong shape", "128x64x1x3"),
        ("bias_integer", np.zeros(64), CONV, "wrong shape", "64"),
        ("convbn_scaling_factor", np.full(64, 0.1), CONV, "wrong shape", "64"),
        ("weight_integer", np.full((128, 64, 3, 3), 126.5), CONV, "not integers", "126.5"),
        ("weight_integer", np.full((128, 64, 3, 3), np.nan), CONV, "not integers", "nan"),
        ("weight_integer", np.full((128, 64, 3, 3), 129.0), CONV, "out of range", "129"),
        ("bias_integer", np.full(128, 2.0**33), CONV, "out of range", "8.58993e+09"),
        ("convbn_scaling_factor", np.zeros(128), CONV, "no scale", "0"),
        ("act_scaling_factor", np.array([-0.5]), "stage1.unit1.quant_act", "no scale", "-0.5"),
        ("act_scaling_factor", np.array([0.1]), "stage1.unit1.quant_act", "no scale", "0.1"),
        ("act_scaling_factor", np.array([np.inf]), "stage1.unit1.quant_act", "no scale", "inf"),
    ],
)
def test_wrong_tensors(section: str, value: Any, layer: str, says: str, found: str) -> None:
    error = refused(changed(of(section, value, layer)))
    assert (
        error.where == f"{layer}.{section}"
        and says in error.message
        and found in error.found
        and error.expected
        and error.remedy
    )


def test_layers_of_another_network() -> None:
    content = changed(of("act_scaling_factor", np.float32([0.5]), "stage9.unit1.quant_act"))
    error = refused(content)
    assert error.found == "stage9.unit1.quant_act" and "--network" in error.remedy


def test_mobilenet_needs_the_last_scale() -> None:
    """HAWQ writes no scale of its last convolution into the file for deployment; what trained has it, and any
    section may.
    """
    content = uniform("mobilenetv2_w1")
    error = refused(content)
    assert error.where == "output.conv_scaling_factor" and "checkpoint.pth.tar" in error.remedy
    content["fc_scaling_factor"]["module.output.conv_scaling_factor"] = torch.full((1000,), 0.01)
    assert read_model(stored(content)).net.name == "mobilenetv2_w1"


# -- networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_recognised(name: str) -> None:
    content = uniform(name)
    if name == "mobilenetv2_w1":
        content["act_scaling_factor"]["module.output.conv_scaling_factor"] = torch.full((1000,), 0.01)
    if name in ("resnet50", "resnet50b"):
        error = refused(content)
        assert "resnet50 and resnet50b" in error.message and "--network resnet50" in error.remedy
        assert read_model(hawq_checkpoint(stored(content), network=name)).net.name == name
        content |= {"arch": name}  # type: ignore[dict-item]
    assert read_model(stored(content)).net.name == name


def test_unknown_networks() -> None:
    assert "mobilenetv2_w1" in refused(uniform("resnet18"), UsageError, network="resnet34").expected
    assert refused(uniform("resnet18"), network="resnet50").found


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_are_those_of_pytorchcv(name: str) -> None:
    """Layers, shapes, strides, padding and groups, in order, against the float networks; ResNet's shortcut comes
    first there, last here.
    """
    modules = [
        (k, m) for k, m in float_network(name).named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    if name.startswith("resnet"):
        at = {k.rpartition(".identity_conv")[0]: (k, m) for k, m in modules if "identity_conv" in k}
        last = {"resnet18": "conv2.conv"}.get(name, "conv3.conv")
        modules = [
            x
            for k, m in modules
            if "identity_conv" not in k
            for x in (
                (k, m),
                *([at[k.rpartition(".body")[0]]] if k.endswith(last) and k.rpartition(".body")[0] in at else []),
            )
        ]
    layers = network(name).weighted
    assert len(layers) == len(modules)
    for ours, (title, theirs) in zip(layers, modules, strict=True):
        assert tuple(s or 1000 for s in ours.shape) == tuple(theirs.weight.shape), title
        if isinstance(theirs, torch.nn.Conv2d):
            assert (ours.stride, ours.stride, *ours.padding, ours.groups) == (
                *theirs.stride,
                *theirs.padding,
                theirs.groups,
            ), title


# -- bits ----------------------------------------------------------------------------------------------------


def configuration(name: str = "resnet18", bits: int = 8) -> dict[str, Any]:
    net = network(name)
    return with_activations(net, {w.layer: 8 if w.fixed else bits for w in net.weighted})


def test_bits_told_by_the_weights() -> None:
    second = "stage2.unit1.quant_convbn2"
    model = read_model(stored(changed(of("weight_integer", np.full((128, 128, 3, 3), -8.0), second))))
    assert (
        model.bits[second] == model.bits["stage2.unit1.quant_act1"] == 4
        and model.bits[CONV] == 8
        and "weights" in model.origin
    )


def test_shared_activations_need_a_configuration() -> None:
    """The shortcut reads what the block's first convolution reads: of different widths, nothing tells the
    activation's.
    """
    content = changed(of("weight_integer", np.full((128, 64, 3, 3), 7.0)))
    error = refused(content)
    assert error.where == "stage2.unit1.quant_act" and "--bits" in error.remedy
    given = configuration() | {CONV: 4}
    assert read_model(hawq_checkpoint(stored(content), bits=given)).bits["stage2.unit1.quant_act"] == 8
    error = refused(changed(of("weight_integer", np.full((128, 64, 3, 3), 50.0))))
    assert error.where == f"{CONV}.weight_integer" and error.found == "50"


def test_configurations_that_do_not_fit_the_weights() -> None:
    error = refused(uniform("resnet18", 4), bits="uniform8")
    assert (
        "not quantized to the 8 bits" in error.message
        and error.where == "stage1.unit1.quant_convbn1.weight_integer"
        and error.found == "7"
    )
    error = refused(uniform("resnet18", 8), bits="uniform4")
    assert "does not fit the 4 bits" in error.message and error.expected == "-8 to 7" and error.found == "127 to 127"
    assert read_model(
        hawq_checkpoint(stored(uniform("resnet18", 4)), bits="bit_config_resnet18_uniform4")
    ).bits == configuration(bits=4)


def test_configurations_as_hawq_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text(json.dumps(configuration() | {"quant_input": [8, "hook"], f"{CONV}.conv": 8, f"{CONV}.bn": 8}))
    model = read_model(hawq_checkpoint(stored(uniform("resnet18")), bits=path))
    assert model.bits == configuration() and model.origin == str(path)


@pytest.mark.parametrize(
    ("change", "says", "found"),
    [
        ({"stage1.unit1.quant_convbm1": 8}, "does not have", "stage1.unit1.quant_convbm1"),
        ({CONV: 9}, "out of range", "9"),
        ({CONV: True}, "out of range", "True"),
        ({CONV: "8"}, "out of range", "8"),
        ({"quant_input": 17}, "out of range", "17"),
        ({"quant_input": []}, "out of range", "[]"),
    ],
)
def test_wrong_configurations(change: dict[str, Any], says: str, found: str) -> None:
    error = refused(uniform("resnet18"), UsageError, bits=configuration() | change)
    assert says in error.message and error.found == found and error.expected


def test_wrong_configuration_files(tmp_path: Path) -> None:
    content = stored(uniform("resnet18"))
    path = tmp_path / "bits.json"
    assert "cannot be read" in refused(content, UsageError, bits=str(path)).message
    for text, says in (("{", "is no JSON"), ("[1]", "no bit configuration"), ("{}", "every layer")):
        path.write_text(text)
        assert says in refused(content, UsageError, bits=str(path)).message
    error = refused(content, UsageError, bits="uniform5")
    assert "uniform8, uniform4, modelsize_0.75" in error.expected


def test_schemes_are_the_published_ones() -> None:
    net = network("resnet18")
    inner = [w.layer for w in net.weighted if not w.fixed]
    for key, numbers in RESNET18_IN_4_BITS.items():
        found = four_bit_layers(net, key.replace("size", "modelsize").replace("=", "_"))
        assert found == {inner[n - 1] for n in numbers}, key
    for name in NAMES:
        net = network(name)
        for scheme in schemes(net):
            four = four_bit_layers(net, scheme)
            assert four is not None and with_activations(
                net, {w.layer: 4 if w.layer in four else 8 for w in net.weighted}
            )
    assert [len(schemes(network(n))) for n in NAMES] == [11, 11, 2, 2, 4, 2]


# -- inspect and the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "quantized_checkpoint.pth.tar"
    torch.save(uniform("resnet18", 4), path)
    assert main(["inspect", str(path), "--shape", "input=1x3x32x32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = report["model"]
    assert report["compilable"] and model["network"] == "resnet18" and model["inputs"][0]["default"] == "1x3x224x224"
    kinds = {q["name"]: q["type"] for q in model["quantized"]}
    assert (kinds["stage1.unit1.quant_act"], kinds[CONV], kinds["quant_output"], kinds["quant_act_int32"]) == (
        "uint4",
        "int4",
        "int8",
        "int16",
    )
    assert main(["inspect", str(path), "--bits", "uniform8"]) == 3
    assert main(["inspect", str(path), "--network", "resnet19"]) == 2
    assert main(["inspect", str(path), "--shape", "x=1x3x32x32"]) == 2


def test_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    path, package = tmp_path / "tiny.onnx", tmp_path / "p.hawq"
    onnx.save(residual_net(), str(path))
    assert main(["compile", str(path), "-o", str(package), "--network", "resnet18", "--quiet"]) == 2
    assert "--network and --bits are for HAWQ checkpoints" in capsys.readouterr().err
    torch.save(uniform("resnet50"), tmp_path / "c.pth.tar")
    assert main(["compile", str(tmp_path / "c.pth.tar"), "-o", str(package), "--quiet"]) == 3
    assert "resnet50b" in capsys.readouterr().err and not package.exists()


def test_shapes() -> None:
    content = stored(uniform("resnet18"))
    for shape in ((1, 1, 32, 32), (1, 3, 32)):
        with pytest.raises(UsageError):
            import_checkpoint(content, {"input": shape})
    assert [int(d) for d in import_checkpoint(content)["main"].params[0].ty.shape.values] == [1, 3, 224, 224]
    with pytest.raises(ModelError, match="shape"):
        import_checkpoint(stored(uniform("inceptionv3")), {"input": (1, 3, 40, 40)})
