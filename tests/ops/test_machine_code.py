"""Machine code is counted and predicted from; the kernels over tokens share options and sums."""

import math
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from anyflow.kernels import gated_residual, layer_norm_modulate, machine_code
from anyflow.kernels.launch import record
from anyflow.kernels.machine_code import MachineCode, Traffic
from anyflow.kernels.token_options import (
    BACKWARD_TOKENS,
    FEW_TENSORS,
    MEASURED,
    override_options,
    token_options,
)
from anyflow.kernels.token_sums import finish_sums
from anyflow.kernels.tokens import add_pairs

INTERPRETS = pytest.mark.skipif(
    os.environ.get("ANYFLOW_TEST_DEVICE", "cpu") != "cpu",
    reason="interprets the kernels on the CPU",
)

# A loop of Triton's disassembler: control codes (the last is the stall), predicate, name, operands.
LOOP = """Function:example_kernel
--:-:0:-:8	LDC R1, c[0x0][0x28];
--:-:2:-:1	LDG.E.128 R8, desc[UR8][R42.64];
LBB0:
--:-:2:-:1	LDG.E.128 R28, desc[UR8][R42.64];
--:0:3:-:1	@!P1 LDG.E.64 R32, desc[UR8][R42.64+0x800];
--:-:-:Y:4	FADD R52, R28, R42;
--:-:0:-:2	SHFL.BFLY PT, R58, R35, 0x1, 0x1f;
--:-:1:-:1	LDG.E R60, desc[UR8][R44.64];
--:-:-:-:6	BAR.SYNC.DEFER_BLOCKING 0x0;
--:0:-:-:1	STG.E.128 desc[UR8][R42.64], R28;
--:-:-:-:5	@P6 BRA LBB0;
--:-:-:-:f	EXIT;
LBB1:
--:-:-:Y:0	BRA LBB1;
"""
COPIES = """--:-:-:-:1	NOP;
LBB0:
--:-:-:-:1	DEPBAR.LE SB0, 0x{waits};
--:-:-:-:1	LDS.128 R4, [R61];
--:-:-:-:1	LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR8][R42.64];
--:-:-:-:1	LDGDEPBAR;
--:-:-:-:1	LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR8][R44.64];
--:-:-:-:1	LDGDEPBAR;
--:-:-:-:5	@P6 BRA LBB0;
--:-:-:-:5	EXIT;
"""


def test_the_loop_is_counted() -> None:
    found = machine_code.parse(LOOP)
    assert (found.loop, found.instructions, found.stall_cycles) == (True, 8, 21)
    assert (found.barriers, found.shuffles) == (1, 1)
    assert (found.load_bits, found.store_bits) == ((128, 64, 32), (128,))
    assert (found.late_loads, found.ahead) == (1, 0)


def test_a_kernel_without_a_loop_is_counted_up_to_its_exit() -> None:
    code = machine_code.parse(LOOP, whole=True)
    assert not code.loop and code.instructions == 11 and code.load_bits == (128, 128, 64, 32)
    assert machine_code.parse(LOOP.replace("BRA LBB0", "BRA LBB1")) == code


@pytest.mark.parametrize(("waits", "ahead"), [("0", 0), ("1", 0), ("2", 1), ("4", 2)])
def test_copies_that_stay_under_way_are_ahead(waits: str, ahead: int) -> None:
    """Two groups of copies in an iteration: to leave two under way is to be one token ahead."""
    assert machine_code.parse(COPIES.format(waits=waits)).ahead == ahead


def test_what_is_no_disassembly_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no instructions in the disassembly: 'hello'"):
        machine_code.parse("hello")


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "held"),
    [
        (64, 4, 16, 8),
        (255, 1, 0, 8),
        (32, 4, 0, 16),
        (16, 1, 0, 32),
        (128, 16, 64, 1),
        (40, 4, 98304, 2),
    ],
)
def test_programs_of_a_multiprocessor(registers: int, warps: int, shared: int, held: int) -> None:
    assert machine_code.programs_per_multiprocessor(registers, warps, shared) == held


def code(**changes: object) -> MachineCode:
    """Return machine code of nothing but what is given, which loads one token ahead."""
    return replace(MachineCode(True, 0, 0, 0, 0, (), (), late_loads=0, ahead=1), **changes)


def test_predictions_by_hand() -> None:
    """132 multiprocessors with two programs each; 264 programs of ten tokens of 10 kB."""
    traffic = Traffic(read=6000.0, written=4000.0, tokens=2640, programs=264)

    def share(c: MachineCode, t: Traffic = traffic, copy: float = 3e12) -> float:
        return machine_code.predicted_share(c, t, held=2, num_warps=4, copy=copy)

    moving = 2640 * 1e4 / 3e12  # 8.8 us
    assert share(code()) == pytest.approx(1.0)
    waiting = 10 * 800 / 1.98e9  # a program's ten trips to memory
    assert share(code(ahead=0)) == pytest.approx(moving / math.hypot(moving, waiting))
    late = pytest.approx(moving / math.hypot(moving, 2 * waiting))
    assert share(code(ahead=0, late_loads=1)) == late
    issuing = 2640 * 100 * 4 / (4 * 132 * 1.98e9)
    assert share(code(instructions=100)) == pytest.approx(moving / math.hypot(moving, issuing))
    summed = Traffic(6000.0, 4000.0, 2640, 264, extra=2640 * 1e4, sums=1)
    assert share(code(), summed) == pytest.approx(moving / (2 * moving + 8e-6))
    assert machine_code.bytes_in_flight(code(ahead=2), traffic, 2) == 24000


def test_a_last_wave_counts_as_a_whole_one() -> None:
    slow = code(stall_cycles=10**6)
    full, more = (Traffic(1.0, 1.0, n, n) for n in (264, 265))
    options = {"held": 2, "num_warps": 1, "copy": 3e12}
    first, second = (machine_code.predicted_share(slow, t, **options) for t in (full, more))
    assert second == pytest.approx(first * 265 / 264 / 2, rel=1e-3)


# What kernels over tokens share -------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("dim", "warps"), [(8, 1), (1536, 2), (2048, 2), (3072, 4), (5120, 4), (8192, 8)]
)
def test_no_lane_is_idle_at_the_widths_of_models(dim: int, warps: int) -> None:
    assert token_options(dim, tokens=16, elements=FEW_TENSORS)["num_warps"] == warps
    assert dim % (256 * warps) == 0 or dim < 256


def test_measured_options_are_for_their_width_and_dtype() -> None:
    def launched(d: int, dtype: torch.dtype) -> dict[str, int]:
        x, row = meta(1, 64, d, dtype=dtype), meta(1, 1, d, dtype=torch.float32)
        with record() as launches:
            gated_residual.backward(x, x, row)
        return {name: launches[0].options[name] for name in ("num_warps", "STAGES", "TOKENS")}

    derived = {"num_warps": 2, "STAGES": 1, "TOKENS": BACKWARD_TOKENS}
    found = dict(zip(derived, MEASURED["gated_residual backward"], strict=True))
    assert launched(1536, torch.bfloat16) == found != derived
    assert launched(1536, torch.float32) == launched(1536, torch.float16) == derived
    assert launched(2048, torch.bfloat16)["TOKENS"] == BACKWARD_TOKENS
    with override_options(TOKENS=16):
        assert launched(1536, torch.bfloat16) == found | {"TOKENS": 16}


def test_options_are_overridden_and_come_back() -> None:
    def launched() -> dict[str, int]:
        with record() as launches:
            layer_norm_modulate.forward(meta(1, 64, 1536), meta(1, 1, 1536), meta(1, 1, 1536))
        assert launches[0].grid == (64 // launches[0].options["TOKENS"],)
        return launches[0].options

    before = launched()
    with override_options(num_warps=4, TOKENS=64):
        assert launched() == before | {"num_warps": 4, "TOKENS": 64}
        with override_options(STAGES=4):
            assert launched() == before | {"STAGES": 4}
        assert launched()["TOKENS"] == 64
    assert launched() == before
    with (
        pytest.raises(ValueError, match="takes TOKENS, STAGES and num_warps, got warps"),
        override_options(warps=1),
    ):
        pass


@triton.jit
def reduce_pairs(a_ptr, b_ptr, sums_ptr, N: tl.constexpr):
    columns = tl.arange(0, N)
    a, b = tl.reduce((tl.load(a_ptr + columns), tl.load(b_ptr + columns)), 0, add_pairs)
    tl.store(sums_ptr, a)
    tl.store(sums_ptr + 1, b)


@INTERPRETS
def test_a_reduction_of_pairs_is_two_sums(generator: torch.Generator) -> None:
    """The compiled kernels reduce pairs, the interpreted ones sum twice."""
    a, b, sums = (*torch.randn(2, 16, generator=generator), torch.empty(2))
    reduce_pairs[(1,)](a, b, sums, N=16)
    torch.testing.assert_close(sums, torch.stack([a.sum(), b.sum()]))


@INTERPRETS
def test_sums_of_gradients_with_different_rows(generator: torch.Generator) -> None:
    """Twelve programs: of four rows three each, of one row all, and of two rows in bf16."""
    partial = torch.randn(3, 12, 40, generator=generator)
    like = [torch.empty(2, 2, 40), torch.empty(40), torch.empty(2, 1, 40, dtype=torch.bfloat16)]
    first, second, third = finish_sums(partial, like)
    torch.testing.assert_close(first, partial[0].view(2, 2, 3, 40).sum(2))
    torch.testing.assert_close(second, partial[1].sum(0))
    narrow = partial[2].view(2, 1, 6, 40).sum(2).bfloat16()
    torch.testing.assert_close(third, narrow, rtol=2**-8, atol=0)
    # autograd wants them apart
    assert len({t.untyped_storage().data_ptr() for t in (first, second, third)}) == 3


@INTERPRETS
def test_sums_over_more_programs_than_a_tile_and_over_none(generator: torch.Generator) -> None:
    partial = torch.randn(1, 300, 8, generator=generator)
    torch.testing.assert_close(
        finish_sums(partial, [torch.empty(8)])[0], partial[0].sum(0), rtol=1e-5, atol=1e-5
    )
    empty, affine = finish_sums(torch.empty(2, 0, 8), [torch.empty(0, 3, 8), torch.empty(8)])
    assert empty.shape == (0, 3, 8) and torch.equal(affine, torch.zeros(8))
