"""The registers and predicates that an instruction reads and writes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tools.cycles.sass import Instruction, Operand

CONTROL = {
    "BRA", "JMP", "BSSY", "BSYNC", "BREAK", "BAR", "NOP", "WARPSYNC", "YIELD", "MEMBAR", "ERRBAR",
    "CGAERRBAR", "CCTL", "EXIT", "FENCE", "ENDCOLLECTIVE", "UCGABAR_ARV", "UCGABAR_WAIT", "CALL",
    "RET", "BPT", "NANOSLEEP", "DEPBAR", "LDGDEPBAR", "BMOV", "ACQBULK",
}  # fmt: skip
_STORES = {"STS", "STG", "ST", "STL", "STAS", "RED", "REDG", "STSM"}


def _width(ins: Instruction) -> int:
    """The registers of a loaded or stored value."""
    return 4 if "128" in ins.modifiers else 2 if "64" in ins.modifiers else 1


def _named(kind: str, number: int, count: int = 1) -> list[str]:
    return [] if number < 0 else [f"{kind}{number + i}" for i in range(count)]


def registers_of(ins: Instruction) -> tuple[list[str], list[str]]:
    """The registers and predicates that an instruction writes, and those it reads."""
    written: list[str] = []
    read: list[str] = []
    ops = list(ins.operands)
    if ins.guard is not None:
        read += _named(ins.guard.kind, ins.guard.number)
    name = ins.name
    first = 0  # the first operand that is read
    if name in _STORES or name in CONTROL:
        pass
    elif name in ("SYNCS", "LDGSTS"):
        first = 1
        if name == "SYNCS" and ops and ops[0].kind in ("P", "UP"):
            written += _named(ops[0].kind, ops[0].number)
        if name == "LDGSTS":
            first = 0
    elif ops:
        while first < len(ops) and ops[first].kind in ("P", "UP"):
            written += _named(ops[first].kind, ops[first].number)
            first += 1
        only_predicates = re.search(r"SETP\d?$|PLOP3$", name) is not None
        if only_predicates:
            first = 2
            written = [r for o in ops[:2] for r in _named(o.kind, o.number)]
        elif first < len(ops):
            o = ops[first]
            written += _named(o.kind, o.number, _result_width(ins))
            first += 1
            # Carries follow the result.
            while name in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD", "LOP3") and (
                first < len(ops) - 1 and ops[first].kind in ("P", "UP") and "X" not in ins.modifiers
            ):
                written += _named(ops[first].kind, ops[first].number)
                first += 1
    for at, o in enumerate(ops[first:], first):
        read += _reads(ins, o, at, first)
    return written, read


def _result_width(ins: Instruction) -> int:
    if ins.name == "HMMA":
        return 2 if "F16" in ins.opcode.split(".")[2:3] else 4
    if ins.name in ("LDS", "LDG", "LD", "LDC", "ULDC", "LDL", "ATOM", "ATOMG"):
        return _width(ins)
    if ins.name == "LDSM":
        return int(ins.opcode.rsplit(".", 1)[1])
    if ins.name == "CS2R":
        return 1 if "32" in ins.modifiers else 2
    return 2 if ins.modifiers & {"WIDE", "64"} else 1


def _reads(ins: Instruction, o: Operand, at: int, first: int) -> list[str]:
    if o.kind == "mem" or o.kind == "const":
        found = [] if o.base is None else _named("R", o.base, 2 if o.base_wide or o.wide else 1)
        if o.ubase is not None:
            found += _named("UR", o.ubase)
        return found
    if o.kind not in ("R", "UR", "P", "UP"):
        return []
    count = 1
    if ins.name == "HMMA":
        halves = {"16816": (4, 2, 4), "1688": (2, 1, 4), "1684": (2, 1, 4)}
        shape = next((m for m in ins.opcode.split(".") if m in halves), "16816")
        sizes = list(halves[shape])
        if "TF32" in ins.modifiers and shape == "1688":
            sizes = [4, 2, 4]
        count = sizes[at - first] if at - first < 3 and o.kind == "R" else 1
    elif ins.name in _STORES and o.kind == "R":
        count = _width(ins)
    elif "WIDE" in ins.modifiers and at == len(ins.operands) - 1:
        count = 2
    return _named(o.kind, o.number, count)


_NUMBERS = {"R": 0, "UR": 256, "P": 320, "UP": 328}
STATE = 336


def numbers(names: Sequence[str]) -> tuple[int, ...]:
    found = []
    for name in names:
        kind = name.rstrip("0123456789")
        found.append(_NUMBERS[kind] + int(name[len(kind) :]))
    return tuple(dict.fromkeys(found))
