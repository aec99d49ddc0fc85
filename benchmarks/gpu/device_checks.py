"""Check that what runs on a device is right; each check names what its failure accuses.

Operators are compared with their references in fp64: small ones as ``anyflow doctor`` does, then at
the models' sizes, forward and backward, where what a kernel allocates reads NaN until it is written
and a second call must give the same bits. Then more than 2^31 elements, a stream of its own, every
attention backend, GELU in the epilogue of a product, and small networks
(:mod:`gpu.network_checks`).

``run_gpu.py`` runs parts of them in processes beside each other (:mod:`gpu.checks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow import ops
from anyflow.doctor.self_check import TOLERANCE, Check, self_check, tolerance
from anyflow.models.attention import attention, attention_report
from anyflow.ops import examples, use_backend
from anyflow.ops.backend import BACKENDS, OPERATORS, missing
from anyflow.ops.examples import Example, OperatorCall, as_tuple
from gpu import network_checks
from gpu.outcomes import SAME, DeviceCheck, WrongNumbers, relative

# Of ||a - e|| / ||e||. One rounding to bf16 is 2^-9 of an element at most, and results have up to
# three on their way; in fp32 they have their own sums and a GPU's approximate functions, for which
# the self-check's bound stands.
LIMITS = {torch.bfloat16: 3 * 2.0**-9, torch.float32: 3 * TOLERANCE[torch.float32]}
# rounded are the weights, the result and, backward, the gradient of the scores
ATTENTION_LIMIT = 5 * 2.0**-9


def catalogue(device: torch.device, tiny: bool) -> list[DeviceCheck]:
    """List the checks for a device; nothing is allocated."""
    found = [*network_checks.catalogue(device, tiny), *_operators(device, tiny)]
    found += [*_self_checks(device), *_attention(device, tiny), *_launches(device, tiny)]
    assert len({check.name for check in found}) == len(found), "two checks have the same name"
    return found


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, device=device, dtype=dtype, generator=generator)


# Operators ----------------------------------------------------------------------------------------


def _self_checks(device: torch.device) -> Iterator[DeviceCheck]:
    """Compare small inputs of every dtype with fp64, by operator and backend."""
    # the widest one; the self-check has one for each dtype
    limit = tolerance(torch.bfloat16, backward=True)
    for op in sorted(OPERATORS):
        for backend in _kernels(op, device):
            run = partial(_self_check, op, backend, device)
            yield DeviceCheck(f"{op}, small: {backend}", limit, run, {op: [backend]})


def _self_check(op: str, backend: str, device: torch.device) -> float:
    found = [check for check in self_check(device, (op,), (backend,)) if isinstance(check, Check)]
    bad = [check for check in found if check.problem is not None]
    if bad:
        problem = "; ".join(f"{check.dtype}: {check.problem}" for check in bad)
        numbers = all(str(check.problem).startswith(("values", "gradients")) for check in bad)
        raise (WrongNumbers if numbers else RuntimeError)(problem)
    errors = [error for check in found for error in (check.forward_error, check.backward_error)]
    return max((error for error in errors if error is not None), default=0.0)


def _kernels(op: str, device: torch.device) -> list[str]:
    """Return the backends with kernels that run on a device, without interpreted ones."""
    names = [name for name in BACKENDS if name != "eager" and missing(name, device, op) is None]
    return [name for name in names if device.type == "cuda" or name != "triton"]


def _operators(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    """Check every operator at sizes of the models, and at one whose sizes are no powers of two."""
    tokens, small = examples.TOKENS, ((42, 256, 1), (42, 128, 21))
    # D = 5120 on a quarter of the tokens, as six processes share the memory with fp64 references
    wide = ((tokens, 1536, 1), (tokens // 4, 5120, 1), (tokens, 1536, 21), (33, 3072, 3))
    found = [e for sizes in (small if tiny else wide) for e in examples.row_examples(*sizes)]
    found += [examples.dual_timestep_embedding(*((3, 64) if tiny else (21, 5120)))]
    found += examples.flow_map_examples(*((2, (2, 4, 4, 4)) if tiny else (8, examples.LATENTS)))
    for example in found:
        for backend in _kernels(example.op, device):
            run = partial(_compare, example, backend, device)
            name, accused = f"{example.name}: {backend}", {example.op: [backend]}
            yield DeviceCheck(name, LIMITS[example.dtype], run, accused)


def _compare(example: Example, backend: str, device: torch.device) -> float:
    """Return the largest error of a result or a gradient, against the reference in fp64."""
    call = example.call(device, example.dtype)
    # native CUDA kernels run forward only
    backward = backend != "native" or device.type != "cuda"
    with poisoned():
        found, again = (_results(call, call.inputs, backend, backward) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
        raise WrongNumbers("not the same bits twice, or NaN: an element is not written, or a race")
    del again
    exact = [x.double() if x.is_floating_point() else x for x in call.inputs]
    expected = _results(call, exact, "eager", backward)
    return max(relative(a, e) for a, e in zip(found, expected, strict=True))


def _results(
    call: OperatorCall, inputs: Sequence[Tensor], backend: str, backward: bool
) -> list[Tensor]:
    """Return the outputs, and the gradients of the inputs that want one."""
    wanted = [any(x is w for w in call.wanted) and backward for x in call.inputs]
    leaves = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    with use_backend(backend), torch.set_grad_enabled(backward or call.training):
        outputs = as_tuple(call.function(*leaves))
        gradients: tuple[Tensor, ...] = ()
        if backward:
            cotangents = [_draw(o.device, *o.shape).to(o.dtype) for o in outputs]
            kept = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
            gradients = torch.autograd.grad(outputs, kept, cotangents)
    return [*(o.detach() for o in outputs), *gradients]


@contextmanager
def poisoned() -> Iterator[None]:
    """Let what is allocated read NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Sizes, streams, products -------------------------------------------------------------------------


def _launches(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    beyond = partial(_beyond_32_bits, device, tiny)
    yield DeviceCheck("more than 2^31 elements", SAME, beyond)  # which no network has
    if device.type != "cuda":
        return
    for backend in _kernels("layer_norm_modulate", device):
        run, accused = partial(_another_stream, device, backend), {"layer_norm_modulate": [backend]}
        yield DeviceCheck(f"a stream of its own: {backend}", LIMITS[torch.float32], run, accused)
    name, limit = "GELU in the epilogue of a product", LIMITS[torch.bfloat16]
    yield DeviceCheck(name, limit, partial(_gelu_epilogue, device))


def _beyond_32_bits(device: torch.device, tiny: bool) -> float:
    """Compare the last sample of a batch of more than 2^31 elements with that sample alone."""
    batch, tokens, dim = (2, 42, 64) if tiny else (14, examples.TOKENS, 5120)
    x = _draw(device, batch, tokens, dim)
    shift, scale = (_draw(device, batch, 21, dim) for _ in range(2))
    with torch.no_grad():
        whole = ops.layer_norm_modulate(x, shift, scale)[-1:]
        alone = ops.layer_norm_modulate(*(t[-1:].clone() for t in (x, shift, scale)))
    return relative(whole, alone)


def _another_stream(device: torch.device, backend: str) -> float:
    """Run an operator on a side stream, behind a copy that is late: it must wait for that one."""
    x, shift, scale = (_draw(device, 1, n, 1536, dtype=torch.float32) for n in (4096, 1, 1))
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), use_backend(backend), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = ops.layer_norm_modulate(late, shift, scale)
    side.synchronize()
    with use_backend("eager"):
        return relative(out, ops.layer_norm_modulate(x.double(), shift.double(), scale.double()))


def _gelu_epilogue(device: torch.device) -> float:
    from anyflow.models.linear import linear_gelu

    x, weight = _draw(device, 1, 777, 1536), _draw(device, 8960, 1536) / 39
    bias = _draw(device, 8960)
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    return relative(linear_gelu(x, weight, bias), expected)


# Attention ----------------------------------------------------------------------------------------


def _attention(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    """Check every backend that runs here."""
    for grad in (False, True):
        report = attention_report(device, dtype=torch.bfloat16, head_dim=128, requires_grad=grad)
        for name, choice in report.items():
            if choice.available:
                marks = f"{', backward' if grad else ''}{' (chosen)' if choice.chosen else ''}"
                run = partial(_attention_error, device, name, 33 if tiny else 777, grad)
                accused = {"attention": [name]}
                yield DeviceCheck(f"attention {name}{marks}", ATTENTION_LIMIT, run, accused)


def _attention_error(device: torch.device, backend: str, length: int, grad: bool) -> float:
    q, k, v = (_draw(device, 2, n, 4, 128).requires_grad_(grad) for n in (length, 130, 131))
    v = v[:, :130].detach().requires_grad_(grad)  # other numbers than the keys
    wide = [t.detach().double().requires_grad_(grad) for t in (q, k, v)]
    with torch.set_grad_enabled(grad):
        out = attention(q, k, v, attention_backend=backend)
        heads_first = (t.transpose(1, 2) for t in wide)
        expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)
        errors = [relative(out, expected)]
        if grad:
            cotangent = _draw(device, *out.shape)
            found = torch.autograd.grad(out, (q, k, v), cotangent)
            gradients = torch.autograd.grad(expected, wide, cotangent.double())
            errors += [relative(a, e) for a, e in zip(found, gradients, strict=True)]
    return max(errors)
