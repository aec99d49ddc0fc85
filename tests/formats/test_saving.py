"""Test that what is written loads bit for bit in diffusers' classes, whole or not at all."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anyflow.formats import (
    CheckpointFormat,
    CheckpointFormatError,
    FlowMap,
    convert,
    detect,
    load_scheduler,
    load_transformer,
    save,
)
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

SCRIPTS = Path(__file__).parent / "scripts"


def load_theirs(folder: Path, name: str = "AnyFlowTransformer3DModel") -> nn.Module:
    kind = getattr(diffusers, name)
    model, info = kind.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == name
    return model


@pytest.mark.parametrize("source", ["older", "fastvideo", "training", "lora", "causal"])
def test_every_flow_map_converts_to_what_diffusers_loads(
    source: str, anyflow_model: Callable, causal_model: nn.Module, older_layout: Callable,
    fastvideo_state: Callable,
    lora_state: tuple[dict, dict], inputs: dict[str, Tensor], tmp_path: Path,
) -> None:  # fmt: skip
    model, out, path = anyflow_model(), tmp_path / "out", tmp_path / "in"
    options = {"attention_head_dim": 24}
    if source == "older":
        older_layout(model, path)
        options = {}
    elif source == "fastvideo":
        path = path.with_suffix(".safetensors")
        save_file(fastvideo_state(model), path)
    elif source == "causal":
        causal_model.save_pretrained(path / "transformer")
        options = {"bidirectional": True}
    else:
        path = path.with_suffix(".pt")
        torch.save({"ema": lora_state[0] if source == "lora" else model.state_dict()}, path)
        options |= {"lora_alpha": 6.0} if source == "lora" else {}
    assert convert(path, out, **options) == out
    expected = load_transformer(path, **options).state_dict()
    theirs = load_theirs(out)
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in theirs.state_dict().items())
    if source not in ("lora", "causal"):
        assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    assert detect(out) is CheckpointFormat.ANYFLOW
    again = load_transformer(out)
    frames = {n: inputs[n][:, None].expand(-1, 3) for n in ("timestep", "r_timestep")}
    with torch.no_grad():
        ours, reference = again(**inputs).sample, theirs(**(inputs | frames)).sample
    assert (ours - reference).norm() < 2e-6 * reference.norm()


def test_a_plain_model_is_written_as_diffusers_wan(
    wan_model: Callable, original_folder: Callable, same_weights: Callable, tmp_path: Path
) -> None:
    model = wan_model()
    convert(original_folder(model, tmp_path / "in"), tmp_path / "out")
    theirs = load_theirs(tmp_path / "out", "WanTransformer3DModel")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in theirs.state_dict().items())
    assert same_weights(load_transformer(tmp_path / "out"), model.state_dict())
    assert not (tmp_path / "out" / "scheduler").exists()
    settings = FlowMap(gate_value=0.6, deltatime_type="t-r")
    convert(tmp_path / "in", tmp_path / "map", flow_map=settings, shift=5.0)
    theirs = load_theirs(tmp_path / "map")
    assert (theirs.config.gate_value, theirs.config.deltatime_type) == (0.6, "t-r")


def test_types_are_kept_and_files_are_split(anyflow_model: Callable, tmp_path: Path) -> None:
    torch.save(anyflow_model().state_dict(), tmp_path / "in.pt")
    out = tmp_path / "out"
    convert(
        tmp_path / "in.pt", out, attention_head_dim=24, dtype=torch.bfloat16, max_shard_size=50_000
    )
    assert len(list((out / "transformer").glob("*.safetensors"))) > 1
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    expected = load_transformer(tmp_path / "in.pt", attention_head_dim=24, dtype=torch.bfloat16)
    theirs = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        out / "transformer", torch_dtype=torch.bfloat16
    )
    for name, tensor in expected.state_dict().items():
        if "delta_embedder" in name:  # diffusers rounds these
            assert torch.equal(load_transformer(out).state_dict()[name], tensor)
        else:
            loaded = theirs.state_dict()[name]
            assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name


def test_the_scheduler_comes_along(
    anyflow_model: Callable, older_layout: Callable, tmp_path: Path
) -> None:
    older_layout(anyflow_model(), tmp_path / "in")
    for name, options, shift in (("a", {}, 5), ("b", {"shift": 3.0}, 3)):
        convert(tmp_path / "in", tmp_path / name, **options)
        folder = tmp_path / name / "scheduler"
        ours = FlowMapEulerDiscreteScheduler.from_pretrained(folder)
        theirs = diffusers.FlowMapEulerDiscreteScheduler.from_pretrained(folder)
        assert ours.config.shift == theirs.config.shift == shift
        assert ours.config.weight_type == ("gaussian" if name == "a" else "beta08")
        assert load_scheduler(tmp_path / name / "transformer").config.shift == shift
    file = tmp_path / "in" / "scheduler" / "scheduler_config.json"
    file.write_text('{"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}')
    assert load_scheduler(tmp_path / "in") is None
    file.write_text('{"_class_name": "FlowMapDiscreteScheduler", "shift": -1}')
    with pytest.raises(CheckpointFormatError, match="shift"):
        convert(tmp_path / "in", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_written_is_refused_before_anything_is(
    anyflow_model: Callable, tmp_path: Path
) -> None:
    torch.save(anyflow_model().state_dict(), tmp_path / "in.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for out, options, message in (
        ("full", {}, "not an empty folder"),
        ("in.pt", {}, "not an empty folder"),
        ("out", {"to": "onnx"}, "to must be diffusers"),
        ("out", {"flow_map": FlowMap(fusion="additive")}, "fused as 'additive'"),
        ("out", {"shift": -1.0}, "shift"),
        ("out", {"weights": "raw"}, "one set of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "in.pt", tmp_path / out, attention_head_dim=24, **options)
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["full", "in.pt", "kept"]
    model = load_transformer(tmp_path / "in.pt", attention_head_dim=24)
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q"]))
    with pytest.raises(ValueError, match="merge them first"):
        save(model, tmp_path / "out")


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_under_the_name_of_the_result(tmp_path: Path) -> None:
    """Kill at times that cover the whole run: the result is whole or absent.

    The next run is not hindered by what is left.
    """
    command = [sys.executable, str(SCRIPTS / "killed_conversions.py"), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    seen = json.loads(done.stdout)
    assert seen["whole"] == [0, 0]  # the second one after a kill
    assert seen["killed"][0] and not seen["left"][0]
    outs = [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert len(outs) == 2 + sum(seen["left"])
    for out in outs:
        assert load_transformer(out).config.num_layers == 2
