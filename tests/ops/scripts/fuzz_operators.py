"""Call every operator of ``anyflow::`` with wrong operands, and compare with its reference.

The operators are those that the dispatcher knows. Valid calls of each are those of the catalog
(``anyflow/ops/examples.py``); the fuzzer changes some of their arguments: sizes, ranks, strides,
expanded and overlapping memory, freed memory, dtypes, layouts, devices, numbers. A call must raise
a Python exception or return what the eager reference returns in fp64. Crashes are for the parent
process to see: the file of ``--trace`` names the last call.

    python tests/ops/scripts/fuzz_operators.py --calls 5000 --seed 0
"""

from __future__ import annotations

import argparse
import inspect
import math
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the layouts

from checks import LAYOUTS, VECTORS

from anyflow.ops.examples import as_tuple, moved, registered_calls, small_examples
from anyflow.ops.library import REFERENCES

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**62, -(2**63), 2**63 - 1)
FLOATS = (0.0, -1.0, 1e-6, 1.0, math.nan, math.inf, -math.inf, 1e308, 1e-320)
TOLERANCES = {
    torch.float8_e4m3fn: 2**-3,
    torch.float64: 1e-6,
    torch.float32: 2e-5,
    torch.float16: 2**-8,
    torch.bfloat16: 2**-5,
}
HUGE = 2**40
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)


def operators() -> list[str]:
    """List every operator in the namespace ``anyflow``, as the dispatcher knows them."""
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "anyflow::" in name
    }
    return sorted(names)


def valid_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Make calls of the registered operators, forward and backward, in two dtypes."""
    found: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for example in small_examples():
        for dtype in (torch.float32, torch.bfloat16):
            arguments = example.arguments("cpu", dtype, seed=3)
            for name, args in registered_calls(example.op, arguments).items():
                found[name].append(args)
    return found


def changed(x: Tensor, draw: random.Random) -> Tensor:
    """Make a tensor of another one that differs in something an operator may not expect."""
    x = x.detach()
    dim = draw.randrange(x.ndim) if x.ndim else 0
    view = x.clone()
    return draw.choice(VIEWS)(view, dim, draw)


def _relaid(x: Tensor, dim: int, draw: random.Random) -> Tensor:
    names = list(LAYOUTS if x.ndim > 1 else VECTORS if x.ndim else ())
    if not x.numel() or x.dtype not in (torch.float32, torch.float64):
        names = [name for name in names if name in ("transposed", "samples inside", "shared")]
    return LAYOUTS[draw.choice(names)](x) if names else x


def _freed(x: Tensor, dim: int, draw: random.Random) -> Tensor:
    x.untyped_storage().resize_(draw.choice([0, max(x.numel() * x.element_size() - 1, 0)]))
    return x


def _expanded(x: Tensor, dim: int, draw: random.Random) -> Tensor:
    # equal rows have no variance to norm by
    if x.ndim == 0 or x.shape[dim] == 0 or (dim == x.ndim - 1 and x.ndim > 1):
        return x
    return x.narrow(dim, 0, 1).expand_as(x)


def _huge(x: Tensor, dim: int, draw: random.Random) -> Tensor:
    shape = list(x.shape) if x.ndim else [1]
    shape[dim] = HUGE
    return torch.zeros(1, dtype=x.dtype).expand(shape)


def _resized(x: Tensor, dim: int, draw: random.Random) -> Tensor:
    shape = list(x.shape) if x.ndim else [1]
    shape[dim] = max(0, shape[dim] + draw.choice([-2, -1, 1, 2, 5, -shape[dim], shape[dim]]))
    return torch.zeros(shape, dtype=x.dtype)


VIEWS = (
    *[_relaid] * 4, _freed, _expanded, _huge, _resized, _resized,
    lambda x, dim, draw: x.transpose(dim, draw.randrange(x.ndim)) if x.ndim else x,
    lambda x, dim, draw: x.unsqueeze(dim),
    lambda x, dim, draw: x.flatten(),
    lambda x, dim, draw: x.select(dim, 0) if x.ndim and x.shape[dim] else x,
    lambda x, dim, draw: x.flatten()[0] if x.numel() else x,
    lambda x, dim, draw: x.new_zeros(()),
    lambda x, dim, draw: x.new_empty(0),
    lambda x, dim, draw: x.to(draw.choice(DTYPES)) if x.ndim < 9 else x,
    lambda x, dim, draw: x.to(draw.choice(DTYPES[:4])),
    lambda x, dim, draw: x.to("meta"),
    lambda x, dim, draw: x.to_sparse() if x.ndim else x,
    lambda x, dim, draw: torch.nn.Parameter(x) if x.is_floating_point() else x,
    lambda x, dim, draw: x.narrow(dim, 1, x.shape[dim] - 1) if x.ndim and x.shape[dim] > 1 else x,
    lambda x, dim, draw: x.flip(dim) if x.ndim else x,
)  # fmt: skip


def changed_argument(value: Any, kind: str, draw: random.Random, others: list[Tensor]) -> Any:
    """Draw another value of an argument, of a type that its schema takes."""
    if isinstance(value, Tensor) or "Tensor" in kind:
        if kind.startswith("Optional") and value is not None and draw.random() < 0.2:
            return None
        if value is None or draw.random() < 0.15:
            return draw.choice(others)
        return changed(value, draw)
    if kind == "float":
        return draw.choice(FLOATS)
    if kind == "bool":
        return not value
    if kind == "str":
        return draw.choice(["", "gated", "additive", "gated\0", "x" * 10000, "\u00e9"])
    # A ScalarType is an int to a schema.
    return draw.choice(DTYPES) if isinstance(value, torch.dtype) else draw.choice(NUMBERS)


def difference(actual: Any, expected: Any, tolerance: float) -> str | None:
    """Say how results differ from those of the reference; None if they do not."""
    actual, expected = as_tuple(actual), as_tuple(expected)
    if len(actual) != len(expected):
        return f"{len(actual)} results, expected {len(expected)}"
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != e.shape:
            return f"result {index} has shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if not a.numel():
            continue
        a, e = a.detach().double(), e.detach().double()
        scale = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 1.0
        if scale > 1e4:  # half precision overflows and fp32 cancels: no oracle
            continue
        wrong = (a - e).abs() > 4 * tolerance * max(scale, 1e-3)
        wrong |= a.isnan() != e.isnan()
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            return f"result {index} has {a[where].item()} at {where}, expected {e[where].item()}"
    return None


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = tuple(value.stride()) if value.layout == torch.strided else value.layout
        return f"{tuple(value.shape)} by {strides} {value.dtype} {value.device.type}"
    return repr(value)[:60]


def is_of_forward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor
) -> bool:
    """Tell whether a log-sum-exp is that of the queries and keys.

    Gradients that start from another one are those of no function, and not compared.
    """
    _, expected = REFERENCES["attention"](q.float(), k.float(), v.float())
    return torch.allclose(logsumexp, expected, rtol=1e-4, atol=1e-4)


def check_call(name: str, args: tuple[Any, ...]) -> tuple[bool, str | None]:
    """Tell whether an operator refused the arguments, and say what is wrong with its answer."""
    try:
        actual = getattr(torch.ops.anyflow, name).default(*args)
    except REFUSED as error:
        return True, None if str(error) else f"{type(error).__name__} without a word"
    if any(isinstance(a, Tensor) and a.device.type == "meta" for a in args):
        return False, None
    if name.startswith("attention_backward") and not is_of_forward(*args):
        return False, None
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    dtypes += [a for a in args if isinstance(a, torch.dtype)]
    tolerance = max((TOLERANCES.get(d, 0.0) for d in dtypes), default=0.0)
    problems = []
    # In fp32 too: a log-sum-exp that is not that of the other operands is taken again in fp64, and
    # nowhere else.
    for dtype in (torch.float64, torch.float32):
        try:
            given = moved(dict(enumerate(args)), "cpu", dtype)
            with torch.no_grad():
                expected = REFERENCES[name.removesuffix("_native")](*given.values())
        except REFUSED as error:
            problems.append(f"it returned, the reference refuses: {error}")
        else:
            problems.append(difference(actual, expected, tolerance))
    return False, None if None in problems else problems[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or ""))
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="a file that names the call being made")
    options = parser.parse_args()
    torch.set_num_threads(2)
    draw, seeds, names = random.Random(options.seed), valid_calls(), operators()
    missing = [name for name in names if name.removesuffix("_native") not in seeds]
    if missing:
        sys.exit(f"no example in anyflow/ops/examples.py calls {', '.join(missing)}")
    found: list[str] = []
    refused = 0
    for index in range(options.calls):
        name = names[index % len(names)]
        args = list(draw.choice(seeds[name.removesuffix("_native")]))
        kinds = [str(a.type) for a in getattr(torch.ops.anyflow, name).default._schema.arguments]
        others = [a.detach() for a in args if isinstance(a, Tensor)]
        for at in draw.sample(
            range(len(args)), draw.choice([0, 1, 1, 1, 2, 3]) if len(args) > 3 else 1
        ):
            args[at] = changed_argument(args[at], kinds[at], draw, others)
        call = f"{name}({', '.join(map(describe, args))})"
        if options.trace is not None:
            options.trace.write_text(f"call {index}: {call}\n")
        was_refused, problem = check_call(name, tuple(args))
        refused += was_refused
        if problem is not None:
            found.append(f"{call}: {problem}")
    print(f"{options.calls} calls of {len(names)} operators: {refused} refused, {len(found)} wrong")
    print("\n".join(found[:50]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
