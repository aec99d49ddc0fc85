"""Compare with diffusers' AnyFlowFARTransformer3DModel: settings, layouts, files."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.models.causal import CAUSAL_PARAMETERS

TOLERANCE = 1e-5
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "t-r": {"deltatime_type": "t-r", "gate_value": 0.6},
    "one-full-chunk": {"full_chunk_limit": 1},
    "two-full-chunks-no-cross-attn-norm": {"full_chunk_limit": 2, "cross_attn_norm": False},
    "wide-compressed-patch": {"compressed_patch_size": (1, 4, 8), "full_chunk_limit": 2},
    "image": {"image_dim": 12},
    "three-heads-odd-widths": {
        "num_attention_heads": 3,
        "attention_head_dim": 14,
        "ffn_dim": 33,
        "freq_dim": 17,
    },
}
PARTITION = [2, 1, 3, 1, 2]


def pair(config: dict[str, Any]) -> tuple[nn.Module, AnyFlowFARTransformer3DModel]:
    """Return diffusers' model and ours with the same random weights."""
    theirs = diffusers.AnyFlowFARTransformer3DModel(**config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    ours = AnyFlowFARTransformer3DModel(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def call(model: nn.Module, inputs: Any, *, clean: bool) -> Tensor:
    """Evaluate the training or the plain layout; frames that are compressed have other times."""
    limit = model.config.full_chunk_limit
    full = sum(PARTITION[-limit:])
    latents = torch.flip(inputs.x, [0])[:, -full:] if clean else None
    times = torch.zeros(len(inputs.x), full) if clean else None
    arguments = (inputs.x, inputs.t, inputs.r, inputs.text, PARTITION, inputs.image)
    sample: Tensor = model(*arguments, latents, times).sample
    assert sample.shape[1] == full
    return sample


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "training"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_layouts_without_a_cache(config, clean, tiny, make_inputs, relative) -> None:
    theirs, ours = pair(tiny | config)
    inputs = make_inputs(2, sum(PARTITION), 4, 8, image="image_dim" in config)
    expected = call(theirs, inputs, clean=clean)
    assert relative(call(ours, inputs, clean=clean), expected) < TOLERANCE


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_the_bidirectional_path(config, tiny, make_inputs, relative) -> None:
    _, ours = pair(tiny | config)
    own = ("compressed_patch_size", "full_chunk_limit")
    theirs = diffusers.AnyFlowTransformer3DModel(
        **{name: value for name, value in (tiny | config).items() if name not in own}
    )
    state = {n: t for n, t in ours.state_dict().items() if n not in CAUSAL_PARAMETERS}
    theirs.load_state_dict(state, strict=True)
    inputs = make_inputs(2, 3, 6, 10, image="image_dim" in config)
    actual = ours(*inputs.tuple()[:4], None, inputs.image, is_causal=False).sample
    assert relative(actual, theirs(*inputs.tuple()).sample) < TOLERANCE


def test_settings_and_positional_arguments_are_those_of_diffusers() -> None:
    theirs = inspect.signature(diffusers.AnyFlowFARTransformer3DModel.__init__).parameters
    ours = inspect.signature(AnyFlowFARTransformer3DModel.__init__).parameters
    assert {n: p.default for n, p in theirs.items()}.items() <= {
        n: p.default for n, p in ours.items()
    }.items()
    names = [
        list(inspect.signature(cls.forward).parameters)[1:9]
        for cls in (diffusers.AnyFlowFARTransformer3DModel, AnyFlowFARTransformer3DModel)
    ]
    assert names[0] == names[1] and names[0][-1] == "clean_timestep"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_state_dicts_interchange_both_ways(config, tiny) -> None:
    theirs, ours = pair(tiny | config)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_a_new_model_has_the_compressed_embedding_of_diffusers(tiny, relative) -> None:
    for size in ((1, 4, 4), (1, 8, 4)):
        theirs = diffusers.AnyFlowFARTransformer3DModel(**tiny, compressed_patch_size=size)
        ours = AnyFlowFARTransformer3DModel(**tiny, compressed_patch_size=size)
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            for parameter in ours.far_patch_embedding.parameters():
                parameter.zero_()
            ours.initialize_compressed()
        expected = theirs.far_patch_embedding
        assert relative(ours.far_patch_embedding.weight, expected.weight) < 1e-6
        assert torch.equal(ours.far_patch_embedding.bias, expected.bias)


@pytest.mark.parametrize("config", [{}, CONFIGS["t-r"] | {"chunk_partition": (1, 2)}], ids=str)
@torch.no_grad()
def test_folders_interchange_both_ways(config, tiny, make_inputs, relative, tmp_path: Path) -> None:
    theirs, ours = pair(tiny | config)
    inputs = make_inputs(1, sum(PARTITION), 4, 8)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = call(ours, inputs, clean=True)
    for name in ("ours", "theirs"):
        again, info = AnyFlowFARTransformer3DModel.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(info.values())
        assert torch.equal(call(again, inputs, clean=True), expected)
        assert tuple(again.config.chunk_partition) == ours.config.chunk_partition
    by_diffusers, info = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    assert relative(call(by_diffusers, inputs, clean=True), expected) < TOLERANCE
    assert tuple(by_diffusers.config.chunk_partition) == ours.config.chunk_partition
    assert {n for n, _ in by_diffusers.named_parameters()} == {*ours.state_dict()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bidirectional_folder_becomes_causal_with_every_weight(
    dtype, tiny, tmp_path: Path
) -> None:
    """Load what diffusers' class leaves on the meta device, without values."""
    bidirectional = diffusers.AnyFlowTransformer3DModel(**tiny, gate_value=0.4)
    bidirectional.save_pretrained(tmp_path / "transformer")
    options = {"subfolder": "transformer", "torch_dtype": dtype}
    ours, info = AnyFlowFARTransformer3DModel.from_pretrained(
        tmp_path, output_loading_info=True, **options
    )
    assert not any(info.values()) and ours.config.gate_value == 0.4
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    source = AnyFlowTransformer3DModel.from_pretrained(tmp_path, **options)
    expected = AnyFlowFARTransformer3DModel.from_bidirectional(source).state_dict()
    state = ours.to("cpu").state_dict()
    assert state.keys() == expected.keys()
    assert all(t.dtype == expected[n].dtype for n, t in state.items())
    assert all(torch.equal(t, expected[n]) for n, t in state.items())
    ours.save_pretrained(tmp_path / "causal")
    theirs, info = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        tmp_path / "causal", output_loading_info=True, torch_dtype=dtype
    )
    assert not any(info.values())
    weight = theirs.state_dict()["far_patch_embedding.weight"]
    assert torch.equal(weight, state["far_patch_embedding.weight"])
