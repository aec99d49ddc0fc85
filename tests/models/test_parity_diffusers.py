"""Compare with diffusers' AnyFlowTransformer3DModel: outputs, gradients, files, adapters."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from anyflow.models import AnyFlowTransformer3DModel

TOLERANCE = 1e-6

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "gate-0.6": {"gate_value": 0.6},
    "gate-0": {"gate_value": 0.0},
    "gate-1": {"gate_value": 1.0},
    "t-r": {"deltatime_type": "t-r"},
    "t-r-gate-0.5": {"deltatime_type": "t-r", "gate_value": 0.5},
    "no-cross-attn-norm": {"cross_attn_norm": False},
    "image": {"image_dim": 12},
    "one-wide-head": {"num_attention_heads": 1, "attention_head_dim": 40, "num_layers": 1},
    "three-heads-odd-widths": {
        "num_attention_heads": 3,
        "attention_head_dim": 14,
        "ffn_dim": 33,
        "freq_dim": 17,
    },
}
SIZES = [(2, 3, 4, 6), (1, 5, 6, 10), (3, 1, 2, 2)]


def randomized(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all weights: a missing norm would hide behind weights of 1 and biases of 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(
                    (1.0 if "norm" in name and name.endswith("weight") else 0.0)
                    + 0.2 * torch.randn(p.shape, generator=generator)
                )
    return model


def pair(
    config: dict[str, Any], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, AnyFlowTransformer3DModel]:
    """Return diffusers' model and ours with the same random weights."""
    theirs = randomized(diffusers.AnyFlowTransformer3DModel(**config), generator)
    ours = AnyFlowTransformer3DModel(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def gradients(model: nn.Module, output: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output * cotangent.to(output.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["per-frame", "per-sample"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output(config, per_sample, size, tiny, make_inputs, generator, relative) -> None:
    theirs, ours = pair(tiny | config, generator)
    inputs = make_inputs(*size, image="image_dim" in config, per_sample=per_sample)
    with torch.no_grad():
        expected = theirs(*inputs.tuple()).sample
        assert relative(ours(*inputs.tuple()).sample, expected) < TOLERANCE
        if per_sample:
            by_sample = ours(
                inputs.x, inputs.t[:, 0], inputs.r[:, 0], inputs.text, inputs.image
            ).sample
            assert relative(by_sample, expected) < TOLERANCE


@pytest.mark.parametrize("per_sample", [False, True], ids=["per-frame", "per-sample"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients(config, per_sample, tiny, make_inputs, generator, relative) -> None:
    theirs, ours = pair(tiny | config, generator)
    inputs = make_inputs(2, 3, 6, 10, image="image_dim" in config, per_sample=per_sample)
    x_theirs, x_ours = (inputs.x.clone().requires_grad_() for _ in range(2))
    cotangent = torch.randn(inputs.x.shape, generator=generator)
    expected = gradients(theirs, theirs(x_theirs, *inputs.tuple()[1:]).sample, cotangent)
    actual = gradients(ours, ours(x_ours, *inputs.tuple()[1:]).sample, cotangent)

    assert actual.keys() == expected.keys() == {n for n, _ in theirs.named_parameters()}
    flat = [torch.cat([g[n].flatten() for n in expected]) for g in (actual, expected)]
    assert relative(*flat) < TOLERANCE
    assert relative(x_ours.grad, x_theirs.grad) < TOLERANCE
    total = flat[1].norm().item()
    for name, gradient in expected.items():
        # A key bias shifts all scores of a query alike, which softmax ignores: its true gradient is
        # 0 (before the norm it is nearly so), and what remains is rounding. The same holds where a
        # gate of 0 or 1 cuts a branch.
        error = (actual[name] - gradient).norm().item()
        assert error < max(5 * TOLERANCE * gradient.norm().item(), 1e-8 * total), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_every_parameter_in_fp64(config, tiny, make_inputs, generator) -> None:
    """Resolve the cancellations in fp64; diffusers rounds sinusoid and norms, hence 1e-6."""
    theirs, ours = pair(tiny | config, generator, torch.float64)
    inputs = make_inputs(1, 5, 6, 10, image="image_dim" in config)
    arguments = [inputs.x.double(), inputs.t, inputs.r, inputs.text.double(), inputs.image]
    arguments[4] = None if inputs.image is None else inputs.image.double()
    cotangent = torch.randn(inputs.x.shape, generator=generator)
    expected = gradients(theirs, theirs(*arguments).sample, cotangent)
    actual = gradients(ours, ours(*arguments).sample, cotangent)
    largest = max(g.norm().item() for g in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm().item()
        assert error < TOLERANCE * gradient.norm().item() + 1e-9 * largest, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_dicts_interchange_both_ways(config, tiny) -> None:
    theirs = diffusers.AnyFlowTransformer3DModel(**(tiny | config))
    ours = AnyFlowTransformer3DModel(**(tiny | config))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_config_and_call_are_compatible() -> None:
    """Check that every setting has its default, and every positional argument its place."""
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(diffusers.AnyFlowTransformer3DModel, method)).parameters
        ours = inspect.signature(getattr(AnyFlowTransformer3DModel, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        if method == "__init__":
            assert all(p.default == ours[n].default for n, p in theirs.items() if n != "self")


def test_return_dict_and_keywords(tiny, make_inputs, generator) -> None:
    _, ours = pair(tiny, generator)
    i = make_inputs()
    with torch.no_grad():
        positional = ours(i.x, i.t, i.r, i.text, None, None, False)
        named = ours(
            hidden_states=i.x,
            timestep=i.t,
            r_timestep=i.r,
            encoder_hidden_states=i.text,
            return_dict=True,
        )
    assert isinstance(positional, tuple) and len(positional) == 1
    assert torch.equal(positional[0], named.sample)


@pytest.mark.parametrize(
    "config", [{}, {"gate_value": 0.6, "deltatime_type": "t-r", "image_dim": 12}], ids=str
)
def test_folders_interchange_both_ways(
    config, tiny, make_inputs, generator, relative, tmp_path: Path
) -> None:
    theirs, ours = pair(tiny | config, generator)
    inputs = make_inputs(image="image_dim" in config)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = ours(*inputs.tuple()).sample
        assert torch.equal(again(*inputs.tuple()).sample, expected)
        assert dict(again.config).items() >= (tiny | config).items()
        from_theirs = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "theirs")
        assert torch.equal(from_theirs(*inputs.tuple()).sample, expected)
        by_diffusers = diffusers.AnyFlowTransformer3DModel.from_pretrained(tmp_path / "ours")
        assert relative(by_diffusers(*inputs.tuple()).sample, expected) < TOLERANCE


def test_additive_fusion_survives_the_file(tiny, make_inputs, tmp_path: Path) -> None:
    ours = AnyFlowTransformer3DModel(**tiny, r_embedder_fusion="additive", gate_value=0.7)
    ours.save_pretrained(tmp_path)
    again = AnyFlowTransformer3DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        inputs = make_inputs()
        assert torch.equal(again(*inputs.tuple()).sample, ours(*inputs.tuple()).sample)


def test_lora_adapter(tiny, make_inputs, generator, relative) -> None:
    """Adapt the published recipe's targets; attention_kwargs sets the scale."""
    theirs, ours = pair(tiny, generator)
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
        "linear_1",
        "linear_2",
    ]
    i = make_inputs()
    with torch.no_grad():
        before = ours(*i.tuple()).sample
        for model in (theirs, ours):
            model.add_adapter(
                LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
            )
        adapters = {
            k: 0.1 * torch.randn(v.shape, generator=generator)
            for k, v in theirs.state_dict().items()
            if "lora" in k
        }
        trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
        assert trainable == {n for n, _ in ours.named_parameters() if "lora" in n}
        assert adapters and {k for k in ours.state_dict() if "lora" in k} == adapters.keys()
        for model in (theirs, ours):
            assert not model.load_state_dict(adapters, strict=False).unexpected_keys
        adapted = ours(*i.tuple()).sample
        assert relative(adapted, before) > 1e-3
        assert relative(adapted, theirs(*i.tuple()).sample) < TOLERANCE
        scaled = [
            m(i.x, i.t, i.r, i.text, attention_kwargs={"scale": 0.5}).sample for m in (ours, theirs)
        ]
        assert relative(*scaled) < TOLERANCE and relative(scaled[0], adapted) > 1e-4
        ours.disable_adapters()
        assert torch.equal(ours(*i.tuple()).sample, before)


def test_gradient_checkpointing_gives_the_same_gradients(tiny, make_inputs, generator) -> None:
    _, ours = pair(tiny, generator)
    i = make_inputs()
    cotangent = torch.randn(i.x.shape, generator=generator)
    plain = gradients(ours, ours(*i.tuple()).sample, cotangent)
    saved = {}

    def count(tensor: Tensor) -> Tensor:
        saved[key] = saved.get(key, 0) + tensor.numel()
        return tensor

    for key in ("plain", "checkpointed"):
        if key == "checkpointed":
            ours.enable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            output = ours(*i.tuple()).sample
    checkpointed = gradients(ours, output, cotangent)
    assert checkpointed.keys() == plain.keys()
    assert all(torch.equal(checkpointed[n], plain[n]) for n in plain)
    assert saved["checkpointed"] < saved["plain"] / 3
