"""Plan which videos an evaluation has, from which noise, and whether a folder has that plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anyflow.evaluation.runs.layout import check_model_name
from anyflow.evaluation.runs.models import VideoModel
from anyflow.evaluation.runs.record import MAX_SAMPLES, MAX_SEED, EvaluationRecord, ModelRecord
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.schedulers import MAX_STEPS
from anyflow.utils.documents import shortened
from anyflow.utils.validation import brief, whole_number

REFERENCE_STEPS = "reference_steps"  # key among a model's settings in the record
_NEGATIVES = "negative_prompts"
_PATHS = (
    "transformer",
    "lora",
)  # settings that say where weights lie; the fingerprint compares them


@dataclass(frozen=True)
class EvaluationPlan:
    """Hold what an evaluation makes.

    Args:
        models: models by name.
        prompts: each text once.
        step_counts: numbers of network evaluations.
        num_samples: videos of each prompt.
        seed: seed of the noise.
        reference_steps: step count of the video that each one is compared with, of equal noise; 0
            for none.

    Raises:
        ValueError: a number is not possible, nothing is to be made, or a prompt occurs with two
            negative prompts.
    """

    models: Mapping[str, VideoModel]
    prompts: Sequence[VideoPrompt]
    step_counts: Sequence[int]
    num_samples: int = 5
    seed: int = 0
    reference_steps: int = 50

    def __post_init__(self) -> None:
        for name in self.models:
            check_model_name(name)
        if not self.models or not self.prompts or not self.step_counts:
            raise ValueError("models, prompts and steps must not be empty")
        for num_inference_steps in self.step_counts:
            whole_number("steps", num_inference_steps, 1, MAX_STEPS)
        whole_number("num_samples", self.num_samples, 1, MAX_SAMPLES)
        whole_number("seed", self.seed, 0, MAX_SEED)
        whole_number("reference_steps", self.reference_steps, 0, MAX_STEPS)
        prompts = tuple(dict.fromkeys(self.prompts))
        negatives: dict[str, VideoPrompt] = {}
        for prompt in prompts:
            prompt.check(f"{shortened(prompt.text)!r}: ")
            if negatives.setdefault(prompt.text, prompt) != prompt:
                raise ValueError(
                    f"the prompt {shortened(prompt.text)!r} occurs with two negative prompts; keep "
                    "one"
                )
        object.__setattr__(self, "prompts", prompts)
        object.__setattr__(self, "step_counts", tuple(sorted(set(self.step_counts))))

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the prompts without their negative prompts."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def sets(self) -> tuple[int, ...]:
        """Return the step counts in the order of the work, the reference's first."""
        others = tuple(
            num_inference_steps
            for num_inference_steps in self.step_counts
            if num_inference_steps != self.reference_steps
        )
        return (self.reference_steps, *others) if self.reference_steps else others

    def noise_seed(self, prompt: str, sample: int) -> int:
        """Return the seed of a video's noise, the same for every model and number of steps.

        The seed does not depend on the process or the order of the work either.

        Args:
            prompt: its text.
            sample: index of the video among those of the prompt.
        """
        text = f"{self.seed}\0{sample}\0{prompt}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**63

    def record(self) -> EvaluationRecord:
        """Return the record of the plan before anything is measured."""
        negatives = [prompt.negative for prompt in self.prompts]
        more = (
            {_NEGATIVES: negatives} if any(negative is not None for negative in negatives) else {}
        )
        models = {
            name: ModelRecord(
                model.path, {**model.sampler(), REFERENCE_STEPS: self.reference_steps, **more}
            )
            for name, model in self.models.items()
        }
        return EvaluationRecord(
            models, self.texts, tuple(self.step_counts), self.num_samples, self.seed
        )

    def extend(self, before: EvaluationRecord, folder: Path) -> EvaluationRecord:
        """Return the record of a folder with the models and step counts that the plan adds.

        Args:
            before: record of the folder.
            folder: named in errors.

        Raises:
            ValueError: the folder holds videos of other prompts, seeds or settings; the message
                says what differs.
        """
        now = self.record()
        changed = _differences(
            {
                "prompts": list(before.prompts),
                "--num-samples": before.num_samples,
                "--seed": before.seed,
            },
            {"prompts": list(now.prompts), "--num-samples": now.num_samples, "--seed": now.seed},
        )
        for name, model in now.models.items():
            if name in before.models:
                where = f"{name}: " if len(now.models) > 1 else ""
                old, new = (dict(m.sampler) for m in (before.models[name], model))
                changed += [f"{where}{line}" for line in _differences(old, new, skipped=_PATHS)]
        if changed:
            raise ValueError(
                f"{shortened(folder)} holds an evaluation of other settings "
                f"({'; '.join(changed)}); name another "
                "folder with --out, or another model as --model NAME=PATH"
            )
        step_counts = tuple(sorted({*before.step_counts, *now.step_counts}))
        return replace(
            before,
            models={**before.models, **{**now.models, **before.models}},
            step_counts=step_counts,
        )


def covers(record: EvaluationRecord, wanted: EvaluationRecord) -> bool:
    """Tell whether a record has all of another one's models, prompts and step counts.

    The settings must be the same.
    """
    same = (record.prompts, record.num_samples, record.seed) == (
        wanted.prompts,
        wanted.num_samples,
        wanted.seed,
    )
    return (
        same
        and set(wanted.step_counts) <= set(record.step_counts)
        and all(
            name in record.models
            and not _differences(record.models[name].sampler, model.sampler, skipped=_PATHS)
            for name, model in wanted.models.items()
        )
    )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], skipped: Sequence[str] = ()
) -> list[str]:
    lines = []
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if old == new or name in skipped:
            continue
        if name == "weights":
            lines.append("the weights are others")
        elif isinstance(old, list) and isinstance(new, list):
            first = next((b for a, b in zip(old, new, strict=False) if a != b), None)
            detail = (
                f"{len(old)} are now {len(new)}" if first is None else f"{brief(first, 60)} is new"
            )
            lines.append(f"{name}: {detail}")
        else:
            lines.append(f"{name} {brief(old)} is now {brief(new)}")
    return lines
