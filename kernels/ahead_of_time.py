"""Compile every kernel for NVIDIA GPUs without having one:
``python -m anyflow.kernels.ahead_of_time``.

What is compiled is what would be launched: the wrappers run on meta tensors of the shapes of the
1.3B and 14B models (and of the widths between), their launches are recorded, and each goes through
Triton and ptxas for sm_80, sm_90 and sm_100. The table shows registers per thread, shared memory
per program and bytes of register spills. ``--report`` prints what the machine code of sm_90 tells
about speed (``anyflow.kernels.report`` has the columns).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anyflow.kernels import (
    dual_timestep_embedding,
    flow_map_inputs,
    flow_map_loss,
    gated_residual,
    layer_norm_modulate,
    residual_layer_norm,
    rms_norm_rope,
)
from anyflow.kernels.launch import Launch, record

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
    """Holds the resources of one kernel on one architecture; ``spills`` are bytes stored and
    loaded.
    """

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
    """Compile a recorded launch, specialized as the launcher would, and read the resources that it
    takes.
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
    """Return Triton's compiled kernel, from its cache on disk where it is there."""
    signature, constants, attributes = _specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {k: v for k, v in launch.options.items() if k in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _specialize(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[object]]]]:
    """Return signature, constants and alignment hints: 1 is a constant, multiples of 16 are
    known.
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
    """Return what ``ptxas -v`` says about a kernel."""
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


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row_calls(
    dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    length: int = 32760,
    rows: int = 21,
    make: Callable[..., Tensor] = _meta,
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the kernels of a block as the model calls them; by default at 480 x 832 x 81, 32760
    tokens in 21 frames.

    Args:
        dim: D, heads of 128.
        dtype: of the tokens.
        batch, length, rows: B, L and R.
        make: ``make(*shape, dtype=torch.float32)`` makes a tensor.
    """
    heads = max(dim // 128, 1)
    x, y, h, grad, grad_h = (make(batch, length, dim, dtype=dtype) for _ in range(5))
    weight, bias = make(dim), make(dim)
    shift, scale, gate = make(batch, rows, 6, dim).unbind(2)[:3]
    yield "", lambda: layer_norm_modulate.forward(x, shift, scale)
    yield "", lambda: layer_norm_modulate.backward(grad, x, shift, scale, 1e-6)
    for variant, args in {
        "gate, affine": (gate, weight, bias, None, None),
        "modulation": (None, None, None, shift, scale),
    }.items():
        read = None if args[0] is None else y
        yield variant, lambda args=args: residual_layer_norm.forward(x, y, *args)
        yield (
            variant,
            lambda args=args, read=read: residual_layer_norm.backward(
                grad_h, grad, read, h, *args, 1e-6
            ),
        )
    yield "", lambda: gated_residual.forward(x, y, gate)
    yield "", lambda: gated_residual.backward(grad, y, gate)
    of_heads = grad.unflatten(2, (heads, -1))
    angle = (make(length, dim // heads // 2), make(length, dim // heads // 2))
    for variant, (cos, sin) in {"rotary": angle, "no rotary": (None, None)}.items():
        yield variant, lambda c=cos, s=sin: rms_norm_rope.forward(x, weight, c, s, heads)
        yield (
            variant,
            lambda c=cos, s=sin: rms_norm_rope.backward(of_heads, x, weight, c, s, heads, 1e-6),
        )


def embedding_calls(
    dim: int, dtype: torch.dtype, *, rows: int = 21
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the fusion of the embeddings of 21 times."""
    emb, gate = _meta(rows, dim, dtype=dtype), _meta()
    for fusion in ("gated", "additive"):
        yield fusion, lambda f=fusion: dual_timestep_embedding.forward(emb, emb, gate, f)
        yield (
            fusion,
            lambda f=fusion: dual_timestep_embedding.backward(emb, emb, emb, emb, gate, f, True),
        )


def frame_calls(
    dtype: torch.dtype, *, shape: Sequence[int] = (4, 21, 16, 60, 104), slots: int = 2
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the kernels of the pretrain loss: a batch of four latents, two of them with r != t."""
    samples, *frame = shape
    x, part = _meta(*shape, dtype=dtype), _meta(slots, *frame)
    t, step, indices = (_meta(n, dtype=torch.float64) for n in (samples, slots, slots))
    indices = indices.to(torch.int64)
    for variant, rows in {"rows": indices, "all rows": None}.items():
        batch = _meta(2 * (samples if rows is None else slots) + samples, *frame)
        u, width = (x, t) if rows is None else (part, step)
        inputs = (x, x, t, t, t, rows)
        yield variant, lambda i=inputs: flow_map_inputs.forward(*i, dtype, True)
        yield variant, lambda i=inputs, b=batch: flow_map_inputs.backward(x, b, *i, True)
        yield (
            variant,
            lambda u=u, w=width, i=rows: flow_map_loss.forward(
                x, x, u, u, x, x, t, t, t, w, i, 3.0, True
            ),
        )
    yield "", lambda: flow_map_loss.backward(_meta(samples), x, t, 3.0)


def edge_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield calls with sizes of one, which Triton compiles into the kernel as constants: other code
    than for others.
    """
    for length, rows in ((1, 1), (7, 1), (7, 7)):
        yield from row_calls(8, dtype, length=length, rows=rows)
    yield from embedding_calls(8, dtype, rows=1)
    for shape in ((1, 1, 1), (1, 1, 16, 60, 104), (3, 1, 8), (1, 3, 1)):
        yield from frame_calls(dtype, shape=shape, slots=1)


def compile_all(
    dims: Sequence[int], dtypes: Sequence[str], capabilities: Sequence[int]
) -> Iterator[Compiled]:
    """Compile every kernel; what would be the same machine code again is compiled once."""
    seen = set()
    for dtype, (index, dim) in product(dtypes, enumerate(dims)):
        calls = list(row_calls(dim, DTYPES[dtype]))
        if index == 0:
            calls += [*embedding_calls(dim, DTYPES[dtype]), *frame_calls(DTYPES[dtype])]
            calls += [("size 1", call) for _, call in edge_calls(DTYPES[dtype])]
        for variant, call in calls:
            with record() as launches:
                call()
            for launch, capability in product(launches, capabilities):
                identity = (
                    launch.kernel.fn.__name__,
                    capability,
                    *map(repr, (*_specialize(launch), launch.options)),
                )
                if identity in seen:
                    continue
                seen.add(identity)
                name = launch.kernel.fn.__name__.removesuffix("_kernel")
                width = launch.options.get("D", 0)
                yield Compiled(
                    name, variant, dtype, width, capability, **compile_launch(launch, capability)
                )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if any kernel spills."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--report", action="store_true", help="what the machine code tells about speed"
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", help="widths D, by default those of the models"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 21), help="R, of the report")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--capabilities", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line in place of the table"
    )
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    if options.report:
        from anyflow.kernels.report import print_report

        spilling = print_report(options.dims or (1536, 5120), options.rows, options.json)
    else:
        spilling = _print_table(
            options.dims or DIMS, options.dtypes, options.capabilities, options.json
        )
    print(f"{spilling} kernels spill registers", file=sys.stderr)
    return int(spilling > 0)


def _print_table(
    dims: Sequence[int], dtypes: Sequence[str], capabilities: Sequence[int], as_json: bool
) -> int:
    """Print the resources of every kernel; return how many spill registers."""
    spilling = 0
    if not as_json:
        print(_HEADER)
    for compiled in compile_all(dims, dtypes, capabilities):
        print(json.dumps(asdict(compiled)) if as_json else _line(compiled), flush=True)
        spilling += compiled.spills > 0
    return spilling


_HEADER = f"{'kernel':34}{'variant':14}{'dtype':10}{'D':>6}{'sm':>5}{'warps':>7}{'registers':>11}{'shared':>8}{'spills':>8}"


def _line(c: Compiled) -> str:
    return (
        f"{c.kernel:34}{c.variant:14}{c.dtype:10}{c.dim or '-':>6}{c.capability:>5}{c.num_warps:>7}{c.registers:>11}"
        f"{c.shared:>8}{c.spills:>8}"
    )


if __name__ == "__main__":
    sys.exit(main())
