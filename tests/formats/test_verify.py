"""Test verify(): our network against diffusers' on the weights of real folders."""

import gc
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anyflow.formats.verify import Deviation, VerifyReport, verify
from anyflow.models import AnyFlowTransformer3DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SIZES: dict[str, int] = {"height": 32, "width": 48, "num_frames": 9}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(network: nn.Module, folder: Path) -> Path:
    """Save the network with random norms and biases, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(params=["anyflow", "wan"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    cls = (
        diffusers.AnyFlowTransformer3DModel
        if request.param == "anyflow"
        else diffusers.WanTransformer3DModel
    )
    return saved(cls(**TINY), tmp_path / "model")


@pytest.fixture
def flow_map(tmp_path: Path) -> Path:
    return saved(diffusers.AnyFlowTransformer3DModel(**TINY), tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_weights_pass(model, dtype) -> None:
    report = verify(model, dtype=dtype, **SIZES)
    assert report.passed, str(report)
    assert [c.name.split(",")[0] for c in report.comparisons] == ["forward"] * 5 + [
        "training loss",
        "latents after 4 steps",
    ]
    # two implementations did run
    assert all(c.max > 0 for c in report.comparisons if c.name != "training loss")
    if dtype == torch.float32:
        assert all(c.max < 5e-6 for c in report.comparisons)


def test_the_folder_of_a_pipeline_and_of_our_own_class(tmp_path: Path) -> None:
    flow_map = saved(AnyFlowTransformer3DModel(**TINY), tmp_path / "pipe" / "transformer")
    assert verify(flow_map.parent, **SIZES).passed
    plain = saved(AnyFlowTransformer3DModel(**TINY, r_embedder=False), tmp_path / "plain")
    assert [c.name for c in verify(plain, **SIZES, num_inference_steps=1).comparisons][:1] == [
        "forward, t 1000"
    ]


def test_a_real_difference_fails(tmp_path: Path) -> None:
    """Save a fusion that diffusers does not know: it evaluates another."""
    folder = saved(
        AnyFlowTransformer3DModel(**TINY, r_embedder_fusion="additive", gate_value=0.7), tmp_path
    )
    report = verify(folder, **SIZES)
    assert not any(c.passed for c in report.comparisons) and not report.passed
    assert str(report).endswith("7 of 7 over")


def test_limits_decide(flow_map) -> None:
    report = verify(flow_map, **SIZES, limits={"forward": 0.0, "loss": 1.0, "sample": 1.0})
    assert [c.passed for c in report.comparisons] == [False] * 5 + [True] * 2
    assert not report.passed


def test_weights_that_are_not_numbers_fail(flow_map) -> None:
    weights = load_file(flow_map / WEIGHTS)
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, flow_map / WEIGHTS, metadata={"format": "pt"})
    report = verify(flow_map, **SIZES, limits=dict.fromkeys(("forward", "loss", "sample"), 1.0))
    assert not any(c.passed for c in report.comparisons)


def test_sizes_beyond_the_network_and_weights_cut_off_are_refused(flow_map) -> None:
    with pytest.raises(
        ValueError, match="height must be <= 512 pixels for this model, got 1000000000"
    ):
        verify(flow_map, **SIZES | {"height": 10**9})
    weights = (flow_map / WEIGHTS).read_bytes()
    (flow_map / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(
        ValueError, match=f"{flow_map / WEIGHTS} is not a complete safetensors file"
    ):
        verify(flow_map, **SIZES)


@pytest.mark.parametrize("mean", [float("nan"), float("inf")])
def test_no_limit_passes_what_is_not_finite(mean) -> None:
    assert not Deviation("a", mean, mean, float("inf")).passed


def test_table() -> None:
    report = VerifyReport(
        "a title", (Deviation("one", 1e-7, 2e-7, 1e-5), Deviation("two", 3e-5, 4e-5, 1e-5))
    )
    assert str(report).splitlines() == [
        "a title",
        "relative difference               mean       max   allowed",
        "one                           1.00e-07  2.00e-07  1.00e-05  ok",
        "two                           3.00e-05  4.00e-05  1.00e-05  OVER",
        "1 of 2 over",
    ]


@pytest.mark.slow
def test_a_run_repeats_exactly_leaves_the_global_generator_and_keeps_no_network(flow_map) -> None:
    state = torch.get_rng_state()
    gc.collect()
    gc.disable()  # networks that only the collector frees would be in memory together
    try:
        reports = [verify(flow_map, **SIZES, seed=3) for _ in range(2)]
        classes = (AnyFlowTransformer3DModel, diffusers.AnyFlowTransformer3DModel)
        alive = [o for o in gc.get_objects() if type(o) in classes]
    finally:
        gc.enable()
    assert not alive
    assert reports[0] == reports[1] != verify(flow_map, **SIZES, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_and_unexpected_weights_are_listed(flow_map) -> None:
    weights = load_file(flow_map / WEIGHTS)
    weights["more"] = weights.pop("proj_out.bias")
    save_file(weights, flow_map / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: proj_out.bias\n  unexpected: more"):
        verify(flow_map, **SIZES)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "height": ({"height": 40}, "multiples of 16, got 40 and 48"),
    "frames": ({"num_frames": 8}, r"num_frames must be 4k \+ 1, got 8"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
    "many steps": ({"num_inference_steps": 10**9}, "must be a whole number from 1 to"),
    "limit": ({"limits": {"loss": -1.0}}, "the limit of loss must be >= 0, got -1.0"),
    "limits": ({"limits": {"speed": 1.0}}, "of forward, loss, sample, got speed"),
    "seed": ({"seed": -1}, "seed must be a whole number from 0"),
    "dtype": ({"dtype": torch.float16}, "got torch.float16"),
    "against": ({"against": "fastvideo"}, "against must be one of diffusers, got 'fastvideo'"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(change, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        verify(tmp_path, **(SIZES | change))


def test_folders_that_hold_no_such_network(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json in"):
        verify(tmp_path, **SIZES)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(
        ValueError, match="is of a 'UNet2DModel'; allowed are AnyFlowTransformer3DModel"
    ):
        verify(tmp_path, **SIZES)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a JSON object, not list"):
        verify(tmp_path, **SIZES)
