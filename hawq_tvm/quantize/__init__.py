"""From a float network to bits per layer and to a quantized model.

Its graph in torch, calibration data, sensitivities, latencies, budgets, rounding:

    from hawq_tvm import quantize
    problem = quantize.problem(exported_program, "calibration.npz", budgets=["bops=0.5", "size=6.7MB"])
    allocation = problem.allocate(["bops=0.5", "size=6.7MB"])      # allocation.assignment: layer -> "W4A8"
    recipe = quantize.Recipe("bits.json", effort="best")
    found = quantize.post_training("float.onnx", "calibration.npz", recipe)
    onnx.save(found.model, "quantized.onnx")                       # found.layers: how every layer was quantized
    found = quantize.finetune("float.onnx", "train.npz", quantize.Recipe("W4A4"), quantize.Training(epochs=2))
    smaller = quantize.prune("float.onnx", "calibration.npz", quantize.Pruning(("macs=60%",)))
    pixels = quantize.Preprocess((127.0,), (128.0,))
    quantize.evaluate("quantized.onnx", "pictures", preprocess=pixels, against="float.onnx")
    quantize.compare_fake("quantized.onnx", "quantized.hawq", "pictures.npz", real="float.onnx").to_dict()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "Budget",
    "Preprocess",
    "Pruning",
    "Recipe",
    "Settings",
    "Training",
    "compare_fake",
    "evaluate",
    "finetune",
    "load_float",
    "measure",
    "measure_latencies",
    "open_data",
    "post_training",
    "problem",
    "problem_of_table",
    "prune",
]

if TYPE_CHECKING:
    from hawq_tvm.quantize.allocate.budgets import Budget
    from hawq_tvm.quantize.allocate.latency import measure_latencies
    from hawq_tvm.quantize.allocate.measurement import measure
    from hawq_tvm.quantize.allocate.plan import problem, problem_of_table
    from hawq_tvm.quantize.allocate.sensitivity import Settings
    from hawq_tvm.quantize.judge.evaluation import evaluate
    from hawq_tvm.quantize.judge.fake_comparison import compare_fake
    from hawq_tvm.quantize.network.data import open_data
    from hawq_tvm.quantize.network.load import load_float
    from hawq_tvm.quantize.network.pictures import Preprocess
    from hawq_tvm.quantize.prune.pruner import Pruning, prune
    from hawq_tvm.quantize.ptq.quantizer import post_training
    from hawq_tvm.quantize.ptq.recipe import Recipe
    from hawq_tvm.quantize.qat.training import Training, finetune

_HOMES = {
    "Budget": "allocate.budgets",
    "Settings": "allocate.sensitivity",
    "load_float": "network.load",
    "measure": "allocate.measurement",
    "measure_latencies": "allocate.latency",
    "open_data": "network.data",
    "problem": "allocate.plan",
    "problem_of_table": "allocate.plan",
    "Preprocess": "network.pictures",
    "evaluate": "judge.evaluation",
    "Recipe": "ptq.recipe",
    "post_training": "ptq.quantizer",
    "Pruning": "prune.pruner",
    "prune": "prune.pruner",
    "Training": "qat.training",
    "finetune": "qat.training",
    "compare_fake": "judge.fake_comparison",
}


def __getattr__(name: str) -> Any:
    """Load on first use: torch and SciPy are imported by what needs them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hawq_tvm.quantize' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
