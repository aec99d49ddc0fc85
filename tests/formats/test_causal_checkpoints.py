"""Test that causal checkpoints load as causal models, and are written as diffusers loads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from folders import refused, rewrite
from safetensors.torch import save_file
from torch import Tensor, nn

from anyflow.formats import (
    CausalSettings,
    CheckpointFormat,
    CheckpointFormatError,
    FlowMap,
    convert,
    detect,
    inspect,
    load_transformer,
    save,
)
from anyflow.models import AnyFlowFARTransformer3DModel

TOLERANCE = 2e-6
PARTITION = (2, 1, 1, 1)
PUBLISHED = (1, 3, 3, 3, 3, 3, 3, 2)
CAUSAL = ("far_patch_embedding.weight", "far_patch_embedding.bias")


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def error(ours: nn.Module, theirs: nn.Module, generator: torch.Generator) -> float:
    """Return the relative distance of two causal forwards with a compressed chunk of two frames."""
    x = torch.randn(1, 5, 3, 4, 8, generator=generator)
    t = 1000 * torch.rand(1, 5, generator=generator)
    t[:, :2] = 0
    arguments = (x, t, t / 3, torch.randn(1, 7, 20, generator=generator), PARTITION)
    with torch.no_grad():
        expected = theirs(*arguments).sample
        assert expected.shape == (1, 3, 3, 4, 8)
        return ((ours(*arguments).sample - expected).norm() / expected.norm()).item()


@pytest.fixture
def causal_folder(causal_model: nn.Module, tmp_path: Path) -> Path:
    """Write a sound causal checkpoint by diffusers."""
    causal_model.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


@pytest.mark.parametrize("layout", ["diffusers", "older"])
@pytest.mark.parametrize("settings", ["written", "null", "absent"])
def test_both_published_layouts_load_as_diffusers_does(
    layout: str, settings: str, causal_model: nn.Module, older_layout: Callable,
    same_weights: Callable, generator: torch.Generator, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "transformer"
    if layout == "older":
        older_layout(causal_model, tmp_path, init_far_model=True, chunk_partition=[1, 3, 3])
    else:
        causal_model.register_to_config(chunk_partition=[1, 3, 3])
        causal_model.save_pretrained(folder)
    if settings == "null":
        rewrite_config(folder, lambda c: c.update(chunk_partition=None))
    elif settings == "absent":
        for field in ("chunk_partition", "full_chunk_limit", "compressed_patch_size"):
            rewrite_config(folder, lambda c, field=field: c.pop(field))
    ours = load_transformer(tmp_path)
    assert type(ours) is AnyFlowFARTransformer3DModel and not ours.training
    assert same_weights(ours, causal_model.state_dict())
    assert error(ours, causal_model, generator) < TOLERANCE
    expected = (1, 3, 3) if settings == "written" else PUBLISHED
    assert ours.config.chunk_partition == expected
    assert (ours.config.full_chunk_limit, ours.config.compressed_patch_size) == (3, (1, 4, 4))
    older = CheckpointFormat.FAR_WAN if layout == "older" else CheckpointFormat.ANYFLOW
    assert detect(tmp_path) is older


def test_a_causal_model_of_the_older_layout_names_its_gate(
    causal_model: nn.Module, older_layout: Callable, tmp_path: Path
) -> None:
    older_layout(causal_model, tmp_path, init_far_model=True)
    rewrite_config(tmp_path / "transformer", lambda c: c.pop("gate_value"))
    assert "gate_value: not in the config" in refused(tmp_path)
    assert load_transformer(tmp_path, flow_map=FlowMap(0.5)).config.gate_value == 0.5


@pytest.mark.parametrize("flag", [None, False])
def test_tensors_decide_unless_the_config_says_that_the_model_is_bidirectional(
    flag: bool | None, causal_model: nn.Module, older_layout: Callable, tmp_path: Path
) -> None:
    older_layout(causal_model, tmp_path, init_far_model=flag)
    if flag is None:
        rewrite_config(tmp_path / "transformer", lambda c: c.pop("init_far_model"))
        assert type(load_transformer(tmp_path)) is AnyFlowFARTransformer3DModel
    else:
        assert "causal: no by the FAR_Wan_Transformer3DModel of the config" in refused(tmp_path)
    assert (
        "far_patch_embedding.bias"
        not in load_transformer(tmp_path, bidirectional=True).state_dict()
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chunk_partition", [], "chunk_partition=[] is not possible"),
        ("chunk_partition", [1, 0], "chunk_partition=[1, 0] is not possible"),
        ("chunk_partition", [5000], "chunk 0 must be a whole number from 1 to 4096"),
        ("full_chunk_limit", 0, "full_chunk_limit=0 is not possible"),
        ("full_chunk_limit", 5000, "full_chunk_limit must be a whole number from 1 to 4096"),
        ("full_chunk_limit", True, "full_chunk_limit=True is not possible"),
        ("compressed_patch_size", [1, 4], "compressed_patch_size=[1, 4] is not possible"),
        ("compressed_patch_size", [1, 8, 8], "(1, 8, 8) in the config, (1, 4, 4) by the tensors"),
        ("full_chunks_limit", 3, "full_chunks_limit is unknown; did you mean full_chunk_limit?"),
    ],
)  # fmt: skip
def test_impossible_settings_are_listed(
    field: str, value: Any, message: str, causal_folder: Path
) -> None:
    rewrite_config(causal_folder, lambda c: c.update({field: value}))
    assert message in refused(causal_folder)


def test_causal_tensors_that_lack_or_have_another_shape_are_listed(causal_folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[CAUSAL[0]] = torch.zeros(48, 5, 1, 4, 4)
        del tensors[CAUSAL[1]]

    rewrite(causal_folder, change)
    message = refused(causal_folder)
    assert "missing: far_patch_embedding.bias" in message
    assert f"shape of {CAUSAL[0]}: [48, 5, 1, 4, 4], the model has [48, 3, 1, 4, 4]" in message
    assert "far_patch_embedding.bias" in str(inspect(causal_folder))
    rewrite(causal_folder, lambda t: t.pop(CAUSAL[0]))
    assert all(f"missing: {name}" in refused(causal_folder) for name in CAUSAL)
    rewrite(causal_folder, lambda t: t.update({CAUSAL[0]: torch.zeros(48, 3, 1, 6, 3)}))
    rewrite_config(causal_folder, lambda c: c.pop("compressed_patch_size"))
    assert "(1, 6, 3) must be a multiple of patch_size" in refused(causal_folder)


def test_a_training_file_has_the_compressed_embedding_beside_its_adapters(
    lora_state: tuple[dict, dict], causal_model: nn.Module, same_weights: Callable, tmp_path: Path
) -> None:
    state, merged = lora_state
    own = {n: t for n, t in causal_model.state_dict().items() if n in CAUSAL}
    peft = "base_model.model."
    for name, prefix, own_prefix in (
        ("plain.pt", "", ""),
        ("peft.pt", peft, peft),
        ("own.pt", peft, ""),
    ):
        adapted = {prefix + n.removeprefix(peft): t for n, t in state.items()}
        adapted |= {own_prefix + n: t for n, t in own.items()}
        torch.save({"ema": adapted}, tmp_path / name)
        options: dict[str, Any] = {"attention_head_dim": 24, "lora_alpha": 6.0}
        ours = load_transformer(tmp_path / name, **options)
        assert type(ours) is AnyFlowFARTransformer3DModel
        assert ours.config.chunk_partition == PUBLISHED
        plain = {n: t for n, t in ours.state_dict().items() if n not in CAUSAL}
        assert plain.keys() == merged.keys()
        assert all((t - merged[n]).norm() <= 1e-6 * t.norm() for n, t in plain.items())
        assert all(torch.equal(ours.state_dict()[n], t) for n, t in own.items())
        settings = CausalSettings(chunk_partition=(1, 2), full_chunk_limit=2)
        other = load_transformer(tmp_path / name, causal=settings, **options).config
        assert (other.chunk_partition, other.full_chunk_limit) == ((1, 2), 2)
        assert inspect(tmp_path / name, attention_head_dim=24).is_causal
    torch.save({"ema": adapted | {peft + n: t for n, t in own.items()}}, tmp_path / "twice.pt")
    assert "are one tensor of the model" in refused(tmp_path / "twice.pt", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bidirectional_checkpoint_becomes_causal_after_its_weights_are_loaded(
    dtype: torch.dtype, anyflow_model: Callable, tmp_path: Path
) -> None:
    theirs = anyflow_model(gate_value=0.4)
    theirs.save_pretrained(tmp_path)
    settings = CausalSettings((1, 8, 4), full_chunk_limit=2, chunk_partition=(1, 2))
    ours = load_transformer(tmp_path, causal=settings, dtype=dtype)
    assert type(ours) is AnyFlowFARTransformer3DModel and ours.config.gate_value == 0.4
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
    assert {k: ours.config[k] for k in vars(settings)} == vars(settings)
    plain = load_transformer(tmp_path, dtype=dtype).state_dict()
    assert {n for n in ours.state_dict() if n not in plain} == {*CAUSAL}
    assert all(torch.equal(ours.state_dict()[n], t) for n, t in plain.items())
    weight = plain["patch_embedding.weight"].float().flatten(0, 1)[:, None]
    expected = nn.functional.interpolate(weight, (1, 8, 4), mode="trilinear")
    actual = ours.far_patch_embedding.weight
    assert actual.dtype == ours.far_patch_embedding.bias.dtype == dtype and actual.requires_grad
    distance = (actual.float().flatten(0, 1)[:, None] - expected).norm() / expected.norm()
    assert distance < (1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(ours.far_patch_embedding.bias, ours.patch_embedding.bias)


def test_a_plain_wan_model_becomes_a_causal_flow_map(wan_model: Callable, tmp_path: Path) -> None:
    wan_model().save_pretrained(tmp_path / "wan")
    convert(
        tmp_path / "wan", tmp_path / "out", flow_map=FlowMap(0.3),
        causal=CausalSettings(chunk_partition=(1, 2)),
    )  # fmt: skip
    model, info = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        tmp_path / "out" / "transformer", output_loading_info=True
    )
    assert not any(info.values())
    assert (model.config.gate_value, tuple(model.config.chunk_partition)) == (0.3, (1, 2))
    plain = load_transformer(tmp_path / "wan", causal=CausalSettings())
    with pytest.raises(ValueError, match="no causal model without a flow map"):
        save(plain, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_settings_that_a_checkpoint_says_must_be_the_same(causal_folder: Path) -> None:
    message = refused(causal_folder, causal=CausalSettings(chunk_partition=(1, 2)))
    assert f"chunk_partition: {PUBLISHED} in the checkpoint, (1, 2) given" in message
    assert type(load_transformer(causal_folder, causal=CausalSettings())).__name__ == (
        "AnyFlowFARTransformer3DModel"
    )
    with pytest.raises(ValueError, match="causal=... makes a causal model"):
        load_transformer(causal_folder, causal=CausalSettings(), bidirectional=True)
    for wrong in ({"chunk_partition": ()}, {"full_chunk_limit": 0}, {"chunk_partition": "1,3"}):
        with pytest.raises(ValueError, match="must be"):
            CausalSettings(**wrong)


@pytest.mark.parametrize("source", ["diffusers", "older", "training"])
def test_what_is_written_loads_in_diffusers_bit_for_bit(
    source: str, causal_model: nn.Module, older_layout: Callable, same_weights: Callable,
    generator: torch.Generator, tmp_path: Path,
) -> None:  # fmt: skip
    path, out, options = tmp_path / "in", tmp_path / "out", {}
    if source == "diffusers":
        causal_model.save_pretrained(path / "transformer")
    elif source == "older":
        older_layout(causal_model, path, init_far_model=True)
    else:
        path = tmp_path / "in.pt"
        torch.save({"ema": causal_model.state_dict()}, path)
        options = {"attention_head_dim": 24}
    convert(path, out, max_shard_size=50_000, **options)
    folder = out / "transformer"
    theirs, info = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert same_weights(theirs, causal_model.state_dict())
    config = json.loads((folder / "config.json").read_text())
    saved = {k for k in causal_model.config if not k.startswith("_")}
    assert config.pop("_class_name") == "AnyFlowFARTransformer3DModel" and config.keys() == saved
    for again in (load_transformer(out), AnyFlowFARTransformer3DModel.from_pretrained(folder)):
        assert same_weights(again, causal_model.state_dict())
        assert error(again, theirs, generator) < TOLERANCE
    assert not inspect(out).problems


def test_weights_without_a_config_are_causal_by_their_names(
    causal_model: nn.Module, same_weights: Callable, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"module.{n}": t for n, t in causal_model.state_dict().items()}, file)
    ours = load_transformer(file, attention_head_dim=24)
    assert same_weights(ours, causal_model.state_dict())
    assert ours.config.compressed_patch_size == (1, 4, 4)
    with pytest.raises(CheckpointFormatError, match="compressed_patch_size"):
        load_transformer(file, attention_head_dim=24, causal=CausalSettings((1, 8, 8)))
