"""The Python of the README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from anyflow.demo import DemoConfig
from anyflow.demo.world import World

README = Path(__file__).parent.parent / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_sampling_and_training_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder of the demo's shape, which need not be trained for this."""
    world = World(DemoConfig())
    folder = tmp_path / "runs" / "demo" / "checkpoints" / "on_policy"
    world.model().enable_flow_map().save_pretrained(folder / "transformer")
    world.scheduler().save_pretrained(folder / "scheduler")
    monkeypatch.chdir(tmp_path)
    _, sampling, _, training, operator = snippets()
    scope: dict[str, object] = {}
    exec(sampling, scope)
    latents = scope["latents"]
    assert isinstance(latents, torch.Tensor) and latents.shape == (1, 4, 8, 6, 6) and latents.isfinite().all()
    for _ in range(3):  # gradients add up: one sample whose time falls on an end of the grid has weight 0
        exec(training, scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    exec(operator, scope)
    tokens = scope["tokens"]
    assert isinstance(tokens, torch.Tensor) and tokens.grad is not None


def test_the_curve_is_there() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README.read_text()):
        assert (README.parent / picture).is_file(), picture
