"""`--target host` on other machines: what their kernels report in /proc/cpuinfo decides, whatever name LLVM has for the CPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tvm
from tvm.target import codegen

from hawq_tvm import cpu, pipeline, stages, target
from hawq_tvm.errors import UsageError
from schedules.layer import Layer
from schedules.rule import choose
from schedules.rules import rules_for

from ..models import Graph, float_output

CPUINFO = Path(__file__).parent / "cpuinfo"
SPR = "sapphirerapids"
# The machine, LLVM's name of its CPU (by family and model, which a hypervisor sets), the name that code is tuned for, how that name's features
# are changed, and the rule that makes a convolution of 64 channels.
MACHINES = (
    ("skylake-client", "skylake", "skylake", (), "cpu.contract"),
    ("skylake-sp", "skylake-avx512", "skylake-avx512", (), "cpu.contract"),
    ("cascade-lake", "cascadelake", "cascadelake", (), "x86.vnni"),
    ("ice-lake", "icelake-server", "icelake-server", (), "x86.vnni"),
    ("sapphire-rapids", SPR, SPR, (), "x86.amx"),
    ("sapphire-rapids-called-skylake", "cooperlake", SPR, (), "x86.amx"),
    ("sapphire-rapids-called-skylake", "skylake-avx512", SPR, (), "x86.amx"),
    ("sapphire-rapids-called-cascadelake", "cascadelake", "cascadelake", ("+amx-int8", "+amx-tile"), "x86.amx"),
    ("sapphire-rapids-no-avx512-fp16", "icelake-server", SPR, ("-amx-bf16", "-avx512fp16"), "x86.amx"),
    ("granite-rapids", "graniterapids", "graniterapids", (), "x86.amx"),
    ("alder-lake", "alderlake", "alderlake", (), "x86.vnni"),
    ("arrow-lake", "arrowlake-s", "arrowlake-s", ("-avxifma", "-avxneconvert", "-avxvnniint16", "-avxvnniint8"), "x86.vnni"),
    ("zen2", "znver2", "znver2", (), "cpu.contract"),
    ("zen3", "znver3", "znver3", (), "cpu.contract"),
    ("zen3-less-vaes", "znver3", "znver3", ("-vaes", "-vpclmulqdq"), "cpu.contract"),
    ("zen4", "znver4", "znver4", (), "x86.vnni"),
    ("zen4-called-zen1", "znver1", "znver4", (), "x86.vnni"),
    ("zen5", "znver5", "znver5", (), "x86.vnni"),
    ("qemu64", "k8-sse3", "k8-sse3", (), "cpu.contract"),
    ("skylake-client", "pentium2", "x86-64-v3", (), "cpu.contract"),  # a name without 64 bits
    ("graviton2", "neoverse-n1", "neoverse-n1", (), "arm.dotprod"),
    ("graviton3", "neoverse-v1", "neoverse-v1", (), "arm.i8mm"),
    ("sve-hidden", "neoverse-v1", "neoverse-v1", ("-sve",), "arm.i8mm"),
    ("raspberry-pi-4", "cortex-a72", "cortex-a72", (), "arm.neon"),
    ("raspberry-pi-5", "cortex-a76", "cortex-a76", (), "arm.dotprod"),
    ("apple-m2-vm", "generic", "generic", ("+bf16", "+complxnum", "+dotprod", "+fp16fml", "+fullfp16", "+i8mm", "+lse", "+rcpc", "+rdm", "+sha3"), "arm.i8mm"),
)  # fmt: skip
TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def cpuinfo(machine: str) -> tuple[str, str]:
    """The text of a machine's /proc/cpuinfo, and its architecture."""
    text = (CPUINFO / f"{machine}.txt").read_text()
    return text, "aarch64" if "Features" in text else "x86_64"


def host_of(machine: str, name: str, granted: bool = True) -> tvm.target.Target:
    text, architecture = cpuinfo(machine)
    return target.of_cpu(name, cpu.features_of(text, architecture), lambda: granted, TRIPLES[architecture])


@pytest.fixture(scope="module")
def convolution() -> tvm.IRModule:
    """A network of one convolution of 64 channels, PACKED."""
    g = Graph()
    x = g.qdq(g.input("x", [1, 64, 28, 28]), 0.05, 128)
    y = g.qdq(g.conv(x, g.weight([64, 64, 3, 3]), pads=[1, 1, 1, 1]), 0.05, 128)
    return pipeline.to_packed(pipeline.import_annotated(g.model([float_output(y)])))


def rules_of(module: tvm.IRModule, on: tvm.target.Target) -> set[str]:
    found = stages.private_functions(module).items()
    layers = [Layer.of(module.get_global_var(name), func) for name, func in found]
    return {choose(rules_for(on), layer, on).rule.name for layer in layers}


@pytest.mark.parametrize(("machine", "name", "tuned_for", "changes", "rule"), MACHINES, ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_kernel_reports_decides(convolution: tvm.IRModule, machine: str, name: str, tuned_for: str, changes: tuple[str, ...], rule: str) -> None:
    text, architecture = cpuinfo(machine)
    made = host_of(machine, name)
    assert target.describe(made) == {"kind": "llvm", "mcpu": tuned_for, "mtriple": TRIPLES[architecture], **({"mattr": list(changes)} if changes else {})}
    # What a package of it needs is what the machine has, all of it: it is refused where something is missing.
    assert set(target.required_features(made)) == cpu.features_of(text, architecture)
    assert rule in rules_of(convolution, made)


def test_tiles_that_linux_does_not_grant_are_not_used(convolution: tvm.IRModule) -> None:
    for machine, name in (("sapphire-rapids", SPR), ("granite-rapids", "graniterapids"), ("sapphire-rapids-called-cascadelake", "cascadelake")):
        made = host_of(machine, name, granted=False)
        assert not {f for f in codegen.llvm_get_cpu_features(made) if f.startswith("amx")}
        assert "x86.vnni" in rules_of(convolution, made)


def test_nobody_is_asked_for_tiles_that_are_not_there() -> None:
    def asked() -> bool:
        raise AssertionError

    text, architecture = cpuinfo("zen4")
    target.of_cpu("znver4", cpu.features_of(text, architecture), asked)


def test_only_what_every_core_has_counts() -> None:
    text = "processor: 0\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor: 1\nFeatures\t: fp asimd asimddp\n"
    assert cpu.features_of(text, "aarch64") == {"neon", "dotprod"}
    assert cpu.features_of("flags: avx2\nvmx flags: vnmi\n", "x86_64") == {"avx2"}
    assert cpu.features_of("", "x86_64") == cpu.features_of("flags: avx2", "riscv64") == set()


@pytest.mark.parametrize(("architecture", "names"), [
    ("x86_64", ("skylake-avx512", "cascadelake", "znver2", "znver5", "x86-64", "pentium2", SPR, "diamondrapids", "haswell", "generic", "knl")),
    ("aarch64", ("generic", "cortex-a53", "cortex-a76", "neoverse-n1", "neoverse-v1", "neoverse-v2", "apple-m4", "ampere1b")),
])  # fmt: skip
def test_any_features_under_any_name(architecture: str, names: tuple[str, ...]) -> None:
    """No code for what is not there; and only what depends on something that is not there is left out."""
    rng, known = random.Random(7), cpu.CPUINFO_NAMES[architecture]
    for _ in range(60):
        share = rng.random()
        have = {f for f in known if rng.random() < share} | {"neon"} & set(known)
        made = target.of_cpu(rng.choice(names), have, lambda: True, TRIPLES[architecture])
        needed = set(target.required_features(made))
        assert needed <= have
        assert not cpu.UNREPORTED & set(codegen.llvm_get_cpu_features(made))
        for left_out in have - needed - cpu.TILE_FEATURES:
            assert not target._implied({"kind": "llvm", "mtriple": TRIPLES[architecture]}, left_out) & set(known) <= have


# What LLVM's names of CPUs imply and no code depends on: it is used only by those who ask for it by name, or is a hint for tuning, or part of every
# processor of the architecture, or for systems. A new version of LLVM may bring more: each must be sorted, into these or into cpu.CPUINFO_NAMES.
NOT_NEEDED = {
    "x86_64": """64bit 64bit-mode cmov cx8 cx16 fxsr mmx nopl sahf sse sse2 x87 crc32
        adx aes amx-avx512 amx-complex amx-fp16 amx-fp8 amx-movrs amx-tf32 avx512vp2intersect cldemote clflushopt clwb clzero cmpccxadd enqcmd
        fsgsbase hreset invpcid kl lwp movdir64b movdiri movrs mwaitx pclmul pconfig pku prefetchi prfchw ptwrite rdpid rdpru rdrnd rdseed serialize
        sha sha512 shstk sm3 sm4 tsxldtrk uintr usermsr waitpkg wbnoinvd widekl xsave xsavec xsaveopt xsaves
        allow-light-256-bit branch-hint branchfusion ermsb false-deps-getmant false-deps-lzcnt-tzcnt false-deps-mulc false-deps-mullq false-deps-perm
        false-deps-popcnt false-deps-range fast-11bytenop fast-15bytenop fast-7bytenop fast-bextr fast-dpwssd fast-gather fast-hops fast-imm16
        fast-lzcnt fast-movbe fast-scalar-fsqrt fast-scalar-shift-masks fast-shld-rotate fast-variable-crosslane-shuffle fast-variable-perlane-shuffle
        fast-vector-fsqrt fast-vector-shift-masks faster-shift-than-shuffle fsrm idivl-to-divb idivq-to-divl lea-sp lea-uses-ag macrofusion
        no-bypass-delay no-bypass-delay-blend no-bypass-delay-mov no-bypass-delay-shuffle pad-short-functions prefer-256-bit prefer-mask-registers
        prefer-movmsk-over-vtest sbb-dep-breaking slow-3ops-lea slow-incdec slow-lea slow-pmaddwd slow-pmulld slow-pmullq slow-shld
        slow-two-mem-ops slow-unaligned-mem-16 slow-unaligned-mem-32 tuning-fast-imm-vector-shift use-glm-div-sqrt-costs use-slm-arith-costs vzeroupper""",
    "aarch64": """CONTEXTIDREL2 am amvs brbe bti ccdp ccidx ccpp chk clrbhb dit ecv el2vmsa el3 ete fgt fp-armv8 fpac hbc hcx lor ls64 mec mpam mte nmi nv pan
        pan-rwv pauth perfmon predres rand ras rme sb sel2 spe spe-eef specres2 specrestrict ssbs strict-align tlb-rmi tracev8.4 trbe uaops vh wfxt xs
        aes altnzcv crc flagm fp8 fp8dot2 fp8dot4 fp8fma fptoint jsconv lse2 lut rcpc-immo rcpc3 sha2 sm4 sme sme-b16b16 sme-f16f16 sme-f64f64
        sme-i16i64 sme2 sme2p1 sve-aes sve-b16b16 sve-bitperm sve-sha3 sve-sm4 v8a v8r v8.1a v8.2a v8.3a v8.4a v8.5a v8.6a v8.7a v8.8a v9a v9.1a v9.2a
        v9.3a
        addr-lsl-slow-14 aggressive-fma aggressive-interleaving alternate-sextload-cvt-f32-pattern alu-lsl-fast arith-bcc-fusion arith-cbz-fusion
        avoid-ldapur balance-fp-ops cmp-bcc-fusion disable-latency-sched-heuristic disable-maximize-scalable-bandwidth
        disable-unpredicated-ld-st-lower enable-select-opt exynos-cheap-as-move force-32bit-jump-tables fuse-address fuse-addsub-2reg-const1
        fuse-adrp-add fuse-aes fuse-arith-logic fuse-crypto-eor fuse-csel fuse-cset fuse-literals ldp-aligned-only max-interleave-factor-4
        no-sve-fp-ld1r no-zcz-fpr64 predictable-select-expensive slow-strqro-store stp-aligned-only store-pair-suppress
        use-fixed-over-scalable-if-equal-cost use-postra-scheduler use-wzr-to-vec-move zcm-fpr128 zcm-gpr64 zcz-fp-workaround zcz-fpr128 zcz-gpr32
        zcz-gpr64""",
}  # fmt: skip


@pytest.mark.parametrize("architecture", TRIPLES)
def test_every_feature_of_every_cpu_is_sorted(architecture: str) -> None:
    def features(mcpu: str) -> set[str]:
        return set(codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mtriple": TRIPLES[architecture], "mcpu": mcpu})))

    least = tvm.target.Target({"kind": "llvm", "mtriple": TRIPLES[architecture]})
    names = [str(n) for n in codegen.llvm_get_cpu_archlist(least)]
    # AArch64 has a feature of every core's own name, dashes aside, that says how to tune for it.
    plain = {n.replace("-", "").removeprefix("cortex") for n in names} | {"neoversev3AE", "cortexr82", "cortexr82ae"}
    found = {f for n in names for f in features(n) if f.replace("-", "").removeprefix("cortex") not in plain and f not in plain}
    known = set(cpu.CPUINFO_NAMES[architecture]) | cpu.UNREPORTED
    assert found - known - set(NOT_NEEDED[architecture].split()) == set()


def test_what_linux_does_not_tell_is_in_no_target() -> None:
    made = target.parse("llvm -mcpu=arrowlake-s -mtriple=x86_64-linux-gnu")
    assert target.describe(made)["mattr"] == ["-avxifma", "-avxneconvert", "-avxvnniint16", "-avxvnniint8"]
    assert target.describe(target.parse(str(target.describe(made)).replace("'", '"'))) == target.describe(made)
    with pytest.raises(UsageError, match=r"-mattr: Linux does not tell.*found avxvnniint8; remedy: leave it out"):
        target.parse("llvm -mcpu=x86-64-v3 -mattr=+avxvnniint8")


@pytest.mark.parametrize(("asked", "says"), [
    ("+avx512_vnni", r"LLVM knows no such feature; expected \+NAME or -NAME; found \+avx512_vnni; remedy: did you mean \+avx512vnni\?"),
    ("-avx-512f", r"found -avx-512f; remedy: did you mean -avx512f\?"),
    ("avx2", r"found avx2"), ("+", r"found \+;"), ("+qqqqqqqqq", r"found \+qqqqqqqqq; remedy: see `llc -mattr=help`"),
])  # fmt: skip
def test_features_that_llvm_would_ignore_are_refused(asked: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=says):
        target.parse(f"llvm -mcpu=x86-64-v3 -mtriple=x86_64-linux-gnu -mattr=+fma,{asked}")
    assert capfd.readouterr().err == ""


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """host() reads /proc/cpuinfo, LLVM's name, and asks for the tiles."""
    text, architecture = cpuinfo("sapphire-rapids-called-skylake")
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu.platform, "machine", lambda: architecture)
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "cooperlake")
    monkeypatch.setattr(codegen, "llvm_get_system_triple", lambda: "x86_64-linux-gnu")
    asked = []
    monkeypatch.setattr(target, "permit_tiles", lambda: asked.append(1))
    assert target.describe(target.host()) == {"kind": "llvm", "mcpu": SPR} and asked == [1]
