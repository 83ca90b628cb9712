"""What to compile for: "host", a named x86-64 level, an LLVM target, or GPUs of NVIDIA's; and which CPU features the
result needs.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm.target import codegen

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.json_files import parse_json

from . import gpu as cuda
from .cpu import CPUINFO_NAMES, TILE_FEATURES, UNREPORTED, host_features, permit_tiles
from .cpu import check_host as check_host
from .cpu import prepare as prepare
from .cpu import runs_here as runs_here

_X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
_ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
# Levels of the x86-64 ABI, then families of instructions that kernels are written for.
PRESETS: dict[str, dict[str, Any]] = {
    **{level: {**_X86, "mcpu": level} for level in ("x86-64-v2", "x86-64-v3", "x86-64-v4")},
    "x86-avx2": {**_X86, "mcpu": "x86-64-v3"},
    "x86-avxvnni": {**_X86, "mcpu": "x86-64-v3", "mattr": ["+avxvnni"]},
    "x86-vnni": {**_X86, "mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
    "x86-amx": {**_X86, "mcpu": "x86-64-v4", "mattr": ["+avx512vnni", "+amx-tile", "+amx-int8"]},
    # Armv8-A; Neoverse N1, Cortex-A76 (Raspberry Pi 5) and later; Neoverse V1 and N2, Apple M2 and later. None uses
    # SVE.
    "arm-neon": {**_ARM, "mcpu": "generic", "mattr": ["+neon"]},
    "arm-dotprod": {**_ARM, "mcpu": "neoverse-n1", "mattr": ["+neon", "+dotprod"]},
    "arm-i8mm": {**_ARM, "mcpu": "neoverse-n1", "mattr": ["+neon", "+dotprod", "+i8mm"]},
}


def parse(text: str) -> tvm.target.Target:
    """The target called `text`: "host", a preset (x86-vnni, x86-64-v3, cuda-sm80, cuda, ...), "llvm -mcpu=NAME ...",
    or JSON.

    Raises UsageError for anything else.
    """
    text = text.strip()
    if text == "host":
        return host()
    if text in PRESETS:
        return tvm.target.Target(PRESETS[text])
    if text in cuda.PRESETS:
        return cuda.make(cuda.PRESETS[text])
    if text.startswith("{"):
        given = parse_json(text, "the target", "a TVM target as JSON", UsageError)
        return cuda.parse(given) if given.get("kind") == "cuda" else _llvm(given)
    kind, *options = text.split()
    if kind != "llvm":
        near = difflib.get_close_matches(text, ["host", *PRESETS, *cuda.PRESETS], 1)
        raise UsageError(
            "unknown target",
            found=text,
            expected=f"host, {', '.join([*PRESETS, *cuda.PRESETS])}, or llvm -mcpu=NAME",
            remedy=f"did you mean {near[0]}?" if near else "",
        )
    fields: dict[str, Any] = {"kind": "llvm"}
    for option in options:
        key, equals, value = option.lstrip("-").partition("=")
        if not equals or key not in ("mcpu", "mtriple", "mattr"):
            raise UsageError("unknown target option", found=option, expected="-mcpu=, -mtriple= or -mattr=")
        fields[key] = value.split(",") if key == "mattr" else value
    return _llvm(fields)


def _llvm(fields: dict[str, Any]) -> tvm.target.Target:
    if fields.get("kind") != "llvm":
        raise UsageError("unknown kind of target", found=str(fields.get("kind")), expected="llvm or cuda")
    try:
        target = tvm.target.Target(fields)
    except (tvm.error.InternalError, TypeError, ValueError) as e:
        raise UsageError("TVM refuses this target", found=str(e).splitlines()[0]) from e
    mcpu = str(fields.get("mcpu", ""))
    if mcpu and not codegen.llvm_is_valid_cpu(mcpu, fields.get("mtriple", codegen.llvm_get_system_triple())):
        raise UsageError("LLVM knows no such CPU", found=mcpu, remedy="see `llc -mcpu=help`, or use a preset")
    asked = [str(a) for a in fields.get("mattr", [])]
    _check_features(target, asked)
    hidden = sorted(UNREPORTED & set(codegen.llvm_get_cpu_features(target)))  # what the CPU's name implies
    return tvm.target.Target({**fields, "mattr": [*asked, *(f"-{f}" for f in hidden)]}) if hidden else target


def _check_features(target: tvm.target.Target, asked: Sequence[str]) -> None:
    """Refuse +FEATURE and -FEATURE that LLVM would ignore with a line on standard error for each kernel, or that no
    package may need.
    """
    plain = {k: target.attrs[k] for k in ("mcpu", "mtriple") if target.attrs.get(k, None)}
    for one in asked:
        sign, name = one[:1], one[1:]
        with _silence():  # the only way to ask LLVM whether it knows a name
            known = sign in ("+", "-") and name in codegen.llvm_get_cpu_features(
                tvm.target.Target({"kind": "llvm", **plain, "mattr": [f"+{name}"]})
            )
        if not known:
            every = {
                f
                for cpu in codegen.llvm_get_cpu_archlist(target)
                for f in codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", **plain, "mcpu": cpu}))
            }
            near = difflib.get_close_matches(name or one, sorted(every), 1)
            raise UsageError(
                "LLVM knows no such feature",
                where="-mattr",
                found=one,
                expected="+NAME or -NAME",
                remedy=f"did you mean {sign if sign in '+-' else '+'}{near[0]}?" if near else "see `llc -mattr=help`",
            )
        if sign == "+" and name in UNREPORTED:
            raise UsageError(
                "Linux does not tell whether a processor has this, so no package may need it",
                where="-mattr",
                found=name,
                remedy="leave it out",
            )


@contextmanager
def _silence() -> Iterator[None]:
    """Standard error of this process closed, for libraries that write to it themselves."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def host() -> tvm.target.Target:
    """This machine: exactly the features that its kernel reports and grants, and the CPU's name that is nearest to
    them.
    """
    return of_cpu(codegen.llvm_get_system_cpu(), host_features(), lambda: permit_tiles() is None)


def of_cpu(mcpu: str, features: Iterable[str], tiles: Callable[[], bool], mtriple: str = "") -> tvm.target.Target:
    """A machine that has `features` and whose CPU LLVM calls `mcpu`, which tells how to tune code for it and may be
    an older CPU's.

    tiles: asks for AMX's tile registers, whether they are granted.  mtriple: where it is another machine than this one.
    """
    fields: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu, **({"mtriple": mtriple} if mtriple else {})}
    architecture_ = architecture(tvm.target.Target(fields))
    known, given = set(CPUINFO_NAMES.get(architecture_, {})), set(features)
    # What depends on a feature that is not there, is not there either; the tile registers come together.
    have = {f for f in known & given if _implied(fields, f) & known <= given}
    if have & TILE_FEATURES and not ({"amx-tile", "amx-int8"} <= have and tiles()):
        have -= TILE_FEATURES
    fields["mcpu"] = _nearest(fields, have)
    named = set(codegen.llvm_get_cpu_features(tvm.target.Target(fields)))
    more, less = have - named, named & (known | UNREPORTED) - have
    changes = [*(f"+{f}" for f in sorted(more)), *(f"-{f}" for f in sorted(less))]
    return tvm.target.Target({**fields, "mattr": changes} if changes else fields)


# CPUs from which the nearest to a machine is taken, by maker, in order of age; the levels of the ABI where the maker is
# not known.
_FAMILIES = (
    (
        "nehalem",
        "sandybridge",
        "ivybridge",
        "haswell",
        "broadwell",
        "skylake",
        "skylake-avx512",
        "cascadelake",
        "cooperlake",
        "cannonlake",
        "icelake-client",
        "icelake-server",
        "tigerlake",
        "rocketlake",
        "alderlake",
        "sapphirerapids",
        "graniterapids",
    ),
    ("znver1", "znver2", "znver3", "znver4", "znver5"),
    ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4"),
)


def _nearest(fields: Mapping[str, Any], have: set[str]) -> str:
    """The name of the CPU in `fields`, or, if the machine has what that CPU has not, the nearest of the same maker.

    A hypervisor may give a machine the name of an older CPU; that it hides features of the right one changes no name.
    """

    def named(mcpu: str) -> set[str]:
        return set(codegen.llvm_get_cpu_features(tvm.target.Target({**fields, "mcpu": mcpu})))

    mcpu, known = str(fields["mcpu"]), set(CPUINFO_NAMES["x86_64"])
    if architecture(tvm.target.Target(dict(fields))) != "x86_64" or ("64bit" in named(mcpu) and have <= named(mcpu)):
        return mcpu
    levels = _FAMILIES[-1]
    family = next(
        (f for f in _FAMILIES if mcpu in f), (mcpu,) if "64bit" in named(mcpu) and mcpu != "generic" else levels
    )
    return min(family, key=lambda name: (len(named(name) & known ^ have), name != mcpu))


def _implied(fields: Mapping[str, Any], feature: str) -> set[str]:
    """What a feature means to LLVM: itself, and all that it depends on, beyond the least CPU of its architecture."""
    least = {**fields, "mcpu": "x86-64" if feature in CPUINFO_NAMES["x86_64"] else "generic"}
    more = tvm.target.Target({**least, "mattr": [f"+{feature}"]})
    return set(codegen.llvm_get_cpu_features(more)) - set(codegen.llvm_get_cpu_features(tvm.target.Target(least)))


def _cpu(target: tvm.target.Target) -> tvm.target.Target:
    """The CPU that a library for `target` runs on, or that launches its kernels."""
    return target.host if cuda.is_cuda(target) else target


def architecture(target: tvm.target.Target) -> str:
    """The CPU's instruction set, as `platform.machine()` names it."""
    triple = str(_cpu(target).attrs.get("mtriple", "")) or codegen.llvm_get_system_triple()
    machine = triple.split("-")[0]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def gpu_architectures(target: tvm.target.Target) -> tuple[str, ...]:
    """The GPU architectures that a library for `target` holds code for; none for a CPU."""
    return cuda.architectures(target) if cuda.is_cuda(target) else ()


def required_features(target: tvm.target.Target) -> list[str]:
    """The CPU's instruction set extensions (LLVM's names) that code for `target` may use."""
    known = CPUINFO_NAMES.get(architecture(target), {})
    return sorted(set(codegen.llvm_get_cpu_features(_cpu(target))) & set(known))


def required_flags(target: tvm.target.Target) -> list[str]:
    """The same extensions as Linux calls them in /proc/cpuinfo, for programs that do not know LLVM's names."""
    return sorted(CPUINFO_NAMES.get(architecture(target), {})[f] for f in required_features(target))


def describe(target: tvm.target.Target) -> dict[str, Any]:
    """JSON-ready description, from which `parse` makes the same target again."""
    if cuda.is_cuda(target):
        return cuda.describe(target)
    fields: dict[str, Any] = {"kind": "llvm"}
    for key in ("mcpu", "mtriple"):
        if target.attrs.get(key, None):
            fields[key] = str(target.attrs[key])
    if target.attrs.get("mattr", None):
        fields["mattr"] = [str(a) for a in target.attrs["mattr"]]
    return fields


def text(stored: Mapping[str, Any]) -> str:
    """The target of a manifest in a few words."""
    if stored["kind"] == "cuda":
        return f"cuda {', '.join(stored['architectures'])}, launched by {stored['architecture']} {stored['mcpu']}"
    same = [name for name, p in PRESETS.items() if all(p.get(k) == stored.get(k) for k in ("mcpu", "mattr", "mtriple"))]
    return f"{stored['architecture']} {stored.get('mcpu', '')}" + (
        f" ({same[0]})" if same and same[0] != stored.get("mcpu") else ""
    )
