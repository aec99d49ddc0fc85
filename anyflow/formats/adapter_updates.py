"""Plan and apply what adapters do to parameters: low-rank products, differences, replacements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from anyflow.formats.adapter_config import AdapterConfig
from anyflow.formats.adapter_keys import AdapterKey, Role
from anyflow.formats.errors import CheckpointFormatError
from anyflow.formats.readers import FLOATS, TensorInfo

Read = Callable[[str], Tensor]
# A LoRA may also be stored in eight bits, whose values fp64 has too.
_FLOATS = frozenset((*FLOATS, "F8_E4M3", "F8_E5M2", "float8_e4m3fn", "float8_e5m2"))
_INTEGERS = frozenset(("I16", "I32", "I64", "int16", "int32", "int64"))


class Update(Protocol):
    """Describe a change of one parameter."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the keys of the tensors of the change, as they stand in the file."""
        ...

    def misfit(self, infos: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> str | None:
        """Say how the tensors do not fit a parameter of this shape, or return None if they do."""
        ...

    def apply(self, parameter: Tensor, read: Read, strength: float) -> Tensor:
        """Compute the new parameter.

        Args:
            parameter: the old one, in the dtype to compute in; it is left as it is.
            read: returns a tensor by its key, on the parameter's device and in its dtype.
            strength: strength of the change; 1 is the adapter as it was trained.
        """
        ...


@dataclass(frozen=True)
class LowRank:
    """Add ``strength scale B A`` to W, and with DoRA scale each output of that by ``m / |V|``.

    DoRA is equation 5 of Liu et al. 2024, with V the sum.

    Attributes:
        down, up: keys of ``A[r, in]`` and ``B[out, r]``; of a convolution ``A[r, in, ...]`` and
            ``B[out, r, 1, ...]``.
        rank: r.
        scale: alpha / r or alpha / sqrt(r), or None while alpha is not known.
        magnitude: key of m, ``[out]`` or ``[out, 1]``; ``[1, in]`` is by columns, as older LyCORIS
            has it.
    """

    down: str
    up: str
    rank: int
    scale: float | None
    magnitude: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (
            (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)
        )

    def misfit(self, infos: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> str | None:
        a, b = infos[self.down], infos[self.up]
        fits = len(shape) == len(a.shape) == len(b.shape) >= 2 and 0 < a.shape[0] == b.shape[1]
        if not fits or (b.shape[0], *a.shape[1:]) != shape or any(n != 1 for n in b.shape[2:]):
            return (
                f"A {a.shape} and B {b.shape} do not make {shape} (A is {a.dtype} {list(a.shape)}, "
                f"B is {b.dtype} "
                f"{list(b.shape)}): {self.down}, {self.up}"
            )
        if self.magnitude is None:
            return None
        m = infos[self.magnitude].shape
        possible = ((shape[0],), (shape[0], 1), (1, shape[-1]))
        return (
            None
            if len(shape) == 2 and m in possible
            else f"magnitude {m} for {shape}: {self.magnitude}"
        )

    def apply(self, parameter: Tensor, read: Read, strength: float) -> Tensor:
        assert self.scale is not None
        weight = parameter.flatten(1)
        down, up = read(self.down).flatten(1), read(self.up).flatten(1)
        merged = torch.addmm(weight, up, down, alpha=strength * self.scale)
        if self.magnitude is not None:
            magnitude = read(self.magnitude)
            by_columns = magnitude.ndim == 2 and magnitude.shape[0] == 1 != merged.shape[0]
            norms = merged.norm(dim=0 if by_columns else 1)
            merged *= (
                magnitude.reshape(1, -1) / norms
                if by_columns
                else (magnitude.flatten() / norms)[:, None]
            )
        return merged.reshape(parameter.shape)


@dataclass(frozen=True)
class Difference:
    """Add ``strength scale d`` to a parameter.

    Attributes:
        key: key of d, which has the parameter's shape.
        scale: scale of d, or None while alpha is not known.
    """

    key: str
    scale: float | None = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def misfit(self, infos: Mapping[str, TensorInfo], shape: tuple[int, ...]) -> str | None:
        found = infos[self.key].shape
        return None if found == shape else f"{found} for {shape}: {self.key}"

    def apply(self, parameter: Tensor, read: Read, strength: float) -> Tensor:
        assert self.scale is not None
        return torch.add(parameter, read(self.key), alpha=strength * self.scale)


@dataclass(frozen=True)
class Replacement(Difference):
    """Put the adapter's own parameter in the place of the model's; made for strength 1 only."""

    def apply(self, parameter: Tensor, read: Read, strength: float) -> Tensor:
        return read(self.key)


@dataclass
class Plan:
    """Collect the changes of all parameters, and everything that speaks against them.

    Attributes:
        updates: by the name of the parameter.
        lines: one for each mistake.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, parameter: str, update: Update) -> None:
        """Add a change, of which a parameter can have one."""
        if parameter in self.updates:
            before = ", ".join(self.updates[parameter].keys)
            self.lines.append(f"two changes of {parameter}: {before} and {', '.join(update.keys)}")
        else:
            self.updates[parameter] = update

    def check(self, infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """List changes of parameters that do not exist, or by tensors of wrong types or shapes."""
        for parameter, update in self.updates.items():
            wrong = [f"{infos[key].dtype} is no type of an adapter: {key}" for key in update.keys
                     if infos[key].dtype not in _FLOATS]  # fmt: skip
            if wrong:
                self.lines += wrong
            elif parameter not in shapes:
                self.lines += [f"no {parameter} in this transformer: {key}" for key in update.keys]
            elif problem := update.misfit(infos, shapes[parameter]):
                self.lines.append(f"{parameter}: {problem}")


@dataclass(frozen=True)
class Layer:
    """Hold all that a file has of one layer's adapter.

    Attributes:
        name: in errors.
        names: by which a configuration may mean it.
        parameters: the names of its parameters by role.
        tensors: tensors of its adapter, by role.
    """

    name: str
    names: tuple[str, ...]
    parameters: Callable[[Role], str]
    tensors: Mapping[Role, AdapterKey]


def add_layer(
    plan: Plan, layer: Layer, infos: Mapping[str, TensorInfo], read: Read,
    configs: Sequence[AdapterConfig],
    alpha: float | None, unscaled: float | None,
) -> None:  # fmt: skip
    """Add the changes of one layer to a plan, or what is wrong with it.

    Args:
        plan: is changed.
        layer: with at least one tensor.
        infos: descriptions of the file's tensors.
        read: a tensor of the file by its key, for alpha.
        configs: all of them hold, so they must agree.
        alpha: given by the user where nothing else says it, or None.
        unscaled: the scale of a layer without an alpha anywhere; None if that is an error.
    """
    own = layer.tensors
    if Role.DOWN in own and Role.UP in own:
        _add_low_rank(plan, layer, infos, read, configs, alpha, unscaled)
    else:
        for role, other in ((Role.DOWN, "B"), (Role.UP, "A")):
            if role in own:
                plan.lines.append(
                    f"missing: {layer.name}.lora_{other}.weight; without its other half: "
                    f"{own[role].key}"
                )
        for role in (Role.UP_BIAS, Role.ALPHA, Role.MAGNITUDE):
            if role in own:
                plan.lines.append(f"not understood without A and B of its layer: {own[role].key}")
    for role in (Role.WEIGHT_DIFFERENCE, Role.BIAS_DIFFERENCE):
        if role in own:
            plan.add(layer.parameters(role), Difference(own[role].key))
    for role in (Role.WEIGHT, Role.BIAS):
        if role in own:
            if any(_is_replaced(c, layer, role) for c in configs):
                plan.add(layer.parameters(role), Replacement(own[role].key))
            else:
                plan.lines.append(f"not understood: {own[role].key}")


def _add_low_rank(
    plan: Plan, layer: Layer, infos: Mapping[str, TensorInfo], read: Read,
    configs: Sequence[AdapterConfig],
    alpha: float | None, unscaled: float | None,
) -> None:  # fmt: skip
    own = layer.tensors
    down, up, magnitude, bias = (
        own.get(r) for r in (Role.DOWN, Role.UP, Role.MAGNITUDE, Role.UP_BIAS)
    )
    assert down is not None and up is not None
    rank = infos[down.key].shape[0] if infos[down.key].shape else 0
    if rank == 0:
        plan.lines.append(f"A has no rank: {down.key}")
        return
    if magnitude is not None and bias is not None:
        plan.lines.append(f"a magnitude and a bias of B in one layer: {magnitude.key}, {bias.key}")
    for config in configs:
        plan.lines += _disagreements(config, layer, rank)
    scale = _scale(plan, layer, rank, infos, read, configs, alpha)
    scale = unscaled if scale is None else scale
    plan.add(
        layer.parameters(Role.DOWN),
        LowRank(down.key, up.key, rank, scale, None if magnitude is None else magnitude.key),
    )
    if bias is not None:
        plan.add(layer.parameters(Role.UP_BIAS), Difference(bias.key, scale))


def _disagreements(config: AdapterConfig, layer: Layer, rank: int) -> list[str]:
    key = layer.tensors[Role.DOWN].key
    lines = []
    if not config.has_adapter(layer.names):
        lines.append(f"a layer without adapters by {config.where}: {key}")
    said = config.rank_of(layer.names)
    if said is not None and said != rank:
        lines.append(f"rank {rank}, but {said} by {config.where}: {key}")
    for role, flag, name in (
        (Role.MAGNITUDE, config.use_dora, "use_dora"),
        (Role.UP_BIAS, config.lora_bias, "lora_bias"),
    ):
        if flag and role not in layer.tensors:
            lines.append(f"{name} by {config.where}, but no {role.value} beside {key}")
        if not flag and role in layer.tensors:
            lines.append(f"no {name} by {config.where}, but the file has {layer.tensors[role].key}")
    return lines


def _scale(
    plan: Plan, layer: Layer, rank: int, infos: Mapping[str, TensorInfo], read: Read,
    configs: Sequence[AdapterConfig], alpha: float | None,
) -> float | None:  # fmt: skip
    """Return the scale of a layer by everything that says it, or None if nothing does."""
    said: dict[str, float] = {}
    if (own := layer.tensors.get(Role.ALPHA)) is not None:
        info = infos[own.key]
        value = None
        if info.dtype in _FLOATS | _INTEGERS and info.shape in ((), (1,)):
            value = float(read(own.key).double().item())
        if value is None or not torch.isfinite(torch.tensor(value)):
            shown = f"{info.dtype} {list(info.shape)}" if value is None else value
            plan.lines.append(f"alpha should be one finite number, not {shown}: {own.key}")
            return None
        said[own.key] = value / rank
    for config in configs:
        number = config.alpha_of(layer.names, alpha)
        if number is not None:
            said[config.where] = config.scale(number, rank)
    if alpha is not None and not configs and not said:
        return alpha / rank
    if len({float(f"{scale:.6g}") for scale in said.values()}) > 1:
        each = ", ".join(f"{scale:g} by {where}" for where, scale in said.items())
        plan.lines.append(f"scales that differ, {each}: {layer.tensors[Role.DOWN].key}")
    return next(iter(said.values()), None)


def _is_replaced(config: AdapterConfig, layer: Layer, role: Role) -> bool:
    return config.is_saved(layer.names) or (role is Role.BIAS and config.bias != "none")


def promised(configs: Iterable[AdapterConfig], layers: Sequence[Layer]) -> list[str]:
    """List what configurations say that a file has and it has not: saved modules and biases."""
    lines = []
    for config in configs:
        replaced = [layer for layer in layers if {Role.WEIGHT, Role.BIAS} & set(layer.tensors)]
        for end in config.modules_to_save:
            if not any(config.saved_by(end, layer.names) for layer in replaced):
                lines.append(
                    f"modules_to_save has {end!r} by {config.where}, but no tensor of it is in the "
                    "file"
                )
        if config.bias != "none" and not any(Role.BIAS in layer.tensors for layer in layers):
            lines.append(f"bias={config.bias!r} by {config.where}, but no bias is in the file")
    return lines


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse tensors that have NaN or infinity.

    Raises:
        CheckpointFormatError: one has; it is named.
    """
    for key, tensor in tensors:
        # Eight bits have no reduction of their own.
        values = tensor if tensor.dtype in FLOATS.values() else tensor.float()
        if not torch.isfinite(values).all():
            raise CheckpointFormatError(f"{where}: NaN or infinity in {key}")
