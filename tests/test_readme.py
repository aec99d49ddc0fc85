"""Run the Python of the README as it stands."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from anyflow.demo import DemoConfig, World

README = Path(__file__).parent.parent / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def snippet(words: str) -> str:
    """Return the only snippet with these words."""
    (found,) = (text for text in snippets() if words in text)
    return found


def test_sampling_and_training_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a folder of the demo's shape, which need not be trained for this."""
    world = World(DemoConfig())
    folder = tmp_path / "runs" / "demo" / "checkpoints" / "on_policy"
    world.model().enable_flow_map().save_pretrained(folder / "transformer")
    world.scheduler().save_pretrained(folder / "scheduler")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(snippet("shapes.gif"), scope)
    latents = scope["latents"]
    assert (
        isinstance(latents, torch.Tensor)
        and latents.shape == (4, 4, 8, 6, 6)
        and latents.isfinite().all()
    )
    with Image.open("shapes.gif") as animation:
        assert animation.n_frames == 8
    # gradients add up: one sample whose time falls on an end of the grid has weight 0
    for _ in range(3):
        exec(snippet("AnyFlowPretrainMethod"), scope)
    model = scope["model"]
    assert isinstance(model, torch.nn.Module)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_pictures_and_pages_are_there() -> None:
    for picture in re.findall(r"\]\((?!https?:)([^)]*)\)", README.read_text()):
        assert (README.parent / picture).is_file(), picture
