"""The recipe of a training run, as frozen dataclasses: what a YAML file says, typed and with
defaults.

The defaults are those of the published Wan2.1-1.3B recipe where it has them. A value that cannot
work is a ValueError when the dataclass is built; what needs a file or the other processes is
checked by the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from anyflow.methods import OnPolicyConfig, PretrainConfig
from anyflow.training.network_config import (
    MAX_SIZE,
    ArchitectureConfig,
    FlowMapConfig,
    LoRAConfig,
    NetworkConfig,
)
from anyflow.training.report_config import (
    MAX_BATCH,
    MAX_TIMESTEPS,
    Logger,
    MetricsConfig,
    PreviewConfig,
    ValidationConfig,
)
from anyflow.utils.validation import require_number, require_positive, require_text, require_whole

__all__ = [
    "ArchitectureConfig",
    "CheckpointConfig",
    "DataConfig",
    "EMAConfig",
    "FlowMapConfig",
    "LoRAConfig",
    "MetricsConfig",
    "NetworkConfig",
    "OnPolicyStageConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreviewConfig",
    "Recipe",
    "SchedulerConfig",
    "Stage",
    "ValidationConfig",
]

_MAX_WORKERS = 1024
_MAX_TIMEOUT = 30 * 24 * 3600

Stage = Literal["teacher", "pretrain", "on_policy"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and the clipping of one network.

    Args:
        lr: peak learning rate.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        schedule: after the warm-up, ``"constant"`` or ``"cosine"`` down to ``min_lr_ratio`` at the
            last step.
        warmup_steps: linear warm-up; the first step has ``lr / warmup_steps``.
        min_lr_ratio: end of the cosine, as a share of lr.
        clip_norm: largest norm of this network's gradient.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip_norm"):
            require_positive(f"optimizer.{name}", getattr(self, name))
        for beta in self.betas:
            require_number("optimizer.betas", beta)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), got {self.betas}")
        for name in ("weight_decay", "min_lr_ratio"):
            require_number(f"optimizer.{name}", getattr(self, name), least=0)
        require_whole("optimizer.warmup_steps", self.warmup_steps, least=0)
        if self.min_lr_ratio > 1:
            raise ValueError(f"optimizer.min_lr_ratio must be <= 1, got {self.min_lr_ratio}")


@dataclass(frozen=True)
class EMAConfig:
    """The average of the student that is sampled from and exported.

    Args:
        decay: in [0, 1).
        start_step: up to this step the average is a copy of the parameters.
    """

    decay: float = 0.999
    start_step: int = 1000

    def __post_init__(self) -> None:
        require_number("ema.decay", self.decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be in [0, 1), got {self.decay}")
        require_whole("ema.start_step", self.start_step, least=0)


@dataclass(frozen=True)
class SchedulerConfig:
    """Arguments of ``FlowMapEulerDiscreteScheduler``."""

    num_train_timesteps: int = 1000
    shift: float = 5.0
    weight_type: Literal["beta08", "gaussian", "uniform"] = "beta08"

    def __post_init__(self) -> None:
        require_whole("scheduler.num_train_timesteps", self.num_train_timesteps, most=MAX_TIMESTEPS)
        require_positive("scheduler.shift", self.shift)


@dataclass(frozen=True)
class DataConfig:
    """The dataset and its loader.

    Args:
        kind: ``"latents"``, written by ``anyflow preprocess``; or ``"synthetic"``, the moving
            shapes of the quickstart.
        path: folder of the latents.
        batch_size: samples per step and data-parallel rank, before gradient accumulation.
        num_workers: processes that read ahead; 0 reads in the training process.
        seed: of the order of the samples.
    """

    kind: Literal["latents", "synthetic"] = "latents"
    path: str | None = None
    batch_size: int = 1
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("data.batch_size", self.batch_size, most=MAX_BATCH)
        require_whole("data.num_workers", self.num_workers, least=0, most=_MAX_WORKERS)
        require_whole("data.seed", self.seed, least=-(2**63))
        if self.path is not None:
            require_text("data.path", self.path)
        if (self.kind == "latents") != (self.path is not None):
            raise ValueError("data.path is required with data.kind=latents, and only then")


@dataclass(frozen=True)
class ParallelConfig:
    """The device mesh: replicate x shard x sequence processes.

    Args:
        replicate: copies of the parameters (HSDP); 1 is plain FSDP.
        shard: processes that parameters are sharded over; None takes what the other two leave.
        sequence: processes that share the tokens of a sample (Ulysses); it divides the number of
            heads.
        timeout_s: seconds without an answer after which the other ranks are given up.
    """

    replicate: int = 1
    shard: int | None = None
    sequence: int = 1
    timeout_s: int = 600

    def __post_init__(self) -> None:
        for name in ("replicate", "sequence"):
            require_whole(f"parallel.{name}", getattr(self, name), most=MAX_SIZE)
        require_whole("parallel.timeout_s", self.timeout_s, most=_MAX_TIMEOUT)
        if self.shard is not None:
            require_whole("parallel.shard", self.shard, most=MAX_SIZE)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from.

    Args:
        every: steps between checkpoints; the last step always has one.
        keep: newest ones kept.
    """

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        require_whole("checkpoint.every", self.every)
        require_whole("checkpoint.keep", self.keep)


@dataclass(frozen=True)
class OnPolicyStageConfig:
    """What only stage 2 has.

    Args:
        teacher: the real score.
        method: rollout, scores and co-training; its ``pretrain`` must be left alone, the recipe's
            own counts.
        critic: where the critic starts; None means the teacher's weights.
        critic_lora: adapters of the critic in place of full fine-tuning.
        critic_optimizer: of the critic.
        generator_update_interval: the student is updated every so many steps, the critic at every
            one.
    """

    teacher: NetworkConfig
    method: OnPolicyConfig = field(default_factory=lambda: OnPolicyConfig(cotrain_pretrain=True))
    critic: NetworkConfig | None = None
    critic_lora: LoRAConfig | None = None
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-6, betas=(0.0, 0.999))
    )
    generator_update_interval: int = 1

    def __post_init__(self) -> None:
        require_whole("on_policy.generator_update_interval", self.generator_update_interval)
        if self.teacher.lora is not None:
            raise ValueError("on_policy.teacher.lora: the teacher is not trained")
        if self.critic is not None and self.critic.lora is not None:
            raise ValueError(
                "on_policy.critic.lora: give the critic's adapters as on_policy.critic_lora"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Args:
        stage: ``"teacher"`` (plain flow matching), ``"pretrain"`` or ``"on_policy"``.
        out: folder of the run: metrics, checkpoints, previews, and the exported model at the end.
        student: the network that is trained.
        data: the videos.
        steps: optimizer steps of the student's loop.
        flow_map: second timestep branch, added to a student that has none (not in the teacher
            stage).
        scheduler: shift, timestep range, training weight.
        pretrain: the pretrain loss, also of stage 2's co-training; the teacher stage uses its
            ``prompt_dropout`` and ``i2v_prob`` only.
        teacher: the network that ``pretrain.velocity_target=teacher`` names; with that in the
            pretrain stage, and only then (stage 2 takes ``on_policy.teacher``).
        on_policy: required in stage 2, and only there.
        optimizer: of the student.
        ema: of the student.
        parallel: how the processes share the work.
        checkpoint: when to save.
        preview: when and what to sample.
        metrics: when and on what to measure sampled videos.
        validation: when and on what to evaluate the loss on videos that are not trained on.
        gradient_accumulation: loss evaluations per optimizer step.
        precision: ``"bf16"`` runs the networks under autocast; parameters and optimizer state are
            fp32 always.
        activation_checkpointing: recompute the blocks in backward.
        compile: ``torch.compile`` of each block.
        device: ``"cuda"``, ``"cpu"``, or None for CUDA where there is a GPU.
        num_threads: threads on a CPU, within its cores; one is fastest for small networks. None
            leaves torch's number, and so does the environment's ``OMP_NUM_THREADS`` or
            ``MKL_NUM_THREADS``.
        seed: of every random draw of the training itself.
        log_every: steps between lines of metrics, the first of which is of step 1; a line has the
            means since the last.
        loggers: where metrics and previews go beside the run's folder: ``tensorboard``, ``wandb``,
            ``trackio``.
        project: that ``wandb`` and ``trackio`` sort the run into.
    """

    stage: Stage
    out: str
    student: NetworkConfig
    data: DataConfig
    steps: int = 6000
    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(prompt_dropout=0.1))
    teacher: NetworkConfig | None = None
    on_policy: OnPolicyStageConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=1000))
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    gradient_accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = True
    compile: bool = False
    device: str | None = None
    num_threads: int | None = None
    seed: int = 0
    log_every: int = 10
    loggers: tuple[Logger, ...] = ()
    project: str = "anyflow"

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            require_whole(name, getattr(self, name))
        require_whole("gradient_accumulation", self.gradient_accumulation, most=MAX_BATCH)
        require_whole("seed", self.seed, least=-(2**63))
        if self.num_threads is not None:
            require_whole("num_threads", self.num_threads, most=MAX_SIZE)
        require_text("out", self.out)
        require_text("project", self.project)
        if (self.stage == "on_policy") != (self.on_policy is not None):
            raise ValueError("on_policy is required with stage=on_policy, and only then")
        if (self.stage == "pretrain" and self.pretrain.velocity_target == "teacher") != (
            self.teacher is not None
        ):
            raise ValueError(
                "teacher is required with pretrain.velocity_target=teacher in the pretrain stage, "
                "and only then "
                "(stage 2 takes on_policy.teacher)"
            )
        if self.teacher is not None and self.teacher.lora is not None:
            raise ValueError("teacher.lora: the teacher is not trained")
        if self.pretrain.derivative == "jvp" and self.parallel.sequence > 1:
            raise ValueError(
                "pretrain.derivative=jvp does not go through parallel.sequence > 1; take 'central'"
            )
        self._check_prompts()
        if self.preview.vae is not None and self.data.kind == "synthetic":
            raise ValueError(
                "preview.vae must be left alone with data.kind=synthetic: no VAE has made these "
                "latents"
            )
        self._check_timesteps()
        self._check_heads()

    @property
    def held_out_rows(self) -> int:
        """Rows of the data that validation keeps out of training."""
        validation = self.validation
        return validation.num_samples if validation.every and validation.path is None else 0

    def _check_prompts(self) -> None:
        """Raise a ValueError where texts have no encoder, or an encoder no texts."""
        for name, part in (("preview", self.preview), ("metrics", self.metrics)):
            if part.prompts and self.preview.model is None:
                raise ValueError(
                    f"preview.model is required with {name}.prompts: its text encoder encodes them"
                )
        if self.preview.model is not None and not (self.preview.prompts or self.metrics.prompts):
            raise ValueError(
                "preview.model is required with preview.prompts or metrics.prompts, and only then"
            )

    def _check_timesteps(self) -> None:
        """Raise a ValueError where a setting in timesteps does not fit the scheduler's range."""
        timesteps = self.scheduler.num_train_timesteps
        if self.stage != "teacher":
            self.pretrain.check_timesteps(timesteps)
        if self.on_policy is not None:
            self.on_policy.method.check_timesteps(timesteps)

    def _check_heads(self) -> None:
        """Raise a ValueError where a sequence cannot be shared out by heads; networks of a folder
        are seen later.
        """
        networks = [("student", self.student)]
        networks += [] if self.teacher is None else [("teacher", self.teacher)]
        if self.on_policy is not None:
            networks.append(("on_policy.teacher", self.on_policy.teacher))
            networks += (
                []
                if self.on_policy.critic is None
                else [("on_policy.critic", self.on_policy.critic)]
            )
        for name, network in networks:
            if (
                network.architecture is not None
                and network.architecture.num_attention_heads % self.parallel.sequence
            ):
                raise ValueError(
                    f"parallel.sequence must divide the {network.architecture.num_attention_heads} "
                    "attention heads of "
                    f"{name}, got {self.parallel.sequence}"
                )
