"""Encoders of I-BERT: from a folder, from a module, compared with the paper's arithmetic integer by integer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hawq_tvm as ht
from hawq_tvm.core.errors import InputError, ModelError, UsageError

from .model import CONFIG, folder, tensors
from .paper import Encoder

IDS, MASK = [3, 10, 2, 7, 5, 1], [1, 1, 1, 1, 1, 0]


def feed(ids=IDS, mask=MASK):
    return {"input_ids": np.array([ids], np.int64), "attention_mask": np.array([mask], np.int64)}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return ht.compile(folder(tmp_path_factory.mktemp("model")), shapes={"input_ids": (1, 6)})


@pytest.mark.parametrize(("ids", "mask"), [(IDS, MASK), ([4] * 6, [1] * 6), ([9, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0])])
def test_every_integer_is_the_papers(package, ids, mask):
    expected = Encoder(tensors()).run(ids, mask)
    (found,) = package.run(feed(ids, mask)).values()
    np.testing.assert_array_equal(found[0], expected)


def test_the_package_says_what_it_computes(package):
    assert package.verify(random=2).ok and package.manifest["nonlinear"] == "ibert"
    proof = package.prove()
    kinds = list(proof.nonlinear.values())
    assert proof.ok and {k: kinds.count(k) for k in sorted(set(kinds))} == {
        "I-BERT's i-GELU (A28)": 2,
        "I-BERT's i-LayerNorm (A30)": 5,
        "I-BERT's i-softmax (A29)": 2,
    }
    with pytest.raises(InputError, match=r"expected 0\.\.10"):
        package.run(feed([3, 11, 2, 7, 5, 1]))


class Encoding(torch.nn.Module):
    """A module with the tensors and the configuration of the encoder, of no class that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(**CONFIG)
        for name, value in tensors("").items():
            owner, _, leaf = name.rpartition(".")
            inner = self
            for part in owner.split("."):
                inner.add_module(part, getattr(inner, part, torch.nn.Module()))
                inner = getattr(inner, part)
            inner.register_buffer(leaf, torch.from_numpy(value))


def test_a_module_and_files_of_torch_give_the_same(package, tmp_path):
    from_module = ht.compile(Encoding(), shapes={"input_ids": (1, 6)})
    graph = package.manifest["graph_sha256"]
    (expected,), (found,) = (p.run(feed()).values() for p in (package, from_module))
    np.testing.assert_array_equal(found, expected)
    path = folder(tmp_path / "pickled")
    (path / "model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors().items()}, path / "pytorch_model.bin")
    assert ht.inspect(path, shapes={"input_ids": (1, 6)}).compilable
    assert ht.compile(path, shapes={"input_ids": (1, 6)}).manifest["graph_sha256"] == graph


def test_the_description(tmp_path):
    report = ht.inspect(folder(tmp_path / "model"))
    assert report.compilable and report.model["format"] == "I-BERT encoder"
    assert report.model["not of the encoder"] == "classifier.weight" and report.model["layers"] == 2
    assert report.model["inputs"][0]["default"] == "1x7"
    kinds = [(q["op"], q["type"]) for q in report.model["quantized"]]
    assert kinds.count(("QuantLinear", "int8")) == 12 and kinds.count(("QuantAct", "int22")) == 4
    assert kinds.count(("QuantEmbedding", "int8")) == 3 and kinds.count(("QuantAct", "int16")) == 1


def test_the_real_formulas_can_be_asked_for(tmp_path):
    package = ht.compile(folder(tmp_path / "model"), shapes={"input_ids": (1, 6)}, nonlinear="real")
    kinds = set(package.prove().nonlinear.values())
    # Its softmax rounds down, as the modules do.
    assert (
        package.verify(random=1).ok
        and package.manifest["nonlinear"] == "real"
        and not any("I-BERT" in kind for kind in kinds)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "encoder.layer.1.output.dense.bias"}, "ibert.encoder.layer.1.output.dense.bias: has no such tensor"),
        ({"zero": "encoder.layer.0.pre_output_act"}, "ibert.encoder.layer.0.pre_output_act: has no calibrated range"),
        ({"cut": "embeddings.LayerNorm.weight"}, r"LayerNorm.weight: has another shape; expected \[8\]; found \[7\]"),
        ({"nan": "encoder.layer.0.intermediate.dense.weight"}, "dense.weight: holds what is no number"),
        ({"drop": "embeddings.word_embeddings.weight"}, "has no embedding of words"),
    ],
    ids=str,
)
def test_tensors_that_are_missing_or_wrong(tmp_path, change, message):
    content = tensors()
    ((how, name),) = change.items()
    name = f"ibert.{name}"
    if how == "drop":
        del content[name]
    elif how == "zero":
        for end in ("x_min", "x_max"):
            content[f"{name}.{end}"] = np.full(1, 1e-5, np.float32)
    elif how == "cut":
        content[name] = content[name][:-1]
    else:
        content[name][0, 0] = np.nan
    path = folder(tmp_path / "model", content)
    for look in (ht.compile, ht.inspect):
        if look is ht.inspect and how != "drop":
            assert not look(path).compilable
            continue
        with pytest.raises(ModelError, match=message):
            report = look(path)
            raise ModelError(report.error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"force_dequant": "gelu"}, "computes some functions in float"),
        ({"num_attention_heads": 3}, "expected num_attention_heads, a divisor of 8; found 3"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(tmp_path, config, message):
    with pytest.raises(ModelError, match=message):
        ht.compile(folder(tmp_path / "model", **config))


def test_a_sentence_longer_than_the_positions(tmp_path):
    with pytest.raises(UsageError, match="expected at most 7 tokens; found 8"):
        ht.compile(folder(tmp_path / "model"), shapes={"input_ids": (1, 8)})


def test_a_damaged_file(tmp_path):
    path = folder(tmp_path / "model")
    for content in (b"", b"\x02\0\0\0\0\0\0\0[]", (path / "model.safetensors").read_bytes()[:-9]):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="is no file of safetensors"):
            ht.compile(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        ht.inspect(path)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError):
        ht.compile(tmp_path)
