"""Measure what bf16 leaves of the central difference, and which parameters stay in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from anyflow.models import AnyFlowTransformer3DModel

EPSILON = 0.005
BF16 = torch.bfloat16


@dataclass
class Difference:
    """Hold the inputs of dF/dt at four times, and its value in fp64."""

    plus: Tensor
    minus: Tensor
    t_plus: Tensor
    t_minus: Tensor
    r: Tensor
    text: Tensor
    exact: Tensor


def save_rounded(tiny: dict[str, Any], folder: Path) -> AnyFlowTransformer3DModel:
    """Save a random model whose weights bf16 holds exactly: only arithmetic can differ."""
    model = AnyFlowTransformer3DModel(**(tiny | {"freq_dim": 256}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.save_pretrained(folder)
    return model


def difference(model: nn.Module, g: torch.Generator) -> Difference:
    """Return x+-, t+- as flow_map_inputs makes them, and the fp64 quotient of fp64 x and t."""
    x0, noise = (torch.randn(4, 3, 16, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    text = torch.randn(4, 7, 20, generator=g).bfloat16().float()
    t = torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64)
    sigma = t.view(-1, 1, 1, 1, 1)
    x, v = (1 - sigma) * x0 + sigma * noise, noise - x0
    plus, minus, t_plus, t_minus = (
        x + EPSILON * v,
        x - EPSILON * v,
        (t + EPSILON) * 1000,
        (t - EPSILON) * 1000,
    )
    wide = AnyFlowTransformer3DModel.from_config(model.config).double()
    wide.load_state_dict(model.state_dict())
    r = 300 * t
    with torch.no_grad():
        u_plus = wide(plus, t_plus, r, text.double()).sample
        exact = (u_plus - wide(minus, t_minus, r, text.double()).sample) / (2 * EPSILON)
    return Difference(*(v.float() for v in (plus, minus, t_plus, t_minus, r)), text, exact)


def our_quotient(model: nn.Module, d: Difference) -> Tensor:
    """Give the model fp32 latents and times; divide by the realized difference of times."""
    text = d.text.to(model.dtype)
    with torch.no_grad():
        u_plus = model(d.plus, d.t_plus, d.r, text).sample
        u_minus = model(d.minus, d.t_minus, d.r, text).sample
    assert u_plus.dtype == torch.float32
    return (u_plus - u_minus) / ((d.t_plus - d.t_minus) / 1000).view(-1, 1, 1, 1, 1)


def peer_quotient(model: nn.Module, d: Difference) -> Tensor:
    """Give the model bf16 latents and times; divide by the nominal difference."""
    t_plus, t_minus, r = (v.to(BF16)[:, None].expand(4, 3) for v in (d.t_plus, d.t_minus, d.r))
    with torch.no_grad():
        u_plus = model(d.plus.to(BF16), t_plus, r, d.text.to(BF16)).sample.float()
        u_minus = model(d.minus.to(BF16), t_minus, r, d.text.to(BF16)).sample.float()
    return (u_plus - u_minus) / (2 * EPSILON)


def test_central_difference_survives_bf16(
    tiny, generator, relative: Callable[..., float], tmp_path: Path
) -> None:
    """Compare what three seeds gave: fp32 6e-6, ours 0.054 to 0.057, the peer's 0.40 to 0.43."""
    reference = save_rounded(tiny, tmp_path)
    d = difference(reference, generator)
    assert relative(our_quotient(reference, d), d.exact) < 1e-4
    ours = relative(
        our_quotient(AnyFlowTransformer3DModel.from_pretrained(tmp_path, torch_dtype=BF16), d),
        d.exact,
    )
    theirs = diffusers.AnyFlowTransformer3DModel.from_pretrained(tmp_path, torch_dtype=BF16)
    peer = relative(peer_quotient(theirs, d), d.exact)
    assert ours < 0.08
    assert peer > 5 * ours


@pytest.mark.parametrize("latents", [BF16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [BF16, torch.float32])
def test_velocity_has_the_dtype_of_the_latents(
    latents, weights, tiny, make_inputs, tmp_path: Path
) -> None:
    save_rounded(tiny, tmp_path)
    model = AnyFlowTransformer3DModel.from_pretrained(tmp_path, torch_dtype=weights)
    i = make_inputs()
    with torch.no_grad():
        assert model(i.x.to(latents), i.t, i.r, i.text.to(weights)).sample.dtype == latents


def test_fp32_latents_are_not_rounded_on_their_way_in_or_out(
    tiny, make_inputs, relative, tmp_path: Path
) -> None:
    """Show a hundredth of bf16's resolution, which a model that rounds its input cannot see."""
    save_rounded(tiny, tmp_path)
    model = AnyFlowTransformer3DModel.from_pretrained(tmp_path, torch_dtype=BF16)
    i = make_inputs()
    x = i.x.bfloat16().float()
    nudged = x * (1 + 2**-12)
    assert torch.equal(nudged.bfloat16().float(), x)
    with torch.no_grad():
        embedded = [model.patch_embedding(v.transpose(1, 2)) for v in (x, nudged)]
        assert embedded[0].dtype == torch.float32
        bias = model.patch_embedding.bias.float().view(1, -1, 1, 1, 1)
        assert relative(embedded[1] - embedded[0], (embedded[0] - bias) * 2**-12) < 1e-2
        out = model(x, i.t, i.r, i.text.bfloat16()).sample
        assert relative(out.bfloat16(), out) > 1e-4  # it has digits that bf16 does not


@pytest.mark.parametrize("enabled_by", ["config", "enable_flow_map"])
def test_both_time_embedders_stay_in_fp32(
    enabled_by, tiny, make_inputs, relative, tmp_path: Path
) -> None:
    """Keep the last digits of these parameters; the others are bf16."""
    model = AnyFlowTransformer3DModel(**tiny, r_embedder=enabled_by == "config")
    if enabled_by == "enable_flow_map":
        model.enable_flow_map()
    model.save_pretrained(tmp_path)
    loaded = AnyFlowTransformer3DModel.from_pretrained(tmp_path, torch_dtype=BF16)
    keep = AnyFlowTransformer3DModel._keep_in_fp32_modules
    assert {"time_embedder", "delta_embedder"} <= set(keep)
    original = dict(model.named_parameters())
    for name, p in loaded.named_parameters():
        assert p.dtype == (torch.float32 if any(k in name.split(".") for k in keep) else BF16), name
        assert p.dtype == BF16 or torch.equal(p, original[name])
    kept = [n for n, p in loaded.named_parameters() if p.dtype == torch.float32]
    assert (
        len([n for n in kept if "delta_embedder" in n])
        == len([n for n in kept if "time_embedder" in n])
        == 4
    )
    i = make_inputs()
    with torch.no_grad():
        out = loaded(i.x, i.t, i.r, i.text.bfloat16()).sample
        assert relative(out, model(*i.tuple()).sample) < 0.03


def test_a_small_change_of_time_is_seen_in_bf16(tiny, make_inputs, tmp_path: Path) -> None:
    """Keep times in fp32: 700 and 700.9 are one number in bf16."""
    save_rounded(tiny, tmp_path)
    model = AnyFlowTransformer3DModel.from_pretrained(tmp_path, torch_dtype=BF16)
    i = make_inputs()
    t, r = torch.full((2,), 700.0), torch.zeros(2)
    assert torch.tensor(700.9).bfloat16() == 700
    with torch.no_grad():
        a, b = (model(i.x, at, r, i.text.bfloat16()).sample for at in (t, t + 0.9))
    assert not torch.equal(a, b)


def test_autocast_keeps_the_projections_wide(tiny, make_inputs, relative) -> None:
    model = AnyFlowTransformer3DModel(**tiny)
    i = make_inputs()
    with torch.no_grad():
        exact = model(*i.tuple()).sample
        with torch.autocast("cpu", dtype=BF16):
            out = model(*i.tuple()).sample
            assert model.patch_embedding(i.x.transpose(1, 2)).dtype == torch.float32
    assert out.dtype == torch.float32 and 1e-4 < relative(out, exact) < 0.03
