"""Check the plain Wan path, the way from it to a flow map, and bad input."""

import copy
from typing import Any

import diffusers
import pytest
import torch

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.ops import use_backend

DELTA = "condition_embedder.delta_embedder."


def flow_map_and_plain(
    tiny: dict[str, Any], **settings: Any
) -> tuple[AnyFlowTransformer3DModel, AnyFlowTransformer3DModel]:
    """Return a flow map, and the same weights without the second branch."""
    flow_map = AnyFlowTransformer3DModel(**(tiny | settings))
    plain = AnyFlowTransformer3DModel(**(tiny | settings), r_embedder=False)
    plain.load_state_dict(
        {k: v for k, v in flow_map.state_dict().items() if not k.startswith(DELTA)}, strict=True
    )
    return flow_map, plain


@pytest.mark.parametrize(
    "config", [{}, {"cross_attn_norm": False}, {"num_attention_heads": 3}], ids=str
)
@pytest.mark.parametrize("size", [(2, 3, 4, 6), (1, 5, 6, 10)], ids=str)
def test_parity_with_wan(config, size, tiny, make_inputs, generator, relative) -> None:
    wan = diffusers.WanTransformer3DModel(**(tiny | config))
    ours = AnyFlowTransformer3DModel(**(tiny | config), r_embedder=False)
    ours.load_state_dict(wan.state_dict(), strict=True)
    wan.load_state_dict(ours.state_dict(), strict=True)
    i = make_inputs(*size)
    expected = wan(i.x.transpose(1, 2), i.t[:, 0], i.text).sample.transpose(1, 2)
    actual = ours(i.x, i.t[:, 0], encoder_hidden_states=i.text).sample
    assert relative(actual, expected) < 1e-6

    cotangent = torch.randn(i.x.shape, generator=generator)
    grads = [
        torch.autograd.grad((y * cotangent).sum(), list(m.parameters()))
        for y, m in ((actual, ours), (expected, wan))
    ]
    names = [[n for n, _ in m.named_parameters()] for m in (ours, wan)]
    named = [dict(zip(n, g, strict=True)) for n, g in zip(names, grads, strict=True)]
    flat = [torch.cat([g[n].flatten() for n in sorted(names[0])]) for g in named]
    assert relative(*flat) < 1e-6


@pytest.mark.parametrize("per_frame", [False, True])
def test_r_none_is_bit_identical_to_the_plain_model(per_frame, tiny, make_inputs) -> None:
    flow_map, plain = flow_map_and_plain(tiny)
    i = make_inputs()
    t, r = (i.t, i.r) if per_frame else (i.t[:, 0], i.r[:, 0])
    with torch.no_grad():
        assert torch.equal(
            flow_map(i.x, t, None, i.text).sample, plain(i.x, t, None, i.text).sample
        )
        # None is not r = t: the second branch has weights of its own.
        assert not torch.allclose(
            flow_map(i.x, t, t, i.text).sample, plain(i.x, t, None, i.text).sample
        )
        assert not torch.allclose(
            flow_map(i.x, t, t, i.text).sample, flow_map(i.x, t, r, i.text).sample
        )


def test_no_second_branch_is_allocated(tiny) -> None:
    flow_map, plain = flow_map_and_plain(tiny)
    assert not [n for n, _ in [*plain.named_parameters(), *plain.named_buffers()] if "delta" in n]
    assert len([n for n, _ in flow_map.named_parameters() if n.startswith(DELTA)]) == 4
    assert flow_map.num_parameters() > plain.num_parameters()


def test_gate_is_a_buffer_outside_the_state_dict(tiny) -> None:
    model = AnyFlowTransformer3DModel(**tiny, gate_value=0.6)
    buffers = dict(model.named_buffers())
    assert buffers["condition_embedder.delta_emb_gate"].item() == pytest.approx(0.6)
    assert not [k for k in model.state_dict() if "gate" in k]


def test_gate_survives_meta_and_casts(tiny, make_inputs) -> None:
    """Keep the buffer when loading through the meta device: no file fills it."""
    model = AnyFlowTransformer3DModel(**tiny, gate_value=0.6)
    with torch.device("meta"):
        loaded = AnyFlowTransformer3DModel(**tiny, gate_value=0.6)
    loaded.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict(), strict=True)
    i = make_inputs()
    with torch.no_grad():
        assert torch.equal(loaded(*i.tuple()).sample, model(*i.tuple()).sample)
    gate = loaded.bfloat16().condition_embedder.delta_emb_gate
    assert gate.dtype == torch.float32 and gate.item() == pytest.approx(0.6, abs=1e-7)


def test_r_timestep_to_a_plain_model_is_an_error(tiny, make_inputs) -> None:
    _, plain = flow_map_and_plain(tiny)
    i = make_inputs()
    with pytest.raises(
        ValueError, match="r_timestep was given, but this model has no second timestep branch"
    ):
        plain(i.x, i.t, i.r, i.text)


@pytest.mark.parametrize("fusion", ["gated", "additive"])
@pytest.mark.parametrize("deltatime", ["r", "t-r"])
def test_enable_flow_map(fusion, deltatime, tiny, make_inputs, relative) -> None:
    _, plain = flow_map_and_plain(tiny)
    i = make_inputs()
    model = copy.deepcopy(plain)
    assert model.enable_flow_map(0.3, deltatime, fusion) is model
    embedder = model.condition_embedder
    for a, b in zip(
        embedder.delta_embedder.parameters(), embedder.time_embedder.parameters(), strict=True
    ):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    config = model.config
    assert (config.r_embedder, config.gate_value, config.deltatime_type,
            config.r_embedder_fusion) == (
        True, 0.3, deltatime, fusion,
    )  # fmt: skip
    with torch.no_grad():
        before = plain(i.x, i.t, None, i.text).sample
        assert torch.equal(model(i.x, i.t, None, i.text).sample, before)
        same = relative(model(i.x, i.t, i.t, i.text).sample, before)
        assert same < 1e-6 if (fusion, deltatime) == ("gated", "r") else same > 1e-4
        assert relative(model(i.x, i.t, i.r, i.text).sample, before) > 1e-4
        twin = AnyFlowTransformer3DModel.from_config(config)
        twin.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(twin(*i.tuple()).sample, model(*i.tuple()).sample)
    with pytest.raises(ValueError, match="already has a second timestep branch"):
        model.enable_flow_map()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.25, "t+r"), "deltatime_type"),
        ((0.25, "r", "sum"), "r_embedder_fusion"),
        ((float("nan"),), "gate_value"),
    ],
)
def test_enable_flow_map_rejects(arguments, message, tiny) -> None:
    _, plain = flow_map_and_plain(tiny)
    with pytest.raises(ValueError, match=message):
        plain.enable_flow_map(*arguments)
    assert plain.condition_embedder.delta_embedder is None and plain.config.r_embedder is False
    names = ("gate_value", "deltatime_type", "r_embedder_fusion")
    defaults = {"gate_value": 0.25, "deltatime_type": "r", "r_embedder_fusion": "gated"}
    with pytest.raises(ValueError, match=message):
        AnyFlowTransformer3DModel(**tiny, **(defaults | dict(zip(names, arguments, strict=False))))


def test_additive_fusion(tiny, make_inputs) -> None:
    """Compare the embedding with ``t + g r``; a gate of 0 is the plain path."""
    model = AnyFlowTransformer3DModel(**tiny, r_embedder_fusion="additive", gate_value=0.7)
    i = make_inputs()
    embedder = model.condition_embedder
    # the other path has no fused activation: not bit for bit
    with torch.no_grad(), use_backend("eager"):
        emb, _ = embedder(i.t[:, 0], i.r[:, 0], torch.float32)
        t_emb, _ = embedder(i.t[:, 0], None, torch.float32)
        r_emb = embedder._embed(embedder.delta_embedder, i.r[:, 0], torch.float32)
        torch.testing.assert_close(emb, t_emb + 0.7 * r_emb)
        off = AnyFlowTransformer3DModel(**tiny, r_embedder_fusion="additive", gate_value=0.0)
        assert torch.equal(off(*i.tuple()).sample, off(i.x, i.t, None, i.text).sample)


@pytest.mark.parametrize("r_none", [False, True])
def test_per_sample_and_per_frame_times_agree(r_none, tiny, make_inputs, relative) -> None:
    model = AnyFlowTransformer3DModel(**tiny)
    i = make_inputs(per_sample=True)
    with torch.no_grad():
        per_frame = model(i.x, i.t, None if r_none else i.r, i.text).sample
        per_sample = model(i.x, i.t[:, 0], None if r_none else i.r[:, 0], i.text).sample
    assert relative(per_sample, per_frame) < 1e-6


def test_times_of_different_frames_matter(tiny, make_inputs) -> None:
    """Change one frame's time; without attention among tokens, no other frame changes."""
    model = AnyFlowTransformer3DModel(**tiny)
    i = make_inputs()
    other = i.t.clone()
    other[:, 1] = 0
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.to_out[0].weight.zero_()
        change = (
            (model(i.x, i.t, None, i.text).sample - model(i.x, other, None, i.text).sample)
            .square()
            .sum((0, 2, 3, 4))
        )
    assert change[0] == change[2] == 0 and change[1] > 0.01


def test_many_frames_and_long_axes(tiny, make_inputs) -> None:
    model = AnyFlowTransformer3DModel(**(tiny | {"rope_max_seq_len": 4}))
    i = make_inputs(1, 5, 4, 4)
    with pytest.raises(ValueError, match="rope_max_seq_len=4"):
        model(*i.tuple())
    wide = make_inputs(1, 1, 4, 10)
    with pytest.raises(ValueError, match="rope_max_seq_len=4"):
        model(*wide.tuple())


def test_rotary_tables_follow_the_grid(tiny, make_inputs) -> None:
    """Run one model on alternating shapes, by tables that the grid finds."""
    model = AnyFlowTransformer3DModel(**tiny)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for size in [(1, 3, 4, 6), (1, 3, 6, 4), (1, 2, 6, 6), (1, 3, 4, 6)]:
            i = make_inputs(*size)
            assert torch.equal(model(*i.tuple()).sample, copy.deepcopy(fresh)(*i.tuple()).sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 16, 4, 6)}, "hidden_states must be"),
        ({"hidden_states": torch.zeros(2, 3, 8, 4, 6)}, "hidden_states must be"),
        ({"hidden_states": torch.zeros(2, 16, 3, 4, 6)}, "hidden_states must be"),
        ({"hidden_states": torch.zeros(2, 3, 16, 5, 6)}, "hidden_states: height 5"),
        ({"hidden_states": torch.zeros(2, 3, 16, 4, 7)}, "hidden_states: width 7"),
        ({"hidden_states": torch.zeros(2, 0, 16, 4, 6)}, "hidden_states: frames 0"),
        ({"timestep": None}, "timestep is required"),
        ({"timestep": torch.tensor(500.0)}, "timestep must be"),
        ({"timestep": torch.zeros(3)}, "timestep must be"),
        ({"timestep": torch.zeros(2, 4)}, "timestep must be"),
        ({"r_timestep": torch.zeros(2, 3)}, "r_timestep .* must have the shape of timestep"),
        ({"r_timestep": torch.zeros(1)}, "r_timestep .* must have the shape of timestep"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states is required"),
        ({"encoder_hidden_states": torch.zeros(2, 20)}, "encoder_hidden_states must be"),
        ({"encoder_hidden_states": torch.zeros(1, 7, 20)}, "encoder_hidden_states must be"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 21)}, "encoder_hidden_states must be"),
        ({"encoder_hidden_states_image": torch.zeros(2, 5, 12)}, "encoder_hidden_states_image was "
                                                                 "given"),
    ],
)  # fmt: skip
def test_bad_input(changes, message, tiny) -> None:
    good = {
        "hidden_states": torch.zeros(2, 3, 16, 4, 6),
        "timestep": torch.full((2,), 500.0),
        "r_timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 7, 20),
    }
    with pytest.raises(ValueError, match=message):
        AnyFlowTransformer3DModel(**tiny)(**(good | changes))


@pytest.mark.parametrize("shape", [(2, 5, 11), (1, 5, 12), (2, 12)], ids=str)
def test_bad_image_states(shape, tiny, make_inputs) -> None:
    model, i = AnyFlowTransformer3DModel(**tiny, image_dim=12), make_inputs()
    with pytest.raises(ValueError, match="encoder_hidden_states_image must be"):
        model(i.x, i.t, i.r, i.text, torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": (2, 2)}, "patch_size"),
        ({"patch_size": (1, 0, 2)}, "patch_size"),
        ({"attention_head_dim": 25}, "attention_head_dim"),
    ],
)
def test_bad_settings(settings, message, tiny) -> None:
    with pytest.raises(ValueError, match=message):
        AnyFlowTransformer3DModel(**(tiny | settings))
