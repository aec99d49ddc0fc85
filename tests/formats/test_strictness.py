"""Test that whatever is wrong with a checkpoint is one CheckpointFormatError that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import WEIGHTS, refused, rewrite
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow.formats import inspect, load_transformer


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_every_missing_unexpected_and_wrong_tensor_is_listed(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.attn1.query.weight"] = tensors.pop("blocks.0.attn1.to_q.weight")
        del tensors["condition_embedder.delta_embedder.linear_2.bias"]
        tensors["blocks.1.ffn.net.2.weight"] = torch.zeros(48, 79)
        tensors["blocks.1.norm2.bias"] = torch.zeros(48, dtype=torch.int64)

    rewrite(folder, change)
    message = refused(folder)
    assert "missing: blocks.0.attn1.to_q.weight" in message
    assert "missing: condition_embedder.delta_embedder.linear_2.bias" in message
    assert "unexpected: blocks.0.attn1.query.weight" in message
    assert "shape of blocks.1.ffn.net.2.weight: [48, 79], the model has [48, 80]" in message
    assert "type of blocks.1.norm2.bias: I64" in message
    assert len(message.splitlines()) == 6 and "more" not in message


def test_a_long_list_is_cut_and_says_by_how_much(folder: Path) -> None:
    total = len(load_file(folder / WEIGHTS))
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if "attn" in name])
    lines = refused(folder).splitlines()
    assert len(lines) == 1 + 12 + 1 and lines[-1].strip() == "and 28 more"
    assert total == len(load_file(folder / WEIGHTS)) + 40


def test_messages_use_the_names_of_the_file(
    wan_model: Callable, original_folder: Callable, tmp_path: Path
) -> None:
    folder = original_folder(wan_model(), tmp_path / "original")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop("blocks.1.norm3.weight", None)
        save_file(
            {
                n.replace("time_projection.1.bias", "time_projection.3.bias"): t
                for n, t in tensors.items()
            },
            file,
        )
    message = refused(folder)
    assert "missing: blocks.1.norm3.weight (blocks.1.norm2.weight)" in message
    assert "missing: time_projection.1.bias (condition_embedder.time_proj.bias)" in message
    assert "unexpected: time_projection.3.bias" in message


def test_a_flow_map_without_its_second_branch_is_not_taken_for_a_plain_model(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if "delta_embedder" in name])
    assert refused(folder).count("missing: condition_embedder.delta_embedder") == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 3, "num_layers: 3 in the config, 2 by the tensors"),
        ("num_layers", 10**9, "num_layers: 1000000000 in the config, 2 by the tensors"),
        ("num_layers", -1, "num_layers=-1 is not possible"),
        ("ffn_dim", 81, "ffn_dim: 81 in the config, 80 by the tensors"),
        ("ffn_dim", "80", "ffn_dim='80' is not possible"),
        ("num_attention_heads", 4, "width: 4 heads of 24, but 48 by the tensors"),
        ("patch_size", [1, 2], "patch_size=[1, 2] is not possible"),
        ("patch_size", [2, 2, 2], "patch_size: (2, 2, 2) in the config, (1, 2, 2) by the tensors"),
        ("cross_attn_norm", False, "cross_attn_norm: False in the config, True by the tensors"),
        ("image_dim", 12, "image_dim: 12 in the config, None by the tensors"),
        ("eps", 0, "eps=0 is not possible"),
        ("gate_value", float("nan"), "gate_value=nan is not possible"),
        ("deltatime_type", "r-t", "deltatime_type must be one of"),
        ("r_embedder", False, "r_embedder: False in the config, but the tensors have a "
                              "delta_embedder"),
        ("qk_norm", "layer_norm", "qk_norm='layer_norm' is not supported"),
        ("added_kv_proj_dim", 48, "added_kv_proj_dim=48 is not supported"),
        ("num_layer", 2, "num_layer is unknown; did you mean num_layers?"),
        ("_class_name", "UNet2DModel", "is of 'UNet2DModel'"),
    ],
)  # fmt: skip
def test_a_config_that_is_impossible_or_contradicts_the_tensors_is_refused(
    field: str, value: Any, message: str, folder: Path
) -> None:
    rewrite_json(folder / "config.json", lambda c: c.update({field: value}))
    assert message in refused(folder)


def test_arguments_that_contradict_the_config_are_refused(folder: Path) -> None:
    from anyflow.formats import FlowMap

    assert "gate_value: 0.25 in the config, 0.5 given" in refused(
        folder, flow_map=FlowMap(gate_value=0.5)
    )
    assert "attention_head_dim: 24 in the config, 12 given" in refused(
        folder, attention_head_dim=12
    )
    assert "one set of weights only" in refused(folder, weights="ema")
    assert "has no folder transformer_2" in refused(folder, subfolder="transformer_2")
    assert "does not exist" in refused(folder / "absent")


def test_gaps_between_blocks_and_absurd_numbers_of_blocks_are_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    rewrite(folder, lambda t: t.update({"blocks.99999999.attn1.to_q.weight": torch.zeros(48, 48)}))
    message = refused(folder, attention_head_dim=24)
    assert "blocks.99999999: there" in message and "blocks.2: absent" in message


def test_a_size_that_nothing_tells_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    rewrite(folder, lambda t: t.pop("blocks.0.ffn.net.0.proj.weight"))
    assert "ffn_dim: neither in a config nor told by a tensor" in refused(
        folder, attention_head_dim=24
    )


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors",
     "C:\\x.safetensors", "x.pt", 3,
     None, "", "..", "x\0.safetensors"],
)  # fmt: skip
def test_an_index_refers_only_to_files_beside_it(name: Any, shards: Path) -> None:
    some = next(iter(shards.glob("*.safetensors")))
    (shards.parent / "outside.safetensors").write_bytes(some.read_bytes())
    (shards / "sub").mkdir()
    (shards / "sub" / "x.safetensors").write_bytes(some.read_bytes())
    rewrite_json(
        shards / f"{WEIGHTS}.index.json", lambda i: i["weight_map"].update({"proj_out.bias": name})
    )
    message = refused(shards)
    assert "not a .safetensors file beside it" in message and repr(name) in message


def test_links_are_followed_as_the_cache_of_the_hub_is_made_of_them(
    folder: Path, same_weights: Callable
) -> None:
    linked = folder.parent / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        os.symlink(file, linked / file.name)
    assert same_weights(load_transformer(linked), load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    assert "is a link to" in refused(linked) and "does not exist" in refused(linked)


def test_an_index_and_its_files_must_agree(shards: Path) -> None:
    index = shards / f"{WEIGHTS}.index.json"
    sound = index.read_text()
    first, *_, last = sorted(set(json.loads(sound)["weight_map"].values()))
    rewrite_json(index, lambda i: i["weight_map"].pop("proj_out.bias"))
    assert "proj_out.bias: in" in refused(shards) and "not in the index" in refused(shards)
    index.write_text(sound)
    other = first if json.loads(sound)["weight_map"]["proj_out.bias"] == last else last
    rewrite_json(index, lambda i: i["weight_map"].update({"proj_out.bias": other}))
    assert f"proj_out.bias: not in {other}" in refused(shards)
    index.write_text(sound)
    (shards / first).unlink()
    assert f"absent:\n  {first}" in refused(shards)
    for content in (
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": [1]}',
        "[" * 100_000,
        "\xff",
    ):
        index.write_text(content, encoding="latin-1")
        assert str(index) in refused(shards)


def test_two_sets_of_weights_in_a_folder_are_not_chosen_between(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    index = {"weight_map": dict.fromkeys(tensors, WEIGHTS)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "more than one set of weights" in refused(folder)
    assert load_transformer(folder / WEIGHTS) is not None
    (folder / f"{WEIGHTS}.index.json").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    assert "is in both" in refused(folder)


def test_a_neighboring_config_of_another_model_does_not_describe_a_named_file(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "num_layers": 9}')
    assert load_transformer(folder / WEIGHTS, attention_head_dim=24).config.num_layers == 2
    assert "AutoencoderKLWan" in refused(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_single_file_gives_the_transformers_part_and_names_what_is_left_out(
    suffix: str, folder: Path, same_weights: Callable
) -> None:
    sound = load_file(folder / WEIGHTS)
    all_in_one = {f"model.diffusion_model.{name}": tensor for name, tensor in sound.items()}
    all_in_one |= {
        "vae.decoder.conv1.weight": torch.ones(3),
        "text_encoders.umt5xxl.shared.weight": torch.ones(3),
    }
    file = folder.parent / f"all{suffix}"
    save_file(all_in_one, file) if suffix != ".pt" else torch.save(all_in_one, file)
    with pytest.warns(
        UserWarning, match=r"left out are 1 tensors of text_encoders., 1 tensors of vae."
    ):
        assert same_weights(load_transformer(file, attention_head_dim=24), sound)
    summary = inspect(file, attention_head_dim=24)
    assert summary.left_out == {"vae.": 1, "text_encoders.": 1} and summary.num_tensors == len(
        sound
    )
    half = {f"ema.{name}": tensor for name, tensor in list(sound.items())[::2]}
    both = sound | {name: tensor.clone() for name, tensor in half.items()}
    save_file(both, file) if suffix != ".pt" else torch.save(both, file)
    refused(file, attention_head_dim=24)


@pytest.mark.parametrize(
    "field",
    ["num_layers", "ffn_dim", "num_attention_heads", "rope_max_seq_len", "freq_dim", "text_dim"],
)
def test_sizes_without_a_tensor_that_tells_them_are_bounded_before_anything_is_built(
    field: str, folder: Path
) -> None:
    kept = {"patch_embedding.weight", "proj_out.weight", "condition_embedder.time_proj.weight"}
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name not in kept])
    rewrite_json(folder / "config.json", lambda c: c.update({field: 10**9}))
    assert len(refused(folder)) < 2000
