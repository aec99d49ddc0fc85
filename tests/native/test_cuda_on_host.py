"""Test what the kernels of csrc/cuda compute, on the CPU; no GPU is needed.

What a thread does is a function of its place in a block and of a sum over that block, so the same
functions run here too, with the CPU's threads: that proves addresses, rounding and arithmetic. The
warp shuffles and the launch itself are left to the tests of the operators, on a GPU.
"""

import ctypes
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from formulas import FORMULAS, expected
from torch import Tensor

pytestmark = pytest.mark.slow  # compiling for the CPU takes 30 seconds

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ON_HOST = Path(__file__).with_name("cuda_on_host.cu")
# (relative to the element, relative to the largest), as in tests/ops: one rounding of an fp32
# accumulation.
TOLERANCES = {
    torch.float32: (2e-6, 1e-6),
    torch.float16: (2**-10, 2**-12),
    torch.bfloat16: (2**-7, 2**-9),
}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Draw = Callable[..., Tensor]
Host = Callable[..., "str | None"]


class Sizes(ctypes.Structure):
    """Mirror the struct of launch.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "tokens", "dim")]


class Operand(ctypes.Structure):
    """Mirror the struct of launch.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "batch_stride", "row_stride")),
    ]


def operand(t: Tensor | None) -> Operand:
    """Pass ``[B, R, D]``, a table ``[L, N]``, a vector ``[D]`` or None as the kernels take it."""
    if t is None:
        return Operand(None, 0, 1, 0, 0)
    assert t.stride(-1) == 1
    rows, strides = (1, *t.shape)[-2], (0, 0, *t.stride())[-3:-1]
    return Operand(t.data_ptr(), CODES[t.dtype], rows, *strides)


def argument(value: Tensor | int | float | None) -> ctypes.Structure | ctypes._SimpleCData:
    """Convert an argument of a kernel; numbers are numbers, everything else is an operand."""
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_float(value) if isinstance(value, float) else operand(value)


@pytest.fixture(scope="module")
def library(nvcc, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Build the kernels for this machine's CPU with the compiler that builds them for a GPU.

    The code for a GPU that comes with it is not run, and not optimized.
    """
    target = tmp_path_factory.mktemp("on_host") / "on_host.so"
    flags = ["-std=c++17", "-O1", "-Xcicc", "-O0", "-arch=compute_80", "-code=compute_80"]
    flags += ["-shared", "-Xcompiler", "-fPIC,-pthread,-fsanitize=alignment"]
    flags += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-I", str(CUDA)]
    process = nvcc(*flags, ON_HOST, "-o", target)
    assert process.returncode == 0, process.stdout
    return ctypes.CDLL(str(target))


@pytest.fixture
def host(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> Iterator[Host]:
    """Return ``host(name, x, *arguments)``, which runs a kernel and returns its error message.

    The sanitizer reports the access to an unaligned address, which a GPU would not bear.
    """

    def run(name: str, x: Tensor, *arguments: Tensor | int | float | None) -> str | None:
        function = getattr(library, f"host_{name}")
        function.restype = ctypes.c_char_p
        outputs = 2 if name == "residual_layer_norm" else 1
        converted = [argument(a) for a in arguments]
        # the results stand before eps
        for i in range(len(converted) - 1 - outputs, len(converted) - 1):
            converted[i] = ctypes.c_void_p(arguments[i].data_ptr())
        error = function(Sizes(*x.shape), operand(x), *converted)
        return None if error is None else error.decode()

    yield run
    assert "runtime error" not in capfd.readouterr().err


@pytest.fixture
def draw(generator: torch.Generator) -> Draw:
    """Draw normal tensors whose tokens, rows and samples lie further apart than they must."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) == 1:
            return torch.randn(shape, generator=generator).to(dtype)
        wide = (*shape[:-2], shape[-2] + 1, 2 * shape[-1] if shape[-1] % 8 == 0 else shape[-1])
        return torch.randn(wide, generator=generator).to(dtype)[..., : shape[-2], : shape[-1]]

    return normal


class Result:
    """Hold a contiguous tensor to be written, and memory around it that must stay as it is.

    The tensor holds NaN until it is written, the memory sevens.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.memory = torch.full((shape.numel() + 64,), 7.0, dtype=dtype)
        self.tensor = self.memory[32 : 32 + shape.numel()].view(shape).fill_(torch.nan)

    def check(self, expected: Tensor) -> Tensor:
        """Compare with an fp64 tensor, NaN where it is NaN; return what was written."""
        assert (self.memory[:32] == 7).all() and (self.memory[-32:] == 7).all()
        rtol, atol = TOLERANCES[self.tensor.dtype]
        largest = expected.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(
            self.tensor.double(), expected, rtol=rtol, atol=atol * largest, equal_nan=True
        )
        return self.tensor


def check(host: Host, op: str, x: Tensor, **others: Tensor | int | None) -> Tensor:
    """Compare what a kernel writes with the operator's formula; return its first result."""
    results = [Result(x.shape, x.dtype) for _ in range(2 if op == "residual_layer_norm" else 1)]
    names = list(inspect.signature(FORMULAS[op]).parameters)[1:-2]  # between x and eps
    operands = {name: others.get(name) for name in names}
    assert host(op, x, *operands.values(), *(r.tensor for r in results), 1e-6) is None
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in operands.items()}
    written = tuple(r.tensor for r in results)
    exact = expected(op, {"x": x.double(), **wide}, written)
    for result, wanted in zip(results, exact, strict=True):
        result.check(wanted.reshape(x.shape))
    return written[0]


# Widths of one warp and many, of one and two vectors per thread, full and with a rest, in every
# dtype; runs of three tokens with a rest, in one segment or many, in one. Few tokens where a block
# has many threads: each is a thread of the CPU.
WIDTHS = [
    (1, 5, 8, 1), (2, 6, 24, 3), (1, 4, 264, 4), (2, 3, 1536, 1), (1, 2, 2048, 1), (1, 4, 2056, 2),
    (1, 3, 5120, 1), (1, 2, 8192, 2),
]  # fmt: skip
RUNS = [(1, 3100, 8, 1), (2, 1550, 16, 31)]
SHAPES = [
    *((*shape, dtype) for shape in WIDTHS for dtype in CODES),
    *((*shape, torch.bfloat16) for shape in RUNS),
]


@pytest.mark.parametrize(("b", "length", "d", "r", "dtype"), SHAPES, ids=str)
def test_layer_norm_modulate(b, length, d, r, dtype, host: Host, draw: Draw) -> None:
    x, shift, scale = draw(b, length, d, dtype=dtype), draw(b, r, d), draw(b, r, d)
    check(host, "layer_norm_modulate", x, shift=shift, scale=scale.bfloat16())


@pytest.mark.parametrize(
    "dtypes", list(itertools.product(CODES, CODES)), ids=lambda p: "-".join(str(d)[6:] for d in p)
)
@pytest.mark.parametrize(
    ("d", "names"), [(40, "gate weight bias"), (1536, "shift scale"), (2056, "gate scale shift")]
)
def test_residual_layer_norm(dtypes, d, names, host: Host, draw: Draw) -> None:
    x, y = (draw(2, 6, d, dtype=dtype) for dtype in dtypes)
    shapes = {"weight": (d,), "bias": (d,)}
    others = {name: draw(*shapes.get(name, (2, 3, d))) for name in names.split()}
    check(host, "residual_layer_norm", x, y=y, **others)


@pytest.mark.parametrize(("b", "length", "d", "r"), [*WIDTHS, *RUNS])
def test_residual_layer_norm_when_rows_differ(b, length, d, r, host: Host, draw: Draw) -> None:
    gate_rows = 2 if length % 2 == 0 else length
    x, y = (draw(b, length, d, dtype=torch.bfloat16) for _ in range(2))
    others = {"gate": draw(b, gate_rows, d), "shift": draw(b, r, d), "scale": draw(b, r, d)}
    check(host, "residual_layer_norm", x, y=y, **others)


@pytest.mark.parametrize("names", ["", "gate", "weight", "gate weight", "weight bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_residual_layer_norm_with_absent_operands(names, dtype, host: Host, draw: Draw) -> None:
    x, y = draw(2, 4, 24, dtype=dtype), draw(2, 4, 24, dtype=dtype)
    others = {k: draw(*((2, 4, 24) if k == "gate" else (24,))) for k in names.split()}
    h = check(host, "residual_layer_norm", x, y=y, **others)
    if "gate" not in names:
        assert torch.equal(h, (x.float() + y.float()).to(dtype))  # to nearest even


def test_norm_reads_the_rounded_sum(host: Host, draw: Draw) -> None:
    """Check the norm next to 64, where the rounding of bf16 to a half changes the norm visibly."""
    x, y = 64 + draw(2, 4, 24, dtype=torch.bfloat16), draw(2, 4, 24, dtype=torch.bfloat16)
    check(host, "residual_layer_norm", x, y=y)


@pytest.mark.parametrize(
    ("b", "length", "d", "heads"),
    [(2, 3, 24, 4), (1, 5, 16, 8), (2, 3, 40, 5), (1, 4, 1536, 12), (1, 3, 2056, 257),
     (1, 3, 5120, 40), (1, 2, 8192, 64), (2, 1550, 16, 2)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("dtype", "tables"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, None),
    ],
    ids=str,
)
def test_rms_norm_rope(b, length, d, heads, tables, dtype, host: Host, draw: Draw) -> None:
    x, weight, cos, sin = draw(b, length, d, dtype=dtype), draw(d), None, None
    if tables is not None:
        angles = draw(length, d // heads // 2)
        cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    check(host, "rms_norm_rope", x, weight=weight, cos=cos, sin=sin, num_heads=heads)


def test_tables_at_odd_addresses(host: Host, draw: Draw) -> None:
    x, weight, angles = draw(1, 5, 64), draw(64), draw(5, 17)
    tables = {"cos": angles.cos()[:, 1:], "sin": angles.sin()[:, :16]}
    check(host, "rms_norm_rope", x, weight=weight, **tables, num_heads=2)


def test_large_mean_and_what_is_not_finite(host: Host, draw: Draw) -> None:
    """Check that the variance does not cancel, and that NaN or infinity spoils its token only."""
    x, shift, scale = draw(1, 6, 264), *draw(2, 1, 1, 264)
    x[0, 1] += 64
    x[0, 5] = 0
    x[0, 3, 200], x[0, 4, 7] = torch.nan, torch.inf
    out = Result(x.shape, x.dtype)
    assert host("layer_norm_modulate", x, shift, scale, out.tensor, 1e-6) is None
    written = out.tensor[0]
    assert written[3].isnan().all() and written[4].isnan().all()
    finite = torch.tensor([0, 1, 2, 5])
    operands = {"x": x[:, finite], "shift": shift, "scale": scale}
    (exact,) = expected("layer_norm_modulate", {n: v.double() for n, v in operands.items()})
    # fp32 has the mean of 64 to within 4e-6 and some; a variance from the mean of squares would be
    # 2e-4 off.
    torch.testing.assert_close(written[finite].double(), exact[0], rtol=1e-5, atol=2e-5)


def test_eps_is_used(host: Host, draw: Draw) -> None:
    x = 1e-3 * draw(1, 4, 264)
    check(host, "layer_norm_modulate", x, shift=draw(1, 1, 264), scale=draw(1, 1, 264))
    check(host, "rms_norm_rope", x, weight=draw(264), num_heads=1)


def test_offsets_beyond_32_bits(host: Host, draw: Draw) -> None:
    """Check two tokens 2^31 elements apart; the pages between them are never touched."""
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    x = memory.as_strided((1, 2, 8), (0, 2**31, 1))
    x.copy_(draw(1, 2, 8))
    check(host, "layer_norm_modulate", x, shift=draw(1, 2, 8), scale=draw(1, 2, 8))
    check(host, "residual_layer_norm", x, y=x)
    check(host, "rms_norm_rope", x, weight=draw(8), num_heads=1)


def test_empty_tensors_and_refusals(host: Host, draw: Draw) -> None:
    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> str | None:
        out = Result(x.shape, x.dtype)
        error = host("layer_norm_modulate", x, shift, scale, out.tensor, 1e-6)
        assert out.tensor.isnan().all()  # nothing was written
        return error

    rows = torch.zeros(1, 1, 16)
    assert modulated(torch.empty(0, 4, 16), rows[:0], rows[:0]) is None
    assert modulated(torch.empty(1, 0, 16), rows, rows) is None
    width = "D must be a multiple of 8 up to 8192"
    assert modulated(torch.empty(1, 2, 12), rows[..., :12], rows[..., :12]) == width
    assert modulated(torch.empty(1, 2, 8200), *torch.empty(2, 1, 1, 8200)) == width
    divide = "the rows of an operand must divide L"
    assert modulated(torch.empty(1, 3, 16), rows.expand(1, 2, 16), rows) == divide
    unaligned = "every row of an operand must begin at a multiple of 16 bytes"
    assert modulated(torch.empty(33)[1:].view(1, 2, 16), rows, rows) == unaligned
    assert modulated(torch.empty(1, 2, 18)[..., :16], rows, rows) == unaligned
    x, weight = torch.empty(1, 2, 24), torch.zeros(24)
    for heads, cos, message in (
        (5, None, "num_heads must divide D"),
        (8, torch.zeros(2, 1), "D / num_heads must be even for a rotation"),
        (4, torch.zeros(1, 3), "cos and sin must have L rows"),
    ):
        error = host("rms_norm_rope", x, weight, cos, cos, heads, torch.empty(1, 2, 24), 1e-6)
        assert error == message
    with_both = [x, None, weight, None, x, x, torch.empty_like(x), torch.empty_like(x), 1e-6]
    assert host("residual_layer_norm", x, *with_both) == "give an affine or a modulation, not both"
