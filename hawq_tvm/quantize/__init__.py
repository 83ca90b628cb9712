"""From a float network to bits per layer and to a quantized model: its graph in torch, calibration data, sensitivities, latencies, budgets, rounding.

    from hawq_tvm import quantize
    problem = quantize.problem(exported_program, "calibration.npz", quantize.Settings(probes=64))
    allocation = problem.allocate(["bops=0.5", "size=6.7MB"])      # allocation.assignment: layer -> "W4A8"
    found = quantize.post_training("float.onnx", "calibration.npz", quantize.Recipe("bits.json", adaround=500, correct_bias=True))
    onnx.save(found.model, "quantized.onnx")                       # found.layers: how every layer was quantized
    found = quantize.finetune("float.onnx", "train.npz", quantize.Recipe("W4A4"), quantize.Training(epochs=2))
    quantize.evaluate("quantized.onnx", "pictures", preprocess=quantize.Preprocess((127.0,), (128.0,)), against="float.onnx")
    quantize.compare_fake("quantized.onnx", "quantized.hawq", "pictures.npz", real="float.onnx").to_dict()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "Budget", "Preprocess", "Recipe", "Settings", "Training", "compare_fake", "evaluate", "finetune", "load_float", "measure", "measure_latencies", "open_data", "post_training", "problem",
    "problem_of_table",
]  # fmt: skip

if TYPE_CHECKING:
    from .data import open_data
    from .evaluation import evaluate
    from .fake_comparison import compare_fake
    from .float_graph import load_float
    from .latency import measure_latencies
    from .measurement import measure
    from .pictures import Preprocess
    from .plan import problem, problem_of_table
    from .quantizer import Recipe, post_training
    from .sensitivity import Settings
    from .table import Budget
    from .training import Training, finetune

_HOMES = {
    "Budget": "table", "Settings": "sensitivity", "load_float": "float_graph", "measure": "measurement", "measure_latencies": "latency",
    "open_data": "data", "problem": "plan", "problem_of_table": "plan", "Preprocess": "pictures",
    "evaluate": "evaluation", "Recipe": "quantizer",
    "post_training": "quantizer", "Training": "training", "finetune": "training", "compare_fake": "fake_comparison",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load on first use: torch and SciPy are imported by what needs them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hawq_tvm.quantize' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
