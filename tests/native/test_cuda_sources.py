"""Test that csrc/cuda compiles without a warning, spill or local memory; no GPU is needed."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
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
def compiled(nvcc, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
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
def test_a_defect_is_found(body: str, defect: str, nvcc, tmp_path: Path) -> None:
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
@pytest.mark.slow
def test_memory_is_accessed_by_16_bytes(source: Path, compiled: Compiled, nvdisasm: str) -> None:
    """Check every store, and every load but those of the tables of a rotation.

    The tables may be unaligned or of odd width. Accesses are chosen before the code is one
    architecture's: one is read.
    """
    cubin, _ = compiled(source, "90a")
    listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
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
