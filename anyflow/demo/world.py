"""What the quickstart's stages share: the videos as latents, the prompts, the model and the scheduler."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.data import MovingShapes, pixel_shuffle_3d, pixel_unshuffle_3d
from anyflow.demo.config import DemoConfig
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler


class World:
    """Data, prompts and factories of one demo configuration."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.shapes = MovingShapes()
        bank = self.shapes.templates()
        self._latents = pixel_unshuffle_3d(bank.flatten(0, 1)).to(self.device)
        self._positions = bank.shape[1]
        # The "text encoder" is frozen, as in the real model: fixed random tokens per class, which the model's own text
        # projection learns to read.
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randn(self.shapes.num_classes, config.text_tokens, config.text_dim, generator=generator)
        self._prompts = tokens.to(self.device)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(F, C, H, W)`` of one video's latents."""
        return tuple(self._latents.shape[1:])

    def generator(self, stream: int) -> torch.Generator:
        """An independent stream of randomness for this run's seed, on the CPU so that devices agree."""
        return torch.Generator().manual_seed(self.config.seed * 1000 + stream)

    def labels(self, n: int) -> Tensor:
        """``[n]`` labels, classes in turn."""
        return torch.arange(n, device=self.device) % self.shapes.num_classes

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` random videos as latents ``[n, F, C, H, W]`` and their prompts ``[n, S, text_dim]``."""
        index = torch.randint(len(self._latents), (n,), generator=generator).to(self.device)
        return self._latents[index], self._prompts[index // self._positions]

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
        return FlowMapEulerDiscreteScheduler(self.config.num_train_timesteps, shift=self.config.shift)

    def model(self) -> AnyFlowTransformer3DModel:
        """A freshly initialized plain model; the flow map is enabled after flow matching."""
        config, channels = self.config, self.latent_shape[1]
        with torch.random.fork_rng(devices=[]):  # module constructors draw from the global generator
            torch.manual_seed(config.seed)
            model = AnyFlowTransformer3DModel(
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=channels,
                out_channels=channels,
                text_dim=config.text_dim,
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
