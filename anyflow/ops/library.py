"""Register operators with ``torch.library``, each from its reference and that of its backward.

Every operator is ``torch.ops.anyflow.<name>`` with a backward ``<name>_backward`` that is an
operator too, so that ``torch.compile`` keeps both as they are. The implementations are found by
convention, all with the arguments of the reference. The eager one is the reference itself. The
Triton ones are ``forward`` and ``backward`` of ``anyflow.kernels.<name>``, imported when first
used. The native ones are the operators ``<name>_native`` and ``<name>_backward_native``, which have
a schema from here and their implementations, by device, from ``anyflow._C``. Results are contiguous
and alias nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anyflow.ops._common import KERNEL_DTYPES, MAX_KERNEL_DIM, check_dense, describe
from anyflow.ops.backend import OPERATORS, choose, forced_backend
from anyflow.ops.native import register as register_native
from anyflow.ops.setting import held, holding

_LIBRARY = torch.library.Library("anyflow", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

Function = Callable[..., Any]

# operator, backward ones among them -> eager reference
REFERENCES: dict[str, Function] = {}


@dataclass(frozen=True)
class Limit:
    """Describe the tensors that the kernels of an operator take.

    Attributes:
        multiple: number of which D, the last dimension of the first operand, is a multiple.
        largest: the largest D; None for any.
        free: names of operands that may have any dtype.
    """

    multiple: int = 1
    largest: int | None = None
    free: tuple[str, ...] = ()

    def problem(self, x: Tensor, operands: Sequence[Tensor | None]) -> str | None:
        """Return what about the operands the kernels do not take, or None; D is x's."""
        if self.largest is not None:
            d = x.shape[-1] if x.ndim else 0
            if d % self.multiple or not 0 < d <= self.largest:
                return f"D={d} (kernels take multiples of {self.multiple} up to {self.largest})"
        for operand in operands:
            if operand is not None and operand.dtype not in KERNEL_DTYPES:
                return f"{describe(operand)} (kernels take bfloat16, float16 and float32)"
        return None


# kernels that read elements one by one
ELEMENTS = Limit()
# kernels that hold the D elements of a token in registers
WHOLE_TOKENS = Limit(multiple=8, largest=MAX_KERNEL_DIM)


class Direction:
    """Register one operator, forward or backward, and run it on the chosen backend.

    Args:
        op: name of the operator, and of its module in ``anyflow.kernels``.
        name: ``"forward"`` or ``"backward"``, a function of that module.
        reference, check, limit, fake: as those of :class:`Operator`.
        result: name of the first result, of which an argument ``dtype`` is the dtype.
    """

    def __init__(
        self,
        op: str,
        name: str,
        reference: Function,
        *,
        check: Function,
        limit: Limit,
        fake: Function | None,
        result: str = "",
    ) -> None:
        self.op, self.name, self._result = op, name, result
        self._reference, self._check, self._limit, self._own_fake = reference, check, limit, fake
        self.registered = op if name == "forward" else f"{op}_{name}"
        REFERENCES[self.registered] = reference
        schema = torch.library.infer_schema(reference, mutates_args=())
        _LIBRARY.define(f"{self.registered}{schema}", tags=_TAGS)
        _LIBRARY.define(f"{self.registered}_native{schema}")
        register_native(self.registered)
        self.overload = getattr(torch.ops.anyflow, self.registered).default
        self.native = getattr(torch.ops.anyflow, f"{self.registered}_native").default
        _LIBRARY.impl(self.registered, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"anyflow::{self.registered}", self._fake, lib=_LIBRARY)
        # register_fake() would read the caller's source, and nothing but fake tensors comes here
        _LIBRARY.impl(f"{self.registered}_native", self._fake, "Meta")

        arguments = self.overload._schema.arguments
        kinds = {a.name: str(a.real_type) for a in arguments}
        self.names = list(kinds)
        self.tensors = [n for n, kind in kinds.items() if "Tensor" in kind]
        self.gradients = [n for n in self.tensors if n == "grad" or n.startswith("grad_")]
        self._defaults = [a.default_value for a in arguments]
        self._dtype = self.names.index("dtype") if "dtype" in self.names else None
        limited = [n for n in self.tensors if n not in limit.free]
        # first an operand that is always there and has D, as incoming gradients may not
        limited.sort(key=lambda n: (n in self.gradients, kinds[n] != "Tensor"))
        self._limited = [self.names.index(n) for n in limited]
        # the operand that a result is like, and the flag without which it is empty
        self.like: list[tuple[int, int | None]]
        self.like = [(self._limited[0], None)] * len(self.overload._schema.returns)

    def __call__(self, *args: Any) -> Any:
        """Run the operator on the chosen backend."""
        return self.run(self.choose(args), args)

    def run(self, backend: str, args: Sequence[Any]) -> Any:
        """Run the operator, of which the backend has been chosen."""
        if backend == "native" and _no_derivative():
            # past a second dispatch, which costs as much as a small kernel
            return self.native(*args)
        return self.overload(*args)

    def choose(self, args: Sequence[Any]) -> str:
        """Return the backend that runs a call."""
        device = args[self._limited[0]].device
        return choose(self.op, device, self._unsupported, args, self.name)

    def _unsupported(self, *args: Any) -> str | None:
        if self._dtype is not None and args[self._dtype] not in KERNEL_DTYPES:
            return f"{self._result} in {str(args[self._dtype]).removeprefix('torch.')}"
        operands = [args[i] for i in self._limited]
        return self._limit.problem(operands[0], operands)

    def _run(self, *args: Any) -> Any:
        args = self._filled(args)
        backend = self.choose(args)
        if backend == "native":
            return self.native(*args)  # which has its own checks
        for tensor in args:
            if isinstance(tensor, Tensor):
                check_dense(self.registered, tensor)
        self._check(*args)
        if backend == "triton":
            module = importlib.import_module(f"anyflow.kernels.{self.op}")
            return getattr(module, self.name)(*args)
        return _contiguous(self._reference(*args))

    def _fake(self, *args: Any) -> Any:
        args = self._filled(args)
        self._check(*args)
        if self._own_fake is not None:
            return _contiguous(self._own_fake(*args))
        results = []
        for like, flag in self.like:
            x, wanted = args[like], flag is None or args[flag]
            if x is None or not wanted:
                results.append(args[self._limited[0]].new_empty(0))
            else:
                results.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        return results[0] if len(results) == 1 else tuple(results)

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return all arguments: the dispatcher drops the last ones where they are the defaults."""
        return *args, *self._defaults[len(args) :]


class Operator:
    """Define an operator by its reference and the reference of its backward.

    Calling it runs the eager reference directly, where autograd and compilers see through it, or
    ``torch.ops.anyflow.<name>`` where a kernel is chosen. Forward-mode derivatives (jvp) are the
    reference's.

    The names of parameters connect the two directions. The backward reference takes, in this order,
    the gradients of the first results (``grad``, or ``grad_<result>`` of several); tensors, then
    other values, of the forward by their names; and ``<input>_gradient``, whether an input needs a
    gradient, without which its gradient is empty. It returns the gradients of the first inputs. The
    other results are not differentiable. A forward with an argument ``need_grad`` has a gradient
    only where that was True.

    Args:
        reference: ``<name>_reference``, the eager implementation, differentiable; its annotations
            are the schema of the operator, all arguments positional.
        backward: ``<name>_backward_reference``, the eager implementation of the gradients. It has
            no derivative of its own, and says so.
        check: raises a ValueError about arguments that are none of the operator's; takes them all.
            The native kernels have checks of their own.
        check_backward: the same for the backward.
        limit: what the kernels take.
        fake: results for fake tensors, made contiguous, such as those of the reference; None where
            all results are like the first operand.
        fake_backward: the same for the backward; None where a gradient is like its input or, of an
            input that the backward does not take, like the first tensor that it does.
        backends: those that it has kernels for.
        results: names of the results, where an argument refers to them.
        passed: an input whose gradient is the incoming one; the backward does not return it.
    """

    def __init__(
        self,
        reference: Function,
        backward: Function,
        *,
        check: Function,
        check_backward: Function,
        limit: Limit,
        fake: Function | None = None,
        fake_backward: Function | None = None,
        backends: tuple[str, ...] = ("triton", "native"),
        results: tuple[str, ...] = (),
        passed: str | None = None,
    ) -> None:
        self.name = reference.__name__.removesuffix("_reference")
        OPERATORS[self.name] = backends
        self.reference = reference
        self.forward = Direction(
            self.name,
            "forward",
            reference,
            check=check,
            limit=limit,
            fake=fake,
            result=results[0] if results else "",
        )
        self.backward = Direction(
            self.name, "backward", backward, check=check_backward, limit=limit, fake=fake_backward
        )
        self._connect(results, passed)
        torch.library.register_autograd(
            f"anyflow::{self.name}",
            self._run_backward,
            setup_context=self._setup_context,
            lib=_LIBRARY,
        )
        torch.library.register_autograd(
            f"anyflow::{self.name}_backward", self._second_derivative, lib=_LIBRARY
        )

    def _connect(self, results: tuple[str, ...], passed: str | None) -> None:
        """Work out by name what the backward takes and what it returns."""
        inputs, backward = self.forward.names, self.backward
        known, names = [*inputs, *results], backward.names
        flags = [n for n in names if n not in known and n.removesuffix("_gradient") in inputs]
        tensors = [n for n in backward.tensors if n not in backward.gradients]
        constants = [n for n in names if n not in (*backward.tensors, *flags)]
        assert names == [*backward.gradients, *tensors, *constants, *flags], f"order of {names}"
        self._tensors = [known.index(n) for n in tensors]
        self._constants = [known.index(n) for n in constants]
        self._flags = [inputs.index(n.removesuffix("_gradient")) for n in flags]
        self._passed = None if passed is None else inputs.index(passed)
        differentiable = [n for n in inputs if n != passed][: len(backward.like)]
        self._differentiable = [inputs.index(n) for n in differentiable]
        self._need_grad = inputs.index("need_grad") if "need_grad" in inputs else None
        for i, n in enumerate(differentiable):
            flag = names.index(f"{n}_gradient") if f"{n}_gradient" in flags else None
            backward.like[i] = (names.index(n) if n in names else backward.like[i][0], flag)

    def __call__(self, *args: Any) -> Any:
        if has_tangent(*args):  # torch would drop it, and the derivative would be 0
            forced = forced_backend()
            if forced is not None and forced[0] in OPERATORS[self.name]:
                raise RuntimeError(
                    f"anyflow.ops.{self.name}: backend {forced[0]!r} ({forced[1]}) has no "
                    "forward-mode derivative; the reference has one: use_backend('eager')"
                )
            return self.reference(*args)
        backend = self.forward.choose(args)
        return self.reference(*args) if backend == "eager" else self.forward.run(backend, args)

    def save(self, ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        """Keep what the backward takes."""
        known = (*inputs, *results)
        ctx.save_for_backward(*[known[i] for i in self._tensors])
        ctx.constants = [known[i] for i in self._constants]
        ctx.has_gradient = self._need_grad is None or inputs[self._need_grad]
        if constant := results[len(self.backward.gradients) :]:
            ctx.mark_non_differentiable(*constant)

    def gradients(self, ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient of every input, from those of the results and what was kept."""
        gradients: list[Tensor | None] = [None] * len(self.forward.names)
        # no tensor is among those that the dispatcher has dropped
        needed = [*ctx.needs_input_grad, *[False] * (len(gradients) - len(ctx.needs_input_grad))]
        if self._passed is not None:
            gradients[self._passed] = grads[0]
        if True not in [needed[i] for i in self._differentiable]:
            return tuple(gradients)
        if not ctx.has_gradient:
            raise RuntimeError(f"anyflow::{self.name} ran without need_grad, so it has no gradient")
        found = self.backward(
            *grads[: len(self.backward.gradients)],
            *ctx.saved_tensors,
            *ctx.constants,
            *[needed[i] for i in self._flags],
        )
        for i, gradient in zip(self._differentiable, _as_tuple(found), strict=True):
            gradients[i] = gradient if needed[i] else None
        return tuple(gradients)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.held = held()  # the settings of the forward hold in the backward
        self.save(ctx, inputs, _as_tuple(output))

    def _run_backward(self, ctx: Any, *grads: Any) -> Any:
        with holding(ctx.held):
            return self.gradients(ctx, *grads)

    def _second_derivative(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"anyflow.ops.{self.name}: a fused kernel has no second derivative; the reference "
            "has one: run forward and backward under use_backend('eager')"
        )


def has_tangent(*args: Any) -> bool:
    """Return whether a forward-mode derivative is being taken through one of the arguments."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def _no_derivative() -> bool:
    """Return whether neither autograd, nor forward mode, nor a tracing compiler sees the call."""
    return not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0
    )


def _as_tuple(result: Any) -> tuple[Any, ...]:
    """Return the results of an operator as a tuple, also where there is one."""
    return result if isinstance(result, tuple) else (result,)


def _contiguous(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(r.contiguous() for r in result)
    return result.contiguous()
