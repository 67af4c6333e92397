"""SASS as cuobjdump prints it: instructions, basic blocks, loops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

INSTRUCTION_BYTES = 16
# Opcodes after which the next instruction does not run, unless they are predicated.
ENDS = {"EXIT", "RET", "BRX", "JMX", "KILL"}
JUMPS = {"BRA", "JMP"}


@dataclass(frozen=True)
class Operand:
    """An operand. `kind`: R, UR, P, UP, imm, const, mem, special, barrier or label.

    `number` is a register's or the immediate's bits; -1 is RZ, URZ, PT or UPT. A constant and a
    memory operand add up `number`, register `base` and uniform register `ubase` (None: absent).
    """

    kind: str
    number: int = 0
    negative: bool = False  # -x, or !p
    inverted: bool = False  # ~x
    absolute: bool = False
    wide: bool = False  # .64: a pair of registers
    half: str = ""  # H0_H0 and H1_H1
    base: int | None = None
    ubase: int | None = None
    base_wide: bool = False
    scale: int = 1  # of `base`
    bank: int = 0
    text: str = ""


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate that it needs."""

    address: int
    opcode: str  # with its modifiers
    operands: tuple[Operand, ...]
    guard: Operand | None = None
    text: str = ""

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        return frozenset(self.opcode.split(".")[1:])

    @cached_property
    def target(self) -> int | None:
        """The address that a branch or call jumps to."""
        if self.name not in ("BRA", "JMP", "CALL", "BSSY", "WARPSYNC"):
            return None
        for operand in reversed(self.operands):
            if operand.kind == "imm":
                return operand.number
        return None


_REGISTER = re.compile(r"(U?)(R|P)(Z|T|\d+)")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*(e[-+]?\d+)?|INF|QNAN|NAN)$", re.IGNORECASE)


def _register(text: str) -> tuple[str, int] | None:
    found = _REGISTER.fullmatch(text)
    if not found:
        return None
    return found[1] + found[2], -1 if found[3] in "ZT" else int(found[3])


def parse_operand(text: str) -> Operand:
    """An operand as cuobjdump spells it."""
    whole = text
    negative = inverted = absolute = False
    text = re.sub(r"\.reuse\b", "", text)
    while text[:1] in "-~!|" and not _FLOAT.match(text) and text != "":
        negative |= text[0] in "-!"
        inverted |= text[0] == "~"
        absolute |= text[0] == "|"
        text = text[1:]
    text = text.rstrip("|")
    half = ""
    if found := re.search(r"\.(H[01]_H[01])$", text):
        half, text = found[1], text[: found.start()]
    wide = text.endswith(".64")
    text = text.removesuffix(".64")

    def made(kind: str, number: int = 0, **more: object) -> Operand:
        flags = (negative, inverted, absolute, wide, half)
        return Operand(kind, number, *flags, text=whole, **more)  # type: ignore[arg-type]

    if register := _register(text):
        return made(register[0], register[1])
    if found := re.fullmatch(r"c\[(?:0x)?([0-9a-f]+)\]\[(.*)\]", text):
        base, ubase, _, _, offset = _sum_of(found[2])
        return made("const", offset, base=base, ubase=ubase, bank=int(found[1], 16))
    if found := re.fullmatch(r"(?:g?desc\[(UR\d+|URZ)\])?\[(.*)\](?:\.64)?", text):
        base, ubase, base_wide, scale, offset = _sum_of(found[2])
        return made("mem", offset, base=base, ubase=ubase, base_wide=base_wide, scale=scale)
    if re.fullmatch(r"0x[0-9a-f]+", text):
        return made("imm", int(text, 16))
    if re.fullmatch(r"\d+", text):
        return made("imm", int(text))
    if _FLOAT.match(text):
        return made("float")
    if text.startswith("SR"):
        return made("special")
    if re.fullmatch(r"B\d+", text):
        return made("barrier", int(text[1:]))
    return made("label")


def _sum_of(text: str) -> tuple[int | None, int | None, bool, int, int]:
    """The registers in an address, whether they are pairs, the first one's factor, the number."""
    base = ubase = None
    wide, scale, offset = False, 1, 0
    for term in re.findall(r"[-+]?[^-+]+", text):
        sign = -1 if term[0] == "-" else 1
        term = term.lstrip("+-")
        name, *modifiers = term.split(".")
        if register := _register(name):
            wide |= "64" in modifiers
            if register[0] == "R":
                base = register[1]
                scale = next((int(m[1:]) for m in modifiers if m[0] == "X"), 1)
            else:
                ubase = register[1]
        elif term:
            offset += sign * int(term, 16)
    return base, ubase, wide, scale, offset


def parse_instruction(address: int, text: str) -> Instruction:
    """An instruction without its semicolon: `@!P0 BRA 0x120`."""
    whole, guard = text, None
    if found := re.match(r"@(!?)(U?P\w+)\s+(.*)", text):
        guard, text = parse_operand(found[1] + found[2]), found[3]
    opcode, _, rest = text.partition(" ")
    operands = [t.strip() for t in re.split(r",(?![^\[]*\])", rest)] if rest.strip() else []
    # Some operands have no comma between them: `RET.REL.NODEC R4 0x0`.
    operands = [part for t in operands for part in t.split()]
    return Instruction(address, opcode, tuple(map(parse_operand, operands)), guard, whole)


def parse(text: str) -> dict[str, Function]:
    """The functions in the output of `cuobjdump -sass`, by mangled name."""
    functions: dict[str, Function] = {}
    arch, name = "", ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if found := re.match(r"\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", line):
            lines.append(parse_instruction(int(found[1], 16), found[2]))
        elif found := re.search(r"\bcode for (sm_\w+)", line):
            arch = found[1]
        elif found := re.search(r"\bFunction : (\S+)", line):
            if name:
                functions[name] = Function(name, arch, tuple(lines))
            name, lines = found[1], []
    if name:
        functions[name] = Function(name, arch, tuple(lines))
    return functions


def split(text: str) -> Iterator[tuple[str, str]]:
    """Each function's mangled name and lines, unparsed, in the output of `cuobjdump -sass`."""
    header = re.search(r"\bcode for sm_\w+", text)
    parts = re.split(r"(?m)^\s*Function : (\S+)\n", text)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        yield name, f"\t{header[0] if header else ''}\n\tFunction : {name}\n{body}"


@dataclass(frozen=True)
class Block:
    """A basic block: instructions [first, last], and the blocks that may follow."""

    first: int
    last: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: `header` dominates `blocks`; all are indices of blocks."""

    header: int
    blocks: frozenset[int]


@dataclass(frozen=True)
class Function:
    """A kernel's code and its control flow."""

    name: str
    arch: str
    instructions: tuple[Instruction, ...]
    _cache: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def index_of(self) -> dict[int, int]:
        """An instruction's index by its address."""
        return {ins.address: i for i, ins in enumerate(self.instructions)}

    def next_of(self, i: int) -> list[int]:
        """The instructions that may run after the i-th: of a call, its target and its return.

        ptxas also calls code that jumps back by itself.
        """
        ins = self.instructions[i]
        after: list[int] = []
        falls = ins.guard is not None or (ins.name not in ENDS and ins.name not in JUMPS)
        # A branch's predicate may be an operand, and BRA.DIV depends on the lanes.
        falls |= ins.name in JUMPS and (
            any(o.kind in ("P", "UP") for o in ins.operands)
            or bool(ins.modifiers & {"DIV", "CONV"})
        )
        if ins.name == "BPT" and "TRAP" in ins.modifiers and ins.guard is None:
            falls = False
        if falls and i + 1 < len(self.instructions):
            after.append(i + 1)
        if ins.name in (*JUMPS, "CALL") and ins.target in self.index_of:
            after.append(self.index_of[ins.target])
        return after

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        starts = {0}
        for i in range(len(self.instructions)):
            after = self.next_of(i)
            if after != [i + 1]:
                starts.update(after)
                starts.add(i + 1)
        ordered = sorted(s for s in starts if s < len(self.instructions))
        number = {first: n for n, first in enumerate(ordered)}
        blocks = []
        for first, end in zip(ordered, [*ordered[1:], len(self.instructions)], strict=True):
            after = self.next_of(end - 1)
            blocks.append(Block(first, end - 1, tuple(number[i] for i in after)))
        return tuple(blocks)

    @cached_property
    def block_of(self) -> tuple[int, ...]:
        """Each instruction's block."""
        return tuple(
            n for n, block in enumerate(self.blocks) for _ in range(block.first, block.last + 1)
        )

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.blocks]
        for n, block in enumerate(self.blocks):
            for after in block.successors:
                found[after].append(n)
        return tuple(map(tuple, found))

    @cached_property
    def dominators(self) -> tuple[int, ...]:
        """Each block's immediate dominator; -1 for the entry and for blocks not reached.

        Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001).
        """
        order: list[int] = []  # postorder
        seen = {0}
        stack = [(0, iter(self.blocks[0].successors))]
        while stack:
            n, successors = stack[-1]
            for after in successors:
                if after not in seen:
                    seen.add(after)
                    stack.append((after, iter(self.blocks[after].successors)))
                    break
            else:
                order.append(n)
                stack.pop()
        rank = {n: i for i, n in enumerate(order)}
        idom = {0: 0}

        def meet(a: int, b: int) -> int:
            while a != b:
                while rank[a] < rank[b]:
                    a = idom[a]
                while rank[b] < rank[a]:
                    b = idom[b]
            return a

        changed = True
        while changed:
            changed = False
            for n in reversed(order[:-1]):
                known = [p for p in self.predecessors[n] if p in idom]
                new = known[0]
                for p in known[1:]:
                    new = meet(p, new)
                if idom.get(n) != new:
                    idom[n], changed = new, True
        return tuple(-1 if n == 0 else idom.get(n, -1) for n in range(len(self.blocks)))

    def dominates(self, a: int, b: int) -> bool:
        """Whether each path from the entry to block b has block a."""
        while b >= 0:
            if a == b:
                return True
            b = self.dominators[b]
        return False

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The natural loops, outer ones first. Back edges to one header make one loop."""
        bodies: dict[int, set[int]] = {}
        for n, block in enumerate(self.blocks):
            for header in block.successors:
                if (n and self.dominators[n] < 0) or not self.dominates(header, n):
                    continue
                body = bodies.setdefault(header, {header})
                stack = [n]
                while stack:
                    m = stack.pop()
                    if m not in body:
                        body.add(m)
                        stack.extend(self.predecessors[m])
        loops = (Loop(header, frozenset(body)) for header, body in bodies.items())
        return tuple(sorted(loops, key=lambda loop: (-len(loop.blocks), loop.header)))

    def names_in(self, loop: Loop) -> list[str]:
        """The opcodes in a loop."""
        return [
            self.instructions[i].opcode
            for n in loop.blocks
            for i in range(self.blocks[n].first, self.blocks[n].last + 1)
        ]

    def innermost(self, block: int) -> Loop | None:
        """The smallest loop with a block."""
        found = [loop for loop in self.loops if block in loop.blocks]
        return min(found, key=lambda loop: len(loop.blocks)) if found else None


def time_loops(function: Function) -> Sequence[Loop]:
    """The loops that may be the loop over time: the GEMM and the activation are in them.

    Outer loops first. The GEMM is HMMA, or FFMA in quantity where there are no tensor cores. The
    activation is MUFU, or only multiply-adds for relu. Which one is the loop over time follows
    from the run: see `trace.py`.
    """
    tensor = any(i.name in ("HMMA", "HGMMA") for i in function.instructions)
    found = []
    for loop in function.loops:
        names = [name.split(".")[0] for name in function.names_in(loop)]
        gemm = sum(name in ("HMMA", "HGMMA") if tensor else name == "FFMA" for name in names)
        shared = any(name in ("BAR", "SYNCS", "UCGABAR_WAIT") for name in names)
        if gemm >= (1 if tensor else 16) and shared:
            found.append(loop)
    return found
