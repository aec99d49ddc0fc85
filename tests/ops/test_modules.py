"""The operators' modules compute what the layers do that they stand for, on their parameters."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from anyflow import ops
from anyflow.models.attention import attention

B, L, H, DH = 2, 6, 3, 8
D = H * DH
TOLERANCE = {"rtol": 0, "atol": 2e-6}


def rand(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def test_layer_norm_modulate_stands_for_a_norm_and_two_passes(generator) -> None:
    x, shift, scale = rand(generator, B, L, D), rand(generator, B, 1, D), rand(generator, B, 1, D)
    module = ops.LayerNormModulate(eps=1e-3)
    expected = nn.LayerNorm(D, eps=1e-3, elementwise_affine=False)(x) * (1 + scale) + shift
    torch.testing.assert_close(module(x, shift, scale), expected, **TOLERANCE)
    assert not module.state_dict()


def test_residual_layer_norm_takes_the_state_of_layer_norm(generator) -> None:
    norm = nn.LayerNorm(D, eps=1e-3)
    norm.weight.data, norm.bias.data = rand(generator, D), rand(generator, D)
    module = ops.ResidualLayerNorm(D, eps=1e-3)
    module.load_state_dict(norm.state_dict())
    x, y, gate = rand(generator, B, L, D), rand(generator, B, L, D), rand(generator, B, 2, D)
    h, n = module(x, y, gate)
    expected = x + y * gate.repeat_interleave(L // 2, 1)
    torch.testing.assert_close(h, expected, **TOLERANCE)
    torch.testing.assert_close(n, norm(expected), **TOLERANCE)
    plain = ops.ResidualLayerNorm(D, elementwise_affine=False)
    assert not plain.state_dict()
    torch.testing.assert_close(plain(x, y)[1], F.layer_norm(x + y, (D,), eps=1e-6), **TOLERANCE)


def test_rms_norm_rope_takes_the_state_of_rms_norm(generator) -> None:
    norm = nn.RMSNorm(D, eps=1e-3)
    norm.weight.data = rand(generator, D)
    module = ops.RMSNormRope(D, H, eps=1e-3)
    module.load_state_dict(norm.state_dict())
    x, angle = rand(generator, B, L, D), rand(generator, L, DH // 2)
    heads = norm(x).unflatten(-1, (H, DH))
    torch.testing.assert_close(module(x), heads, **TOLERANCE)
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    rotated = torch.view_as_real(pairs * torch.exp(1j * angle)[:, None]).flatten(-2)
    torch.testing.assert_close(module(x, (angle.cos(), angle.sin())), rotated, **TOLERANCE)


def test_the_others_are_torch_layers(generator) -> None:
    x, y, gate = rand(generator, B, L, D), rand(generator, B, L, D), rand(generator, B, 1, D)
    torch.testing.assert_close(ops.GatedResidual()(x, y, gate), x + y * gate, **TOLERANCE)
    torch.testing.assert_close(ops.GELUTanh()(x), nn.GELU(approximate="tanh")(x), **TOLERANCE)
    theirs, ours = nn.Linear(D, 5), ops.Linear(D, 5)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
    q, k, v = (rand(generator, B, L, H, DH) for _ in range(3))
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    torch.testing.assert_close(ops.DotProductAttention()(q, k, v), expected, **TOLERANCE)


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_modulation_of_another_layout_is_refused_with_the_way_to_ours(generator) -> None:
    x, rows = rand(generator, B, L, D), rand(generator, B, 1, D)
    cases = {
        "shift.unsqueeze(1)": rows[:, 0],
        "take one of unbind(2)": rand(generator, B, 1, 6, D),
        f"shift.expand({B}, -1, -1)": rows[:1],
    }
    for hint, wrong in cases.items():
        message = refusal(lambda wrong=wrong: ops.layer_norm_modulate(x, wrong, rows))
        assert "shift must be a floating-point [B=2, R, D=24]" in message and hint in message
    message = refusal(lambda: ops.layer_norm_modulate(x.unflatten(2, (H, DH)), rows, rows))
    assert "[B, L, D]" in message and "flatten(2)" in message


def test_rotary_tables_of_diffusers_are_refused_with_the_way_to_ours(generator) -> None:
    """The way that the message names gives what diffusers computes."""
    x, weight = rand(generator, B, L, D), torch.ones(D)
    cos, sin = get_1d_rotary_pos_embed(DH, L, use_real=True, repeat_interleave_real=True)
    ours = cos[:, 0::2], sin[:, 1::2]
    for name, tables in (
        ("cos", (cos, sin)),
        ("cos", (cos[None, :, None], sin[None, :, None])),
        ("sin", (ours[0], sin[None, :, None])),
    ):
        message = refusal(lambda tables=tables: ops.rms_norm_rope(x, weight, *tables, num_heads=H))
        assert f"{name} must be a floating-point [L=6, Dh/2=4]" in message
        way = message[message.index(f"{name}.reshape") : message.index(";")]
        converted = eval(way, {"cos": cos[None, :, None], "sin": sin[None, :, None]})
        assert torch.equal(converted, ours[0] if name == "cos" else ours[1])
    message = refusal(
        lambda: ops.rms_norm_rope(x, weight, ours[0][None, :, None], ours[1], num_heads=H)
    )
    assert message.endswith("cos.reshape(6, 4)")


@pytest.mark.parametrize("function", [ops.attention, attention])
def test_heads_first_is_refused_where_shapes_tell(function, generator) -> None:
    q, k = rand(generator, B, H, L, DH), rand(generator, B, H, L + 1, DH)
    message = refusal(lambda: function(q, k, k))
    assert "[B=2, S, H=6, Dh=8]" in message and "transpose(1, 2) gives [B, L, H, Dh]" in message
