"""Describe what an example of an operator is: operands to draw, a call, and the least work.

:mod:`anyflow.ops.examples` is the catalog of the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow import ops

MODEL_DTYPE = torch.bfloat16  # of the tokens in the models

Arguments = dict[str, Any]


@dataclass(frozen=True)
class LeastWork:
    """Count what one direction of an operator cannot do without.

    Attributes:
        read: elements that are read, of the dtype that the operator is given.
        written: elements that are written, of the same dtype.
        wide_read: elements that are read in fp32 whatever that dtype is: modulation rows, tables.
        wide_written: elements that are written in fp32.
        flops: floating-point operations of matrix products.
    """

    read: int
    written: int
    wide_read: int = 0
    wide_written: int = 0
    flops: int = 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that must be moved."""
        return self.read_bytes(dtype) + self.written_bytes(dtype)

    def read_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that must be read."""
        return self.read * dtype.itemsize + 4 * self.wide_read

    def written_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that must be written."""
        return self.written * dtype.itemsize + 4 * self.wide_written


@dataclass(frozen=True)
class OperatorCall:
    """Hold a public function of :mod:`anyflow.ops` and the tensors that it is called on.

    Attributes:
        function: takes the inputs by position; everything that is no tensor is bound to it.
        inputs: tensors.
        training: whether forward computes the gradient too, so that without gradients it would be
            another kernel.
    """

    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    training: bool = False

    @property
    def wanted(self) -> list[Tensor]:
        """List the inputs that want a gradient."""
        return [x for x in self.inputs if x.requires_grad]

    def outputs(self) -> tuple[Tensor, ...]:
        """Run forward."""
        return as_tuple(self.function(*self.inputs))


class Draws:
    """Draw normal tensors from one seeded generator, in the dtype of an operator's operands.

    Tensors of one seed in bf16, fp16 and fp32 are the same numbers, rounded. On the meta device
    nothing is drawn.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self._generator = None if device.type == "meta" else torch.Generator(device)
        if self._generator is not None:
            self._generator.manual_seed(seed)

    def __call__(self, *shape: int, wide: bool = False, gradient: bool = True) -> Tensor:
        """Draw a leaf.

        Args:
            shape: sizes.
            wide: draw in fp32 (fp64 for operands in fp64), as modulation rows and weights are.
            gradient: mark the tensor as one that wants a gradient.
        """
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=self.wide)
        return drawn.to(self.wide if wide else self.dtype).requires_grad_(gradient)


@dataclass(frozen=True)
class Example:
    """Describe an operator on operands of one variant and size.

    Attributes:
        op: name of the operator.
        variant: which of its forms; empty where it has one only.
        tokens, dim, rows: L, D and R; for the flow-map operators B, the elements of a sample and
            the number of picked samples.
        forward: what forward must do.
        backward: what backward must do.
        make: makes the arguments of the registered operator from draws, by the schema's names.
        dtype: dtype of the operands in a model.
    """

    op: str
    variant: str
    tokens: int
    dim: int
    rows: int
    forward: LeastWork
    backward: LeastWork
    make: Callable[[Draws], Arguments]
    dtype: torch.dtype = MODEL_DTYPE

    @property
    def name(self) -> str:
        """Return a unique name: operator, variant (the dtype where there is one only) and sizes."""
        form = self.variant or {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"{self.op}[{form}] L={self.tokens} D={self.dim} R={self.rows}"

    @property
    def forward_bytes(self) -> int:
        """Return the bytes that forward must move in the dtype of a model."""
        return self.forward.bytes(self.dtype)

    @property
    def backward_bytes(self) -> int:
        """Return the bytes that backward must move in the dtype of a model."""
        return self.backward.bytes(self.dtype)

    def arguments(
        self, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0
    ) -> Arguments:
        """Make the arguments of the registered operator, by name, in the order of its schema.

        Args:
            device: device of the tensors.
            dtype: dtype of the operands; None means that of a model.
            seed: seed of the draws.
        """
        return self.make(Draws(torch.device(device), self.dtype if dtype is None else dtype, seed))

    def call(
        self, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0
    ) -> OperatorCall:
        """Make the operands, and the public function of them; the arguments are those above."""
        return public_call(self.op, self.arguments(device, dtype, seed))


def public_call(op: str, arguments: Arguments) -> OperatorCall:
    """Bind the arguments of a registered operator to its public function."""
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    others = {name: value for name, value in arguments.items() if name not in names}
    public = _ADAPTERS.get(op, getattr(ops, op))

    def function(*tensors: Tensor) -> Any:
        return public(**others, **dict(zip(names, tensors, strict=True)))

    training = bool(arguments.get("need_grad", False))
    return OperatorCall(function, [arguments[name] for name in names], training)


def moved(
    arguments: Arguments, device: torch.device | str, dtype: torch.dtype | None = None
) -> Arguments:
    """Copy arguments to a device, tensors as leaves like those that are given.

    Args:
        arguments: arguments of a registered operator.
        device: device of the new tensors.
        dtype: dtype of floating-point tensors and of what asks for a dtype; None leaves each its
            own.
    """

    def converted(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return value if dtype is None else dtype
        if not isinstance(value, Tensor):
            return value
        own = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.detach().to(device, own, copy=True).requires_grad_(value.requires_grad)

    return {name: converted(value) for name, value in arguments.items()}


def registered_calls(op: str, arguments: Arguments) -> dict[str, tuple[Any, ...]]:
    """Return the arguments that the dispatcher sees of an operator and of its backward.

    Meta tensors run nothing but the shapes, which tells what the kernels would be given.

    Returns:
        ``op`` and ``<op>_backward``, each with its arguments by position.
    """
    with _Recorder() as recorder:
        outputs = as_tuple(getattr(torch.ops.anyflow, op).default(*arguments.values()))
        outputs = tuple(o for o in outputs if o.requires_grad)
        wanted = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.randn_like(o) for o in outputs])
    return recorder.calls


class _Recorder(TorchDispatchMode):
    """Keep the arguments of the operators of anyflow that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "anyflow":
            self.calls[func._opname.removesuffix("_native")] = args
        return func(*args, **({} if kwargs is None else kwargs))


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Return the results of an operator as a tuple, also where it has one only."""
    return result if isinstance(result, tuple) else (result,)


def _flow_map_inputs(
    epsilon_plus: Tensor, epsilon_minus: Tensor, **others: Any
) -> tuple[Tensor, Tensor]:
    return ops.flow_map_batch(epsilon=(epsilon_plus, epsilon_minus), **others)


def _flow_map_loss(need_grad: bool, **others: Any) -> Tensor:
    return ops.flow_map_loss(**others)  # whether a gradient is needed follows from pred


# Public functions whose arguments are not those of the operator's schema.
_ADAPTERS: dict[str, Callable[..., Any]] = {
    "flow_map_inputs": _flow_map_inputs,
    "flow_map_loss": _flow_map_loss,
}
