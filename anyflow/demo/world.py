"""Share the data, the randomness, the model and the scheduler of the quickstart's stages."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.data import SyntheticVideos
from anyflow.demo.config import DemoConfig
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler


class World:
    """Hold the data of one demo configuration, and make its noise, model and scheduler.

    Attributes:
        dataset: the moving shapes as latents with prompts.
        shapes: the moving shapes as videos.
    """

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.dataset = SyntheticVideos()
        self.shapes = self.dataset.shapes

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return ``(F, C, H, W)`` of one video's latents."""
        return self.dataset.latent_shape

    def generator(self, stream: int) -> torch.Generator:
        """Make a generator of this run's seed, on the CPU so that devices agree.

        Args:
            stream: number below 1000; each stream is independent of the others.
        """
        return torch.Generator().manual_seed(self.config.seed * 1000 + stream)

    def labels(self, n: int) -> Tensor:
        """Return ``[n]`` labels, classes in turn."""
        return torch.arange(n, device=self.device) % self.shapes.num_classes

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``[n, F, C, H, W]`` from the standard normal distribution."""
        return torch.randn(n, *self.latent_shape, generator=generator).to(self.device)

    def prompts(self, labels: Tensor) -> Tensor:
        """Return the prompt embeddings ``[n, S, text_dim]`` of ``labels[n]``."""
        return self.dataset.prompts.to(self.device)[labels]

    def decode(self, latents: Tensor) -> Tensor:
        """Unfold latents ``[n, F, C, H, W]`` to videos ``[n, 8, 1, 12, 12]`` on the CPU."""
        return self.dataset.decode(latents)

    def scheduler(self) -> FlowMapEulerDiscreteScheduler:
        """Make the scheduler of this run."""
        return FlowMapEulerDiscreteScheduler(
            self.config.num_train_timesteps, shift=self.config.shift
        )

    def model(self) -> AnyFlowTransformer3DModel:
        """Make an untrained plain model; the flow map is enabled after flow matching."""
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
        with torch.no_grad():  # residual gates are open and the output is silent at first
            model.proj_out.weight.zero_()
            for block in model.blocks:
                block.get_parameter("scale_shift_table")[:, [2, 5]] += 1
        return model.to(self.device)
