"""Registration of an operator with ``torch.library``: schema, implementations, fake, autograd.

Every operator is ``torch.ops.anyflow.<name>`` with a backward ``<name>_backward`` that is an
operator too, so that ``torch.compile`` keeps both as they are. The implementations are found by
convention, all with the arguments of the schema: the eager ones are given here, the Triton ones are
``forward`` and ``backward`` of ``anyflow.kernels.<name>`` (imported when first used), the native
ones are the operators ``<name>_native`` and ``<name>_backward_native``, which have a schema from
here and their implementations, by device, from ``anyflow._C``. Outputs are contiguous and alias
nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anyflow.ops._common import check_dense
from anyflow.ops.backend import OPERATORS, choose, forced_backend
from anyflow.ops.native import register as register_native
from anyflow.ops.setting import held, holding

_LIBRARY = torch.library.Library("anyflow", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# operator, backward ones among them -> eager reference
REFERENCES: dict[str, Callable[..., Any]] = {}

Function = Callable[..., Any]
Unsupported = Callable[..., "str | None"]


class Operator:
    """One operator: calling it runs the eager reference directly, where autograd and compilers see
    through it, or ``torch.ops.anyflow.<name>`` when a kernel is chosen. Forward-mode derivatives
    (jvp) are the reference's.

    Args:
        name: of the operator and of its module in ``anyflow.kernels``.
        signature: arguments and results in the schema language, all positional.
        reference: eager implementation, differentiable.
        fake: results for fake tensors.
        check: raises a ValueError about arguments that are none of the operator's; takes them all.
            The native kernels have checks of their own (``csrc/checks.cpp``).
        unsupported: says of the arguments why the kernels do not take them, or None.
        backends: those that it has kernels for; forcing another one runs the reference.
    """

    def __init__(
        self,
        name: str,
        signature: str,
        *,
        reference: Function,
        fake: Function,
        check: Function,
        unsupported: Unsupported,
        backends: tuple[str, ...] = ("triton", "native"),
    ) -> None:
        OPERATORS[name] = backends
        self.name = name
        self.reference = reference
        self.check = check
        self.unsupported = unsupported
        self._define(name, signature, "forward", reference, fake, check, unsupported)
        self.overload = getattr(torch.ops.anyflow, name).default
        self.native = getattr(torch.ops.anyflow, f"{name}_native").default

    def register_backward(
        self,
        signature: str,
        *,
        reference: Function,
        fake: Function,
        check: Function,
        unsupported: Unsupported,
    ) -> None:
        """Define ``<name>_backward``, with the same five things; it has no derivative of its own,
        and says so.
        """
        name = f"{self.name}_backward"
        self._define(name, signature, "backward", reference, fake, check, unsupported)
        self.backward_unsupported = unsupported
        self.backward_overload = getattr(torch.ops.anyflow, name).default
        self.backward_native = getattr(torch.ops.anyflow, f"{name}_native").default

        def no_second_derivative(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(
                f"anyflow.ops.{self.name}: a fused kernel has no second derivative; the reference "
                "has one: "
                "run forward and backward under use_backend('eager')"
            )

        torch.library.register_autograd(
            f"anyflow::{self.name}_backward", no_second_derivative, lib=_LIBRARY
        )

    def register_autograd(self, setup_context: Function, backward: Function) -> None:
        """Connect the two, as ``torch.library.register_autograd``; the settings of the forward hold
        in the backward.
        """

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.held = held()
            setup_context(ctx, inputs, output)

        def run(ctx: Any, *grads: Any) -> Any:
            with holding(ctx.held):
                return backward(ctx, *grads)

        torch.library.register_autograd(
            f"anyflow::{self.name}", run, setup_context=setup, lib=_LIBRARY
        )

    def __call__(self, *args: Any) -> Any:
        if has_tangent(*args):  # torch would drop it, and the derivative would be 0
            forced = forced_backend()
            if forced is not None and forced[0] != "eager":
                raise RuntimeError(
                    f"anyflow.ops.{self.name}: backend {forced[0]!r} ({forced[1]}) has no "
                    "forward-mode derivative; the "
                    "reference has one: use_backend('eager')"
                )
            return self.reference(*args)
        backend = choose(self.name, _device(args), self.unsupported, args)
        if backend == "eager":
            return self.reference(*args)
        if backend == "native" and _no_derivative():
            # past a second dispatch, which costs as much as a small kernel
            return self.native(*args)
        return self.overload(*args)

    def backward(self, *args: Any) -> Any:
        """The gradients, by ``<name>_backward``: what the backward given to
        :meth:`register_autograd` calls.
        """
        backend = choose(self.name, _device(args), self.backward_unsupported, args, "backward")
        if backend == "native" and _no_derivative():
            return self.backward_native(*args)
        return self.backward_overload(*args)

    def _define(
        self,
        name: str,
        signature: str,
        direction: str,
        reference: Function,
        fake: Function,
        check: Function,
        unsupported: Unsupported,
    ) -> None:
        def implementation(*args: Any) -> Any:
            backend = choose(self.name, _device(args), unsupported, args, direction)
            if backend == "native":
                return native(*args)  # which has its own checks
            for tensor in args:
                if isinstance(tensor, Tensor):
                    check_dense(name, tensor)
            check(*args)
            if backend == "triton":
                return getattr(importlib.import_module(f"anyflow.kernels.{self.name}"), direction)(
                    *args
                )
            return _contiguous(reference(*args))

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        _LIBRARY.define(f"{name}{signature}", tags=_TAGS)
        _LIBRARY.define(f"{name}_native{signature}")
        register_native(name)
        native = getattr(torch.ops.anyflow, f"{name}_native").default
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        for registered in (name, f"{name}_native"):
            torch.library.register_fake(f"anyflow::{registered}", checked_fake, lib=_LIBRARY)
        REFERENCES[name] = reference


def has_tangent(*args: Any) -> bool:
    """Whether a forward-mode derivative is being taken through one of the arguments."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def _no_derivative() -> bool:
    """Whether nobody asks for one: no autograd, no forward mode, no compiler that would trace the
    call.
    """
    return not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0
    )


def _device(args: Sequence[Any]) -> torch.device:
    return next(a for a in args if isinstance(a, Tensor)).device


def _contiguous(result: Any) -> Any:
    return (
        tuple(r.contiguous() for r in result) if isinstance(result, tuple) else result.contiguous()
    )


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of x's shape, dtype and device: what the fakes of element-wise results
    return.
    """
    return torch.empty_like(x, memory_format=torch.contiguous_format)
