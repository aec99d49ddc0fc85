"""Test a plain Wan model by plain Euler steps, against diffusers' WanPipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from anyflow.formats import load_transformer, save
from anyflow.pipelines import AnyFlowPipeline
from anyflow.pipelines.plain_wan import load_scheduler
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

PROMPTS = ["a red disc moves slowly", "a blue cross stops"]
CALL: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 12}
SHIFT = 3.0


def flow_match() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=SHIFT,
        num_train_timesteps=1000,
    )


@pytest.fixture(scope="module")
def peer(model: Path) -> diffusers.WanPipeline:
    """Build Wan's own pipeline with the other parts of the tiny model."""
    parts = diffusers.AnyFlowPipeline.from_pretrained(model).components
    torch.manual_seed(1)
    parts["transformer"] = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    pipe = diffusers.WanPipeline(**{**parts, "scheduler": flow_match()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def wan(peer: diffusers.WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    peer.save_pretrained(folder)
    return folder


def load(path: Path, **options: Any) -> AnyFlowPipeline:
    return AnyFlowPipeline.from_pretrained(path, dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_plain_wan_model_gives_wans_video_at_the_same_sigmas(
    guidance: float, peer, wan: Path
) -> None:
    call = {
        **CALL,
        "prompt": PROMPTS,
        "negative_prompt": ["bad quality"] * 2,
        "guidance_scale": guidance,
    }
    seeded = [
        {"generator": torch.Generator().manual_seed(3), "output_type": "np"} for _ in range(2)
    ]
    expected = peer(**call, **seeded[0], num_inference_steps=4).frames
    sigmas = peer.scheduler.sigmas[:4]  # end at S(S(1/1000)), and ours at S(1/4)
    frames = load(wan, euler=True)(**call, **seeded[1], sigmas=sigmas).frames
    assert expected.std() > 0.01
    torch.testing.assert_close(
        torch.from_numpy(frames), torch.from_numpy(expected), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("scheduler", [flow_match, unipc])
def test_the_shift_is_that_of_the_folders_scheduler(scheduler, wan: Path, tmp_path: Path) -> None:
    scheduler().save_pretrained(tmp_path / "scheduler")
    ours = load_scheduler(tmp_path, euler=True)
    assert isinstance(ours, FlowMapEulerDiscreteScheduler)
    assert (ours.config.shift, ours.config.num_train_timesteps) == (SHIFT, 1000)
    with pytest.raises(
        ValueError, match=f"is of '{scheduler().__class__.__name__}', which is no scheduler of flow"
    ):
        load_scheduler(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dynamic_shifting": True}, "has use_dynamic_shifting=True: euler=True needs"),
     ({"shift": "five"}, "shift must be a positive number, from"),
     ({"_class_name": "DDIMScheduler", "shift": None}, "shift must be a positive number, from"),
     ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "prediction_type": "epsilon"},
      "has prediction_type='epsilon'")],
)  # fmt: skip
def test_a_schedule_that_is_no_shift_is_refused(settings, message, tmp_path: Path) -> None:
    flow_match().save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=message) as error:
        load_scheduler(tmp_path, euler=True)
    assert str(file) in str(error.value)


def test_a_plain_wan_model_is_refused_before_weights_are_read(
    wan: Path, model: Path, tmp_path: Path
) -> None:
    message = "is a plain Wan model.*euler=True.*--euler"
    copy = tmp_path / "wan"
    shutil.copytree(wan, copy)
    encoder = next((copy / "text_encoder").glob("*.safetensors"))
    encoder.write_bytes(encoder.read_bytes()[:100])  # reading any weight would fail
    with pytest.raises(ValueError, match=f"{copy}/transformer {message}"):
        load(copy)
    with pytest.raises(ValueError, match=f"{wan}/transformer {message}"):
        load(model, transformer=wan)
    with pytest.raises(ValueError, match=f"the transformer {message}"):
        load(model, transformer=load_transformer(wan))
    (copy / "transformer_2").mkdir()
    with pytest.raises(ValueError, match="has two transformers"):
        load(copy, euler=True)


def test_a_teacher_of_training_is_sampled_by_euler(wan: Path, model: Path, tmp_path: Path) -> None:
    """Sample beside the parts of another model with its own shift, and in place of them."""
    teacher = save(
        load_transformer(wan),
        tmp_path / "run",
        scheduler=FlowMapEulerDiscreteScheduler(shift=SHIFT),
    )
    call = {**CALL, "prompt": PROMPTS[0], "seed": 2, "num_inference_steps": 4, "output_type": "pt"}
    pipe = load(model, transformer=teacher, euler=True)
    assert pipe.scheduler.config.shift == SHIFT
    assert torch.equal(pipe(**call).frames, load(wan, euler=True)(**call).frames)


def test_euler_evaluates_a_flow_map_at_one_time(model: Path) -> None:
    call = {**CALL, "prompt": PROMPTS[0], "seed": 2, "num_inference_steps": 4, "output_type": "pt"}
    euler, flow_map = load(model, euler=True), load(model)
    frames = euler(**call).frames
    assert torch.equal(frames, flow_map(**call, use_mean_velocity=False).frames)
    assert torch.equal(euler(**call, use_mean_velocity=True).frames, flow_map(**call).frames)
    assert (frames - flow_map(**call).frames).abs().max() > 1e-4
