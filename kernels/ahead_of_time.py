"""Compile every kernel for NVIDIA GPUs, on a machine without one.

``python -m anyflow.kernels.ahead_of_time`` runs the wrappers on meta tensors of the sizes of the
1.3B and 14B models (and of the widths between), records their launches and takes each through
Triton and ptxas for sm_80, sm_90 and sm_100. The operands are those of the catalog
(:mod:`anyflow.ops.examples`). The table shows registers per thread, shared memory per program and
bytes of register spills. ``--report`` prints what the machine code of sm_90 tells about speed
(``anyflow.kernels.report`` has the columns).
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anyflow.kernels.launch import Launch, record
from anyflow.ops.examples import (
    FRAMES,
    LATENTS,
    TOKENS,
    Example,
    FrameTimes,
    dual_timestep_embedding,
    flow_map_inputs,
    flow_map_loss,
    registered_calls,
    rms_norm_rope,
    row_examples,
)

CAPABILITIES = (80, 90, 100)
DIMS = (1536, 2048, 3072, 5120)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Compiled:
    """Hold the resources of one kernel on one architecture; ``spills`` are bytes."""

    kernel: str
    variant: str
    dtype: str
    dim: int
    capability: int
    num_warps: int
    registers: int
    shared: int
    spills: int


def compile_launch(launch: Launch, capability: int) -> dict[str, int]:
    """Compile a recorded launch as the launcher would, and return the resources that it takes.

    Returns:
        ``num_warps``, ``registers`` per thread, ``shared`` bytes per program, and ``spills``: bytes
        stored and loaded.
    """
    compiled = _compile(launch, capability)
    report = _assemble(compiled.asm["ptx"])
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None or not compiled.asm["cubin"]:
        raise RuntimeError(
            f"ptxas reported no registers for {launch.kernel.fn.__name__}:\n{report}"
        )
    return {
        "num_warps": compiled.metadata.num_warps,
        "registers": int(registers.group(1)),
        "shared": compiled.metadata.shared,
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
    }


def disassemble(launch: Launch, capability: int) -> str:
    """Compile a recorded launch and return its machine code as text; sm_80 and sm_90 only."""
    return str(_compile(launch, capability).asm["sass"])


def _compile(launch: Launch, capability: int) -> Any:
    """Return Triton's compiled kernel, from its cache on disk if it was compiled before."""
    signature, constants, attributes = _specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _specialize(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[object]]]]:
    """Return signature, constants and alignment hints of a launch.

    As Triton's launcher does, a size of 1 becomes a constant, and a multiple of 16 is marked.
    """
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args[index] if index < len(launch.args) else launch.options[parameter.name]
        if index >= len(launch.args) or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _assemble(ptx: str) -> str:
    """Assemble a kernel with ``ptxas -v``, and return what that prints."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    tools = triton.knobs.nvidia
    blackwell = int(target.group(1).removeprefix("sm_").rstrip("a")) >= 100
    ptxas = getattr(tools, "ptxas_blackwell", tools.ptxas) if blackwell else tools.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas.path, "-v", "--gpu-name", target.group(1), file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def kernel_calls(
    examples: Iterable[Example], dtype: torch.dtype, device: torch.device | str = "meta"
) -> Iterator[tuple[Example, str, Callable[[], object]]]:
    """Yield the launches of examples, forward and backward, as autograd makes them.

    Args:
        examples: examples of operators with Triton kernels.
        dtype: dtype of the operands.
        device: device of the operands.

    Yields:
        The example, ``"forward"`` or ``"backward"``, and a function that calls the kernel.
    """
    for example in examples:
        kernels = importlib.import_module(f"anyflow.kernels.{example.op}")
        for name, operands in registered_calls(
            example.op, example.arguments(device, dtype)
        ).items():
            direction = "forward" if name == example.op else "backward"
            yield example, direction, partial(getattr(kernels, direction), *operands)


def block_examples(dim: int, tokens: int = TOKENS, rows: int = FRAMES) -> list[Example]:
    """List the operators of a block, with and without rotation."""
    return [*row_examples(tokens, dim, rows), rms_norm_rope(tokens, dim, rows, rotary=False)]


def embedding_examples(dim: int, rows: int = FRAMES) -> list[Example]:
    """List both fusions of the embeddings of the times; the gate is learned."""
    return [dual_timestep_embedding(rows, dim, f, learned=True) for f in ("gated", "additive")]


def loss_examples(
    shape: Sequence[int] = (4, *LATENTS), picked: Sequence[int] | None = (0, 1)
) -> list[Example]:
    """List the operators of the pretrain loss as the method calls them, with times in fp64."""
    times = FrameTimes(dtype=torch.float64)
    inputs = flow_map_inputs(shape, picked, times, with_x_t=True)
    return [inputs, flow_map_loss(shape, picked, times)]


def edge_examples() -> list[Example]:
    """List examples with sizes of one, which Triton compiles into the kernel as constants."""
    found = []
    for tokens, rows in ((1, 1), (7, 1), (7, 7)):
        found += block_examples(8, tokens, rows)
    found += embedding_examples(8, rows=1)
    shapes = ((1, 1, 1), (1, 1, 16, 60, 104), (3, 1, 8), (1, 3, 1))
    for shape, picked in product(shapes, ((0,), None)):
        found += loss_examples(shape, picked)
    return [replace(example, variant="size 1") for example in found]


def compile_all(
    dims: Sequence[int], dtypes: Sequence[str], capabilities: Sequence[int], edges: bool = True
) -> Iterator[Compiled]:
    """Compile every kernel; two launches that give the same machine code are compiled once.

    Sizes of one are compiled with ``edges`` only.
    """
    seen = set()
    for dtype, (index, dim) in product(dtypes, enumerate(dims)):
        examples = block_examples(dim)
        if index == 0:
            examples += [*embedding_examples(dim), *loss_examples(), *loss_examples(picked=None)]
            examples += edge_examples() if edges else []
        for example, _, call in kernel_calls(examples, DTYPES[dtype]):
            with record() as launches:
                call()
            for launch, capability in product(launches, capabilities):
                name = launch.kernel.fn.__name__
                identity = (name, capability, *map(repr, (*_specialize(launch), launch.options)))
                if identity in seen:
                    continue
                seen.add(identity)
                yield Compiled(
                    name.removesuffix("_kernel"),
                    example.variant,
                    dtype,
                    launch.options.get("D", 0),
                    capability,
                    **compile_launch(launch, capability),
                )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if any kernel spills registers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--report", action="store_true", help="print what the machine code tells about speed"
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", help="widths D; by default those of the models"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 21), help="R, of the report")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--capabilities", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES
    )
    parser.add_argument("--no-edges", action="store_true", help="leave sizes of one out")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line in place of the table"
    )
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    if options.report:
        from anyflow.kernels.report import print_report

        spilling = print_report(options.dims or (1536, 5120), options.rows, options.json)
    else:
        compiled = compile_all(
            options.dims or DIMS, options.dtypes, options.capabilities, not options.no_edges
        )
        spilling = print_table(_HEADER, compiled, _line, options.json)
    print(f"{spilling} kernels spill registers", file=sys.stderr)
    return int(spilling > 0)


def print_table(
    header: str, kernels: Iterable[Any], line: Callable[[Any], str], as_json: bool
) -> int:
    """Print a table, or one JSON object per line; return how many kernels spill registers.

    Args:
        header: first line of the table.
        kernels: dataclasses with ``spills``, printed as they come.
        line: formats one of them below the header.
        as_json: print JSON in place of the table.
    """
    if not as_json:
        print(header)
    spilling = 0
    for kernel in kernels:
        print(json.dumps(asdict(kernel)) if as_json else line(kernel), flush=True)
        spilling += kernel.spills > 0
    return spilling


_HEADER = (
    f"{'kernel':34}{'variant':16}{'dtype':10}{'D':>6}{'sm':>5}{'warps':>7}{'registers':>11}"
    f"{'shared':>8}{'spills':>8}"
)


def _line(c: Compiled) -> str:
    """Format a kernel as a line below the header."""
    return (
        f"{c.kernel:34}{c.variant:16}{c.dtype:10}{c.dim or '-':>6}{c.capability:>5}"
        f"{c.num_warps:>7}{c.registers:>11}{c.shared:>8}{c.spills:>8}"
    )


if __name__ == "__main__":
    sys.exit(main())
