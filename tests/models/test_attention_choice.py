"""Check the choice of an attention backend: overrides, torch.compile, report, setter."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import anyflow.models.attention as module
from anyflow.models import AnyFlowTransformer3DModel, attention_report, use_attention_backend
from anyflow.models.attention import ATTENTION_BACKENDS, attention
from anyflow.ops.attention.backends import flash_implementation, unsupported
from anyflow.ops.attention.choice import preference
from anyflow.ops.native import EXTENSION

NATIVE = EXTENSION is not None and EXTENSION.cpu_instruction_set() != "generic"
ON_CPU = ("native", "flash", "math") if NATIVE else ("flash", "math")
NOT_ON_CPU = tuple(name for name in ATTENTION_BACKENDS if name not in ("native", *ON_CPU))


# ---- the choice and its overrides


@pytest.mark.parametrize("backend", ON_CPU)
def test_exactly_the_forced_backend_runs(backend, qkv, monkeypatch, kernel_of) -> None:
    tensors = qkv()
    assert kernel_of(attention, *tensors, attention_backend=backend) == backend
    with use_attention_backend(backend):
        assert kernel_of(attention, *tensors) == backend
    monkeypatch.setenv("ANYFLOW_ATTENTION", backend)
    assert kernel_of(attention, *tensors) == backend


def test_the_nearest_override_wins(qkv, monkeypatch, kernel_of) -> None:
    tensors = qkv()
    monkeypatch.setenv("ANYFLOW_ATTENTION", "math")
    assert kernel_of(attention, *tensors) == "math"
    with use_attention_backend("flash"):
        assert kernel_of(attention, *tensors) == "flash"
        assert kernel_of(attention, *tensors, attention_backend="math") == "math"
        with use_attention_backend("math"):
            assert kernel_of(attention, *tensors, attention_backend="flash") == "flash"
            assert kernel_of(attention, *tensors) == "math"
        assert kernel_of(attention, *tensors) == "flash"
    assert kernel_of(attention, *tensors) == "math"


def test_use_attention_backend_sets_and_restores(qkv, kernel_of, automatic) -> None:
    tensors = qkv()
    with pytest.raises(KeyError), use_attention_backend("math"):
        raise KeyError
    assert kernel_of(attention, *tensors) == automatic
    use_attention_backend("math")
    assert kernel_of(attention, *tensors) == "math"
    use_attention_backend(None)
    assert kernel_of(attention, *tensors) == automatic


def test_an_automatic_choice_keeps_to_sdpa_kernel_and_a_forced_one_does_not(
    qkv, kernel_of, automatic
) -> None:
    tensors = qkv()
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_of(attention, *tensors) == "math"
        assert kernel_of(attention, *tensors, attention_backend="flash") == "flash"
        assert kernel_of(attention, *tensors) == "math"  # the switches are as they were
        assert not torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert kernel_of(attention, *tensors) == "math"
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert kernel_of(attention, *tensors) == automatic


@pytest.mark.parametrize(
    ("capability", "cudnn", "first"),
    [
        ((8, 0), 91002, ["flash_attn_2", "flash", "efficient", "math"]),
        ((8, 9), 91002, ["flash_attn_2", "flash", "efficient", "math"]),
        ((9, 0), 91002, ["flash_attn_3", "cudnn", "flash_attn_2", "flash", "efficient", "math"]),
        ((10, 0), 91002, ["flash_attn_3", "cudnn", "flash_attn_2", "flash", "efficient", "math"]),
        ((12, 0), 91002, ["flash_attn_3", "cudnn", "flash_attn_2", "flash", "efficient", "math"]),
        ((9, 0), 90800, ["flash_attn_3", "flash_attn_2", "flash", "efficient", "math"]),
        ((9, 0), 0, ["flash_attn_3", "flash_attn_2", "flash", "efficient", "math"]),
    ],
)
def test_order_of_preference(capability, cudnn, first) -> None:
    """Keep FlashAttention-3 in the order of newer GPUs, where it is then missing."""
    assert list(preference(capability, cudnn)) == first


def test_an_implementation_that_the_user_has_activated_comes_first() -> None:
    for capability in ((9, 0), (10, 0)):
        for name in ("FA3", "FA4"):
            order = preference(capability, 91002, name)
            assert order[0] == "flash" and sorted(order) == sorted(preference(capability, 91002))


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"), reason="needs torch 2.11"
)
def test_an_activated_implementation_is_noticed_and_named() -> None:
    """Activate an implementation that registers no kernel by torch's own registry."""
    registry, removed = torch.nn.attention, []

    class Handle:
        def remove(self) -> None:
            removed.append(True)

    registry.register_flash_attention_impl("ours", register_fn=Handle)
    before = registry.current_flash_attention_impl()
    assert flash_implementation() == before is None
    registry.activate_flash_attention_impl("ours")
    try:
        assert flash_implementation() == "ours"
        assert "the kernel is ours's, activated" in attention_report("cuda")["flash"].reason
        # which it does not replace
        assert "activated" not in attention_report("cpu")["flash"].reason
    finally:
        registry.restore_flash_attention_impl()
    assert flash_implementation() is None and removed == [True]
    assert "activated" not in attention_report("cuda")["flash"].reason


def test_forward_mode_derivative(qkv, relative) -> None:
    tensors = qkv(dtype=torch.float64)
    twice_reverse = torch.autograd.functional.jvp  # the same derivative without forward mode
    expected = twice_reverse(lambda *x: attention(*x, attention_backend="math"), tensors, tensors)[
        1
    ]
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(torch.func.jvp(attention, tensors, tensors)[1], expected) < 1e-12
    with use_attention_backend("math"):
        assert relative(torch.func.jvp(attention, tensors, tensors)[1], expected) < 1e-12


def test_a_fake_call_does_not_spoil_the_choice_for_real_ones(qkv, kernel_of) -> None:
    """Probe each kind once with real tensors: fake CPU tensors have the math kernel only."""
    unsupported.cache_clear()
    with FakeTensorMode():
        fake = torch.empty(1, 4, 2, 56)
        assert attention(fake, fake, fake, attention_backend="flash").shape == (1, 4, 112)
    assert kernel_of(attention, *qkv((1, 4, 4, 2, 56)), attention_backend="flash") == "flash"


def test_support_is_probed_once(qkv) -> None:
    unsupported.cache_clear()
    for length in (3, 4, 5):
        attention(*qkv((1, length, length, 2, 8)), attention_backend="flash")
    assert unsupported.cache_info().misses == 1


# ---- torch.compile


class Compiler:
    """Run the graphs of torch.compile as they are, and keep the kernel of each forward graph."""

    def __init__(self, kernel_among: Callable[[list[str]], str]) -> None:
        self.kernel_among, self.kernels = kernel_among, []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return aot_autograd(
            fw_compiler=self.forward,
            bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        )(graph, inputs)

    def forward(self, graph: Any, inputs: Any) -> Any:
        self.kernels.append(self.kernel_among([str(node.target) for node in graph.graph.nodes]))
        return make_boxed_func(graph.forward)


def by_argument(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(2 * query, key, value, attention_backend="math")


def by_inner_block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with use_attention_backend("math"):
        return attention(2 * query, key, value)


def unforced(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(2 * query, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "outer"),
    [
        (unforced, None),
        (unforced, "math"),
        *((unforced, name) for name in ON_CPU if name != "math"),
        (by_argument, None),
        (by_inner_block, "flash"),
    ],
)
def test_compile(function, outer, dynamic, qkv, kernel_of, kernel_among, automatic) -> None:
    torch._dynamo.reset()
    compiler = Compiler(kernel_among)
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
    for shape in ((2, 37, 7, 3, 64), (2, 37, 37, 3, 64)):
        tensors = qkv(shape, grad=True)
        with use_attention_backend(outer) if outer else nullcontext():
            out, expected = compiled(*tensors), function(*tensors)
            assert compiler.kernels[-1] == kernel_of(function, *tensors)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        ours, theirs = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert kernel_of(attention, *tensors) == automatic


@pytest.mark.slow
def test_compile_with_inductor(qkv) -> None:
    torch._dynamo.reset()
    tensors = qkv(grad=True)
    for function in (unforced, by_argument):
        out, expected = torch.compile(function, fullgraph=True)(*tensors), function(*tensors)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_code_follows_use_attention_backend(qkv, kernel_among, automatic) -> None:
    torch._dynamo.reset()
    compiler = Compiler(kernel_among)
    compiled = torch.compile(unforced, fullgraph=True, backend=compiler)
    tensors = qkv()
    for backend in (None, "math", "flash", None, "math"):
        with use_attention_backend(backend):
            compiled(*tensors)
    assert compiler.kernels == [automatic, "math", "flash"]  # and each is reused


def test_compile_reports_a_missing_backend(qkv) -> None:
    torch._dynamo.reset()
    with (
        use_attention_backend("cudnn"),
        pytest.raises(Exception, match="'cudnn' .* is not available"),
    ):
        torch.compile(unforced, fullgraph=True, backend="eager")(*qkv())


# ---- the report


def test_report_on_the_cpu(monkeypatch, automatic) -> None:
    report = attention_report("cpu")
    assert tuple(report) == ATTENTION_BACKENDS and all(
        row.name == name for name, row in report.items()
    )
    assert [name for name, row in report.items() if row.chosen] == [automatic]
    assert [name for name, row in report.items() if row.available] == list(ON_CPU)
    assert report["cudnn"].reason == "runs on CUDA devices only, not on cpu"
    assert report["math"].reason == f"{automatic} is preferred"
    monkeypatch.setenv("ANYFLOW_ATTENTION", "math")
    report = attention_report("cpu")
    assert report["math"].chosen and report["math"].reason == "forced by ANYFLOW_ATTENTION"
    assert not report["flash"].chosen and report["flash"].available
    assert report["flash"].reason == "math is forced by ANYFLOW_ATTENTION"


def test_report_of_what_cannot_run() -> None:
    with use_attention_backend("cudnn"):
        report = attention_report("cpu")
        assert not any(row.chosen for row in report.values())
        assert (
            report["cudnn"].reason
            == "forced by use_attention_backend(): runs on CUDA devices only, not on cpu"
        )
    with sdpa_kernel(SDPBackend.MATH):
        report = attention_report("cpu")
        assert (
            report["math"].chosen
            and report["flash"].reason == "disabled by sdpa_kernel or torch.backends.cuda"
        )
    report = attention_report("cpu", dtype=torch.float8_e4m3fn)
    assert report["math"].chosen and not report["flash"].available
    assert "query of dtype torch.float8_e4m3fn with head_dim 128" in report["flash"].reason
    if not torch.cuda.is_available():
        rows = attention_report("cuda").values()
        assert not any(row.chosen or row.available for row in rows)
        assert "torch finds no CUDA device" in {row.reason for row in rows}


def test_the_submodule_is_not_shadowed() -> None:
    assert module.attention is attention


# ---- the model


def test_set_attention_backend(tiny, make_inputs, kernel_of, operators_of, automatic) -> None:
    model, other = (AnyFlowTransformer3DModel(**tiny).eval() for _ in range(2))
    x = make_inputs(per_sample=True)
    arguments = (x.x, x.t[:, 0], x.r[:, 0], x.text)
    assert kernel_of(model, *arguments) == automatic
    model.set_attention_backend("math")
    names = operators_of(model, *arguments)
    assert not any("flash" in name or name.startswith("attention") for name in names)
    assert sum("softmax" in name for name in names) == 2 * tiny["num_layers"]
    with use_attention_backend("flash"):
        assert kernel_of(model, *arguments) == "math"
    assert kernel_of(other, *arguments) == automatic
    for reset in (lambda: model.set_attention_backend("auto"), model.reset_attention_backend):
        model.set_attention_backend("math")
        reset()
        assert kernel_of(model, *arguments) == automatic


def test_set_attention_backend_is_validated_at_once(tiny) -> None:
    model = AnyFlowTransformer3DModel(**tiny)
    model.set_attention_backend("math")
    for diffusers_name in ("_native", "_native_cudnn", "sage"):
        with pytest.raises(
            ValueError, match="set_attention_backend: .*expected one of flash_attn_3, "
        ):
            model.set_attention_backend(diffusers_name)
    if not torch.cuda.is_available():
        for backend in NOT_ON_CPU:
            with pytest.raises(RuntimeError, match=f"{backend}.*is not available: "):
                model.set_attention_backend(backend)
    assert {block.attn1.attention_backend for block in model.blocks} == {"math"}
