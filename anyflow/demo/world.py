"""What the quickstart's stages share: the videos as latents, the prompts, the model and the
scheduler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.data import MovingShapes, SyntheticVideos, pixel_shuffle_3d
from anyflow.demo.config import DemoConfig
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler


class World:
    """Data, prompts and factories of one demo configuration."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.shapes, self.dataset = MovingShapes(), SyntheticVideos()
        rows = range(0, len(self.dataset), len(self.dataset) // self.shapes.num_classes)
        self._prompts = torch.stack([self.dataset[row].prompt_embeds for row in rows]).to(
            self.device
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(F, C, H, W)`` of one video's latents."""
        return self.dataset.latent_shape

    def generator(self, stream: int) -> torch.Generator:
        """An independent stream of randomness for this run's seed, on the CPU so that devices
        agree.
        """
        return torch.Generator().manual_seed(self.config.seed * 1000 + stream)

    def labels(self, n: int) -> Tensor:
        """``[n]`` labels, classes in turn."""
        return torch.arange(n, device=self.device) % self.shapes.num_classes

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """``[n, F, C, H, W]`` standard normal."""
        return torch.randn(n, *self.latent_shape, generator=generator).to(self.device)

    def prompts(self, labels: Tensor) -> Tensor:
        """``[n, S, text_dim]`` for ``labels[n]``."""
        return self._prompts[labels]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[n, F, C, H, W]`` to videos ``[n, 8, 1, 12, 12]`` on the CPU."""
        return pixel_shuffle_3d(latents).float().cpu()

    def scheduler(self) -> FlowMapEulerDiscreteScheduler:
        """The scheduler of this run."""
        return FlowMapEulerDiscreteScheduler(
            self.config.num_train_timesteps, shift=self.config.shift
        )

    def model(self) -> AnyFlowTransformer3DModel:
        """A freshly initialized plain model; the flow map is enabled after flow matching."""
        config, channels = self.config, self.latent_shape[1]
        # module constructors draw from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = AnyFlowTransformer3DModel(
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=channels,
                out_channels=channels,
                text_dim=self.dataset.text_shape[1],
                freq_dim=64,
                ffn_dim=4 * config.num_heads * config.head_dim,
                num_layers=config.num_layers,
                rope_max_seq_len=32,
                r_embedder=False,
            )
        with torch.no_grad():  # open residual gates and a silent output: it trained better
            model.proj_out.weight.zero_()
            for block in model.blocks:
                block.get_parameter("scale_shift_table")[:, [2, 5]] += 1
        return model.to(self.device)
