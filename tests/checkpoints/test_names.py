"""The tables of names go both ways."""

import pytest

from anyflow.checkpoints.names import DIFFUSERS, FASTVIDEO, NAMINGS, ORIGINAL, Naming, common_prefix, naming_of
from anyflow.models import AnyFlowTransformer3DModel


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda n: n.title)
def test_every_parameter_has_one_name_and_comes_back(naming: Naming) -> None:
    model = AnyFlowTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, ffn_dim=8, num_layers=11, text_dim=4, image_dim=6
    )
    names = [n for n, _ in model.named_parameters() if naming is not ORIGINAL or "delta_embedder" not in n]
    theirs = {naming.theirs(name): name for name in names}
    assert None not in theirs and len(theirs) == len(names)
    assert all(naming.ours(name) == ours for name, ours in theirs.items())
    assert naming_of(theirs) is naming


def test_what_a_table_does_not_have_has_no_name() -> None:
    assert ORIGINAL.theirs("condition_embedder.delta_embedder.linear_1.weight") is None  # Wan has one timestep
    assert ORIGINAL.ours("blocks.0.norm2.weight") is None and FASTVIDEO.ours("blocks.0.attn1.to_q.weight") is None
    assert ORIGINAL.ours("") is None and DIFFUSERS.ours("anything") == "anything"
    assert naming_of(["vae.weight"]) is None and naming_of([]) is None


def test_a_prefix_counts_only_before_every_name() -> None:
    assert common_prefix(["base_model.model.a", "base_model.model.b"]) == "base_model.model."
    assert common_prefix(["base_model.model.a", "b"]) == common_prefix([]) == ""
