"""Test what operators refuse: operands that do not fit, and what a kernel does not take."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import DEVICE
from forms import KINDS, over
from torch import Tensor

from anyflow.ops import examples as catalog
from anyflow.ops import use_backend
from anyflow.ops.backend import OPERATORS
from anyflow.ops.examples import Arguments, Example, public_call, registered_calls

FUZZER = Path(__file__).parent / "scripts" / "fuzz_operators.py"
REFUSED = (ValueError, RuntimeError, IndexError)
Z = torch.zeros

# What no operand may be but picked, whose floats are in the table below.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "integer": lambda x: x.long(),
    "on another device": lambda x: x.to("meta"),
    "of another rank": lambda x: x.unsqueeze(0),
    "shorter": lambda x: x.narrow(-1, 0, x.shape[-1] - 1),
}
NAMED = {f"{e.op}-{e.variant}": e for e in KINDS}


def changes(op: str, arguments: Arguments) -> list[tuple[str, str]]:
    """List the operands of an operator, each with what may be wrong about it."""
    found = []
    for index, (name, value) in enumerate(arguments.items()):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        # the others are measured by the first operand, and are named in its place
        kinds = ("integer", "of another rank") if index == 0 else tuple(CHANGES)
        found += [(name, kind) for kind in kinds if value.ndim or kind != "shorter"]
    return [(name, kind) for name, kind in found if (op, name, kind) not in ACCEPTED]


# gelu takes tensors of any rank, linear those of any rank but 0, a gate has one element, a residual
# any size; attention names v, which is measured by k
ACCEPTED = {
    ("gelu", "x", "of another rank"),
    ("gelu_backward", "grad", "of another rank"),
    ("linear", "x", "of another rank"),
    ("linear_backward", "grad", "of another rank"),
    ("dual_timestep_embedding", "gate", "of another rank"),
    ("dual_timestep_embedding_backward", "gate", "of another rank"),
    ("flow_map_loss_backward", "residual", "shorter"),
    ("attention", "k", "on another device"),
}


@pytest.mark.parametrize("example", NAMED.values(), ids=NAMED)
def test_operands_that_do_not_fit_are_named(example: Example) -> None:
    arguments = example.arguments("cpu", torch.float32)
    for name, kind in changes(example.op, arguments):
        wrong = arguments | {name: CHANGES[kind](arguments[name].detach())}
        message = rf"{example.op}: .*\b{name.replace('_', '[ _]')}\b"
        with use_backend("native"), pytest.raises(ValueError, match=message):
            public_call(example.op, wrong).outputs()
            pytest.fail(f"{name} {kind} was taken")


@pytest.mark.parametrize("suffix", ["", "_native"])
@pytest.mark.parametrize("example", NAMED.values(), ids=NAMED)
def test_the_registered_operators_refuse_too(example: Example, suffix: str) -> None:
    """Forward and backward, in Python and in C++: an exception in words, never a crash."""
    calls = registered_calls(example.op, example.arguments("cpu", torch.float32))
    for operator, args in calls.items():
        overload = getattr(torch.ops.anyflow, operator + suffix).default
        names = [argument.name for argument in overload._schema.arguments]
        given = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in zip(names, args, strict=False)
        }
        for name, kind in changes(operator, given):
            wrong = given | {name: CHANGES[kind](given[name])}
            with pytest.raises(REFUSED) as refusal:
                overload(*wrong.values())
                pytest.fail(f"{operator}: {name} {kind} was taken")
            assert str(refusal.value)


# What is special to an operator ------------------------------------------------------------------

TOKENS = catalog.layer_norm_modulate(6, 8, 1, batch=2)
RESIDUAL = catalog.residual_layer_norm("plain", 6, 8, batch=2)
AFFINE = catalog.residual_layer_norm("gate+affine", 6, 8, batch=2)
NORM = catalog.rms_norm_rope(6, 8, heads=2, batch=2)
GATED, EMBEDDINGS = catalog.gated_residual(12, 8, 3, 2), catalog.dual_timestep_embedding(3, 16)
LINEAR, ATTENTION = catalog.linear(2, 3, 4), catalog.attention(5, 24, 8, 7)
INPUTS = catalog.flow_map_inputs((4, 3, 2), (1, 0))
LOSS = catalog.flow_map_loss((4, 3, 2), None)
ROW, VECTOR, TABLE = Z(2, 1, 8), Z(8), Z(6, 2)
WRONG: list[tuple[Example, Arguments, str]] = [
    (TOKENS, {"shift": Z(2, 4, 8), "scale": Z(2, 4, 8)}, "must divide the L=6"),
    (TOKENS, {"shift": Z(2, 0, 8), "scale": Z(2, 0, 8)}, "must divide the L=6"),
    (TOKENS, {"scale": Z(2, 3, 8)}, "one shape"),
    (TOKENS, {"shift": ROW[:1]}, "shift must be"),
    (RESIDUAL, {"y": Z(2, 1, 8)}, "y must have the shape of x"),
    (RESIDUAL, {"gate": Z(2, 4, 8)}, "must divide the L=6"),
    (RESIDUAL, {"bias": VECTOR}, "bias needs weight"),
    (RESIDUAL, {"shift": ROW}, "given together"),
    (RESIDUAL, {"scale": ROW}, "given together"),
    (RESIDUAL, {"shift": ROW, "scale": Z(2, 3, 8)}, "one shape"),
    (RESIDUAL, {"weight": VECTOR, "shift": ROW, "scale": ROW}, "not both"),
    (AFFINE, {"bias": Z(1)}, "bias must be"),
    (NORM, {"num_heads": 3}, "num_heads=3 must divide"),
    (NORM, {"num_heads": 0}, "num_heads=0 must divide"),
    (NORM, {"num_heads": -2}, "num_heads=-2 must divide"),
    (NORM, {"sin": None}, "given together"),
    (NORM, {"cos": None}, "given together"),
    (NORM, {"x": Z(2, 6, 6), "weight": Z(6), "cos": TABLE[:, :1], "sin": TABLE[:, :1]}, "Dh/2=1.5"),
    (GATED, {"gate": Z(2, 5, 8)}, "must divide the L=12"),
    (GATED, {"gate": None, "y": Z(2, 1, 8)}, "y must have the shape of x"),
    (GATED, {"gate": None, "y": Z(2, 12, 8, device="meta")}, "y is on meta"),
    (EMBEDDINGS, {"fusion": "sum"}, "unknown fusion 'sum'"),
    (EMBEDDINGS, {"gate": Z(2)}, "gate must be"),
    (LINEAR, {"weight": Z(4, 3).half()}, "of x's dtype torch.float32.* got .* float16"),
    (LINEAR, {"bias": Z(4).double()}, r"bias must be .* got \(4,\) float64"),
    (LINEAR, {"x": Z(())}, r"x must be a floating-point \[\.\.\., K\] tensor"),
    (ATTENTION, {n: Z(1, 7, 3, 8, device="meta") for n in "kv"}, "k is on meta"),
    (ATTENTION, {"k": Z(1, 7, 3, 8).double()}, "k and v must have the dtype of q"),
    (ATTENTION, {"k": Z(1, 7, 1, 8)}, r"k must be \[B=1, S, H=3, Dh=8\]"),
    (INPUTS, {"t": Z(())}, "t must be"),
    (INPUTS, {"t": Z(4, 3, 1)}, "t must be"),
    (INPUTS, {"epsilon_minus": Z((), device="meta")}, "epsilon minus is on meta"),
    (INPUTS, {"picked": torch.tensor([True])}, "picked mask must be"),
    (INPUTS, {"picked": torch.tensor([0.0])}, "picked must be"),
    (INPUTS, {"picked": torch.tensor([[0]])}, "picked must be"),
    (INPUTS, {"picked": torch.tensor([0], device="meta")}, "picked is on meta"),
    (INPUTS, {"dtype": torch.long}, "dtype must be floating-point"),
    (catalog.flow_map_inputs((0, 3, 2), ()), {"picked": torch.tensor([0])}, "pick among 0 samples"),
    (LOSS, {"r": Z(4, 3)}, "one shape"),
    (LOSS, {"guidance": 0.0}, "guidance must be a finite number > 0"),
    (LOSS, {"guidance": -1.0}, "guidance must be a finite number > 0"),
    (LOSS, {"guidance": math.nan}, "guidance must be a finite number > 0"),
    (LOSS, {"uncond": None}, "needs the unconditional prediction"),
    (LOSS, {"u_minus": None}, "given together"),
    (LOSS, {"u_plus": None}, "given together"),
    (LOSS, {"picked": torch.tensor([0])}, "u_plus must be"),
    (LOSS, {"picked": torch.ones(4, dtype=torch.bool)}, "picked must be"),
    (LOSS, {"width": Z((), device="meta")}, "width is on meta"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda c: f"{c[0].op}-{'-'.join(c[1])}")
def test_what_does_not_fit_together(case: tuple[Example, Arguments, str]) -> None:
    example, changed, message = case
    arguments = example.arguments("cpu", torch.float32) | changed
    with use_backend("native"), pytest.raises(ValueError, match=f"{example.op}: .*{message}"):
        public_call(example.op, arguments).outputs()


FREED = Z(1, 4, 64)
FREED.untyped_storage().resize_(0)
# Of registered operators, operands whose sizes a result would be made by, and what the error names.
REGISTERED: list[tuple[str, tuple[Any, ...], str]] = [
    ("gated_residual_backward", (Z(1, 64, 64), Z(1, 64, 64), Z(1, 0, 64)), "gate"),
    (
        "layer_norm_modulate_backward",
        (Z(1, 4, 64), Z(1, 4, 64), Z(1, 1, 64), Z(1, 1, 64), math.nan),
        "eps",
    ),
    ("layer_norm_modulate_backward", (*[Z(1, 4, 64)] * 2, *[Z(1, 1, 64)] * 2, -1.0), "eps"),
    (
        "residual_layer_norm_backward",
        (None, Z(1, 4, 64), Z(1, 1, 64), Z(1, 4, 64), None, None, None, None, None, 1e-6),
        "y",
    ),
    ("gelu", (Z(1).expand(2**40),), ".*"),
    ("gelu", (FREED,), "memory of 0 bytes"),
    ("gelu_backward", (Z(3), Z(4)), "grad"),
    ("rms_norm_rope", (Z(1, 4, 64), Z(64), None, None, -(2**63)), "num_heads"),
    (
        "flow_map_inputs",
        (*[Z(2, 3, 8)] * 2, Z(2), Z([]), Z([]), torch.tensor([2]), torch.float32, True),
        ".*",
    ),
    ("flow_map_loss_backward", (Z(3), Z(2, 3, 8), Z(2), 1.0), "grad"),
    ("attention_backward", ((Z(1, 2, 1, 8),) * 5 + (Z(1, 1, 3),)), "logsumexp"),
]


@pytest.mark.parametrize("suffix", ["", "_native"])
@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case[0])
def test_registered_operators_name_the_operand(case, suffix) -> None:
    name, args, operand = case
    with pytest.raises(REFUSED, match=rf"\b{operand}\b"):
        getattr(torch.ops.anyflow, name + suffix).default(*args)


def test_meta_tensors_are_checked_too() -> None:
    x, row = Z(1, 4, 64, device="meta"), Z(1, 3, 64, device="meta")
    with pytest.raises(ValueError, match="shift"):
        torch.ops.anyflow.layer_norm_modulate(x, row, row)
    with pytest.raises(ValueError, match="on meta"):
        torch.ops.anyflow.gated_residual(Z(1, 4, 64), x, Z(1, 1, 64))


@pytest.mark.slow
def test_fuzzed(tmp_path, process_environment) -> None:
    """In a process of its own: a crash is a failure that names the call."""
    trace = tmp_path / "call"
    command = [sys.executable, FUZZER, "--calls", "400", "--seed", "5", "--trace", trace]
    done = subprocess.run(
        command, env=process_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-2000:]}\n{trace.read_text()}"
    assert "400 calls of" in done.stdout


# What a kernel does not take ---------------------------------------------------------------------

# In fp64 on purpose, or read by nobody but the reference.
ANY_DTYPE = {"t", "r", "weight", "width", "epsilon_plus", "epsilon_minus", "gate"}


@over(KINDS, [torch.float32], kernels=True)
def test_a_forced_kernel_refuses_fp64(example, backend, dtype) -> None:
    """In any operand: nothing is rounded without a word, and nothing falls back."""
    arguments = example.arguments(DEVICE, dtype)
    free = ANY_DTYPE if example.op.startswith(("flow", "dual")) else set()
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or name in free:
            continue
        wide = {name: value.detach().double()}
        if example.op in ("linear", "attention"):  # whose operands have one dtype
            wide = {n: v.detach().double() for n, v in arguments.items() if isinstance(v, Tensor)}
        message = f"{example.op}: backend '{backend}' .* does not support .*float64"
        with pytest.raises(ValueError, match=message):
            public_call(example.op, arguments | wide).outputs()


ROWS = [e for e in KINDS if e.op.endswith(("modulate", "residual", "_norm", "rope"))]


@over(ROWS, [torch.float32], kernels=True)
def test_a_forced_kernel_refuses_a_width(example, backend, dtype) -> None:
    """Multiples of 8 up to 8192, since a row of D is held in registers."""
    arguments = example.arguments(DEVICE, dtype)
    arguments |= {n: None for n in ("cos", "sin") if n in arguments}
    arguments |= {"num_heads": 2} if "num_heads" in arguments else {}
    for dim in (0, 4, 12, 8200):
        resized = {
            name: Z(*value.shape[:-1], dim, device=DEVICE) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        with pytest.raises(ValueError, match=f"does not support D={dim} "):
            public_call(example.op, resized).outputs()


@pytest.mark.parametrize(
    ("head_dim", "kind", "message"),
    [
        (12, torch.float32, r"Dh=12 \(the kernel takes multiples of 8 up to 256\)"),
        (264, torch.float32, "Dh=264"),
        (8, torch.float64, r"float64 \(the kernel takes float32 and bfloat16\)"),
        (8, torch.float16, "float16"),
    ],
)
def test_forced_attention_says_what_it_does_not_take(head_dim, kind, message, native) -> None:
    call = catalog.attention(3, 2 * head_dim, head_dim, keys=4).call(DEVICE, kind)
    refusal = f"attention: backend 'native' .* support {message}"
    with use_backend("native"), pytest.raises(ValueError, match=refusal):
        call.outputs()


@over([INPUTS], [torch.float32], kernels=True)
def test_x_t_in_fp64(example, backend, dtype) -> None:
    arguments = example.arguments(DEVICE, dtype) | {"dtype": torch.float64}
    with pytest.raises(ValueError, match="x_t in float64"):
        public_call("flow_map_inputs", arguments).outputs()


@pytest.mark.parametrize("op", [op for op, kernels in OPERATORS.items() if "triton" not in kernels])
def test_without_a_triton_kernel_the_reference_runs(op) -> None:
    """The reference keeps its forward-mode derivative, which a kernel would drop."""
    call = next(e for e in KINDS if e.op == op).call(DEVICE, torch.float32)
    inputs = tuple(x.detach() for x in call.inputs)
    found = []
    for name in ("eager", "triton"):
        with torch.no_grad(), use_backend(name):
            found.append(torch.func.jvp(call.function, inputs, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
