"""Print the kernels' machine code in a table: ``python -m anyflow.kernels.ahead_of_time --report``.

For sm_90, bf16, at 480 x 832 x 81 (32760 tokens in 21 frames) and the widths of both models, with
one modulation row per sample and with one per frame. The kernels over frames take a batch of four
latents. The columns:

    warps, regs    of a program, per thread
    held, occ      programs that a multiprocessor holds at a time, and its share of 64 warps
    narrow         accesses to global memory of less than 128 bits; outside of the kernels over
                   rows, the scalars
    instr, bars    instructions and barriers of a token (of a chunk, for the kernels over frames)
    late           loads issued after the first exchange between lanes: a second trip to memory
    ahead          tokens that are copied to shared memory before their turn
    KB             bytes in flight per multiprocessor; Hopper needs about 40 to 60 KB to reach its
                   bandwidth
    waves          programs over those that 132 multiprocessors hold at a time
    H100, H200     predicted share of the bandwidth of a copy (anyflow.kernels.machine_code says
                   how)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from anyflow.kernels import machine_code
from anyflow.kernels.ahead_of_time import (
    compile_launch,
    disassemble,
    kernel_calls,
    loss_examples,
    print_table,
)
from anyflow.kernels.launch import Launch, record
from anyflow.kernels.machine_code import Traffic
from anyflow.ops.examples import (
    FRAMES,
    TOKENS,
    Example,
    LeastWork,
    dual_timestep_embedding,
    row_examples,
)

CAPABILITY = 90
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """Hold a line of the table; the module's docstring has the columns.

    ``share`` is by card, and None for a kernel that is too small to have a bandwidth.
    """

    kernel: str
    variant: str
    dim: int
    rows: int
    num_warps: int
    registers: int
    spills: int
    held: int
    occupancy: float
    narrow: int
    instructions: int
    barriers: int
    late_loads: int
    ahead: int
    kilobytes: float
    waves: float
    share: dict[str, float] | None


def entries(dims: Sequence[int], rows: Sequence[int]) -> Iterator[Entry]:
    """Compile and count every kernel; those over frames and embeddings once.

    Args:
        dims: widths D.
        rows: modulation rows per sample, R.
    """
    for dim in dims:
        for r in rows:
            yield from _entries(row_examples(TOKENS, dim, r), dim, r)
        embedding = dual_timestep_embedding(FRAMES, dim, learned=True)
        yield from _entries([embedding], dim, FRAMES)
    yield from _entries(loss_examples(picked=None), 0, 0)


def _entries(examples: Iterable[Example], dim: int, rows: int) -> Iterator[Entry]:
    """Record, compile and count the kernels of examples, forward and backward."""
    for example, direction, call in kernel_calls(examples, DTYPE):
        work = example.forward if direction == "forward" else example.backward
        with record() as launches:
            call()
        finishing = [launch for launch in launches if _name(launch) == "finish_sums"]
        for launch in launches:
            if launch not in finishing:
                traffic = _traffic(example, work, launch, finishing)
                yield _entry(launch, example.variant, dim, rows, traffic)


def _name(launch: Launch) -> str:
    """Return the name of a launch's kernel, without its suffix."""
    return str(launch.kernel.fn.__name__).removesuffix("_kernel")


def _entry(launch: Launch, variant: str, dim: int, rows: int, traffic: Traffic | None) -> Entry:
    """Compile a launch and predict its speed from its machine code."""
    resources = compile_launch(launch, CAPABILITY)
    # the kernels over frames have a chunk per program, and no loop
    whole = "CHUNK" in launch.options
    code = machine_code.parse(disassemble(launch, CAPABILITY), whole=whole)
    warps = resources["num_warps"]
    held = machine_code.programs_per_multiprocessor(
        resources["registers"], warps, resources["shared"]
    )
    share, flight = None, 0.0
    if traffic is not None:
        flight = machine_code.bytes_in_flight(code, traffic, held) / 1024
        share = {
            card: machine_code.predicted_share(code, traffic, held, warps, copy)
            for card, copy in machine_code.COPY_BANDWIDTH.items()
        }
    return Entry(
        kernel=_name(launch),
        variant=variant,
        dim=dim,
        rows=rows,
        num_warps=warps,
        registers=resources["registers"],
        spills=resources["spills"],
        held=held,
        occupancy=held * warps / machine_code.MAX_WARPS,
        narrow=sum(bits < 128 for bits in (*code.load_bits, *code.store_bits)),
        instructions=code.instructions,
        barriers=code.barriers,
        late_loads=code.late_loads,
        ahead=code.ahead,
        kilobytes=flight,
        waves=launch.grid[0] / (held * machine_code.MULTIPROCESSORS),
        share=share,
    )


def _traffic(
    example: Example, work: LeastWork, launch: Launch, finishing: Sequence[Launch]
) -> Traffic | None:
    """Return the bytes that a launch moves for a token or a chunk; None for the embeddings."""
    if example.op == "dual_timestep_embedding":
        return None
    programs = launch.grid[0]
    read, written = work.read_bytes(DTYPE), work.written_bytes(DTYPE)
    if "CHUNK" in launch.options:
        share = launch.options["CHUNK"] / (example.tokens * example.dim)
        return Traffic(read * share, written * share, programs, programs)
    partial = sum(launch.args[0].numel() * 4 for launch in finishing)
    # partial sums are written and read again
    extra, sums = 2.0 * partial, len(finishing)
    return Traffic(read / TOKENS, written / TOKENS, TOKENS, programs, extra=extra, sums=sums)


_HEADER = (
    f"{'kernel':33}{'variant':13}{'D':>5}{'R':>3}{'warps':>6}{'regs':>5}{'held':>5}{'occ':>5}"
    f"{'narrow':>7}{'instr':>6}{'bars':>5}{'late':>5}{'ahead':>6}{'KB':>4}{'waves':>6}"
    f"{'H100':>6}{'H200':>6}"
)


def _line(e: Entry) -> str:
    """Format an entry as a line below the header."""
    shares = ("-", "-") if e.share is None else tuple(f"{share:.0%}" for share in e.share.values())
    return (
        f"{e.kernel:33}{e.variant:13}{e.dim or '-':>5}{e.rows or '-':>3}{e.num_warps:>6}"
        f"{e.registers:>5}{e.held:>5}{e.occupancy:>5.0%}{e.narrow:>7}{e.instructions:>6}"
        f"{e.barriers:>5}{e.late_loads:>5}{e.ahead:>6}{e.kilobytes:>4.0f}{e.waves:>6.1f}"
        + "".join(f"{share:>6}" for share in shares)
    )


def print_report(dims: Sequence[int], rows: Sequence[int], as_json: bool) -> int:
    """Print an entry for each kernel; return how many kernels spill registers."""
    return print_table(_HEADER, entries(dims, rows), _line, as_json)
