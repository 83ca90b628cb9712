"""The names of layers: the paths of the user's modules, as far as they tell operators apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .program import QUANTIZATION, Call, Ref


def layer_names(calls: Sequence[Call], paths: Sequence[str], inputs: Sequence[str], constants: set[str]) -> list[str]:
    """One unique name per call.

    An operator alone in its module is called after the module, others after module and node.  A quantize is called
    after what it quantizes, the dequantize of a constant after the layer and the operand it is for.
    """
    own = [not c.op.startswith(QUANTIZATION) for c in calls]
    parts = [c.op == "operator.getitem" for c in calls]
    alone = Counter(path for path, is_own, part in zip(paths, own, parts, strict=True) if is_own and not part)
    names: dict[str, str] = {name: name for name in inputs}
    taken = set(inputs)

    def take(call: Call, wanted: str) -> None:
        name, count = wanted, 1
        while name in taken:
            name, count = f"{wanted}_{count}", count + 1
        taken.add(name)
        names[call.name] = name

    for call, path, is_own, part in zip(calls, paths, own, parts, strict=True):
        if is_own:
            full = f"{path}.{call.name}" if path else call.name
            take(call, path if path and alone[path] == 1 and not part else full)
    operands = {r.name: (names[c.name], role) for c in reversed(calls) for role, r in _roles(c) if c.name in names}
    stored = set(constants)
    for call, is_own in zip(calls, own, strict=True):
        if is_own:
            continue
        source = next((r.name for r in call.refs()), "")
        verb = call.op.removeprefix(QUANTIZATION).split("_per_")[0]
        if source in stored:
            stored.add(call.name)
            layer, role = operands.get(call.name, ("", ""))
            take(call, f"{layer}.{role}" if layer else call.name)
        else:
            take(call, f"{names.get(source, source)}.{verb}".replace(".quantize.dequantize", ".dequantize"))
    return [names[c.name] for c in calls]


def _roles(call: Call) -> list[tuple[str, Ref]]:
    return [(role, v) for role, v in call.arguments.items() if isinstance(v, Ref)]
