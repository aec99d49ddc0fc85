"""attention: extremes, the same bits, any length, what is left to torch, instruction sets."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, largest_error
from formulas import attention as formula
from torch import Tensor

from anyflow.ops import attention, backend_report, use_backend
from anyflow.ops.native import EXTENSION

Operands = list[Tensor]


@pytest.fixture
def native() -> None:
    """Skip where the kernel is not offered."""
    if DEVICE.type != "cpu":
        pytest.skip("the native kernel is for the CPU")
    if EXTENSION is None or EXTENSION.cpu_instruction_set() == "generic":
        pytest.skip("without AVX2 the native kernel is not offered")


@pytest.fixture
def qkv(draw):
    """Draw q ``[B, L, H, Dh]``, and k and v ``[B, S, H, Dh]``, from B, L, S, H and Dh."""

    def make(
        b: int, length: int, keys: int, heads: int, head_dim: int, kind: torch.dtype = torch.float32
    ) -> Operands:
        return [draw(b, n, heads, head_dim, dtype=kind) for n in (length, keys, keys)]

    return make


def doubled(tensors: Operands) -> Operands:
    return [t.detach().double().requires_grad_() for t in tensors]


def errors(actual: Operands, exact: Operands) -> list[float]:
    """Return the error of each tensor, relative to its largest element."""
    return [largest_error([a], [e]) for a, e in zip(actual, exact, strict=True)]


def test_log_sum_exp(backend, qkv) -> None:
    """The operator returns it for its backward; it has no gradient."""
    q, k, v = qkv(2, 37, 21, 3, 24)
    out, logsumexp = torch.ops.anyflow.attention(q, k, v)
    scores = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) / math.sqrt(24)
    assert not logsumexp.requires_grad and logsumexp.dtype == torch.float32
    assert largest_error([logsumexp], [scores.logsumexp(-1)]) <= 2e-6
    _, empty = torch.ops.anyflow.attention(q, k[:, :0], v[:, :0])
    assert torch.equal(empty, torch.full_like(empty, -math.inf))


@pytest.mark.parametrize("size", [15.0, 1e2, 1e4])
def test_large_logits(size, backend, qkv) -> None:
    """Scores have an error of their size times 2^-24.

    For the largest, the gradients of q and k are nothing else.
    """
    q, k, v = (t.detach() for t in qkv(1, 70, 150, 2, 64))
    tensors = [(q * size / 5).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    wide = doubled(tensors)
    out, (exact,) = attention(*tensors), formula(*wide)
    ours = torch.autograd.grad(out.sum(), tensors)
    wrong = errors(ours, torch.autograd.grad(exact.sum(), wide))
    bound = 2e-6 + 4 * size * 2**-24
    assert largest_error([out], [exact]) <= bound and wrong[2] <= bound
    assert max(wrong) <= 3 * bound or size > 1e3
    assert all(g.isfinite().all() for g in ours)


@pytest.mark.parametrize("keys", [120, 128, 150, 257])
def test_equal_logits_average(keys, backend, draw) -> None:
    """Padding of the last block of keys must not count, whatever is largest."""
    v = draw(1, keys, 1, 8).detach()
    expected = v.double().mean(1, keepdim=True).expand(1, 5, 1, 8)
    for logit in (-3600.0, 3600.0):
        q = torch.full((1, 5, 1, 8), 100.0, device=DEVICE)
        k = torch.full((1, keys, 1, 8), logit / 283, device=DEVICE)
        assert largest_error([attention(q, k, v)], [expected]) <= 2e-6


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "grad"])
def test_nan_goes_where_it_must(which, backend, qkv, draw) -> None:
    tensors = [*qkv(1, 30, 150, 1, 16), draw(1, 30, 1, 16)]
    tensors[which].detach()[0, 11, 0, 3] = math.nan
    *inputs, cotangent = tensors
    wide = doubled(inputs)
    out, (exact,) = attention(*inputs), formula(*wide)
    ours = torch.autograd.grad(out, inputs, cotangent)
    theirs = torch.autograd.grad(exact, wide, cotangent.double())
    assert any(t.isnan().any() for t in (out, *ours))
    for actual, want in zip((out, *ours), (exact, *theirs), strict=True):
        assert torch.equal(actual.isnan(), want.isnan())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_call_and_for_every_number_of_threads(kind, native, qkv) -> None:
    tensors = qkv(2, 600, 333, 3, 40, kind)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = attention(*tensors)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    before = torch.get_num_threads()
    try:
        with use_backend("native"):
            first = run(2)
            assert all(
                torch.equal(a, b) for n in (1, 2, 3, 2) for a, b in zip(run(n), first, strict=True)
            )
    finally:
        torch.set_num_threads(before)


def test_compiles_for_any_length(backend, qkv) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 37, 7, 3, 64), (2, 41, 41, 3, 64)):
        tensors = qkv(*shape)
        outputs = compiled(*tensors), attention(*tensors)
        gradients = [torch.autograd.grad(o.square().sum(), tensors) for o in outputs]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_take_runs_on_torchs(native, qkv) -> None:
    for shape, kind in (((1, 5, 7, 2, 12), torch.float32), ((1, 5, 7, 2, 8), torch.float64)):
        tensors = qkv(*shape, kind)
        heads_first = (t.transpose(1, 2) for t in tensors)
        expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        with use_backend(None):
            assert torch.equal(attention(*tensors), expected)
            fallbacks = backend_report("cpu")["attention"].fallbacks
        assert any("Dh=12" in reason for reason in fallbacks)
    assert any(reason.startswith("float64") for reason in fallbacks)


@pytest.mark.slow
def test_every_instruction_set(run_python) -> None:
    """Also those that are not the choice here; the generic kernels are compiled, if not offered."""
    code = (
        "import torch, anyflow.ops as ops\n"
        "torch.manual_seed(0); torch.set_num_threads(2)\n"
        "q, k, v, g = (torch.randn(1, n, 2, 72) for n in (65, 130, 130, 65))\n"
        "new = torch.ops.anyflow\n"
        "out, total = new.attention_native(q, k, v)\n"
        "ours = out, *new.attention_backward_native(g, q, k, v, out, total)\n"
        "wide = [t.double().requires_grad_() for t in (q, k, v)]\n"
        "with ops.use_backend('eager'): expected = ops.attention(*wide)\n"
        "theirs = expected.detach(), *torch.autograd.grad(expected, wide, g.double())\n"
        "print(max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs)))\n"
    )
    if EXTENSION is None:
        pytest.skip("the native extension is not built")
    names = EXTENSION.build_info()["cpu_instruction_sets"].split(",")
    for name in names[: names.index(EXTENSION.cpu_instruction_set()) + 1]:
        assert float(run_python(code, ANYFLOW_CPU_ISA=name).split()[-1]) <= 3e-6, name
