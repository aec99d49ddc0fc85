"""Test that csrc/cuda compiles without a warning, spill or local memory, and computes its results.

No GPU is needed. What a thread does is a function of its place in a block and of a sum over that
block, so the same functions run here too, with the CPU's threads: that proves addresses, rounding
and arithmetic. The warp shuffles and the launch itself are left to the tests of the operators, on a
GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops.layer_norm_modulate import layer_norm_modulate_reference, modulate
from anyflow.ops.residual_layer_norm import residual_layer_norm_reference
from anyflow.ops.rms_norm_rope import rms_norm_rope_reference

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ON_HOST = Path(__file__).with_name("cuda_on_host.cu")
SOURCES = sorted(CUDA.glob("*.cu"))
assert SOURCES, f"no CUDA sources in {CUDA}"
ARCHS = ("80", "90a", "100a")
STRICT = [
    "-std=c++17",
    "-O3",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v,--warn-on-spills,--warn-on-local-memory-usage",
]

Compiled = Callable[[Path, str], tuple[Path, str]]

every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def find(tool: str, *folders: Path) -> str | None:
    """Find a program in one of the folders, on the PATH, or where CUDA is usually installed."""
    usual = [Path("/usr/local/cuda/bin")]
    home = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    places = [*home, *folders, *map(Path, os.environ.get("PATH", "").split(os.pathsep)), *usual]
    return shutil.which(tool, path=os.pathsep.join(map(str, places)))


@functools.cache
def find_nvcc() -> str | None:
    """Find the CUDA compiler that a build would take."""
    named = os.environ.get("CUDACXX")
    return shutil.which(named) if named else find("nvcc")


@functools.cache
def find_nvdisasm() -> str | None:
    """Find CUDA's disassembler, or the one that Triton brings along."""
    spec = importlib.util.find_spec("triton")
    origin = None if spec is None else spec.origin
    return find(
        "nvdisasm",
        *([] if origin is None else [Path(origin).parent / "backends" / "nvidia" / "bin"]),
    )


needs_nvcc = pytest.mark.skipif(
    find_nvcc() is None, reason="no nvcc in $CUDACXX, $CUDA_HOME/bin, $PATH or /usr/local/cuda/bin"
)
needs_nvdisasm = pytest.mark.skipif(
    find_nvdisasm() is None, reason="neither CUDA nor Triton brings an nvdisasm"
)


def nvcc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the compiler; its messages and those of ptxas are in stdout."""
    command = [str(find_nvcc()), *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def defects(report: str) -> list[str]:
    """List what must not be in the report of ``ptxas -v``; a report without a kernel is one."""
    kernels = re.split(r"Compiling entry function ", report)[1:]
    found = [] if kernels else ["no kernel was compiled"]
    for kernel in kernels:
        name = kernel.split("'")[1]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", kernel
        )
        if frame is None or any(map(int, frame.groups())):
            found.append(f"{name}: {None if frame is None else frame[0]}")
        found += [f"{name}: {local}" for local in re.findall(r"\d+ bytes lmem", kernel)]
    return found + re.findall(r".*\b(?:warning|error)\b.*", report)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Return ``compiled(source, arch)``, which makes a cubin and the report on it once.

    A failure of nvcc is a failure of the test.
    """
    folder = tmp_path_factory.mktemp("cubins")

    @functools.cache
    def cubin(source: Path, arch: str) -> tuple[Path, str]:
        target = folder / f"{source.stem}.sm_{arch}.cubin"
        process = nvcc(*STRICT, f"-arch=sm_{arch}", "-cubin", source, "-o", target)
        assert process.returncode == 0, process.stdout
        return target, process.stdout

    return cubin


@every_source
@pytest.mark.parametrize("arch", ARCHS)
@needs_nvcc
@pytest.mark.slow
def test_compiles_without_spills_or_local_memory(
    source: Path, arch: str, compiled: Compiled
) -> None:
    _, report = compiled(source, arch)
    print(report)
    assert not defects(report)


@pytest.mark.parametrize(
    ("body", "defect"),
    [
        ("float a[64]; for (int i = 0; i < 64; ++i) a[i * n % 64] = x[i]; x[0] = a[n] - a[n / 2];",
         "local memory"),
        ("float a[64]; for (int i = 0; i < 64; ++i) a[i] = x[i]; __syncthreads();"
         "for (int i = 0; i < 64; ++i) x[i] = a[63 - i] * a[i];", "spill"),
        ("int unused; x[0] = n;", "warning|never referenced"),
    ],
    ids=["local-array", "spill", "warning"],
)  # fmt: skip
@needs_nvcc
def test_a_defect_is_found(body: str, defect: str, tmp_path: Path) -> None:
    """Find each defect, by the same flags and the same reading of the report."""
    source = tmp_path / "bad.cu"
    source.write_text(
        f"__global__ void __launch_bounds__(1024, 2) bad(volatile float* x, int n) {{ {body} }}\n"
    )
    process = nvcc(*STRICT, "-arch=sm_90a", "-cubin", source, "-o", tmp_path / "bad.cubin")
    assert process.returncode != 0 and re.search(defect, process.stdout, re.IGNORECASE), (
        process.stdout
    )
    assert defects(process.stdout)


def test_a_report_without_kernels_is_a_defect() -> None:
    assert defects("ptxas info    : 0 bytes gmem\n") == ["no kernel was compiled"]


@every_source
@pytest.mark.parametrize("arch", ARCHS)
@needs_nvcc
@needs_nvdisasm
@pytest.mark.slow
def test_memory_is_accessed_by_16_bytes(source: Path, arch: str, compiled: Compiled) -> None:
    """Check every store, and every load but those of the tables of a rotation.

    The tables may be unaligned or of odd width.
    """
    cubin, _ = compiled(source, arch)
    listing = subprocess.run(
        [str(find_nvdisasm()), "-c", str(cubin)], capture_output=True, text=True
    )
    if listing.returncode != 0:
        pytest.skip(f"this nvdisasm does not read sm_{arch}: {listing.stderr.strip()}")
    kernels = re.split(r"^\.text\.", listing.stdout, flags=re.MULTILINE)[1:]
    assert kernels
    for kernel in kernels:
        name, accesses = kernel.splitlines()[0], re.findall(r"\b(LDG|STG|LDL|STL)\.(\S+)", kernel)
        loads, stores = (
            [width for access, width in accesses if access == kind] for kind in ("LDG", "STG")
        )
        assert loads and stores, name
        assert not [access for access, _ in accesses if access in ("LDL", "STL")], name
        assert all("128" in width for width in stores), (name, stores)
        assert any("128" in width for width in loads), (name, loads)
        assert "RmsNormRope" in name or all("128" in width for width in loads), (name, loads)


@pytest.mark.parametrize(
    "path", sorted([*SOURCES, *CUDA.glob("*.cuh"), *CUDA.glob("*.h")]), ids=lambda path: path.name
)
def test_no_torch_header(path: Path) -> None:
    """Check that nvcc alone compiles the kernels; only csrc/cuda/operators.cpp knows torch."""
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    assert included and not [
        name for name in included if re.match(r"(torch|ATen|c10|pybind11|Python)\b", name)
    ]


def test_interface_is_plain_cpp(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "user.cpp"
    source.write_text(
        f'#include "{CUDA / "launch.h"}"\nint main() {{ return anyflow::cuda::kMaxDim != 8192; }}\n'
    )
    subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", source], check=True
    )


# (relative to the element, relative to the largest), as in tests/ops: one rounding of an fp32
# accumulation.
TOLERANCES = {
    torch.float32: (2e-6, 1e-6),
    torch.float16: (2**-10, 2**-12),
    torch.bfloat16: (2**-7, 2**-9),
}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
every_dtype = pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))

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
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Build the kernels for this machine's CPU with the compiler that builds them for a GPU."""
    folder = tmp_path_factory.mktemp("on_host")
    target = [
        "-arch=compute_80",
        "-code=compute_80",
        "-shared",
        "-Xcompiler",
        "-fPIC,-pthread,-fsanitize=alignment",
    ]
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    process = nvcc(
        "-std=c++17", "-O1", *warnings, *target, "-I", CUDA, ON_HOST, "-o", folder / "on_host.so"
    )
    assert process.returncode == 0, process.stdout
    return ctypes.CDLL(str(folder / "on_host.so"))


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


def doubled(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if t is None else t.double() for t in tensors)


# Widths of one warp and many, of one and two vectors per thread, full and with a rest; runs of one
# token and of three with a rest, in one segment or many. Few tokens where a block has many threads:
# each is a thread of the CPU.
SHAPES = [
    (1, 5, 8, 1), (2, 6, 24, 3), (1, 4, 264, 4), (2, 3, 1536, 1), (1, 2, 2048, 1), (1, 4, 2056, 2),
    (1, 3, 5120, 1), (1, 2, 8192, 2), (1, 3100, 8, 1), (2, 1550, 16, 31),
]  # fmt: skip
every_shape = pytest.mark.parametrize(("b", "length", "d", "r"), SHAPES)


def on_host(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as slow, because compiling for the CPU takes 10 seconds."""
    return pytest.mark.slow(needs_nvcc(test))


@on_host
@every_shape
@every_dtype
def test_layer_norm_modulate(b, length, d, r, dtype, host: Host, draw: Draw) -> None:
    check_modulate(
        host, draw(b, length, d, dtype=dtype), draw(b, r, d), draw(b, r, d, dtype=torch.bfloat16)
    )


def check_modulate(host: Host, x: Tensor, shift: Tensor, scale: Tensor) -> None:
    out = Result(x.shape, x.dtype)
    assert host("layer_norm_modulate", x, shift, scale, out.tensor, 1e-6) is None
    out.check(layer_norm_modulate_reference(*doubled(x, shift, scale), 1e-6))


@on_host
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(CODES, CODES)), ids=lambda p: "-".join(str(d)[6:] for d in p)
)
@pytest.mark.parametrize(
    ("d", "names"), [(40, "gate weight bias"), (1536, "shift scale"), (2056, "gate scale shift")]
)
def test_residual_layer_norm(dtypes, d, names, host: Host, draw: Draw) -> None:
    x, y = (draw(2, 6, d, dtype=dtype) for dtype in dtypes)
    check_residual(
        host,
        x,
        y,
        {k: draw(*((d,) if k in ("weight", "bias") else (2, 3, d))) for k in names.split()},
    )


@on_host
@every_shape
def test_residual_layer_norm_when_rows_differ(b, length, d, r, host: Host, draw: Draw) -> None:
    gate_rows = 2 if length % 2 == 0 else length
    x, y = draw(b, length, d, dtype=torch.bfloat16), draw(b, length, d, dtype=torch.bfloat16)
    check_residual(
        host, x, y, {"gate": draw(b, gate_rows, d), "shift": draw(b, r, d), "scale": draw(b, r, d)}
    )


@on_host
@pytest.mark.parametrize("names", ["", "gate", "weight", "gate weight", "weight bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_residual_layer_norm_with_absent_operands(names, dtype, host: Host, draw: Draw) -> None:
    x, y = draw(2, 4, 24, dtype=dtype), draw(2, 4, 24, dtype=dtype)
    h = check_residual(
        host, x, y, {k: draw(*((2, 4, 24) if k == "gate" else (24,))) for k in names.split()}
    )
    if "gate" not in names:
        assert torch.equal(h, (x.float() + y.float()).to(dtype))  # to nearest even


@on_host
def test_norm_reads_the_rounded_sum(host: Host, draw: Draw) -> None:
    """Check the norm next to 64, where the rounding of bf16 to a half changes the norm visibly."""
    x, y = 64 + draw(2, 4, 24, dtype=torch.bfloat16), draw(2, 4, 24, dtype=torch.bfloat16)
    check_residual(host, x, y, {})


def check_residual(host: Host, x: Tensor, y: Tensor, named: dict[str, Tensor]) -> Tensor:
    """Compare h with the reference, and n with the norm of the h that was written."""
    gate, weight, bias, shift, scale = (
        named.get(k) for k in ("gate", "weight", "bias", "shift", "scale")
    )
    h, n = Result(x.shape, x.dtype), Result(x.shape, x.dtype)
    error = host(
        "residual_layer_norm", x, y, gate, weight, bias, shift, scale, h.tensor, n.tensor, 1e-6
    )
    assert error is None
    x64, y64, gate64, weight64, bias64, shift64, scale64 = doubled(
        x, y, gate, weight, bias, shift, scale
    )
    written = h.check(residual_layer_norm_reference(x64, y64, gate64)[0])
    expected = F.layer_norm(written.double(), x.shape[-1:], weight64, bias64, 1e-6)
    n.check(expected if scale is None else modulate(expected, shift64, scale64))
    return written


@on_host
@pytest.mark.parametrize(
    ("b", "length", "d", "heads"),
    [(2, 3, 24, 4), (1, 5, 16, 8), (2, 3, 40, 5), (1, 4, 1536, 12), (1, 3, 2056, 257),
     (1, 3, 5120, 40), (1, 2, 8192, 64), (2, 1550, 16, 2)],
)  # fmt: skip
@pytest.mark.parametrize(
    "tables", [None, torch.float32, torch.bfloat16], ids=["plain", "fp32", "bf16"]
)
@every_dtype
def test_rms_norm_rope(b, length, d, heads, tables, dtype, host: Host, draw: Draw) -> None:
    x, weight, cos, sin = draw(b, length, d, dtype=dtype), draw(d), None, None
    if tables is not None:
        angles = draw(length, d // heads // 2)
        cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    check_rms(host, x, weight, cos, sin, heads)


@on_host
def test_tables_at_odd_addresses(host: Host, draw: Draw) -> None:
    x, weight, angles = draw(1, 5, 64), draw(64), draw(5, 17)
    check_rms(host, x, weight, angles.cos()[:, 1:], angles.sin()[:, :16], 2)


def check_rms(
    host: Host, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int
) -> None:
    out = Result(x.shape, x.dtype)
    assert host("rms_norm_rope", x, weight, cos, sin, heads, out.tensor, 1e-6) is None
    out.check(rms_norm_rope_reference(*doubled(x, weight, cos, sin), heads, 1e-6).flatten(2))


@on_host
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
    expected = layer_norm_modulate_reference(*doubled(x[:, finite], shift, scale), 1e-6)[0]
    # fp32 has the mean of 64 to within 4e-6 and some; a variance from the mean of squares would be
    # 2e-4 off.
    torch.testing.assert_close(written[finite].double(), expected, rtol=1e-5, atol=2e-5)


@on_host
def test_eps_is_used(host: Host, draw: Draw) -> None:
    x = 1e-3 * draw(1, 4, 264)
    check_modulate(host, x, draw(1, 1, 264), draw(1, 1, 264))
    check_rms(host, x, draw(264), None, None, 1)


@on_host
def test_offsets_beyond_32_bits(host: Host, draw: Draw) -> None:
    """Check two tokens 2^31 elements apart; the pages between them are never touched."""
    memory = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    x = memory.as_strided((1, 2, 8), (0, 2**31, 1))
    x.copy_(draw(1, 2, 8))
    check_modulate(host, x, draw(1, 2, 8), draw(1, 2, 8))
    check_residual(host, x, x, {})
    check_rms(host, x, draw(8), None, None, 1)


@on_host
def test_empty_tensors_and_refusals(host: Host, draw: Draw) -> None:
    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> str | None:
        out = Result(x.shape, x.dtype)
        error = host("layer_norm_modulate", x, shift, scale, out.tensor, 1e-6)
        assert out.tensor.isnan().all()  # nothing was written
        return error

    rows = torch.zeros(1, 1, 16)
    assert modulated(torch.empty(0, 4, 16), rows[:0], rows[:0]) is None
    assert modulated(torch.empty(1, 0, 16), rows, rows) is None
    assert (
        modulated(torch.empty(1, 2, 12), rows[..., :12], rows[..., :12])
        == "D must be a multiple of 8 up to 8192"
    )
    assert (
        modulated(torch.empty(1, 2, 8200), *torch.empty(2, 1, 1, 8200))
        == "D must be a multiple of 8 up to 8192"
    )
    assert (
        modulated(torch.empty(1, 3, 16), rows.expand(1, 2, 16), rows)
        == "the rows of an operand must divide L"
    )
    unaligned = "every row of an operand must begin at a multiple of 16 bytes"
    assert modulated(torch.empty(33)[1:].view(1, 2, 16), rows, rows) == unaligned
    assert modulated(torch.empty(1, 2, 18)[..., :16], rows, rows) == unaligned
    x, weight = torch.empty(1, 2, 24), torch.zeros(24)
    for heads, cos, message in (
        (5, None, "num_heads must divide D"),
        (8, torch.zeros(2, 1), "D / num_heads must be even for a rotation"),
        (4, torch.zeros(1, 3), "cos and sin must have L rows"),
    ):
        assert (
            host("rms_norm_rope", x, weight, cos, cos, heads, torch.empty(1, 2, 24), 1e-6)
            == message
        )
    with_both = [x, None, weight, None, x, x, torch.empty_like(x), torch.empty_like(x), 1e-6]
    assert host("residual_layer_norm", x, *with_both) == "give an affine or a modulation, not both"
