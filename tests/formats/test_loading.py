"""Test that every format gives the model of diffusers or PEFT: the same bits and outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from anyflow.formats import (
    CheckpointFormat,
    CheckpointFormatError,
    FlowMap,
    detect,
    load_transformer,
)
from anyflow.models import AnyFlowTransformer3DModel

TOLERANCE = 2e-6
HEAD_DIM = 24


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def flow_map_error(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]) -> float:
    frames = inputs["hidden_states"].shape[1]
    times = {name: inputs[name][:, None].expand(-1, frames) for name in ("timestep", "r_timestep")}
    with torch.no_grad():
        return relative(ours(**inputs).sample, theirs(**(inputs | times)).sample)


def plain_error(ours: nn.Module, theirs: nn.Module, inputs: dict[str, Tensor]) -> float:
    x, t, text = (inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), t, text).sample.transpose(1, 2)
        return relative(ours(x, t, encoder_hidden_states=text).sample, expected)


@pytest.mark.parametrize("where", ["pipeline", "transformer", "file", "index"])
def test_a_diffusers_flow_map_loads_from_its_pipeline_its_folder_its_file_and_its_index(
    where: str,
    anyflow_model: Callable,
    same_weights: Callable,
    inputs: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    theirs = anyflow_model(gate_value=0.4, deltatime_type="t-r", cross_attn_norm=False, eps=1e-4)
    folder = tmp_path / "transformer"
    theirs.save_pretrained(folder, max_shard_size=40_000 if where == "index" else "1GB")
    name = "diffusion_pytorch_model.safetensors"
    path = {
        "pipeline": tmp_path,
        "transformer": folder,
        "file": folder / name,
        "index": folder / f"{name}.index.json",
    }
    ours = load_transformer(path[where])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (where == "index")
    assert detect(path[where]) is CheckpointFormat.ANYFLOW
    assert same_weights(ours, theirs.state_dict())
    assert flow_map_error(ours, theirs, inputs) < TOLERANCE
    assert not ours.training and all(p.requires_grad for p in ours.parameters())
    assert (ours.config.gate_value, ours.config.deltatime_type, ours.config.eps) == (
        0.4,
        "t-r",
        1e-4,
    )


def test_a_plain_wan_model_loads_with_and_without_a_new_flow_map(
    wan_model: Callable, same_weights: Callable, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    theirs = wan_model()
    theirs.save_pretrained(tmp_path / "transformer")
    plain = load_transformer(tmp_path)
    assert detect(tmp_path) is CheckpointFormat.WAN
    assert same_weights(plain, theirs.state_dict())
    assert plain_error(plain, theirs, inputs) < TOLERANCE

    flow_map = load_transformer(tmp_path, flow_map=FlowMap(gate_value=0.3, deltatime_type="t-r"))
    embedder = flow_map.condition_embedder
    for name, p in embedder.time_embedder.named_parameters():
        copied = embedder.delta_embedder.get_parameter(name)
        assert torch.equal(p, copied) and p.data_ptr() != copied.data_ptr()
    assert (
        embedder.delta_emb_gate.tolist() == [pytest.approx(0.3)]
        and flow_map.config.deltatime_type == "t-r"
    )
    assert plain_error(flow_map, theirs, inputs) < TOLERANCE


def test_the_older_layout_of_the_hub_loads_as_the_model_it_is(
    anyflow_model: Callable, wan_model: Callable, older_layout: Callable, same_weights: Callable,
    inputs: dict[str, Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    theirs = anyflow_model()
    older_layout(theirs, tmp_path / "a")
    ours = load_transformer(tmp_path / "a")
    assert detect(tmp_path / "a") is CheckpointFormat.FAR_WAN
    assert same_weights(ours, theirs.state_dict())
    assert flow_map_error(ours, theirs, inputs) < TOLERANCE

    plain = wan_model()
    older_layout(plain, tmp_path / "b", init_flowmap_model=False, gate_value=0, deltatime_type="r")
    assert same_weights(load_transformer(tmp_path / "b"), plain.state_dict())


def test_the_older_layout_does_not_take_our_default_for_a_gate_that_it_does_not_name(
    anyflow_model: Callable, older_layout: Callable, tmp_path: Path
) -> None:
    older_layout(anyflow_model(), tmp_path / "a")
    file = tmp_path / "a" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["gate_value"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match="gate_value"):
        load_transformer(tmp_path / "a")
    assert load_transformer(tmp_path / "a", flow_map=FlowMap(0.5)).config.gate_value == 0.5


def test_a_causal_model_loads_as_a_bidirectional_one_where_that_is_asked_for(
    causal_model: nn.Module, anyflow_model: Callable, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    causal_model.save_pretrained(tmp_path / "transformer")
    theirs = anyflow_model()
    extra = {"far_patch_embedding.weight", "far_patch_embedding.bias"}
    theirs.load_state_dict({n: t for n, t in causal_model.state_dict().items() if n not in extra})
    ours = load_transformer(tmp_path, bidirectional=True)
    assert type(ours) is AnyFlowTransformer3DModel
    assert flow_map_error(ours, theirs, inputs) < TOLERANCE
    theirs.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointFormatError, match="not one"):
        load_transformer(tmp_path / "other", bidirectional=True)


def test_the_original_wan_loads_as_diffusers_converts_it(
    wan_model: Callable, original_state: Callable, original_folder: Callable,
    same_weights: Callable,
    inputs: dict[str, Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    theirs = wan_model()
    state = original_state(theirs)
    converted = convert_wan_transformer_to_diffusers(dict(state))
    # the names that this test writes are the original's
    assert converted.keys() == theirs.state_dict().keys()

    ours = load_transformer(original_folder(theirs, tmp_path / "folder"))
    assert same_weights(ours, converted)
    assert plain_error(ours, theirs, inputs) < TOLERANCE
    save_file(state, tmp_path / "wan.safetensors")
    assert same_weights(
        load_transformer(tmp_path / "wan.safetensors", attention_head_dim=HEAD_DIM), converted
    )
    torch.save(state, tmp_path / "wan.pth")
    assert same_weights(
        load_transformer(tmp_path / "wan.pth", attention_head_dim=HEAD_DIM), converted
    )
    save_file(
        {f"model.diffusion_model.{n}": t for n, t in state.items()}, tmp_path / "comfy.safetensors"
    )
    assert same_weights(
        load_transformer(tmp_path / "comfy.safetensors", attention_head_dim=HEAD_DIM), converted
    )
    for name in ("folder", "wan.safetensors", "wan.pth", "comfy.safetensors"):
        assert detect(tmp_path / name) is CheckpointFormat.ORIGINAL


@pytest.mark.parametrize("kind", ["anyflow_model", "wan_model"])
def test_fastvideo_names_load(
    kind: str,
    request: pytest.FixtureRequest,
    fastvideo_state: Callable,
    same_weights: Callable,
    tmp_path: Path,
) -> None:
    theirs = request.getfixturevalue(kind)()
    state = fastvideo_state(theirs)
    assert (
        "blocks.0.self_attn_residual_norm.norm.weight" in state
        and "blocks.1.attn2.to_out.bias" in state
    )
    save_file(state, tmp_path / "model.safetensors")
    assert detect(tmp_path) is CheckpointFormat.FASTVIDEO
    assert same_weights(
        load_transformer(tmp_path, attention_head_dim=HEAD_DIM), theirs.state_dict()
    )


def test_heads_have_wans_128_channels_where_nothing_says_otherwise(
    anyflow_model: Callable, tmp_path: Path
) -> None:
    theirs = anyflow_model(num_attention_heads=3, attention_head_dim=128)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    ours = load_transformer(tmp_path / "model.pt")
    assert (ours.config.num_attention_heads, ours.config.attention_head_dim) == (3, 128)
    save_file(anyflow_model().state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointFormatError, match="give attention_head_dim"):
        load_transformer(tmp_path / "narrow.safetensors")


def test_a_training_file_gives_the_average_or_the_parameters(
    anyflow_model: Callable, same_weights: Callable, tmp_path: Path
) -> None:
    average, raw = anyflow_model(), anyflow_model()
    content = {"global_step": 7, "world_size": 8}
    content |= {"ema": average.state_dict(), "model_state_dict_g": raw.state_dict()}
    file = tmp_path / "anyflow.pt"
    torch.save(content, file)
    load = lambda **options: load_transformer(file, attention_head_dim=HEAD_DIM, **options)  # noqa: E731
    assert detect(file) is CheckpointFormat.TRAINING
    assert same_weights(load(), average.state_dict()) and same_weights(
        load(weights="ema"), average.state_dict()
    )
    assert same_weights(load(weights="raw"), raw.state_dict())
    assert load(flow_map=FlowMap(gate_value=0.5)).config.gate_value == 0.5

    torch.save({"global_step": 7, "model_state_dict_g": raw.state_dict(), "ema": None}, file)
    assert same_weights(load(), raw.state_dict())
    with pytest.raises(CheckpointFormatError, match="has raw"):
        load(weights="ema")
    torch.save(average.state_dict(), file, _use_new_zipfile_serialization=False)  # cannot be mapped
    assert same_weights(load(), average.state_dict())
    with pytest.raises(ValueError, match="ema or raw"):
        load(weights="best")


@pytest.mark.parametrize("container", ["pt", "safetensors"])
def test_adapters_are_merged_in_fp64_and_rounded_once(
    container: str,
    lora_state: tuple[dict, dict],
    inputs: dict[str, Tensor],
    anyflow_model: Callable,
    tmp_path: Path,
) -> None:
    state, merged_by_peft = lora_state
    file = tmp_path / f"lora.{container}"
    torch.save({"ema": state}, file) if container == "pt" else save_file(state, file)
    ours = load_transformer(file, attention_head_dim=HEAD_DIM, lora_alpha=6.0)
    state_of = {n.removeprefix("base_model.model."): t for n, t in state.items()}
    merged = 0
    for name, tensor in ours.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.real.weight" in state_of and name.endswith(".weight"):
            a, b = (state_of[f"{layer}.lora_{half}.real.weight"].double() for half in "AB")
            expected = (state_of[f"{layer}.base_layer.weight"].double() + 6.0 / 4 * (b @ a)).float()
            # Sums of four in another order: fp64 differs in the last bits, so fp32 in at most one.
            assert (
                (tensor - expected).abs() <= torch.finfo(torch.float32).eps * expected.abs()
            ).all()
            assert not torch.equal(tensor, state_of[f"{layer}.base_layer.weight"])
            merged += 1
        else:
            assert torch.equal(tensor, merged_by_peft[name])
    assert merged == 12 and ours.state_dict().keys() == merged_by_peft.keys()
    theirs = anyflow_model()
    theirs.load_state_dict(merged_by_peft)
    assert flow_map_error(ours, theirs, inputs) < TOLERANCE


def test_the_alpha_of_adapters_is_never_guessed(
    lora_state: tuple[dict, dict], tmp_path: Path
) -> None:
    state, merged = lora_state
    file = tmp_path / "lora.pt"
    torch.save(state, file)
    with pytest.raises(CheckpointFormatError, match="12 adapters of rank 4.*give lora_alpha"):
        load_transformer(file, attention_head_dim=HEAD_DIM)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6}))
    ours = load_transformer(file, attention_head_dim=HEAD_DIM)
    assert all(relative(t, merged[n]) < 1e-6 for n, t in ours.state_dict().items())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": "much"}))
    with pytest.raises(CheckpointFormatError, match="lora_alpha should be a number"):
        load_transformer(file, attention_head_dim=HEAD_DIM)
    torch.save(merged, file)
    with pytest.raises(CheckpointFormatError, match="has no adapters"):
        load_transformer(file, attention_head_dim=HEAD_DIM, lora_alpha=6)


def test_adapters_that_do_not_fit_are_listed(lora_state: tuple[dict, dict], tmp_path: Path) -> None:
    state, _ = lora_state
    layer = "base_model.model.blocks.0.attn1.to_q"
    broken: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("without its other half", lambda s: s.pop(f"{layer}.lora_B.real.weight")),
        (
            "A is float32 [5, 48]",
            lambda s: s.update({f"{layer}.lora_A.real.weight": torch.zeros(5, 48)}),
        ),
        ("2 kinds", lambda s: s.update({f"{layer}.lora_A.fake.weight": torch.zeros(4, 48)})),
        ("both", lambda s: s.update({f"{layer}.weight": torch.zeros(48, 48)})),
    ]
    for message, change in broken:
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "lora.pt")
        with pytest.raises(CheckpointFormatError) as raised:
            load_transformer(tmp_path / "lora.pt", attention_head_dim=HEAD_DIM, lora_alpha=6)
        assert message in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types_are_those_that_diffusers_gives(
    dtype: torch.dtype, anyflow_model: Callable, same_weights: Callable, tmp_path: Path
) -> None:
    anyflow_model().save_pretrained(tmp_path / "transformer")
    ours = load_transformer(tmp_path, dtype=dtype)
    theirs = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        tmp_path / "transformer", torch_dtype=dtype
    )
    for name, tensor in theirs.state_dict().items():
        own = ours.state_dict()[name]
        if "delta_embedder" in name or dtype == torch.float64:  # theirs rounds both, ours neither
            assert own.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        else:
            assert own.dtype == tensor.dtype and torch.equal(own, tensor), name
    assert ours.dtype == dtype

    theirs = theirs.to(torch.bfloat16)
    torch.save(theirs.state_dict(), tmp_path / "all.pt")
    stored = load_transformer(tmp_path / "all.pt", attention_head_dim=HEAD_DIM)
    assert stored.dtype == theirs.patch_embedding.weight.dtype
    assert all(
        torch.equal(t.double(), theirs.state_dict()[n].double())
        for n, t in stored.state_dict().items()
    )


def test_a_mixture_of_types_needs_a_dtype(anyflow_model: Callable, tmp_path: Path) -> None:
    model = anyflow_model()
    model.blocks[0].to(torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "mixed.safetensors")
    with pytest.raises(CheckpointFormatError, match="bfloat16 and float32; give dtype"):
        load_transformer(tmp_path / "mixed.safetensors", attention_head_dim=HEAD_DIM)
    loaded = load_transformer(
        tmp_path / "mixed.safetensors", attention_head_dim=HEAD_DIM, dtype=torch.bfloat16
    )
    assert loaded.blocks[1].attn1.to_q.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_transformer(tmp_path / "mixed.safetensors", dtype=torch.int8)


def test_what_no_file_holds_is_right_and_nothing_is_left_on_the_meta_device(
    anyflow_model: Callable, tmp_path: Path
) -> None:
    anyflow_model(gate_value=0.7).save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    model = load_transformer(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    gate = model.condition_embedder.delta_emb_gate
    assert gate.dtype == torch.float32 and gate.item() == pytest.approx(0.7)
    reference = type(model)(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    grid = ((3, 2, 3), torch.device("cpu"), torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(model.rope(*grid), reference.rope(*grid), strict=True)
    )


def test_the_loaded_model_does_not_share_memory_with_the_file(
    anyflow_model: Callable, tmp_path: Path
) -> None:
    theirs = anyflow_model()
    for name, write in (("a.safetensors", save_file), ("a.pt", torch.save)):
        file = tmp_path / name
        write(theirs.state_dict(), file)
        model = load_transformer(file, attention_head_dim=HEAD_DIM)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with file.open("r+b") as opened:
            opened.seek(0)
            opened.write(b"\1" * file.stat().st_size)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        with torch.no_grad():
            model.patch_embedding.weight.zero_()
