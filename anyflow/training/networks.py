"""Build the networks of a recipe on the CPU in fp32, and choose what of them is trained."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from anyflow.formats import load_transformer
from anyflow.formats.checkpoint import ReadOptions, open_checkpoint
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.models.network import is_causal
from anyflow.training.config import (
    ArchitectureConfig,
    CausalSettings,
    FlowMap,
    LoRAConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.training.draws import draw_seed
from anyflow.utils.packages import missing


def build_student(recipe: Recipe) -> AnyFlowTransformer3DModel:
    """Build the network that is trained: plain Wan in the teacher stage, else a flow map.

    With ``student.causal``, or from a causal folder, it is the causal model.

    Raises:
        ValueError: the folder does not hold such a network, its flow map or its causal settings are
            others than the recipe's, it is causal and ``pretrain.causal`` is not given or the
            reverse, or ``student.lora`` names what the network does not have.
    """
    config = recipe.student
    if config.path is None:
        student = _build_random(config, "student", config.causal)
    else:
        student = _load(Path(config.path), "student.path", config.causal)
        _require_kind(student, recipe)
    return prepare_student(student, recipe)


def prepare_student(
    student: AnyFlowTransformer3DModel, recipe: Recipe
) -> AnyFlowTransformer3DModel:
    """Give a network the recipe's flow map and adapters, and choose what is trained, in place.

    Raises:
        ValueError: as :func:`build_student`, but for the folder.
    """
    _set_flow_map(student, None if recipe.stage == "teacher" else recipe.flow_map)
    _choose_trained(student, recipe.student.lora, recipe.student.seed, "student.lora")
    return _with_options(student, recipe)


def build_teacher(recipe: Recipe) -> AnyFlowTransformer3DModel:
    """Build the frozen teacher, the real score of stage 2 or the target of stage 1.

    It may be a plain Wan model or a flow map; a causal one is read as its bidirectional model.

    Raises:
        ValueError: the folder does not hold a network.
    """
    config, name = (
        (recipe.teacher, "teacher")
        if recipe.on_policy is None
        else (recipe.on_policy.teacher, "on_policy.teacher")
    )
    assert config is not None
    return _with_options(_build(config, name).requires_grad_(False), recipe)


def build_critic(recipe: Recipe, teacher: AnyFlowTransformer3DModel) -> AnyFlowTransformer3DModel:
    """Build the fake score of stage 2 from its own folder, or as a copy of the teacher.

    The teacher must not be sharded yet.

    Raises:
        ValueError: the folder does not hold a network, or ``critic_lora`` names what it does not
            have.
    """
    assert recipe.on_policy is not None
    config = recipe.on_policy.critic
    critic = copy.deepcopy(teacher) if config is None else _build(config, "on_policy.critic")
    return prepare_critic(critic, recipe)


def prepare_critic(critic: AnyFlowTransformer3DModel, recipe: Recipe) -> AnyFlowTransformer3DModel:
    """Give a network the adapters of the recipe's critic, and choose what is trained, in place.

    Raises:
        ValueError: ``critic_lora`` names what the network does not have.
    """
    assert recipe.on_policy is not None
    config = recipe.on_policy.critic
    seed = recipe.on_policy.teacher.seed if config is None else config.seed
    _choose_trained(critic, recipe.on_policy.critic_lora, seed, "on_policy.critic_lora")
    return _with_options(critic, recipe)


def check_networks(recipe: Recipe) -> None:
    """Build the networks that the recipe describes itself, without memory for their weights.

    Raises:
        ValueError: as :func:`build_student`, :func:`build_teacher` and :func:`build_critic`;
            networks of a folder are not looked at.
    """
    with torch.device("meta"):
        if recipe.student.path is None:
            build_student(recipe)
        if recipe.teacher is not None and recipe.teacher.path is None:
            build_teacher(recipe)
        if recipe.on_policy is not None and recipe.on_policy.teacher.path is None:
            teacher = build_teacher(recipe)
            if recipe.on_policy.critic is None or recipe.on_policy.critic.path is None:
                build_critic(recipe, teacher)


def _build(config: WeightsConfig, name: str) -> AnyFlowTransformer3DModel:
    if config.path is not None:
        return _load_bidirectional(Path(config.path), f"{name}.path")
    return _build_random(config, name)


def _build_random(
    config: WeightsConfig, name: str, causal: CausalSettings | None = None
) -> AnyFlowTransformer3DModel:
    """Build a network with random weights, those of the seed whether it is causal or not."""
    with torch.device("meta"):
        size = sum(p.nbytes for p in new_network(config.architecture, causal).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"{name}.architecture has {size / 1e9:.0f} GB of weights in fp32, and this machine "
            f"{memory / 1e9:.0f} GB"
        )
    with _seeded(config.seed):
        return new_network(config.architecture, causal)


def new_network(
    architecture: ArchitectureConfig | None, causal: CausalSettings | None = None
) -> AnyFlowTransformer3DModel:
    """Build a network without a second timestep, the causal model where it has settings."""
    assert architecture is not None
    sizes = dataclasses.asdict(architecture)
    if causal is None:
        return AnyFlowTransformer3DModel(**sizes, r_embedder=False)
    return AnyFlowFARTransformer3DModel(**sizes, r_embedder=False, **dataclasses.asdict(causal))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generator, which module constructors draw from, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _load(
    path: Path, name: str, causal: CausalSettings | None = None, *, bidirectional: bool = False
) -> AnyFlowTransformer3DModel:
    """Load a checkpoint of any format in fp32; its weights decide whether it is a flow map."""
    try:
        return load_transformer(
            path, dtype=torch.float32, causal=causal, bidirectional=bidirectional
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _load_bidirectional(path: Path, name: str) -> AnyFlowTransformer3DModel:
    """Load a checkpoint without the two tensors that only the causal model has."""
    try:
        causal = open_checkpoint(path, ReadOptions()).is_causal
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return _load(path, name, bidirectional=causal)


def _require_kind(student: AnyFlowTransformer3DModel, recipe: Recipe) -> None:
    """Raise a ValueError unless a student of a folder is causal where its training is."""
    name = f"student.path: {recipe.student.path}"
    if is_causal(student) and recipe.stage == "teacher":
        raise ValueError(
            f"{name} holds a causal model, which stage=teacher does not train; `anyflow convert "
            "--bidirectional` writes it without its causal tensors"
        )
    if is_causal(student) and recipe.pretrain.causal is None:
        needed = "pretrain.causal={}"
        if recipe.on_policy is not None:
            needed += " and on_policy.method.causal={}"
        raise ValueError(
            f"{name} holds a causal model, whose training has settings of its own: give {needed}, "
            "or train its bidirectional model, which `anyflow convert --bidirectional` writes"
        )
    if not is_causal(student) and recipe.pretrain.causal is not None:
        raise ValueError(
            f"{name} holds a bidirectional model, and pretrain.causal is given: student.causal={{}}"
            " makes it causal"
        )


def _set_flow_map(network: AnyFlowTransformer3DModel, wanted: FlowMap | None) -> None:
    if not network.config.r_embedder:
        if wanted is not None:
            network.enable_flow_map(wanted.gate_value, wanted.deltatime_type, wanted.fusion)
        return
    config = network.config
    found = FlowMap(config.gate_value, config.deltatime_type, config.r_embedder_fusion)
    if wanted is None:
        raise ValueError(
            "student.path: stage=teacher trains a plain model, but this one is a flow map"
        )
    if found != wanted:
        raise ValueError(
            f"student.path holds a flow map of {found}, but the recipe's flow_map is {wanted}"
        )


def _choose_trained(
    network: AnyFlowTransformer3DModel, lora: LoRAConfig | None, seed: int, name: str
) -> None:
    """Set ``requires_grad``: everywhere, or of adapters and the modules trained beside them."""
    network.requires_grad_(True)
    if lora is None:
        return
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(missing(name, "peft")) from error
    targets = _matching(network, lora.target_modules, f"{name}.target_modules")
    for target, module in targets.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name}.target_modules: {target} is not a linear layer but {type(module).__name__}"
            )
    trained = _matching(network, lora.trained_modules, f"{name}.trained_modules")
    for module_name in trained:
        inside = [t for t in targets if t == module_name or t.startswith(f"{module_name}.")]
        if inside:
            raise ValueError(
                f"{name}: {inside[0]} cannot have an adapter and be trained in full by "
                f"{module_name}"
            )
    with _seeded(draw_seed(seed, "adapters")):
        network.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
        )
    for module in trained.values():
        module.requires_grad_(True)


def _matching(network: nn.Module, ends: tuple[str, ...], name: str) -> dict[str, nn.Module]:
    """Find the modules whose names are, or end after a dot in, one of ``ends``."""
    found: dict[str, nn.Module] = {}
    for end in ends:
        modules = {n: m for n, m in network.named_modules() if n == end or n.endswith(f".{end}")}
        if not modules:
            raise ValueError(f"{name}: {end!r} is the end of no module's name in this network")
        found.update(modules)
    return found


def _with_options(network: AnyFlowTransformer3DModel, recipe: Recipe) -> AnyFlowTransformer3DModel:
    trains = any(p.requires_grad for p in network.parameters())
    if recipe.activation_checkpointing and trains:
        # Nothing in a block is random, so the generators' states need not be kept.
        network.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        )
    if recipe.compile:
        network.compile_repeated_blocks()
    return network.train(trains)
