"""Check how a block runs its linear layers and the GELU, and what each way computes."""

from collections.abc import Callable

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from anyflow.models.blocks import AnyFlowTransformerBlock, FeedForward, GELUProjection
from anyflow.models.linear import apply_linear, fuses_gelu, is_plain_linear, linear_gelu
from anyflow.models.linear import no_derivative_needed as underived
from anyflow.ops import gelu
from anyflow.ops.backend import LEFT_TO_TORCH

DIM, FFN = 16, 40


class OtherTensor(Tensor):
    """Stand for a weight of another tensor type, as quantized weights are."""


def with_lora(ffn: FeedForward) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), ffn)


def with_forward_hook(ffn: FeedForward) -> None:
    ffn.net[0].proj.register_forward_hook(lambda module, args, out: 2 * out)


def with_pre_hook(ffn: FeedForward) -> None:
    ffn.net[0].proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def with_offload(ffn: FeedForward) -> None:
    accelerate.cpu_offload(ffn, execution_device=torch.device("cpu"))


def with_accelerate_hook(ffn: FeedForward) -> None:
    add_hook_to_module(ffn.net[0].proj, ModelHook())


def with_layerwise_casting(ffn: FeedForward) -> None:
    apply_layerwise_casting(ffn, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def with_parametrization(ffn: FeedForward) -> None:
    nn.utils.parametrizations.weight_norm(ffn.net[0].proj)


def with_other_weight(ffn: FeedForward) -> None:
    proj = ffn.net[0].proj
    proj.weight = nn.Parameter(proj.weight.detach().as_subclass(OtherTensor))


def with_other_bias(ffn: FeedForward) -> None:
    proj = ffn.net[0].proj
    proj.bias = nn.Parameter(proj.bias.detach().as_subclass(OtherTensor))


def without_bias(ffn: FeedForward) -> None:
    ffn.net[0].proj.bias = None


def with_other_class(ffn: FeedForward) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    ffn.net[0].proj = Doubled(DIM, FFN)


WRAPPED = [
    with_lora,
    with_forward_hook,
    with_pre_hook,
    with_offload,
    with_accelerate_hook,
    with_layerwise_casting,
    with_parametrization,
    with_other_weight,
    with_other_bias,
    without_bias,
    with_other_class,
]


@pytest.mark.parametrize("wrap", WRAPPED, ids=lambda wrap: wrap.__name__)
def test_only_a_plain_linear_is_fused(wrap: Callable[[FeedForward], None]) -> None:
    ffn = FeedForward(DIM, FFN)
    assert is_plain_linear(ffn.net[0].proj)
    wrap(ffn)
    assert not is_plain_linear(ffn.net[0].proj)


@pytest.mark.parametrize("wrap", [lambda ffn: None, *WRAPPED], ids=lambda wrap: wrap.__name__)
@torch.no_grad()
def test_a_layer_gives_what_its_call_gives(wrap: Callable[[FeedForward], None], generator) -> None:
    """Require the same of large products, where a plain one goes through the operator."""
    ffn = FeedForward(DIM, FFN)
    wrap(ffn)
    proj, x = ffn.net[0].proj, torch.randn(2, 2**13, DIM, generator=generator)
    torch.testing.assert_close(apply_linear(proj, x), proj(x), rtol=1e-5, atol=1e-5)


def test_the_models_layers_take_the_operator(generator) -> None:
    """Run all layers that see tokens by the operator: 4 of self-, 2 of cross-attention, 2 more."""
    block = AnyFlowTransformerBlock(64, 128, 2, cross_attn_norm=True, eps=1e-6)
    x, text = (
        torch.randn(1, 1024, 64, generator=generator),
        torch.randn(1, 4, 64, generator=generator),
    )
    angle, modulation = (
        torch.rand(1024, 16, generator=generator),
        torch.randn(1, 1, 6, 64, generator=generator),
    )
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        block(x, text, modulation, (angle.cos(), angle.sin())).sum().backward()
    runs = {event.key: event.count for event in seen.key_averages()}
    expected = 0 if "linear" in LEFT_TO_TORCH else 4 + 2 + 2
    assert (
        runs.get("anyflow::linear", 0) == expected
        and runs.get("anyflow::linear_backward_native", 0) == expected
    )


def test_a_removed_hook_is_no_hook() -> None:
    linear = nn.Linear(DIM, FFN)
    handle = linear.register_forward_hook(lambda module, args, out: None)
    handle.remove()
    assert is_plain_linear(linear)


def test_no_derivative_is_lost() -> None:
    plain, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert underived(plain, plain)
    assert not underived(plain, trained) and not underived(trained, plain)
    with torch.no_grad():
        assert underived(plain, trained)
    with torch.inference_mode():
        assert underived(plain, trained)
    seen = []

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():  # which does not turn forward mode off
            seen.append(underived(x, plain))
        return x

    torch.func.jvp(function, (plain,), (plain,))
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(plain, plain))
    assert seen == [False, False]
    assert underived(plain, plain)


def test_what_torch_offers(generator) -> None:
    """Confirm the conditions: torch has the erf-GELU on a CPU, and no derivative."""
    x = torch.randn(2, 3, DIM, generator=generator)
    weight, bias = torch.randn(FFN, DIM, generator=generator), torch.randn(FFN, generator=generator)
    out = linear_gelu(x, weight, bias)
    assert out.shape == (2, 3, FFN)
    torch.testing.assert_close(out, F.gelu(F.linear(x, weight, bias)), rtol=1e-5, atol=1e-5)
    assert (out - F.gelu(F.linear(x, weight, bias), approximate="tanh")).abs().max() > 1e-4
    with pytest.raises(
        RuntimeError, match="derivative for aten::_addmm_activation is not implemented"
    ):
        linear_gelu(x, weight.requires_grad_(), bias).sum().backward()
    meta = linear_gelu(x.to("meta"), weight.to("meta"), bias.to("meta"))
    assert meta.shape == (2, 3, FFN) and meta.is_meta


@torch.no_grad()
def test_the_cpu_keeps_the_ordinary_path(generator) -> None:
    module = GELUProjection(DIM, FFN)
    x = torch.randn(2, 3, DIM, generator=generator)
    assert not fuses_gelu(module.proj, x)
    assert torch.equal(module(x), gelu(F.linear(x, module.proj.weight, module.proj.bias)))


def test_the_conditions_compile() -> None:
    module = nn.Linear(DIM, FFN)

    def function(x: Tensor) -> Tensor:
        return x + 1 if is_plain_linear(module) and underived(x, module.weight) else x - 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    with torch.no_grad():
        assert torch.equal(compiled(x), x + 1)
    assert torch.equal(compiled(x), x - 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_against_unfused_on_cuda(dtype, generator, relative) -> None:
    module = GELUProjection(256, 512).to("cuda", dtype)
    x = torch.randn(2, 33, 256, generator=generator).to("cuda", dtype)
    exact = F.gelu(
        F.linear(x.double(), module.proj.weight.double(), module.proj.bias.double()),
        approximate="tanh",
    )
    unfused = module(x)
    assert unfused.requires_grad and not fuses_gelu(module.proj, x)
    with torch.no_grad():
        assert fuses_gelu(module.proj, x)
        fused = module(x)
        assert not fuses_gelu(module.proj, x[:0]) and module(x[:0]).shape == (0, 33, 512)
        assert not fuses_gelu(module.proj, x.cpu()) and not fuses_gelu(module.proj, x.double())
        with torch.autocast("cuda", torch.bfloat16):
            assert not fuses_gelu(module.proj, x)
        compiled = torch.compile(module, fullgraph=True)(x)
    assert relative(fused, exact) <= 1.01 * relative(unfused, exact) + 1e-6  # one rounding fewer
    assert relative(compiled, exact) <= 1.01 * relative(unfused, exact) + 1e-6
    with torch.no_grad():
        strided = module(x.transpose(0, 1))
    assert relative(strided.transpose(0, 1), fused) < 1e-2
