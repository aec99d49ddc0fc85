"""The kernels' machine code in a table: ``python -m anyflow.kernels.ahead_of_time --report``.

For sm_90, bf16, at 480 x 832 x 81 (32760 tokens in 21 frames) and the widths of both models, with
one modulation row per sample and with one per frame. The kernels over frames take a batch of four
latents. The columns:

    warps, regs    of a program, per thread
    held, occ      programs that a multiprocessor holds at a time, and its share of 64 warps
    narrow         accesses to global memory of less than 128 bits; outside of the kernels over rows, the scalars
    instr, bars    instructions and barriers of a token (of a chunk, for the kernels over frames)
    late           loads issued after the first exchange between lanes: a second trip to memory
    ahead          tokens that are copied to shared memory before their turn
    KB             bytes in flight per multiprocessor; Hopper needs about 40 to 60 KB to reach its bandwidth
    waves          programs over those that 132 multiprocessors hold at a time
    H100, H200     predicted share of the bandwidth of a copy (anyflow.kernels.machine_code says how)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from anyflow.kernels import machine_code
from anyflow.kernels.ahead_of_time import (
    compile_launch,
    disassemble,
    embedding_calls,
    frame_calls,
    row_calls,
)
from anyflow.kernels.launch import Launch, record
from anyflow.kernels.machine_code import Traffic

CAPABILITY = 90
TOKENS, FRAMES = 32760, 21
_SAMPLES, _SLOTS = 4, 2  # of the kernels over frames: latents, and those of them with r != t

# Passes over [L, D] that are read and written, of kernels over rows.
ROW_PASSES = {
    "layer_norm_modulate_forward": (1, 1),
    "layer_norm_modulate_backward": (2, 1),
    "residual_layer_norm_forward": (2, 2),
    "residual_layer_norm_backward, gate, affine": (4, 2),
    "residual_layer_norm_backward, modulation": (3, 1),
    "gated_residual_forward": (2, 1),
    "gated_residual_backward": (2, 1),
    "rms_norm_rope_forward": (1, 1),
    "rms_norm_rope_backward": (2, 1),
}
# Bytes per element of a latent that are read and written, every sample with r != t: latents in
# bf16, t +- in fp32.
_FRAME_BYTES = {
    "flow_map_inputs_forward": (4, 2 + 4 + 8),
    "flow_map_inputs_backward": (2 + 4 + 8, 4),
    "flow_map_loss_forward": (12, 2),
    "flow_map_loss_backward": (2, 2),
}
_ROTARY_BYTES = 2 * 64 * 4  # cos and sin of a token, in fp32; all heads share them


@dataclass(frozen=True)
class Entry:
    """A line of the table; the module's docstring has the columns.

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
    dtype = torch.bfloat16
    for dim in dims:
        for r in rows:
            yield from _of(row_calls(dim, dtype, length=TOKENS, rows=r), dim, r)
        yield from _of(embedding_calls(dim, dtype, rows=FRAMES), dim, FRAMES)
    latents = (_SAMPLES, FRAMES, 16, 60, 104)
    yield from _of(frame_calls(dtype, shape=latents, slots=_SLOTS), 0, 0)


def _of(calls: Iterator[tuple[str, Callable[[], object]]], dim: int, rows: int) -> Iterator[Entry]:
    for variant, call in calls:
        if variant in ("rows", "no rotary", "additive"):  # the same code but for a branch
            continue
        with record() as launches:
            call()
        finishing = [launch for launch in launches if _name(launch) == "finish_sums"]
        for launch in launches:
            if launch not in finishing:
                yield _entry(launch, variant, dim, rows, finishing)


def _name(launch: Launch) -> str:
    return str(launch.kernel.fn.__name__).removesuffix("_kernel")


def _entry(launch: Launch, variant: str, dim: int, rows: int, finishing: Sequence[Launch]) -> Entry:
    resources = compile_launch(launch, CAPABILITY)
    name, programs = _name(launch), launch.grid[0]
    code = machine_code.parse(disassemble(launch, CAPABILITY), whole=name in _FRAME_BYTES)
    warps = resources["num_warps"]
    held = machine_code.programs_per_multiprocessor(
        resources["registers"], warps, resources["shared"]
    )
    traffic = _traffic(name, variant, dim, launch, finishing)
    share = traffic and {
        card: machine_code.predicted_share(code, traffic, held, warps, copy)
        for card, copy in machine_code.COPY_BANDWIDTH.items()
    }
    return Entry(
        kernel=name,
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
        kilobytes=0.0
        if traffic is None
        else machine_code.bytes_in_flight(code, traffic, held) / 1024,
        waves=programs / (held * machine_code.MULTIPROCESSORS),
        share=share,
    )


def _traffic(
    name: str, variant: str, dim: int, launch: Launch, finishing: Sequence[Launch]
) -> Traffic | None:
    programs = launch.grid[0]
    if name in _FRAME_BYTES:
        read, written = (n * launch.options["CHUNK"] for n in _FRAME_BYTES[name])
        return Traffic(read, written, programs, programs)
    if not {name, f"{name}, {variant}"} & set(ROW_PASSES):
        return None
    partial = sum(launch.args[0].numel() * 4 for launch in finishing)
    read, written = token_bytes(name, variant, dim)
    return Traffic(read, written, TOKENS, programs, extra=2.0 * partial, sums=len(finishing))


def token_bytes(name: str, variant: str, dim: int) -> tuple[int, int]:
    """Return the bytes of a token in bf16 that a kernel over rows must read, and write.

    Args:
        name: ``<op>_forward`` or ``<op>_backward``.
        variant: as :func:`~anyflow.kernels.ahead_of_time.row_calls` yields it.
        dim: D.
    """
    passes = ROW_PASSES.get(name) or ROW_PASSES[f"{name}, {variant}"]
    table = _ROTARY_BYTES if variant == "rotary" else 0
    return passes[0] * 2 * dim + table, passes[1] * 2 * dim


HEADER = (
    f"{'kernel':33}{'variant':13}{'D':>5}{'R':>3}{'warps':>6}{'regs':>5}{'held':>5}{'occ':>5}{'narrow':>7}"
    f"{'instr':>6}{'bars':>5}{'late':>5}{'ahead':>6}{'KB':>4}{'waves':>6}{'H100':>6}{'H200':>6}"
)


def line(e: Entry) -> str:
    """Format an entry as a line below ``HEADER``."""
    shares = ("-", "-") if e.share is None else tuple(f"{share:.0%}" for share in e.share.values())
    return (
        f"{e.kernel:33}{e.variant:13}{e.dim or '-':>5}{e.rows or '-':>3}{e.num_warps:>6}{e.registers:>5}"
        f"{e.held:>5}{e.occupancy:>5.0%}{e.narrow:>7}{e.instructions:>6}"
        f"{e.barriers:>5}{e.late_loads:>5}{e.ahead:>6}{e.kilobytes:>4.0f}{e.waves:>6.1f}"
        + "".join(f"{share:>6}" for share in shares)
    )


def print_report(dims: Sequence[int], rows: Sequence[int], as_json: bool) -> int:
    """Print the table, or one JSON object per line; return how many kernels spill registers."""
    if not as_json:
        print(HEADER)
    spilling = 0
    for entry in entries(dims, rows):
        print(json.dumps(asdict(entry)) if as_json else line(entry), flush=True)
        spilling += entry.spills > 0
    return spilling
