"""Define the recipe of a training run: what a YAML file says, typed and with defaults.

The defaults are those of the published Wan2.1-1.3B recipe where it has them. A value that cannot
work is a SettingError when its dataclass is built; the trainer checks what needs a file or other
processes. Each section is defined beside what it configures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from anyflow.data.config import DataConfig
from anyflow.methods import OnPolicyConfig, PretrainConfig
from anyflow.models.configuration import CausalSettings, FlowMap
from anyflow.schedulers import SchedulerConfig
from anyflow.training.checkpoint import CheckpointConfig
from anyflow.training.distributed import ParallelConfig
from anyflow.training.ema import EMAConfig
from anyflow.training.held_out import ValidationConfig
from anyflow.training.limits import MAX_BATCH, MAX_SIZE
from anyflow.training.network_config import (
    ArchitectureConfig,
    LoRAConfig,
    NetworkConfig,
    WeightsConfig,
    require_weights_only,
)
from anyflow.training.optimization import OptimizerConfig
from anyflow.training.preview import PreviewConfig
from anyflow.training.sample_metrics import MetricsConfig
from anyflow.training.trackers import Logger
from anyflow.utils.validation import (
    SettingError,
    in_section,
    require_text,
    require_whole,
)

__all__ = [
    "ArchitectureConfig",
    "CausalSettings",
    "CheckpointConfig",
    "DataConfig",
    "EMAConfig",
    "FlowMap",
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
    "WeightsConfig",
]

Stage = Literal["teacher", "pretrain", "on_policy"]


@dataclass(frozen=True)
class OnPolicyStageConfig:
    """Hold the settings that only stage 2 has.

    Args:
        teacher: the real score.
        method: rollout, scores and co-training, whose loss is the recipe's own ``pretrain``.
        critic: where the critic starts; None means the teacher's weights.
        critic_lora: adapters of the critic in place of full fine-tuning.
        critic_optimizer: the critic's optimizer.
        generator_update_interval: updates of the critic for each update of the student.
    """

    teacher: WeightsConfig
    method: OnPolicyConfig = field(default_factory=lambda: OnPolicyConfig(cotrain_pretrain=True))
    critic: WeightsConfig | None = None
    critic_lora: LoRAConfig | None = None
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-6, betas=(0.0, 0.999))
    )
    generator_update_interval: int = 1

    def __post_init__(self) -> None:
        require_whole("generator_update_interval", self.generator_update_interval)
        require_weights_only(teacher=self.teacher, critic=self.critic)


@dataclass(frozen=True)
class Recipe:
    """Hold the settings of a whole run.

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
        optimizer: the student's optimizer.
        ema: the student's average.
        parallel: how the processes share the work.
        checkpoint: when to save.
        preview: when and what to sample.
        metrics: when and on what to measure sampled videos.
        validation: when and on what to evaluate the loss on videos that are not trained on.
        gradient_accumulation: loss evaluations per optimizer step.
        precision: ``"bf16"`` runs the networks under autocast; parameters and optimizer state are
            fp32 always.
        activation_checkpointing: recompute the blocks in backward.
        compile: ``torch.compile`` each block.
        device: ``"cuda"``, ``"cpu"``, or None for CUDA where there is a GPU.
        num_threads: threads on a CPU, within its cores; one is fastest for small networks. None
            leaves torch's number, and so does the environment's ``OMP_NUM_THREADS`` or
            ``MKL_NUM_THREADS``.
        seed: seed of every random draw of the training itself.
        log_every: steps between lines of metrics, the first of which is of step 1; a line has the
            means since the last.
        loggers: where metrics and previews go beside the run's folder: ``tensorboard``, ``wandb``,
            ``trackio``.
        project: project that ``wandb`` and ``trackio`` sort the run into.
    """

    stage: Stage
    out: str
    student: NetworkConfig
    data: DataConfig
    steps: int = 6000
    flow_map: FlowMap = field(default_factory=FlowMap)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(prompt_dropout=0.1))
    teacher: WeightsConfig | None = None
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
            raise SettingError("on_policy", "is required with stage=on_policy, and only then")
        taught = self.stage == "pretrain" and self.pretrain.velocity_target == "teacher"
        if taught != (self.teacher is not None):
            raise SettingError(
                "teacher",
                "is required with pretrain.velocity_target=teacher in the pretrain stage, and only "
                "then (stage 2 takes on_policy.teacher)",
            )
        require_weights_only(teacher=self.teacher)
        if self.pretrain.derivative == "jvp" and self.parallel.sequence > 1:
            raise SettingError(
                "pretrain.derivative", "must be 'central' with parallel.sequence > 1, got 'jvp'"
            )
        self._check_causal()
        self._check_prompts()
        if self.preview.vae is not None and self.data.kind == "synthetic":
            raise SettingError(
                "preview.vae",
                "must be left alone with data.kind=synthetic: no VAE has made these latents",
            )
        self._check_timesteps()
        self._check_heads()

    @property
    def num_held_out(self) -> int:
        """Return the number of samples of the data that validation keeps out of training."""
        validation = self.validation
        return validation.num_samples if validation.every and validation.path is None else 0

    def _check_causal(self) -> None:
        """Raise a SettingError where some settings are of a causal student, and others are not.

        Whether a folder holds a causal model is looked at later.
        """
        given = {"student.causal": self.student.causal, "pretrain.causal": self.pretrain.causal}
        for name, settings in given.items():
            if self.stage == "teacher" and settings is not None:
                raise SettingError(
                    name,
                    "must be null with stage=teacher: the causal model is a flow map, and what "
                    "this stage trains is none",
                )
        if self.student.causal is not None and self.pretrain.causal is None:
            raise SettingError("pretrain.causal", "is required with student.causal; {} will do")
        random = self.student.architecture is not None
        if random and self.student.causal is None and self.pretrain.causal is not None:
            raise SettingError(
                "student.causal",
                "is required with pretrain.causal, unless student.path holds a causal model",
            )
        if self.on_policy is not None:
            rollouts = self.on_policy.method.causal is not None
            if rollouts != (self.pretrain.causal is not None):
                raise SettingError(
                    "on_policy.method.causal", "is required with pretrain.causal, and only then"
                )

    def _check_prompts(self) -> None:
        """Raise a SettingError where texts have no encoder, or an encoder no texts."""
        for name, part in (("preview", self.preview), ("metrics", self.metrics)):
            if part.prompts and self.preview.model is None:
                raise SettingError(
                    "preview.model",
                    f"is required with {name}.prompts: its text encoder encodes them",
                )
        if self.preview.model is not None and not (self.preview.prompts or self.metrics.prompts):
            raise SettingError(
                "preview.model",
                "is required with preview.prompts or metrics.prompts, and only then",
            )

    def _check_timesteps(self) -> None:
        """Raise a SettingError where a setting in timesteps does not fit the scheduler's range."""
        timesteps = self.scheduler.num_train_timesteps
        if self.stage != "teacher":
            with in_section("pretrain"):
                self.pretrain.check_timesteps(timesteps)
        if self.on_policy is not None:
            with in_section("on_policy.method"):
                self.on_policy.method.check_timesteps(timesteps)

    def _check_heads(self) -> None:
        """Raise a SettingError where heads cannot be shared out; folders are looked at later."""
        networks: dict[str, WeightsConfig | None] = {"student": self.student}
        networks["teacher"] = self.teacher
        if self.on_policy is not None:
            networks["on_policy.teacher"] = self.on_policy.teacher
            networks["on_policy.critic"] = self.on_policy.critic
        for name, network in networks.items():
            if network is None or network.architecture is None:
                continue
            heads = network.architecture.num_attention_heads
            if heads % self.parallel.sequence:
                raise SettingError(
                    "parallel.sequence",
                    f"must divide the {heads} attention heads of {name}, "
                    f"got {self.parallel.sequence}",
                )
