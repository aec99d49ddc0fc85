"""Count the machine code of a kernel, and predict the bandwidth that the kernel can reach.

A kernel over tokens is judged by its loop: the instructions and barriers of one token, the width of
the accesses, whether the loads of the next token are under way while this one is summed, and the
bytes that a multiprocessor keeps in flight. The prediction is an estimate for choosing between two
versions of a kernel; a GPU decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

MULTIPROCESSORS = 132  # H100 SXM and H200
CLOCK_HZ = 1.98e9
# Limits of sm_90 (CUDA programming guide, table of compute capabilities).
REGISTERS, MAX_WARPS, MAX_PROGRAMS = 65536, 64, 32
SHARED_BYTES, RESERVED_SHARED_BYTES = 233472, 1024
SCHEDULERS = 4  # instructions that a multiprocessor issues per cycle
# Bytes/s of a device-to-device copy, read plus written.
COPY_BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}
# Assumed cycles until the result of an instruction can be read; not measured.
MEMORY_CYCLES, SHARED_CYCLES, SHUFFLE_CYCLES, BARRIER_CYCLES = 800, 30, 25, 30
SUM_LAUNCH_S = 8e-6  # of torch's kernel that finishes a two-stage sum

_CONTROL = re.compile(r"^[\d-]{2}:[\d-]:[\d-]:[Y-]:([0-9a-f])\t(?:@!?U?P\d )?([\w.]+)(.*)$")
_WIDTH = re.compile(r"\.(128|64|U?16|U?8|S16|S8)\b")


@dataclass(frozen=True)
class Instruction:
    """Hold an instruction: its name with modifiers, its operands, the cycles until the next one."""

    name: str
    operands: str
    stall: int

    @property
    def bits(self) -> int:
        """Return the width of a memory access."""
        found = _WIDTH.search(self.name)
        return 32 if found is None else int(found.group(1).lstrip("US"))

    def is_a(self, *names: str) -> bool:
        """Tell whether the name before the modifiers is one of these."""
        return self.name.partition(".")[0] in names


@dataclass(frozen=True)
class MachineCode:
    """Count what the loop of a kernel does, or all of a kernel without a loop.

    Attributes:
        loop: whether the kernel has a loop.
        instructions: instructions of one iteration.
        stall_cycles: cycles that the instructions of one warp take one after the other, waiting
            for no memory.
        barriers: barriers of all warps of a program, in one iteration.
        shuffles: exchanges between the lanes of a warp.
        load_bits, store_bits: widths of the accesses to global memory, one entry for each
            instruction.
        late_loads: loads from global memory issued after the first exchange between lanes, hence
            after a barrier.
        ahead: iterations between the issue of a load and the use of what it loads; 0 where both are
            in the same one.
    """

    loop: bool
    instructions: int
    stall_cycles: int
    barriers: int
    shuffles: int
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]
    late_loads: int
    ahead: int


def parse(sass: str, whole: bool = False) -> MachineCode:
    """Count the loop of a kernel in the text of Triton's disassembler.

    Args:
        sass: ``compiled.asm["sass"]``.
        whole: whether to count all of a kernel whose loop is not over tokens.

    Raises:
        ValueError: the text holds no instructions.
    """
    listing = _instructions(sass)
    body, loop = _body([] if whole else listing) or (_up_to_exit(listing), False)
    loads = [i for i, x in enumerate(body) if x.is_a("LDG", "LDGSTS")]
    first_shuffle = next((i for i, x in enumerate(body) if x.is_a("SHFL")), len(body))
    return MachineCode(
        loop=loop,
        instructions=len(body),
        stall_cycles=sum(x.stall for x in body),
        barriers=sum(x.is_a("BAR") for x in body),
        shuffles=sum(x.is_a("SHFL") for x in body),
        load_bits=tuple(body[i].bits for i in loads),
        store_bits=tuple(x.bits for x in body if x.is_a("STG")),
        late_loads=sum(i > first_shuffle and body[i].is_a("LDG") for i in loads),
        ahead=_iterations_ahead(body) if loop else 0,
    )


def _instructions(sass: str) -> list[tuple[str, Instruction | None]]:
    """Return labels and instructions in order: ``(label, None)`` or ``("", instruction)``."""
    found: list[tuple[str, Instruction | None]] = []
    for line in sass.splitlines():
        match = _CONTROL.match(line)
        if match is not None:
            stall, name, operands = match.groups()
            found.append(("", Instruction(name, operands.strip(" ;"), int(stall, 16))))
        elif line.endswith(":"):
            found.append((line[:-1], None))
    if not any(x is not None for _, x in found):
        raise ValueError(f"no instructions in the disassembly: {sass[:200]!r}")
    return found


def _body(
    listing: Sequence[tuple[str, Instruction | None]],
) -> tuple[list[Instruction], bool] | None:
    """Return the longest loop that touches global memory, or None without one."""
    labels = {label: i for i, (label, x) in enumerate(listing) if x is None}
    loops = []
    for end, (_, x) in enumerate(listing):
        start = labels.get(x.operands.split()[-1], end) if x is not None and x.is_a("BRA") else end
        loops.append(
            [y for _, y in listing[start : end + 1] if y is not None] if start < end else []
        )
    bodies = [body for body in loops if any(x.is_a("LDG", "LDGSTS", "STG") for x in body)]
    return (max(bodies, key=len), True) if bodies else None


def _up_to_exit(listing: Sequence[tuple[str, Instruction | None]]) -> list[Instruction]:
    """Return all instructions up to the last EXIT; behind it there is only padding."""
    whole = [x for _, x in listing if x is not None]
    last = max((i for i, x in enumerate(whole) if x.is_a("EXIT")), default=len(whole) - 1)
    return whole[: last + 1]


def _iterations_ahead(body: Sequence[Instruction]) -> int:
    """Return how many iterations ahead of its work the loop copies to shared memory."""
    # of asynchronous copies, committed in an iteration
    groups = sum(x.is_a("LDGDEPBAR") for x in body)
    # groups left under way
    waits = [int(x.operands.split()[-1], 16) for x in body if x.is_a("DEPBAR")]
    return min(waits, default=0) // groups if groups else 0


@dataclass(frozen=True)
class Traffic:
    """Hold the bytes that a kernel moves for one token, or for one chunk without a loop.

    Attributes:
        read, written: bytes of a token.
        tokens: tokens of the launch.
        programs: programs of the launch.
        extra: bytes beside those that the operator must move: partial sums, written and read again.
        sums: torch kernels that finish the sums over tokens.
    """

    read: float
    written: float
    tokens: int
    programs: int
    extra: float = 0.0
    sums: int = 0


def programs_per_multiprocessor(registers: int, num_warps: int, shared: int) -> int:
    """Return how many programs a multiprocessor holds at a time.

    ``registers`` are per thread, ``shared`` are bytes per program.
    """
    per_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = REGISTERS // (per_warp * num_warps)
    by_shared = SHARED_BYTES // (shared + RESERVED_SHARED_BYTES)
    return min(by_registers, MAX_WARPS // num_warps, MAX_PROGRAMS, by_shared)


def bytes_in_flight(code: MachineCode, traffic: Traffic, held: int) -> float:
    """Return the most bytes that a multiprocessor has asked for and not yet received."""
    return held * traffic.read * max(code.ahead, 1)


def predicted_share(
    code: MachineCode, traffic: Traffic, held: int, num_warps: int, copy: float
) -> float:
    """Predict the share of the bandwidth of a copy that a kernel reaches.

    Three times are computed for all tokens: moving the bytes at the bandwidth of the copy; the
    iterations of a program one after the other, ``held`` programs at a time on each multiprocessor;
    and issuing the instructions. The three overlap in part: the root of the sum of their squares is
    taken. A last wave of programs that does not fill the GPU counts as a full one, and the kernels
    that finish sums come after.

    Args:
        code: counts of the kernel.
        traffic: bytes that the kernel cannot do without.
        held: programs on a multiprocessor.
        num_warps: warps of a program.
        copy: bytes/s of a copy.
    """
    moved = (traffic.read + traffic.written) * traffic.tokens
    waits = (
        SHUFFLE_CYCLES * code.shuffles
        + BARRIER_CYCLES * code.barriers
        + SHARED_CYCLES * code.barriers
    )
    trips = 0 if code.ahead else 2 if code.late_loads else 1  # to memory, one after the other
    iteration = trips * MEMORY_CYCLES + code.stall_cycles + waits
    slots = held * MULTIPROCESSORS
    waves = traffic.programs / slots
    filled = waves / math.ceil(waves) if waves > 0 else 1.0
    moving = (moved + traffic.extra) / copy
    waiting = traffic.tokens * iteration / (slots * CLOCK_HZ * filled)
    issuing = (
        traffic.tokens * code.instructions * num_warps / (SCHEDULERS * MULTIPROCESSORS * CLOCK_HZ)
    )
    seconds = math.sqrt(moving**2 + waiting**2 + issuing**2) + SUM_LAUNCH_S * traffic.sums
    return moved / copy / seconds
