"""Every recipe of docs/operators.md computes what diffusers' block does; figures are the gates'."""

import re
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

from anyflow import ops
from anyflow.pipelines.block_parts import replaced_parts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operators.md").read_text()
B, FRAMES, D, HEADS = 2, 3, 48, 2


def snippets(section: str) -> dict[str, str]:
    """Return the code below each heading of a section."""
    text = PAGE[PAGE.index(f"\n## {section}") :].split("\n## ")[1]
    return dict(re.findall(r"^### (.*?)\n.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE))


RECIPES = snippets("Recipes for diffusers' Wan block")


@pytest.fixture
def block() -> WanTransformerBlock:
    torch.manual_seed(0)
    block = WanTransformerBlock(D, 64, HEADS, cross_attn_norm=True)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return block


def test_recipes_are_those_of_every_operator_of_the_block() -> None:
    flow_maps = {"dual_timestep_embedding", "flow_map_inputs", "flow_map_batch", "flow_map_loss"}
    functions = {name for name in ops.__all__ if name.islower()}
    assert set(RECIPES) == functions - flow_maps - {"backend_report", "use_backend"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_computes_the_same(name, block, generator) -> None:
    x, text = torch.randn(B, 18, D, generator=generator), torch.randn(B, 5, D, generator=generator)
    temb = torch.randn(B, 6, D, generator=generator)
    rotary = WanRotaryPosEmbed(D // HEADS, (1, 2, 2), 32)(torch.empty(B, 4, FRAMES, 4, 6))
    names = set(block.state_dict())
    expected = block(x, text, temb, rotary)
    (gradient,) = torch.autograd.grad(expected.square().sum(), block.scale_shift_table)
    scope: dict[str, Any] = {"block": block}
    exec(RECIPES[name], scope)
    with torch.profiler.profile() as profile:
        result = block(x, text, temb, rotary)
    calls = [event.key for event in profile.key_averages()]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    (ours,) = torch.autograd.grad(result.square().sum(), block.scale_shift_table)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4)
    assert set(block.state_dict()) == names
    if name != "linear":  # left to torch at this size
        assert any(key.startswith(f"anyflow::{name}") for key in calls), calls


def test_recipes_for_flow_maps_run() -> None:
    scope: dict[str, Any] = {}
    for snippet in snippets("For flow maps").values():
        exec(snippet, scope)
    assert scope["activated"].shape == (4, 64) and scope["u"].grad.isfinite().all()
    expected = 2 * 0.005 * (scope["noise"] - scope["latents"])
    torch.testing.assert_close(scope["x_plus"] - scope["x_minus"], expected[:1])


def test_the_catalog() -> None:
    scope: dict[str, Any] = {}
    catalog = r"```python\n([^`]*anyflow.ops import examples.*?)```"
    exec(re.search(catalog, PAGE, re.DOTALL)[1], scope)
    outputs = scope["call"].outputs()
    assert outputs[0].shape == (1, 1280, 384) and outputs[0].dtype == torch.bfloat16
    assert scope["example"].forward_bytes == 2 * 2 * 1280 * 384 + 4 * 2 * 384


def test_the_call_for_a_whole_pipeline() -> None:
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    transformer = diffusers.WanTransformer3DModel(**heads, text_dim=16, freq_dim=32, ffn_dim=32)
    lines = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert lines is not None
    scope: dict[str, Any] = {"pipe": transformer}
    first, second = lines[1].rsplit("anyflow.restore", 1)
    exec(first, scope)
    assert replaced_parts(transformer) == ("norms", "rope")
    exec(f"anyflow.restore{second}", scope)
    assert not replaced_parts(transformer)


def test_figures_are_not_above_the_gates() -> None:
    gates = tomllib.loads((ROOT / "benchmarks" / "gates.toml").read_text())["cpu-avx512-amd-zen4"]
    line = r"^\| `([a-z_.+=A-Z0-9]+)`[^|]*\| ([0-9.]+) \| ([0-9.]+) \|$"
    lines = re.findall(line, PAGE, re.MULTILINE)
    assert len(lines) == 11
    for name, *figures in lines:
        for direction, figure in zip(("forward", "backward"), figures, strict=True):
            found = [k for k in gates if k.startswith(f"ops/{name}/") and f"/{direction}/" in k]
            assert len(found) == 1 and float(figure) <= gates[found[0]], (name, direction)
