"""Compile every Triton kernel to machine code for chips that are not here, and look at what came out.

    python -m benchmarks.kernel_gate            table to benchmarks/results/kernel_gate.md
    python -m benchmarks.kernel_gate --json     rows on standard output

A row passes with no register spills, shared memory within the chip's limit, and a matrix instruction where the
kernel multiplies matrices. The specialisation is the one the JIT would choose: pointers and strides divisible by 16.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pronghorn.ops.triton import bf16, cross_entropy, gated, lora, nf4, norm, rope
from pronghorn.ops.triton.launch import DEFAULTS, row_warps

RESULTS = Path(__file__).parent / "results" / "kernel_gate.md"
# chip -> bytes of shared memory one block may use (CUDA programming guide, table of technical specifications; CDNA3 ISA)
CHIPS = {
    "cuda:80": 163 * 1024, "cuda:86": 99 * 1024, "cuda:89": 99 * 1024, "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024, "cuda:120": 99 * 1024, "hip:gfx942": 64 * 1024,
}  # fmt: skip
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)")


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments, its compile-time constants and its warps."""

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    warps: int
    product: bool = False


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case on a chip; ``registers`` is 0 where it does not say."""

    kernel: str
    chip: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: bool
    passed: bool


def cases() -> list[Case]:
    """Every kernel at the sizes that models use: rows of 4,096 and 16,384, heads of 128, rank 16 and 64."""
    found = []
    forward = "*bf16 *bf16 *bf16 *bf16 *fp32 i32/16 i32/16 fp32 fp32"
    backward = "*bf16 *bf16 *fp32 *bf16 *bf16 i32/16 i32/16 i32/16 fp32"
    for columns in (4096, 16384):
        for early, centered in ((True, False), (False, False), (False, True)):
            kind = "early" if early else "layer" if centered else "late"
            constants = {"BLOCK": columns, "WEIGHT": True, "CENTERED": centered}
            found.append(
                Case(f"norm_forward {kind} {columns}", norm.norm_forward_kernel, forward,
                     {**constants, "BIAS": centered, "EARLY": early}, row_warps(columns))
            )  # fmt: skip
            if not early:
                found.append(
                    Case(f"norm_backward {kind} {columns}", norm.norm_backward_kernel, backward, constants,
                         row_warps(columns))
                )  # fmt: skip
    for activation, kind in gated.KINDS.items():
        constants = {"BLOCK": DEFAULTS["gated_forward"].block[0], "KIND": kind}
        warps = DEFAULTS["gated_forward"].warps
        found.append(
            Case(f"gated_forward {activation}", gated.gated_forward_kernel, "*bf16 *bf16 *bf16 i32/16", constants, warps)
        )
        found.append(
            Case(f"gated_backward {activation}", gated.gated_backward_kernel, "*bf16 *bf16 *bf16 i32/16", constants, warps)
        )
    table = "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16" + " i32" * 3 + " i32/16" * 10
    for halves in (True, False):
        for back in (False, True):
            constants = {"HEADS": DEFAULTS["rope"].block[0], "PAIRS": 64, "DIM": 128, "HALVES": halves,
                         "HALF_TABLE": False, "BACKWARD": back}  # fmt: skip
            name = f"rope {'halves' if halves else 'interleaved'} {'backward' if back else 'forward'}"
            found.append(Case(name, rope.rope_kernel, table, constants, DEFAULTS["rope"].warps))
    for capped in (False, True):
        found.append(
            Case(f"cross_entropy {'softcap' if capped else 'plain'}", cross_entropy.cross_entropy_kernel,
                 "*bf16 *i64 *fp32 *fp32 i32/16 i32/16 fp32 fp32 i32",
                 {"BLOCK": DEFAULTS["cross_entropy"].block[0], "CAP": capped}, DEFAULTS["cross_entropy"].warps)
        )  # fmt: skip
    block = {"BLOCK": DEFAULTS["nf4"].block[0]}
    found.append(Case("nf4", nf4.nf4_kernel, "*u8 *fp32 *fp32 *bf16 i32/16 i32/16", block, DEFAULTS["nf4"].warps))
    found.append(
        Case("absmax", nf4.absmax_kernel, "*u8 *fp32 *fp32 *fp32 i32/16 fp32 i32/16", block, DEFAULTS["absmax"].warps)
    )
    height, width = DEFAULTS["lora_add"].block
    for rank in (16, 64):
        found.append(
            Case(f"lora_add rank {rank}", lora.lora_add_kernel,
                 "*bf16 *bf16 *bf16 i32/16 i32/16 i32/16 i32/16 i32/16 i32/16 fp32",
                 {"ROWS": height, "COLUMNS": width, "RANK": rank}, DEFAULTS["lora_add"].warps, product=True)
        )  # fmt: skip
    found.append(Case("bf16", bf16.bf16_kernel, "*i32 *i16 i32/16", block, DEFAULTS["bf16"].warps))
    return found


def compile_case(case: Case, chip: str) -> Row:
    """Compile one case for one chip and read the machine code."""
    backend, arch = chip.split(":")
    cuda = backend == "cuda"
    target = GPUTarget(backend, int(arch) if cuda else arch, 32 if cuda else 64)
    names = case.kernel.arg_names
    types = dict(zip((n for n in names if n not in case.constants), case.types.split(), strict=True))
    signature = {n: "constexpr" if n in case.constants else types[n].removesuffix("/16") for n in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, n in enumerate(names)
        if n in types and (types[n].startswith("*") or types[n].endswith("/16"))
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    options = {"num_warps": case.warps} | ({"num_stages": DEFAULTS["lora_add"].stages} if case.product else {})
    compiled = triton.compile(source, target=target, options=options)
    registers, spills, matrix = _read_cuda(compiled.asm["cubin"]) if cuda else _read_hip(compiled.asm["amdgcn"])
    shared = int(compiled.metadata.shared)
    passed = spills == 0 and shared <= CHIPS[chip] and (matrix or not case.product)
    return Row(case.name, chip, registers, spills, shared, matrix, passed)


def _read_cuda(cubin: bytes) -> tuple[int, int, bool]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        code = _output(str(tools / "nvdisasm"), file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return registers, len(re.findall(r"\b(?:LDL|STL)\b", code)), bool(MATRIX.search(code))


def _read_hip(code: str) -> tuple[int, int, bool]:
    def figure(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[0])

    spills = figure("vgpr_spill_count") + figure("sgpr_spill_count")
    return figure("vgpr_count"), spills, bool(MATRIX.search(code))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(rows: list[Row]) -> str:
    """The rows as Markdown: one line a kernel, one column a chip (registers / spills / shared bytes)."""
    chips = list(CHIPS)
    lines = [
        "# Triton kernels compiled ahead of time",
        "",
        f"Triton {triton.__version__}; made by `python -m benchmarks.kernel_gate`. "
        "Each cell: registers / spills / shared bytes; M = matrix instructions present, FAIL = breaks the gate.",
        "",
        "| kernel | " + " | ".join(chips) + " |",
        "|---" * (len(chips) + 1) + "|",
    ]
    cells = {(row.kernel, row.chip): row for row in rows}
    for kernel in dict.fromkeys(row.kernel for row in rows):
        line = []
        for chip in chips:
            row = cells[kernel, chip]
            mark = (" M" if row.matrix else "") + ("" if row.passed else " FAIL")
            line.append(f"{row.registers} / {row.spills} / {row.shared_bytes}{mark}")
        lines.append(f"| {kernel} | " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compile all, write the table or JSON; exit code 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows instead of writing the table")
    arguments = parser.parse_args()
    rows = [compile_case(case, chip) for case in cases() for chip in CHIPS]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        RESULTS.write_text(table(rows), encoding="utf-8")
        print(table(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
