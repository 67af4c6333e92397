"""tools/cuda_cycles.py: SASS, its control flow, the machine, the model and the comparison.

Needs neither nvcc nor a disassembler: the kernels here are written by hand.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools import cuda_cycles
from tools.cycles import disassembler, integers, launches, measure, pipeline, policy, sass
from tools.cycles.integers import ALL, Integers, Launch
from tools.cycles.machine import Machine, Run, shared_wavefronts

PARAMS = 0x210  # where an sm_90 kernel's arguments begin


def assemble(code: str, arch: str = "sm_90a") -> str:
    """SASS as cuobjdump prints it. `name:` is a label, which branches may name."""
    lines = [line.strip() for line in code.strip().splitlines() if line.strip()]
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(instructions)
        else:
            instructions.append(line)
    text = f'\tcode for {arch}\n\t\tFunction : kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    for i, line in enumerate(instructions):
        for label, address in labels.items():
            line = re.sub(rf"\b{label}\b", f"{address:#x}", line)
        text += f"        /*{16 * i:04x}*/                   {line} ;"
        text += "                    /* 0x0000000000047919 */\n"
        text += "                                                  /* 0x000e2e0000002100 */\n"
    return text


def function_of(code: str, arch: str = "sm_90a") -> sass.Function:
    (function,) = sass.parse(assemble(code, arch)).values()
    return function


def launch_of(*words: int, threads: int = 32, grid: tuple[int, int, int] = (1, 1, 1)) -> Launch:
    return Launch("kernel", threads, grid, 0, 0, struct.pack(f"<{len(words)}I", *words))


def run(code: str, *words: int, threads: int = 32) -> tuple[Machine, Run]:
    """Runs a kernel with these arguments."""
    launch = launch_of(*words, threads=threads)
    cta = Machine(function_of(code), threads, len(launch.params), limit=2000)
    return cta, cta.run(launch)


def word(cta: Integers, register: int) -> list[int | None]:
    """A register's value in each thread; None if unknown."""
    pairs = zip(cta.R[register], cta.RK[register], strict=True)
    return [int(v) if k == ALL else None for v, k in pairs]


# ---- SASS ---------------------------------------------------------------------------------------


def test_an_instruction_is_parsed() -> None:
    ins = sass.parse_instruction(0x30, "@!P2 LDG.E.64.STRONG.GPU R14, desc[UR12][R144.64+-0x8]")
    assert (ins.name, ins.address) == ("LDG", 0x30)
    assert ins.modifiers == {"E", "64", "STRONG", "GPU"}
    assert ins.guard is not None
    assert (ins.guard.kind, ins.guard.number, ins.guard.negative) == ("P", 2, True)
    to, memory = ins.operands
    assert (to.kind, to.number) == ("R", 14)
    assert (memory.kind, memory.base, memory.base_wide, memory.number) == ("mem", 144, True, -8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("R12.reuse", ("R", 12)),
        ("RZ", ("R", -1)),
        ("URZ", ("UR", -1)),
        ("!PT", ("P", -1)),
        ("-R5", ("R", 5)),
        ("~R5", ("R", 5)),
        ("0x1f", ("imm", 31)),
        ("c[0x0][0x218]", ("const", 0x218)),
        ("B3", ("barrier", 3)),
        ("SR_TID.X", ("special", 0)),
        ("-1.5e-05", ("float", 0)),
        ("+INF ", ("float", 0)),
    ],
)
def test_operands(text: str, expected: tuple[str, int]) -> None:
    operand = sass.parse_operand(text.strip())
    assert (operand.kind, operand.number) == expected
    assert operand.negative == text.startswith(("-R", "!"))
    assert operand.inverted == text.startswith("~")


def test_addresses_add_registers() -> None:
    operand = sass.parse_operand("[R3+UR5+0x20]")
    assert (operand.base, operand.ubase, operand.number) == (3, 5, 0x20)
    assert operand.scale == 1
    assert sass.parse_operand("[R30.X4+0xd400]").scale == 4
    operand = sass.parse_operand("c[0x0][R126+0x210]")
    assert (operand.kind, operand.base, operand.number) == ("const", 126, 0x210)


def test_functions_are_split_as_they_are_parsed() -> None:
    text = assemble("EXIT") + assemble("NOP\nEXIT").split("\n", 1)[1].replace("kernel", "other")
    assert [len(f.instructions) for f in sass.parse(text).values()] == [1, 2]
    parts = dict(sass.split(text))
    assert list(parts) == ["kernel", "other"]
    (other,) = sass.parse(parts["other"]).values()
    assert (other.name, other.arch, len(other.instructions)) == ("other", "sm_90a", 2)


# ---- control flow -------------------------------------------------------------------------------

# A loop that loads weights, then the loop over time with a loop over chunks, and behind the end a
# way out for a wait that takes too long.
LOOPS = """
    S2R R0, SR_TID.X
  weights:
    LDG.E R4, desc[UR4][R2.64]
    STS [R0], R4
    IADD3 R0, R0, 0x20, RZ
    ISETP.GE.AND P0, PT, R0, 0x40, PT
    @!P0 BRA weights
  time:
    MOV R8, RZ
  chunk:
    LDG.E.STRONG.GPU R6, desc[UR4][R2.64]
    ISETP.NE.AND P1, PT, R6, RZ, PT
    @!P1 BRA wait
  ready:
    HMMA.16816.F32.BF16 R12, R16, R20, RZ
    MUFU.TANH R9, R12
    BAR.SYNC.DEFER_BLOCKING 0x0
    IADD3 R8, R8, 0x1, RZ
    ISETP.GE.AND P0, PT, R8, 0x2, PT
    @!P0 BRA chunk
    IADD3 R10, R10, 0x1, RZ
    ISETP.GE.AND P0, PT, R10, c[0x0][0x210], PT
    @!P0 BRA time
    EXIT
  wait:
    LDG.E.STRONG.GPU R6, desc[UR4][R2.64]
    CS2R R24, SR_CLOCKLO
    ISETP.GT.AND P2, PT, R24, 0x3e8, PT
    @P2 BRA late
    ISETP.NE.AND P1, PT, R6, RZ, PT
    @!P1 BRA wait
    BRA ready
  late:
    BPT.TRAP 0x1
  end:
    BRA end
"""


def labels_of(code: str) -> dict[str, int]:
    """The indices of the labelled instructions."""
    lines = [line.strip() for line in code.strip().splitlines() if line.strip()]
    found: dict[str, int] = {}
    n = 0
    for line in lines:
        if line.endswith(":"):
            found[line[:-1]] = n
        else:
            n += 1
    return found


def test_loops_and_dominators() -> None:
    f = function_of(LOOPS)
    at = {name: f.block_of[i] for name, i in labels_of(LOOPS).items()}
    loops = {loop.header: loop for loop in f.loops}
    headers = [at[name] for name in ("weights", "time", "chunk", "wait", "end")]
    # Nothing but a trap reaches the endless loop at the end: it is no loop of the program.
    assert set(loops) == set(headers[:4])
    assert loops[at["chunk"]].blocks < loops[at["time"]].blocks
    assert loops[at["wait"]].blocks < loops[at["chunk"]].blocks
    assert at["late"] not in loops[at["time"]].blocks
    assert f.dominates(at["time"], at["ready"])
    assert not f.dominates(at["wait"], at["ready"])
    inner = f.innermost(at["wait"])
    assert inner is not None
    assert inner.header == at["wait"]
    assert [loop.header for loop in sass.time_loops(f)] == [at["time"], at["chunk"]]


def test_a_branch_on_a_predicate_operand_falls_through() -> None:
    f = function_of("BRA P1, end\nNOP\nend:\nEXIT")
    assert f.next_of(0) == [1, 2]
    f = function_of("BRA end\nNOP\nend:\n@P0 EXIT\nEXIT")
    assert f.next_of(0) == [2]
    assert f.next_of(2) == [3]
    assert f.next_of(3) == []


def test_a_loop_may_go_through_called_code_that_jumps_back() -> None:
    f = function_of(
        """
      time:
        CALL.REL.NOINC called
        EXIT
      back:
        HMMA.16816.F32.BF16 R12, R16, R20, RZ
        BAR.SYNC.DEFER_BLOCKING 0x0
        @P0 BRA time
        EXIT
      called:
        WARPSYNC 0xffffffff
        BRA back
        """
    )
    (loop,) = sass.time_loops(f)
    assert f.blocks[loop.header].first == 0
    assert {f.block_of[0], f.block_of[2], f.block_of[6]} == loop.blocks


# ---- the machine --------------------------------------------------------------------------------


def test_predicates_and_the_threads_number() -> None:
    cta, _ = run(
        """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT
        IMAD R1, R0, 0x3, R0
        @P0 IADD3 R1, -R0, 0x64, RZ
        EXIT
        """,
        10,
    )
    assert word(cta, 1) == [4 * i for i in range(10)] + [100 - i for i in range(10, 32)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("LOP3.LUT R1, R0, 0x3c, RZ, 0xc0, !PT", lambda i: i & 0x3C),
        ("LOP3.LUT R1, R0, 0x100, R0, 0xf8, !PT", lambda i: i | (0x100 & i)),
        ("LOP3.LUT R1, RZ, R0, RZ, 0x33, !PT", lambda i: ~i),
        ("LOP3.LUT R1, R0, 0xc, RZ, 0x3c, !PT", lambda i: i ^ 0xC),
        ("SHF.R.S32.HI R1, RZ, 0x1, R0", lambda i: i >> 1),
        ("SHF.L.U32 R1, R0, 0x1f, RZ", lambda i: i << 31),
        ("LEA R1, R0, 0x400, 0x18", lambda i: (i << 24) + 0x400),
        ("LEA.HI R1, R0, R0, RZ, 0x1f", lambda i: (i >> 1) + i),
        ("PRMT R1, R0, 0x1054, R0", lambda i: i << 16 | i),
        ("PRMT R1, R0, 0x9910, RZ", lambda i: i),
        ("VIMNMX R1, R0, 0x8, PT", lambda i: min(i, 8)),
        ("VIMNMX.U32 R1, R0, -0x1, PT", lambda i: i),
        ("VIMNMX3 R1, R0, 0x8, -0x1, !PT", lambda i: max(i, 8)),
        ("VIMNMX3.U32 R1, R0, 0x8, 0x10, PT", lambda i: min(i, 8)),
        ("IMNMX R1, R0, 0x8, !PT", lambda i: max(i, 8)),
        ("VIADDMNMX R1, R0, 0xfffffffe, RZ, !PT", lambda i: max(i - 2, 0)),
        ("IABS R1, R0", lambda i: i),
        ("HFMA2.MMA R1, -RZ, RZ, 0, 1.1920928955078125e-07", lambda i: 2),
        ("SHFL.BFLY PT, R1, R0, 0x10, 0x1f", lambda i: i ^ 16),
        ("SEL R1, R0, 0x7, !PT", lambda i: 7),
        ("IMAD.HI.U32 R1, R0, 0x80000000, RZ", lambda i: i >> 1),
    ],
)
def test_integer_instructions(code: str, expected: Any) -> None:
    cta, result = run(f"S2R R0, SR_TID.X\n{code}\nEXIT", 0)
    assert word(cta, 1) == [expected(i) & ALL for i in range(32)]
    assert not result.unknown


def test_sums_of_64_bits_carry() -> None:
    cta, _ = run(
        """
        S2R R0, SR_TID.X
        IMAD.WIDE R2, R0, 0x10000000, RZ
        MOV R4, 0xf0000000
        IADD3 R6, P0, R4, R2, RZ
        IADD3.X R7, RZ, R3, RZ, P0, !PT
        IADD3 R8, P1, R2, -R4, RZ
        IADD3.X R9, R3, -0x1, RZ, P1, !PT
        LEA R10, P2, R2, R4, 0x2
        LEA.HI.X R11, R2, RZ, R3, 0x2, P2
        EXIT
        """,
        0,
    )
    for i in range(32):
        wide = i << 28
        assert word(cta, 6)[i] | word(cta, 7)[i] << 32 == wide + 0xF0000000  # type: ignore[operator]
        assert word(cta, 8)[i] == (wide - 0xF0000000) & ALL
        assert word(cta, 9)[i] == (wide - 0xF0000000) >> 32 & ALL
        assert word(cta, 10)[i] | word(cta, 11)[i] << 32 == 4 * wide + 0xF0000000  # type: ignore[operator]


def test_a_quotient_by_the_estimated_reciprocal() -> None:
    """As nvcc divides unsigned integers: 1000 / tid by a float32 reciprocal."""
    cta, _ = run(
        """
        S2R R0, SR_TID.X
        IADD3 R0, R0, 0x1, RZ
        I2F.RP R2, R0
        MUFU.RCP R2, R2
        IADD3 R2, R2, 0xffffffe, RZ
        F2I.FTZ.U32.TRUNC.NTZ R3, R2
        IMAD.MOV R4, RZ, RZ, -R3
        IMAD R5, R4, R0, RZ
        MOV R2, RZ
        IMAD.HI.U32 R2, R3, R5, R3
        IMAD.HI.U32 R6, R2, 0x3e8, RZ
        EXIT
        """,
        0,
    )
    # The estimate is at most one too small; nvcc's next instructions mend that.
    for i, q in enumerate(word(cta, 6)):
        assert q is not None
        assert 0 <= 1000 // (i + 1) - q <= 1


QUICK = [
    "IADD3 R5, R1, R2, R3", "IADD3 R5, -R1, R2, RZ", "VIADD R5, R1, 0xffffffff",
    "IMAD R5, R1, R2, R3", "IMAD R5, R1, -0x3, R2", "IMAD.MOV.U32 R5, RZ, RZ, R2",
    "IMAD.IADD R5, R1, 0x1, -R2", "IMAD.WIDE R6, R1, R2, R8", "IMAD.WIDE.U32 R6, R1, 0x7, RZ",
    "LEA R5, R1, R2, 0x4", "LEA.HI R5, R1, R2, RZ, 0x3", "MOV R5, R1", "SEL R5, R1, R2, P1",
    "SHF.R.S32.HI R5, RZ, 0x1f, R1", "SHF.R.U32.HI R5, RZ, 0x3, R1", "SHF.L.U32 R5, R1, 0x2, RZ",
    *(f"LOP3.LUT R5, R1, R2, R3, {t:#x}, !PT" for t in (0xC0, 0xFC, 0x3C, 0x33, 0x0F, 0x30)),
    *(f"LOP3.LUT R5, R1, R2, R3, {t:#x}, !PT" for t in (0xF8, 0xFE, 0xEA, 0x80)),
    "PRMT R5, R1, 0x5410, R2", "PRMT R5, R1, 0x7632, R2", "@P1 IADD3 R5, R1, R2, RZ",
    *(f"ISETP.{c}.AND P2, PT, R1, R2, PT" for c in ("EQ", "NE", "LT", "LE", "GT", "GE")),
    "ISETP.LT.U32.OR P2, PT, R1, R2, P1", "ISETP.LT.U32.XOR P2, PT, R1, R2, !P1",
    "IMAD R5, R1, c[0x0][0x210], R3",
]  # fmt: skip


@pytest.mark.parametrize("text", QUICK)
def test_quick_paths_agree_with_the_general_ones(text: str) -> None:
    ins = sass.parse_instruction(0, text)
    random = np.random.default_rng(0)
    results = []
    for general in (False, True):
        threads = Integers("sm_90a", 64, 4)
        threads.start(launch_of(77, threads=64), (0, 0, 0))
        random = np.random.default_rng(1)
        threads.R[1:10] = random.integers(0, 2**32, (9, 64), np.uint32)
        threads.R[2, :20] = threads.R[1, :20]
        threads.P[1] = random.integers(0, 2, 64, np.uint8).astype(np.bool_)
        compute = threads._compute(ins)
        assert compute is not None
        values = threads._values(ins)
        assert values is not None
        step = threads._general(ins, compute) if general else threads._quick(ins, values)
        active = threads.lanes % np.uint32(3) != 0
        with np.errstate(over="ignore"):
            step(active)
        assert not threads.dirty
        results.append((threads.R.copy(), threads.P.copy()))
    assert (results[0][0] == results[1][0]).all()
    assert (results[0][1] == results[1][1]).all()


def test_bits_are_known_one_by_one() -> None:
    cta, _ = run(
        """
        LDG.E R0, desc[UR4][R2.64]
        LOP3.LUT R1, R0, 0xff, RZ, 0xc0, !PT
        PRMT R3, RZ, 0x7610, R0
        PRMT R4, R3, 0x9910, RZ
        LOP3.LUT R5, R1, 0xffffff00, RZ, 0xc0, !PT
        ISETP.EQ.AND P0, PT, R0, RZ, !PT
        ISETP.NE.AND P1, PT, R4, RZ, PT
        EXIT
        """,
        0,
    )
    assert word(cta, 0) == word(cta, 1) == word(cta, 3) == [None] * 32
    # The low half is RZ's; the high one, loaded, has gone.
    assert word(cta, 4) == word(cta, 5) == [0] * 32
    # An unknown value and false is false.
    assert cta.PK[0].all()
    assert not cta.P[0].any()
    assert cta.PK[1].all()
    assert not cta.P[1].any()


def test_lanes_that_part_meet_at_the_barrier() -> None:
    code = """
        S2R R0, SR_TID.X
        BSSY B0, join
        ISETP.GE.AND P0, PT, R0, 0x8, PT
        @P0 BRA cold
        IADD3 R1, R0, 0x1, RZ
      join:
        BSYNC B0
        IADD3 R2, R1, 0x1, RZ
        EXIT
      cold:
        IADD3 R1, R0, 0x64, RZ
        BRA join
    """
    cta, result = run(code, 0, threads=64)
    assert word(cta, 2) == [i + 2 for i in range(8)] + [i + 101 for i in range(8, 64)]
    first, second = result.traces()
    at = labels_of(code)
    # The first warp goes both ways, and on as one; the second only the cold one.
    names = [i for i, _ in first]
    assert names.count(at["cold"]) == 1
    assert names.count(at["join"] - 1) == 1
    assert names.count(at["join"] + 1) == 1
    assert [i for i, _ in second].count(at["join"] - 1) == 0
    assert result.forced == 0


def test_a_null_pointer_decides_a_branch() -> None:
    code = """
        ULDC.64 UR4, c[0x0][0x210]
        ISETP.NE.U32.AND P0, PT, RZ, UR4, PT
        ISETP.NE.AND.EX P0, PT, RZ, UR5, PT, P0
        @!P0 BRA none
        STG.E desc[UR4][R2.64], R4
      none:
        EXIT
    """
    for pointer, expected in ((0, 0), (1, 1), (1 << 32, 1)):
        _, result = run(code, pointer & ALL, pointer >> 32)
        stores = [i for i, _ in result.traces()[0] if i == 4]
        assert len(stores) == expected
        assert not result.guesses


def test_polls_succeed_and_no_time_passes() -> None:
    _, result = run(LOOPS, 3)
    at = labels_of(LOOPS)
    trace = [i for i, _ in result.traces()[0]]
    assert trace.count(at["time"]) == 3
    assert trace.count(at["chunk"]) == 6
    assert at["wait"] not in trace
    assert at["late"] not in trace
    assert result.guesses == {at["chunk"] + 2: 6}
    assert result.polls == {at["chunk"]}


def test_a_poll_in_its_own_loop_is_left_for_the_side_that_goes_on() -> None:
    """Of the poll's two exits one ends in a trap, and the value that decides is loaded too."""
    code = LOOPS.replace("@!P1 BRA wait\n  ready:", "BRA wait\n  ready:").replace(
        "CS2R R24, SR_CLOCKLO", "LDG.E R24, desc[UR4][R2.64]"
    )
    _, result = run(code, 2)
    at = labels_of(code)
    trace = [i for i, _ in result.traces()[0]]
    assert trace.count(at["wait"]) == 4
    assert at["late"] not in trace
    assert result.polls == {at["wait"]}


# The poll of the forward grid kernel as nvcc 13.0 compiled it, with an end.
POLL = """\
\tcode for sm_90a
\t\tFunction : poll
        /*7f20*/              @P2 BRA 0x7fe0 ;
        /*7f30*/              @P3 BRA 0x7fc0 ;
        /*7f40*/                   VIADD R18, R142, 0x1 ;
        /*7f50*/                   LDG.E.STRONG.GPU R17, desc[UR10][R166.64] ;
        /*7f60*/                   CCTL.IVALL ;
        /*7f70*/                   YIELD ;
        /*7f80*/                   ULDC UR4, c[0x0][0xc] ;
        /*7f90*/                   IMAD R16, R18, UR4, RZ ;
        /*7fa0*/                   ISETP.GE.U32.AND P0, PT, R17, R16, PT ;
        /*7fb0*/              @!P0 BRA 0x7f50 ;
        /*7fc0*/                   WARPSYNC.ALL ;
        /*7fd0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*7fe0*/                   IMAD.SHL.U32 R16, R141, 0x2000, RZ ;
        /*7ff0*/                   EXIT ;
"""


def test_the_grids_poll() -> None:
    (f,) = sass.parse(POLL).values()
    (loop,) = f.loops
    assert f.instructions[f.blocks[loop.header].first].address == 0x7F50
    branch = f.index_of[0x7FB0]
    assert policy.Policy(f).choose(branch) == (False, True)
    assert policy.Policy(f).polls(branch) == {f.index_of[0x7F50]}
    result = Machine(f, 64, 4).run(launch_of(0, threads=64))
    assert [f.instructions[i].address for i, _ in result.traces()[0]] == list(
        range(0x7F20, 0x8000, 16)
    )
    assert result.polls == {f.index_of[0x7F50]}


def test_shared_memory_keeps_what_is_known() -> None:
    """A thread finds what itself and others have stored, but not what came from elsewhere."""
    code = """
        S2R R0, SR_TID.X
        IMAD.SHL.U32 R1, R0, 0x8, RZ
        MOV R2, 0x5
        IADD3 R3, R0, 0x64, RZ
        STS.64 [R1+0x100], R2
        LOP3.LUT R4, R1, 0x8, RZ, 0x3c, !PT
        LDS.64 R6, [R4+0x100]
        LDS R8, [R1+0x1000]
        EXIT
    """
    cta, _ = run(code, 0)
    assert word(cta, 6) == [5] * 32
    assert word(cta, 7) == [(i ^ 1) + 100 for i in range(32)]
    assert word(cta, 8) == [None] * 32
    # Only the odd lanes store again, and what they store is unknown.
    again = """
        LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT
        LDG.E R2, desc[UR4][R10.64]
        @P0 STS [R1+0x100], R2
        LDS.64 R6, [R4+0x100]"""
    cta, _ = run(code.replace("\n        LDS.64 R6, [R4+0x100]", again), 0)
    assert word(cta, 6) == [5 if i % 2 else None for i in range(32)]
    for store in ("LDGSTS.E [R4+0x100], desc[UR4][R10.64]", "STAS [R4.64+0x100], R2"):
        cta, _ = run(code.replace("LDS.64 R6", f"{store}\nLDS.64 R6"), 0)
        assert word(cta, 6) == [None] * 32
    cta, _ = run(code.replace("[R1+0x100], R2", "[R0.X8+0x100], R2"), 0)
    assert word(cta, 7) == [(i ^ 1) + 100 for i in range(32)]
    # A store to an unknown address may have gone anywhere.
    code = code.replace("LDS.64 R6", "LDG.E R9, desc[UR4][R10.64]\nSTS [R9], R2\nLDS.64 R6")
    assert word(run(code, 0)[0], 7) == [None] * 32


def test_data_that_are_their_own_flag_have_come() -> None:
    """The retry of the grid's poll does not run. 0xffffffff is a word that is missing."""
    code = """
      time:
        LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64]
        VIMNMX.U32 R8, R4, R5, !PT
        VIMNMX3.U32 R8, R6, R7, R8, !PT
        ISETP.NE.AND P2, PT, R8, -0x1, PT
        @P2 BRA done
      wait:
        LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64]
        ISETP.NE.AND P2, PT, R4, -0x1, PT
        @!P2 BRA wait
      done:
        HMMA.16816.F32.BF16 R12, R16, R4, RZ
        BAR.SYNC.DEFER_BLOCKING 0x0
        IADD3 R10, R10, 0x1, RZ
        ISETP.GE.AND P0, PT, R10, 0x3, PT
        @!P0 BRA time
        EXIT
    """
    _, result = run(code, 0)
    at = labels_of(code)
    trace = [i for i, _ in result.traces()[0]]
    assert trace.count(at["done"]) == 3
    assert at["wait"] not in trace
    assert not result.guesses
    assert result.polls == {at["time"]}


def test_named_barriers_of_some_threads() -> None:
    _, result = run(
        """
        S2R R0, SR_TID.X
        ISETP.GE.AND P0, PT, R0, 0x40, PT
        @P0 BRA other
        BAR.SYNC.DEFER_BLOCKING 0x1, 0x40
        EXIT
      other:
        BAR.SYNC.DEFER_BLOCKING 0x2, 0x40
        EXIT
        """,
        0,
        threads=128,
    )
    assert result.forced == 0
    assert [len(trace) for trace in result.traces()] == [5, 5, 5, 5]


def test_warps_may_name_barriers_by_a_register() -> None:
    """Pairs of warps meet at barriers 1 and 2. The second barrier is for nobody."""
    code = """
        S2R R0, SR_TID.X
        SHF.R.U32.HI R1, RZ, 0x6, R0
        IADD3 R1, R1, 0x1, RZ
        BAR.SYNC.DEFER_BLOCKING R1, 0x40
        ISETP.GE.AND P0, PT, R0, 0x80, PT
        @P0 BAR.SYNC.DEFER_BLOCKING 0x0
        @P0 MEMBAR.ALL.GPU
        EXIT
    """
    _, result = run(code, 0, threads=128)
    assert result.forced == 0
    codes = [[wave for i, wave in trace if i in (3, 5, 6)] for trace in result.traces()]
    assert codes == [[2 * CTA + 64, 0, 0]] * 2 + [[3 * CTA + 64, 0, 0]] * 2
    times = pipeline.Model(function_of(code), set(), result.traces()).simulate(True)
    # Neither the barrier nor the fence takes the warps' time.
    assert [t[5] - t[4] < 10 and t[7] - t[6] < 10 for t in times] == [True] * 4
    assert [round(t[4] - t[3]) for t in times] == [28] * 4


def test_a_loop_without_an_end_is_an_error() -> None:
    cta = Machine(function_of("again:\nNOP\nBRA again\nEXIT"), 32, 4, limit=100)
    with pytest.raises(integers.UnsupportedError, match="100 instructions and no end at 0x"):
        cta.run(launch_of(0))


def test_an_unknown_opcode_is_counted() -> None:
    cta, result = run("MOV R1, 0x1\nBREV R1, R1\nEXIT", 0)
    assert result.unknown == {"BREV": 1}
    assert word(cta, 1) == [None] * 32


def test_an_arch_without_a_constant_bank_is_an_error() -> None:
    with pytest.raises(integers.UnsupportedError, match="sm_70: where its constant bank"):
        Machine(function_of("EXIT", arch="sm_70"), 32, 4)


# ---- bank conflicts -----------------------------------------------------------------------------

EVERYONE = [True] * 32


@pytest.mark.parametrize(
    ("addresses", "lane_bytes", "expected"),
    [
        ([4 * i for i in range(32)], 4, (1, 1)),
        ([8 * i for i in range(32)], 4, (2, 1)),
        ([128 * i for i in range(32)], 4, (32, 1)),
        ([0] * 32, 4, (1, 1)),  # the same word
        ([2 * i for i in range(32)], 2, (1, 1)),  # two lanes a word
        ([132 * i for i in range(32)], 4, (1, 1)),  # padded by a word
        ([8 * i for i in range(32)], 8, (2, 2)),
        ([16 * i for i in range(32)], 16, (4, 4)),
        ([128 * i for i in range(32)], 16, (32, 4)),
        ([192 * (i // 4) + 16 * (i % 4) for i in range(32)], 16, (4, 4)),
        ([144 * (i // 4) + 16 * (i % 4) for i in range(32)], 16, (8, 4)),
    ],
)
def test_wavefronts(addresses: list[int], lane_bytes: int, expected: tuple[int, int]) -> None:
    assert shared_wavefronts(addresses, EVERYONE, lane_bytes) == expected


def test_wavefronts_of_some_lanes() -> None:
    addresses = [128 * i for i in range(32)]
    assert shared_wavefronts(addresses, [i < 3 for i in range(32)], 4) == (3, 1)
    assert shared_wavefronts(addresses, [False] * 32, 4) == (0, 0)
    # Lanes 0 to 7 are one of the four parts of a wide access.
    assert shared_wavefronts(addresses, [i < 2 for i in range(32)], 16) == (2, 1)


def test_conflicts_follow_from_the_addresses() -> None:
    code = """
        S2R R0, SR_TID.X
        IMAD.SHL.U32 R1, R0, 0x8, RZ
        IMAD.SHL.U32 R8, R0, 0x80, RZ
        ISETP.GE.AND P0, PT, R0, 0x10, PT
        LDS R2, [R1+0x40]
        @!P0 STS [R1], R2
        LDSM.16.M88.2 R4, [R8]
        LDG.E R3, desc[UR4][R2.64]
        STS [R3], R2
        EXIT
    """
    _, result = run(code, 0)
    (trace,), (extra,) = result.traces(), result.conflicts()
    assert [wave for _, wave in trace] == [-1, -1, -1, -1, 2, 1, 16, 1, 1, -1]
    # LDSM's rows are 128 bytes apart: each of two matrices takes a wavefront a row.
    assert extra == [0, 0, 0, 0, 1, 0, 14, 0, 0, 0]
    assert result.unknown_addresses == 1


# ---- the model ----------------------------------------------------------------------------------


CTA = pipeline.BARRIER_CODE  # barrier 0 of all threads


def wave_of(ins: sass.Instruction) -> int:
    if ins.name == "BAR":
        return CTA
    return 1 if ins.name in ("LDS", "STS", "STAS", "RED") else -1


def issue(
    code: str, warps: int = 1, polls: Sequence[int] = (), exchange: bool = False
) -> list[list[float]]:
    """The cycles at which each of some warps issues a kernel without branches."""
    f = function_of(code)
    trace = [(i, wave_of(ins)) for i, ins in enumerate(f.instructions)]
    return pipeline.Model(f, set(polls), [trace] * warps).simulate(exchange)


def test_issue_of_one_warp() -> None:
    # Independent: one a cycle. The third waits for the first, 4 cycles.
    code = "FADD R1, R2, R3\nFADD R4, R5, R6\nFADD R7, R1, R1"
    assert issue(code) == [[0, 1, 4]]
    # A pipe of half rate.
    assert issue("IADD3 R1, R2, R3, RZ\nIADD3 R4, R5, R6, RZ\nIADD3 R7, R1, R1, RZ") == [[0, 2, 5]]
    # Eight cycles a MUFU, 22 to its result.
    assert issue("MUFU.RCP R1, R2\nMUFU.RCP R3, R4\nFADD R5, R1, R1") == [[0, 8, 22]]
    assert issue("LDS R1, [R2]\nFADD R3, R1, R1") == [[0, 30]]
    # A predicate is a dependence.
    assert issue("ISETP.GE.AND P0, PT, R1, R2, PT\n@P0 FADD R3, R4, R5") == [[0, 5]]
    # The accumulator of 4 registers.
    code = "HMMA.16816.F32.BF16 R12, R16, R20, RZ\nHMMA.16816.F32.BF16 R12, R16, R20, R12\n"
    assert issue(code + "FADD R1, R15, R15") == [[0, 33, 66]]


def test_issue_of_several_warps() -> None:
    # Warps 0 and 4 share a scheduler, and so its pipes.
    times = issue("MUFU.RCP R1, R2\nFADD R3, R4, R5", warps=5)
    assert times == [[0, 1], [0, 1], [0, 1], [0, 1], [8, 9]]
    # A barrier opens 28 cycles after the last arrival.
    f = function_of("LDS R1, [R2]\nFADD R1, R1, R1\nBAR.SYNC.DEFER_BLOCKING 0x0\nFADD R3, R4, R5")
    slow = [(0, 1), (1, -1), (2, CTA), (3, -1)]
    fast = slow[2:]
    assert pipeline.Model(f, set(), [slow, fast]).simulate(False) == [[0, 30, 31, 59], [0, 59]]


def test_a_bank_conflict_keeps_shared_memory_busy() -> None:
    f = function_of("LDS R1, [R2]\nFADD R3, R1, R1")
    for waves in (1, 4):
        traces = [[(0, waves), (1, -1)]] * 2
        first, second = pipeline.Model(f, set(), traces).simulate(False)
        assert first == [0, 30 + waves - 1]
        # The second warp's access starts when the first's has ended.
        assert second == [0, 30 + 2 * waves - 1]


def test_a_taken_branch_costs_more() -> None:
    f = function_of("BRA P0, end\nNOP\nend:\nFADD R1, R2, R3\nEXIT")
    assert pipeline.Model(f, set(), [[(0, -1), (2, -1)]]).simulate(False) == [[0, 10]]
    assert pipeline.Model(f, set(), [[(0, -1), (1, -1), (2, -1)]]).simulate(False) == [[0, 3, 4]]


SIGNAL = """
    MEMBAR.ALL.GPU
    RED.E.ADD.STRONG.GPU [R2], R3
    LDG.E.STRONG.GPU R5, [R6]
    FADD R7, R5, R5
"""


def test_a_poll_waits_for_the_signal() -> None:
    assert issue(SIGNAL, polls=[2]) == [[0, 1, 2, 282]]
    # The fence takes 500 cycles, and 500 go by until the signal is seen.
    assert issue(SIGNAL, polls=[2], exchange=True) == [[0, 500, 501, 1000]]
    # A warp that never signals waits for the one that does.
    f = function_of(SIGNAL)
    waits = [[(2, 1), (3, -1)], [(0, -1), (1, 1)]]
    (_, seen), sent = pipeline.Model(f, {2}, waits).simulate(True)
    assert (seen, sent) == (1000, [0, 500])


def test_data_that_are_their_own_flag() -> None:
    code = "ST.E.STRONG.GPU [R2.64], R4\nLD.E.128.STRONG.GPU R8, [R6.64]\nFADD R9, R8, R8"
    assert issue(code, polls=[1]) == [[0, 1, 281]]
    # 500 until a poll has seen them, and the round trip of the load that does.
    assert issue(code, polls=[1], exchange=True) == [[0, 1, 780]]
    f = function_of(code)
    trace = [(i, wave_of(ins)) for i, ins in enumerate(f.instructions)]
    # They order nothing else: a fence does not wait for them.
    (times,) = pipeline.Model(f, {1}, [trace]).chain()
    assert times == [0, 0, 0]


def test_the_exchange_of_a_cluster() -> None:
    code = "STAS.128 [R2.64], R4\nSYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R8\n@P0 FADD R1, R2, R3"
    assert issue(code, polls=[1]) == [[0, 1, 26]]
    assert issue(code, polls=[1], exchange=True) == [[0, 1, 230]]


def test_the_dependent_chain() -> None:
    """Instructions beside the longest path take no time; a barrier and what it orders do."""
    code = """
        LDS R1, [R2]
        FADD R3, R1, R1
        MUFU.RCP R20, R21
        MUFU.RCP R22, R23
        STS [R4], R3
        BAR.SYNC.DEFER_BLOCKING 0x0
        LDS R5, [R6]
        EXIT
    """
    f = function_of(code)
    trace = [(i, wave_of(ins)) for i, ins in enumerate(f.instructions)]
    times = pipeline.Model(f, set(), [trace, trace]).chain()
    # LDS 30, FADD 4, then the store and the barrier's 28.
    assert [t[-1] for t in times] == [62, 62]


def test_the_registers_of_instructions() -> None:
    from tools.cycles.registers import registers_of

    def of(text: str) -> tuple[set[str], set[str]]:
        written, read = registers_of(sass.parse_instruction(0, text))
        return set(written), set(read)

    assert of("IMAD.WIDE R2, R4, 0x4, R6") == ({"R2", "R3"}, {"R4", "R6", "R7"})
    assert of("LDG.E.128 R4, desc[UR4][R8.64]") == (
        {"R4", "R5", "R6", "R7"},
        {"R8", "R9"},
    )
    assert of("STS.64 [R1+UR3], R2") == (set(), {"R1", "UR3", "R2", "R3"})
    assert of("IADD3 R1, P0, P1, R2, R3, R4") == ({"R1", "P0", "P1"}, {"R2", "R3", "R4"})
    assert of("IADD3.X R1, R2, R3, RZ, P0, P1") == ({"R1"}, {"R2", "R3", "P0", "P1"})
    assert of("@!P3 ISETP.GE.OR P0, P1, R2, R3, P2") == (
        {"P0", "P1"},
        {"P3", "R2", "R3", "P2"},
    )
    assert of("SHFL.IDX P0, R1, R2, R3, 0x1f") == ({"P0", "R1"}, {"R2", "R3"})
    assert of("LOP3.LUT P0, RZ, R2, 0x3, RZ, 0xc0, !PT") == ({"P0"}, {"R2"})


# ---- figures of a kernel ------------------------------------------------------------------------

STEP = """
    HMMA.16816.F32.BF16 R12, R16, R20, RZ
    MUFU.TANH R9, R12
    STS [R4], R9
    BAR.SYNC.DEFER_BLOCKING 0x0
"""
# The arguments: steps. R4 makes a store's two lanes meet in each bank.
KERNEL = """
    S2R R0, SR_TID.X
    IMAD.SHL.U32 R4, R0, 0x8, RZ
  time:
    {step}
    IADD3 R10, R10, {per_turn}, RZ
    ISETP.GE.AND P0, PT, R10, c[0x0][0x210], PT
    @!P0 BRA time
    EXIT
"""


def kernel(per_turn: int) -> str:
    return assemble(KERNEL.format(step=STEP * per_turn, per_turn=f"{per_turn:#x}"))


def figures(per_turn: int) -> measure.Figures:
    launch = launch_of(measure.STEPS, threads=256, grid=(4, 2, 1))
    return measure.Kernel(kernel(per_turn)).measure(launch)


def test_figures_of_a_kernel() -> None:
    found = figures(1)
    assert (found.ctas, found.steps_per_turn, found.loop) == (8, 1, "0x20")
    assert found.instructions == found.mean_instructions == 7
    assert found.kinds == {"ALU": 2, "BAR": 1, "HMMA": 1, "MUFU": 1, "STS": 1, "branch": 1}
    assert found.conflicts == 8  # a wavefront a warp
    assert found.step == found.cycles
    assert found.exchange == 0
    # From barrier to barrier nothing depends on the step before but by the barrier.
    assert found.chain == pipeline.BARRIER
    assert 0 < found.prologue < 100
    assert not found.guesses


@pytest.mark.parametrize("per_turn", [2, 4])
def test_figures_of_an_unrolled_loop(per_turn: int) -> None:
    found = figures(per_turn)
    assert found.steps_per_turn == per_turn
    assert found.instructions == round(4 + 3 / per_turn)
    assert found.conflicts == 8
    assert found.cycles < figures(1).cycles


def test_a_kernel_without_a_loop_over_time_is_an_error(tmp_path: Path) -> None:
    text = assemble("HMMA.16816.F32.BF16 R12, R16, R20, RZ\nEXIT")
    (found,) = measure.measure_all(text, [launch_of(12)], tmp_path)
    assert found == "kernel: no loop over time is found: turns []"


def test_figures_are_stored_by_code_and_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launch_of(measure.STEPS, threads=64)
    (first,) = measure.measure_all(kernel(1), [launch], tmp_path)
    monkeypatch.setattr(measure, "Kernel", None)
    assert measure.measure_all(kernel(1), [launch], tmp_path) == [first]
    with pytest.raises(TypeError):
        measure.measure_all(kernel(2), [launch], tmp_path)


# ---- the command --------------------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    base = {
        "arch": "sm_90a", "cell": "lstm", "type": "tf32", "H": 64, "B": 8, "mode": "inference",
        "requested": "default", "algorithm": "persistent_cta", "step": 1000, "waves": 2,
        "prologue": 5000, "cycles": 900, "exchange": 100, "chain": 500, "instructions": 300,
        "conflicts": 0, "kernel": "K", "kinds": {"FMA": 7},
    }  # fmt: skip
    return {**base, **changes}


def test_the_comparison() -> None:
    stored = [row()]
    assert cuda_cycles.dearer(stored, [row(step=1030, prologue=5150)]) == []
    assert cuda_cycles.dearer(stored, [row(step=100)]) == []
    # Another problem has nothing to be compared with.
    assert cuda_cycles.dearer(stored, [row(step=9000, H=65)]) == []
    name = "sm_90a lstm tf32 64 8 inference default"
    assert cuda_cycles.dearer(stored, [row(step=1031)]) == [
        f"{name}: 2000 cycles a step became 2062 (+3.1 %)"
    ]
    assert cuda_cycles.dearer(stored, [row(waves=3)]) == [
        f"{name}: 2000 cycles a step became 3000 (+50.0 %)"
    ]
    assert cuda_cycles.dearer(stored, [row(prologue=5200)]) == [
        f"{name}: 5000 cycles before the loop over time became 5200 (+4.0 %)"
    ]
    stepwise = {k: v for k, v in row(algorithm="stepwise").items() if k != "step"}
    assert cuda_cycles.dearer(stored, [stepwise]) == [
        f"{name}: stepwise, and was persistent_cta with 2000 cycles a step"
    ]
    assert cuda_cycles.dearer([stepwise], [row()]) == []


def test_the_tables() -> None:
    text = cuda_cycles.report([row(), {**row(B=9), "algorithm": "stepwise"}], "13.0")
    assert "## lstm on sm_90a" in text
    assert (
        "| tf32 | 64 | 8 | inference | cta | 1000 | 900 | 100 | 500 | 300 | 0 | 5000 | 2 |" in text
    )
    assert "| `K` | inference | 7 | 300 |" in text


def test_the_table_against_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepwise = {k: v for k, v in row(B=9, algorithm="stepwise").items() if k != "step"}
    for name, rows in {
        "before": [row(step=3000, instructions=700, prologue=9000), stepwise],
        "cycles": [row(), row(B=9), row(requested="persistent_grid", H=77)],
    }.items():
        (tmp_path / f"{name}.json").write_text(cuda_cycles.stored_text(rows, "13.0"))
    monkeypatch.setattr(cuda_cycles, "STORED", tmp_path / "cycles.json")
    monkeypatch.setattr(cuda_cycles, "AGAINST", tmp_path / "against.md")
    assert cuda_cycles.main(["--table-against", str(tmp_path / "before.json")]) == 0
    text = (tmp_path / "against.md").read_text()
    assert "## lstm, tf32 on sm_90a" in text
    assert (
        "| 64 | 8 | inference | cta | 700 | 6000 | 9000 | cta | 300 | 2000 | 5000 | 3.00 |" in text
    )
    assert "| 64 | 9 | inference | stepwise | | | | cta | 300 | 2000 | 5000 |  |" in text
    assert "77" not in text


def test_a_source_is_compiled_again_if_what_it_includes_has_changed(tmp_path: Path) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/kernel.cu").write_text('#include "kernel.cuh"\n#include <cstdint>\n')
    (tmp_path / "cuda/kernel.cuh").write_text('#include "../cells.h"\n')
    states: list[bytes] = []
    for name in ("cells.h", "cells.h", "other.h"):
        (tmp_path / name).write_text(f"// {len(states)}")
        states.append(disassembler._state(tmp_path / "cuda/kernel.cu"))
    assert states[0] != states[1]
    assert states[1] == states[2]


def test_the_stored_run_is_whole() -> None:
    """The file that `--compare` reads, and its table, are of one run."""
    stored = json.loads(cuda_cycles.STORED.read_text())
    assert cuda_cycles.STORED.read_text() == cuda_cycles.stored_text(stored["rows"], stored["nvcc"])
    text = cuda_cycles.STORED.with_suffix(".md").read_text()
    assert text == cuda_cycles.report(stored["rows"], stored["nvcc"])
    keys = [cuda_cycles.key_of(r) for r in stored["rows"]]
    assert len(set(keys)) == len(keys) > 100


def test_missing_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_BINUTILS", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(disassembler, "FOLDER", tmp_path / "fetched")
    assert cuda_cycles.main(["--find"]) == cuda_cycles.MISSING
    assert capsys.readouterr().out == (
        "the kernels' cycles can't be modelled: there are no cuobjdump and nvdisasm: "
        f"{disassembler.MEND}\n"
    )
    for name in disassembler.NAMES:
        (tmp_path / "bin" / name).touch(mode=0o755)
    assert cuda_cycles.main(["--find"]) == 0
    monkeypatch.setenv("CUDA_BINUTILS", str(tmp_path))
    assert cuda_cycles.main(["--find"]) == cuda_cycles.MISSING
    assert f"CUDA_BINUTILS={tmp_path} has no cuobjdump and nvdisasm" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert cuda_cycles.main(["--find"]) == cuda_cycles.MISSING
    assert "/nowhere" in capsys.readouterr().out


def test_tools_are_fetched_from_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pip brings the wheel."""
    wheel = tmp_path / "triton-1.0-py3-none-any.whl"
    pip = tmp_path / "python"
    pip.write_text(f'#!/bin/sh\nwhile [ "$1" != -d ]; do shift; done\ncp "{wheel}" "$2"\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setattr(disassembler, "FOLDER", tmp_path / "fetched")
    with pytest.raises(disassembler.MissingError, match="pip can't download the wheel of triton"):
        disassembler.fetch()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("triton/backends/nvidia/bin/cuobjdump", "first")
    with pytest.raises(disassembler.MissingError, match=r"has no triton/.*/nvdisasm"):
        disassembler.fetch()
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("triton/backends/nvidia/bin/nvdisasm", "second")
    monkeypatch.delenv("CUDA_BINUTILS", raising=False)
    monkeypatch.setenv("PATH", "/bin")
    assert disassembler.fetch() == disassembler.find(None) == tmp_path / "fetched"
    assert (tmp_path / "fetched/nvdisasm").read_text() == "second"


def test_the_problems() -> None:
    def types_of(types: Sequence[str], archs: Sequence[str], algorithm: str) -> set[str]:
        found = cuda_cycles.problems(archs, ["lstm"], types, [8], [1], ["backward"], [algorithm])
        return {f"{p.arch} {p.type}" for p in found}

    everything = types_of(list(launches.TYPES), cuda_cycles.ARCHS, "default")
    assert len(everything) == 7
    assert "sm_80 float16" not in everything
    assert types_of(["float16"], ["sm_80"], "default") == {"sm_80 float16"}
    assert types_of(["float16"], cuda_cycles.ARCHS, "persistent_cluster") == {"sm_90a float16"}


def test_only_a_whole_run_is_stored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cuda_cycles.parse_arguments(["--store", "--types", "tf32"])
    assert "--store is for all problems" in capsys.readouterr().err
    assert cuda_cycles.parse_arguments(["--store", "--jobs", "1"]).store


def test_encodings_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(assemble("MOV R1, 0x1\nEXIT"))
    tool = tmp_path / "cuobjdump"
    tool.write_text(f'#!/bin/sh\ncat "{tmp_path}/text"\n')
    tool.chmod(0o755)
    text = disassembler.disassembled(tmp_path, tmp_path / "cubin")
    assert "/* 0x" not in text
    assert sass.parse(text) == sass.parse(assemble("MOV R1, 0x1\nEXIT"))
    tool.write_text("#!/bin/sh\necho no cubin >&2\nexit 1\n")
    with pytest.raises(disassembler.MissingError, match=r"can't read .*cubin: no cubin"):
        disassembler.disassembled(tmp_path, tmp_path / "cubin")


@pytest.mark.long
def test_launches_are_the_librarys_own(tmp_path: Path) -> None:
    """The plan, the kernel and its arguments come from csrc/cuda, compiled for the host."""
    program = launches.build(tmp_path, 2)
    assert launches.build(tmp_path, 2) == program
    problem = launches.Problem("sm_90a", "lstm", "bfloat16", 128, 16, "inference")
    clusters = launches.Problem("sm_80", "gru", "tf32", 64, 3, "backward", "persistent_cluster")
    unknown = launches.Problem("sm_90a", "elman", "tf32", 64, 3, "backward")
    found = launches.ask(program, [problem, clusters, unknown], 100, 12)
    launch = found[0].launch
    assert launch is not None
    assert launch.kernel.startswith("PersistentForwardKernel<Lstm, ")
    assert launch.threads % 32 == 0
    # steps, rows, hidden_size, directions
    assert struct.unpack_from("<4i", launch.params) == (12, 16, 128, 1)
    assert "FUSEDRNN_CUDA_REGIME=cluster" in found[1].error
    assert found[2].error == "no cell is named elman"


def test_the_machine_reads_a_call_and_its_return() -> None:
    cta, _ = run(
        """
        MOV R20, back
        CALL.REL.NOINC routine
      back:
        IADD3 R1, R1, 0x1, RZ
        EXIT
      routine:
        MOV R1, 0x5
        RET.REL.NODEC R20 0x0
        """,
        0,
    )
    assert word(cta, 1) == [6] * 32
