"""What counts as floating point in the listing of GPU code, and what the assembler's report is read as."""

from __future__ import annotations

import pytest

from hawq_tvm.compiler.cuda.nvcc import Usage, parse_usage
from hawq_tvm.core.errors import PackageError
from hawq_tvm.verify import sass

FLOAT = (
    "FADD R1, R2, R3",
    "FADD.FTZ R1, R2, R3",
    "FMUL R1, R2, 2",
    "FFMA.RZ R1, R2, R3, R4",
    "FFMA32I R1, R2, 1, R3",
    "FMNMX R1, R2, R3, !PT",
    "FSETP.GT.AND P0, PT, R1, R2, PT",
    "FSEL R1, R2, R3, P0",
    "FCHK P0, R1, R2",
    "MUFU.RCP R1, R2",
    "MUFU.RCP64H R1, R2",
    "DADD R2, R4, R6",
    "DFMA R2, R4, R6, R8",
    "DSETP.MAX.AND P0, P1, R2, R4, PT",
    "HADD2 R1, R2, R3",
    "HFMA2.MMA R1, R2, R3, R4",
    "HFMA2 R1, -RZ, RZ, R5, R6",
    "HMMA.16816.F32 R4, R8, R2, R4",
    "HGMMA.64x8x16.F32 R24, gdesc[UR4], R24",
    "QGMMA.64x8x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24",
    "DMMA.884 R2, R4, R6, R8",
    "I2F R1, R2",
    "I2F.U32.RP R1, R2",
    "I2FP.F32.S32 R1, R2",
    "F2I.TRUNC.NTZ R1, R2",
    "F2F.F64.F32 R2, R1",
    "F2FP.F16.F32.PACK_AB R1, R2, R3",
    "FRND R1, R2",
    "UFADD UR4, UR5, UR6",
    "F2IP.S8.F32 R1, R2, R3",
    "HSETP2.GT.AND P0, P1, R1, R2, PT",
)
INTEGER = (
    "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
    "IMAD.WIDE R2, R4, R5, R2",
    "IMMA.16832.S8.S8 R4, R8.ROW, R2.COL, R4",
    "IDP.4A.S8.U8 R1, R2, R3, R4",
    "IGMMA.64x64x32.S8.S8 R24, gdesc[UR4], R24",
    "I2I.S8.S32.SAT R1, R2",
    "I2IP.S8.S32.SAT R1, R2, R3, R4",
    "FLO.U32 R1, R2",
    "UFLO.U32 UR4, UR5",
    "MOV R1, R2",
    "MOVM.16.MT88 R1, R2",
    "DEPBAR.LE SB0, 0x0",
    "DEPBAR {1}",
    "HFMA2.MMA R3, -RZ, RZ, 0, 5.9604644775390625e-08",
    "HFMA2 R3, -RZ, RZ, 1.875, -15.25",
    "PRMT R1, R2, 0x7604, R3",
    "LDG.E.U8.CONSTANT R1, [R2.64]",
    "MATCH.ANY R1, R2",
    "FENCE.VIEW.ASYNC",
)


@pytest.mark.parametrize("text", FLOAT)
def test_float(text: str) -> None:
    assert sass.is_float_instruction(text)


@pytest.mark.parametrize("text", INTEGER)
def test_integer(text: str) -> None:
    assert not sass.is_float_instruction(text)


def test_a_missing_tool_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "find_spec", lambda name: None)
    monkeypatch.setattr(sass.shutil, "which", lambda *args, **options: None)
    with pytest.raises(
        PackageError,
        match=(
            r"cannot be certified without its disassembler; expected nvdisasm; remedy: pip install 'hawq-tvm\[cuda\]'"
        ),
    ):
        sass.tool("nvdisasm")


def test_containers_are_found_by_their_header() -> None:
    def container(body: bytes) -> bytes:
        return (
            sass._MAGIC
            + (1).to_bytes(2, "little")
            + (16).to_bytes(2, "little")
            + len(body).to_bytes(8, "little")
            + body
        )

    found = list(sass.fat_binaries(b"abc" + container(b"1234") + b"--" + container(b"5") + sass._MAGIC + b"short"))
    assert [f[16:] for f in found] == [b"1234", b"5"]


def test_the_assemblers_report() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_kernel' for 'sm_75'
ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function 'a_kernel_1' for 'sm_75'
ptxas info    : Function properties for a_kernel_1
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 376 bytes cmem[0]
"""
    assert parse_usage(log) == [
        Usage("sm_75", "a_kernel", 10, 0, 0, 0),
        Usage("sm_75", "a_kernel_1", 255, 16, 24, 512, 8),
    ]
