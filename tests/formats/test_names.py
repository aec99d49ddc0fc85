"""Test that the tables of names go both ways."""

import re

import pytest

from anyflow.formats import CheckpointFormatError
from anyflow.formats.names import (
    DIFFUSERS,
    FASTVIDEO,
    NAMINGS,
    ORIGINAL,
    Naming,
    locate,
    naming_of,
)
from anyflow.models import AnyFlowTransformer3DModel


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: n.title)
def test_every_parameter_has_one_name_and_comes_back(naming: Naming) -> None:
    model = AnyFlowTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        ffn_dim=8,
        num_layers=11,
        text_dim=4,
        image_dim=6,
    )
    names = [
        n
        for n, _ in model.named_parameters()
        if naming is not ORIGINAL or "delta_embedder" not in n
    ]
    theirs = {naming.theirs(name): name for name in names}
    assert None not in theirs and len(theirs) == len(names)
    assert all(naming.ours(name) == ours for name, ours in theirs.items())
    assert naming_of(theirs) is naming


def test_what_a_table_does_not_have_has_no_name() -> None:
    # Wan has one timestep
    assert ORIGINAL.theirs("condition_embedder.delta_embedder.linear_1.weight") is None
    assert (
        ORIGINAL.ours("blocks.0.norm2.weight") is None
        and FASTVIDEO.ours("blocks.0.attn1.to_q.weight") is None
    )
    assert ORIGINAL.ours("") is None and DIFFUSERS.ours("anything") == "anything"
    assert naming_of(["vae.weight"]) is None and naming_of([]) is None


PATCH = "patch_embedding.weight"


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.",
     "model.diffusion_model.",
     "diffusion_model.", "base_model.model.", "_fsdp_wrapped_module.",
     "generator.model._fsdp_wrapped_module."],
)  # fmt: skip
def test_the_transformer_is_found_under_any_prefix(prefix: str) -> None:
    feed_forward = f"{prefix}blocks.0._orig_mod.ffn.0.weight"
    shapes = {f"{prefix}{PATCH}": (8, 2, 1, 2, 2), feed_forward: (4, 8)}
    located = locate(
        shapes | {"vae.conv1.weight": (3,), "clip_vision.patch_embedding.weight": (8, 3, 2, 2)},
        "file",
    )
    assert located.names == {
        PATCH: f"{prefix}{PATCH}",
        "blocks.0.ffn.0.weight": f"{prefix}blocks.0._orig_mod.ffn.0.weight",
    }
    assert located.others == {"vae.": 1, "clip_vision.": 1}


def test_several_transformers_strange_tensors_and_doubles_are_refused() -> None:
    patch = (8, 2, 1, 2, 2)
    for names, message in (
        ((f"ema.{PATCH}", f"model.{PATCH}"), "holds 2 transformers, under ema., model."),
        ((PATCH, f"ema.{PATCH}"), "holds 2 transformers, under no prefix, ema."),
        (
            (f"model.{PATCH}", "optimizer.state"),
            "neither of it nor of another model that is known:\n  optimizer.state",
        ),
        ((PATCH, f"_orig_mod.{PATCH}"), "are one tensor of the model"),
    ):
        with pytest.raises(CheckpointFormatError, match=re.escape(message)):
            locate(dict.fromkeys(names, patch), "file")
