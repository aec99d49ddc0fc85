"""Describe the recipe of the quickstart, in two budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """Hold the optimization settings of one stage.

    Args:
        steps: optimizer steps.
        batch_size: videos per step.
        lr: learning rate of the network that is trained (AdamW).
        betas: the two averaging rates of AdamW.
        ema_decay: decay of the average that the stage hands on; less in a short stage, which would
            not forget its start.
        cosine: decay the learning rate to 5 % along a cosine; else it is constant after the
            warm-up.
        critic_lr: learning rate of the critic (stage 2 only).
    """

    steps: int
    batch_size: int = 32
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float = 0.995
    cosine: bool = False
    critic_lr: float = 0.0


@dataclass(frozen=True)
class DemoConfig:
    """Hold everything that a run of the quickstart depends on.

    ``num_threads`` (on a CPU, see :func:`anyflow.utils.threads.torch_threads`) is 1: the network is
    so small that sharing its operators out costs more than it saves. ``num_train_timesteps`` is
    100: with 1000, the time embedding of so small a model aliases at the finite difference.
    ``epsilon`` is in timesteps of that range. ``flow_matching`` trains the network that the two
    stages start from, that they take velocities from (``velocity_target``), and that they are
    compared with. ``cotrain_weight`` weighs stage 1's loss in stage 2. A killed run continues
    from a checkpoint that is made every ``checkpoint_every`` updates of a stage.
    """

    budget: str = "full"
    seed: int = 0
    device: str = "cpu"
    num_threads: int = 1
    num_heads: int = 4
    head_dim: int = 16
    num_layers: int = 4
    num_train_timesteps: int = 100
    shift: float = 3.0
    gate_value: float = 0.25
    epsilon: float = 0.5
    velocity_target: str = "teacher"
    cotrain_weight: float = 30.0
    rollout_steps: tuple[int, ...] = (1, 2)
    flow_matching: Stage = Stage(steps=1500, batch_size=64, lr=1e-2, ema_decay=0.998, cosine=True)
    pretrain: Stage = Stage(steps=900, lr=2e-3, cosine=True)
    on_policy: Stage = Stage(
        steps=150, batch_size=16, lr=2e-4, betas=(0.0, 0.999), ema_decay=0.98, critic_lr=5e-4
    )
    checkpoint_every: int = 100
    step_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    samples: int = 512
    heldout: int = 1024

    @classmethod
    def for_budget(cls, budget: str, seed: int = 0, device: str = "cpu") -> DemoConfig:
        """Return the recipe of a budget: ``"full"`` (minutes) or ``"fast"`` (about one minute).

        Raises:
            ValueError: unknown budget.
        """
        full = cls(seed=seed, device=device)
        if budget == "full":
            return full
        if budget == "fast":
            # The published settings: on a teacher's velocities, stage 1 alone is worse at one step
            # (docs/any-step.md).
            return replace(
                full,
                budget="fast",
                velocity_target="data",
                cotrain_weight=1.0,
                rollout_steps=(1, 2, 4, 8),
                flow_matching=Stage(steps=500, lr=1e-2, cosine=True),
                pretrain=Stage(steps=180, lr=5e-3, cosine=True),
                on_policy=replace(full.on_policy, steps=25),
                samples=256,
            )
        raise ValueError(f"budget must be 'fast' or 'full', got {budget!r}")


@dataclass(frozen=True)
class CausalDemoConfig:
    """Hold everything that a causal run depends on: clips made chunk by chunk.

    The causal model starts from the flow matching of ``demo``. A chunk is one latent frame; of the
    chunks before it the last ``full_chunk_limit - 1`` are seen in full and the others as one token
    each. Trained on the 4 chunks of a training clip, it makes clips of ``chunks``.

    Args:
        demo: data, network and flow matching.
        full_chunk_limit: L of the causal model.
        compressed_patch_size: (frames, height, width) of a compressed token, in latents.
        cache_window: compressed chunks that are kept while sampling; None keeps all.
        long_context_ratio: of :class:`anyflow.methods.CausalConfig`.
        pretrain: stage 1; there is no stage 2, which has not made these clips better.
        step_counts: steps of a chunk that are shown.
        chunks: chunks of a long clip.
        samples: clips at each number of steps.
    """

    demo: DemoConfig
    full_chunk_limit: int = 2
    compressed_patch_size: tuple[int, int, int] = (1, 6, 6)
    cache_window: int | None = 2
    long_context_ratio: float = 1.0
    pretrain: Stage = Stage(steps=600, lr=3e-3, cosine=True)
    step_counts: tuple[int, ...] = (1, 2, 4)
    chunks: int = 24
    samples: int = 256

    @classmethod
    def for_budget(cls, budget: str, seed: int = 0, device: str = "cpu") -> CausalDemoConfig:
        """Return the recipe of a budget, on the flow matching of :meth:`DemoConfig.for_budget`.

        Raises:
            ValueError: unknown budget.
        """
        full = cls(DemoConfig.for_budget(budget, seed, device))
        if budget == "full":
            return full
        return replace(full, pretrain=Stage(steps=300, lr=5e-3, cosine=True), samples=128)
