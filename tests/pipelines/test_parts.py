"""Test diffusers' methods on our pipeline under every memory plan."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm import tqdm

from anyflow.formats import load_transformer
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.pipelines import AnyFlowPipeline

PROMPT = "a red disc moves slowly"
CALL: dict[str, Any] = {
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "output_type": "latent",
}


def load(model: Path, **options: Any) -> AnyFlowPipeline:
    pipe = AnyFlowPipeline.from_pretrained(
        model, **{"torch_dtype": torch.float32, "device": "cpu", **options}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: diffusers.DiffusionPipeline, **call: Any) -> torch.Tensor:
    return pipe(PROMPT, generator=torch.Generator().manual_seed(1), **CALL, **call).frames


@pytest.fixture(scope="module")
def peer(model: Path) -> diffusers.AnyFlowPipeline:
    pipe = diffusers.AnyFlowPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def expected(model: Path) -> torch.Tensor:
    return latents(load(model))


def test_it_is_a_pipeline_of_diffusers(model: Path) -> None:
    pipe = load(model)
    assert isinstance(pipe, diffusers.AnyFlowPipeline) and pipe.device == torch.device("cpu")
    assert set(pipe.components) == {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"}
    assert pipe.dtype == torch.float32 and pipe.vae_scale_factor_temporal == 4
    pipe.vae.enable_tiling()
    assert pipe.vae.use_tiling


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, torch.bfloat16), ({"torch_dtype": torch.float16}, torch.float16),
     ({"dtype": "float32"}, torch.float32),
     ({"dtype": torch.float32, "torch_dtype": "float32"}, torch.float32)],
)  # fmt: skip
def test_the_dtype_has_both_names(options: dict[str, Any], dtype: torch.dtype, model: Path) -> None:
    pipe = AnyFlowPipeline.from_pretrained(model, device="cpu", **options)
    assert pipe.transformer.patch_embedding.weight.dtype == pipe.text_encoder.dtype == dtype
    assert pipe.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": torch.float16, "torch_dtype": torch.bfloat16}, "dtype and torch_dtype are one "
                                                               "setting"),
     ({"torch_dtype": "bf8"}, "torch_dtype must be one of .*float16, got 'bf8'"),
     ({"dtype": torch.int8}, "dtype must be one of")],
)  # fmt: skip
def test_a_dtype_that_cannot_be_is_refused(
    options: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        AnyFlowPipeline.from_pretrained(model, device="cpu", **options)


def test_moving_to_a_dtype_is_diffusers(model: Path, peer: diffusers.AnyFlowPipeline) -> None:
    pipe = load(model)
    assert pipe.to(torch.float64) is pipe and {p.dtype for p in pipe.vae.parameters()} == {
        torch.float64
    }
    wide = latents(pipe)
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    torch.testing.assert_close(latents(pipe), latents(peer), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide.float(), latents(peer), rtol=0, atol=1e-5)
    assert pipe.to(device="cpu", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_what_needs_a_gpu_says_so_and_changes_nothing(
    memory: str, model: Path, expected: torch.Tensor
) -> None:
    pipe = load(model, memory=memory)
    with pytest.raises(ValueError, match="device 'cuda' cannot be used"):
        pipe.to("cuda")
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(ValueError, match=f"{name}.* needs a GPU to bring the parts to"):
            getattr(pipe, name)()
    assert pipe.memory == memory and torch.equal(latents(pipe), expected)


def test_the_plan_low_keeps_its_dtype_and_may_move(model: Path, expected: torch.Tensor) -> None:
    pipe = load(model, memory="low")
    with pytest.raises(
        ValueError, match=r"memory='low' loads parts .* from_pretrained \(torch_dtype"
    ):
        pipe.to(torch.float16)
    assert pipe.to("cpu") is pipe and pipe.device.type == "cpu"
    pipe.to("meta")
    assert pipe.device.type == "meta" and pipe.vae.device.type == "meta"


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_offloading_of_diffusers_takes_the_plans_place(
    memory: str, model: Path, expected: torch.Tensor
) -> None:
    """Offload from the CPU to itself (not by layers), with first frames for the VAE."""
    pipe = load(model, memory=memory)
    video = torch.zeros(1, 1, 3, 16, 32)
    with_context = latents(pipe, video=video)
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(
        hasattr(module, "_hf_hook") for module in (pipe.transformer, pipe.text_encoder, pipe.vae)
    )
    for _ in range(2):
        torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(latents(pipe, video=video), with_context, rtol=0, atol=1e-6)
    assert len(pipe(PROMPT, **{**CALL, "output_type": "pil"}).frames[0]) == 5


@pytest.fixture(scope="module")
def loras(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write two LoRAs, of different layers and ranks."""
    folders = []
    for rank, targets in ((2, ["to_q", "to_k"]), (4, ["to_v", "net.2"])):
        torch.manual_seed(rank)
        network = diffusers.AnyFlowTransformer3DModel.from_pretrained(
            model, subfolder="transformer"
        )
        network.add_adapter(
            LoraConfig(r=rank, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        )
        folders.append(tmp_path_factory.mktemp("lora"))
        AnyFlowPipeline.save_lora_weights(folders[-1], get_peft_model_state_dict(network))
    return folders


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_loras_are_those_of_diffusers(memory: str, model: Path, loras: list[Path]) -> None:
    """Load, weigh, scale in a call, switch off, fuse and unload."""
    ours, theirs = load(model, memory=memory), diffusers.AnyFlowPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []

    def same(**call: Any) -> None:
        actual, other = latents(ours, **call), latents(theirs, **call)
        torch.testing.assert_close(actual, other, rtol=0, atol=1e-5)
        seen.append(actual)

    for pipe in (ours, theirs):
        pipe.load_lora_weights(loras[0], adapter_name="a")
    same()
    same(attention_kwargs={"scale": 0.5})
    for pipe in (ours, theirs):
        pipe.load_lora_weights(loras[1], adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.5, 0.7])
    same()
    for pipe in (ours, theirs):
        pipe.fuse_lora(lora_scale=0.9)
    same()
    for pipe in (ours, theirs):
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    same()
    torch.testing.assert_close(seen[-1], latents(load(model)), rtol=0, atol=1e-5)  # unfusing rounds
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_a_saved_pipeline_is_loaded_by_both(
    memory: str, model: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    load(model, memory=memory).save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(load(tmp_path / "saved")), expected)
    theirs = diffusers.AnyFlowPipeline.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs.transformer) is diffusers.AnyFlowTransformer3DModel
    torch.testing.assert_close(latents(theirs), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        load(model).save_pretrained(tmp_path / "saved")


def test_adapters_are_not_lost_by_saving(model: Path, loras: list[Path], tmp_path: Path) -> None:
    pipe = load(model)
    pipe.load_lora_weights(loras[0])
    with pytest.raises(ValueError, match="has adapters; merge them first"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_pipelines_are_made_of_parts_and_of_other_pipelines(
    model: Path, peer: diffusers.AnyFlowPipeline, expected: torch.Tensor
) -> None:
    for pipe in (AnyFlowPipeline(**peer.components), AnyFlowPipeline.from_pipe(peer)):
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-5)
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float64)
    network = load_transformer(model)
    pipe = load(
        model,
        vae=vae,
        transformer=network,
        text_encoder=peer.text_encoder,
        scheduler=peer.scheduler,
    )
    assert (
        pipe.vae is vae and pipe.transformer is network and pipe.text_encoder is peer.text_encoder
    )
    assert torch.equal(latents(pipe), expected)
    low = load(model, memory="low", text_encoder=peer.text_encoder)
    assert torch.equal(latents(low), expected) and low.text_encoder is peer.text_encoder


def test_a_scheduler_of_diffusers_is_taken_by_its_settings(model: Path) -> None:
    pipe, other = load(model), load(model)
    pipe.scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=2.0)
    other.scheduler = other.scheduler.from_config(other.scheduler.config, shift=2.0)
    assert torch.equal(latents(pipe), latents(other))
    pipe.scheduler = diffusers.UniPCMultistepScheduler()
    with pytest.raises(
        ValueError, match="scheduler must be a FlowMapEuler.*, got UniPCMultistepScheduler"
    ):
        latents(pipe)


def test_encode_prompt_is_diffusers_under_every_plan(
    model: Path, peer: diffusers.AnyFlowPipeline
) -> None:
    arguments = (["a red disc", "a blue cross stops"], "bad quality", True, 2)
    theirs = peer.encode_prompt(*arguments, max_sequence_length=12)
    for memory in ("fast", "low"):
        ours = load(model, memory=memory).encode_prompt(*arguments, max_sequence_length=12)
        for actual, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, other, rtol=0, atol=1e-5)


def test_a_bar_of_the_steps_is_diffusers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = AnyFlowPipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")
    shown = {}
    for name, config, call in (
        ("default", {}, {}),
        ("disabled", {"disable": True}, {}),
        ("asked for", {"disable": True}, {"progress": True}),
        ("declined", {}, {"progress": False}),
    ):
        pipe.set_progress_bar_config(**config)
        latents(pipe, **call)
        shown[name] = "2/2" in capsys.readouterr().err
        assert pipe._progress_bar_config == config
    assert shown == {"default": True, "disabled": False, "asked for": True, "declined": False}
    assert isinstance(pipe.progress_bar(total=2), tqdm)


def test_a_plain_model_is_saved_as_wans_pipeline(model: Path, tmp_path: Path) -> None:
    sizes = {k: v for k, v in load_transformer(model).config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    plain = AnyFlowTransformer3DModel(**sizes | {"r_embedder": False}).eval()
    parts = load(model).components | {"transformer": plain}
    with pytest.raises(ValueError, match="is a plain Wan model"):
        AnyFlowPipeline(**parts)
    pipe = AnyFlowPipeline(**parts, euler=True)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="knows r = t only"):
        latents(pipe, use_mean_velocity=True)
    pipe.save_pretrained(tmp_path / "wan")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "wan")
    assert type(theirs) is diffusers.WanPipeline and theirs.scheduler.config.shift == 5.0
    theirs.set_progress_bar_config(disable=True)
    call = {**CALL, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(1)}
    frames = theirs(PROMPT, **call).frames
    actual = latents(
        load(tmp_path / "wan", euler=True), sigmas=np.asarray(theirs.scheduler.sigmas[:2])
    )
    torch.testing.assert_close(actual, frames, rtol=0, atol=1e-5)
