"""Hold settings in a context: a thread, an asyncio task, and what either copies its context to."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from anyflow.ops.native import EXTENSION


class _Block:
    """Mark an entered ``with`` block of a setting."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open = True


# What holds in a context, from the outermost block to the innermost; without a block, what was set
# by a plain call.
_State = tuple[tuple[_Block | None, Any], ...]


class Setting:
    """Hold a value that blocks and plain calls set; None where nothing has set one.

    The value is read from the context of the caller. Autograd's threads of a device have no context
    of their own: they read that of the thread that called ``backward``. In code that
    ``torch.compile`` traces, the value is a constant of the graph, which the guards of every call
    compare with that of its context; blocks inside such code hold inside.

    Args:
        name: name of the setting; unique.
    """

    def __init__(self, name: str) -> None:
        self._state: ContextVar[_State] = ContextVar(f"anyflow.{name}", default=())
        self._key = f"anyflow.{name}"
        self._traced = _Traced()
        self._live = _Mirror() if EXTENSION is None else EXTENSION.Evaluated(self._read)

    def get(self) -> Any:
        """Return the value that holds here."""
        if torch.compiler.is_compiling():
            traced = self._traced.value
            return self._live.value if traced is None else traced[0]
        return self._read()

    def set(self, value: Any) -> None:
        """Set the value until the innermost block of this context ends; without one, for good."""
        state = self._state.get()
        # without the blocks that another context has ended, in which no value would be read
        state = tuple(entry for entry in state if entry[0] is None or entry[0].open)
        block = state[-1][0] if state else None
        self._put((*state[:-1], (block, value)))

    def enter(self, value: Any, shared: bool = True) -> _Block:
        """Begin a block with a value; ``shared``: autograd's threads are to read it, too."""
        block = _Block()
        self._put((*self._state.get(), (block, value)), shared)
        return block

    def checked(self, value: Any) -> Any:
        """Return a value that may be set."""
        return value

    def leave(self, blocks: list[_Block], shared: bool = True) -> None:
        """End the last begun of some blocks, wherever the blocks of others begin and end.

        A block that another context began (a generator that one thread starts and another one ends)
        is over for all.
        """
        state = self._state.get()
        for index in range(len(state) - 1, -1, -1):
            block = state[index][0]
            if block is not None and block in blocks:
                blocks.remove(block)
                self._put(state[:index] + state[index + 1 :], shared)
                return
        blocks.pop().open = False

    def _read(self) -> Any:
        state = self._state.get()
        if state:
            return next(
                (value for block, value in reversed(state) if block is None or block.open), None
            )
        if not torch._C._is_key_in_tls(self._key):
            return None
        thread, value = torch._C._get_obj_in_tls(self._key)
        # The thread that has set it has its context; another one can only have it from autograd.
        return None if thread == threading.get_ident() else value

    def _put(self, state: _State, shared: bool = True) -> None:
        self._state.set(state)
        self._traced.value = None
        if EXTENSION is None:
            self._live.value = self._read()
        if shared:
            _share(self._key, (threading.get_ident(), self._read()))


def _stash_steals() -> bool:
    """Return whether torch takes an uncounted reference to what it stashes (2.11, not 2.13)."""
    probe = [object()]
    before = sys.getrefcount(probe)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))  # enough for either
    torch._C._stash_obj_in_tls("anyflow.probe", probe)
    return sys.getrefcount(probe) == before + 1


_STASH_STEALS = _stash_steals()


def _share(key: str, value: Any) -> None:
    """Store an object that autograd's threads read, and that lives as long as it is stored."""
    if _STASH_STEALS:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)


class _Traced(threading.local):
    """Hold the setting of a block inside traced code, as a 1-tuple."""

    value: tuple[Any] | None = None


class _Mirror(threading.local):
    """Hold the value of a thread's last context, where the extension for guards is not built."""

    value: Any = None


class BackendSetting(Setting):
    """Hold the name of a backend that blocks, plain calls or an environment variable force.

    Args:
        name: name of the setting; unique.
        kind: what error messages call it.
        names: the backends.
        variable: environment variable that forces a backend where nothing nearer does.
        use: the :class:`Use` of the setting, by name.
    """

    def __init__(
        self, name: str, *, kind: str, names: tuple[str, ...], variable: str, use: str
    ) -> None:
        super().__init__(name)
        self.names = names
        self._kind, self._variable, self._by_use = kind, variable, f"forced by {use}()"
        self._by_variable = f"forced by {variable}"

    def checked(self, value: Any, prefix: str = "") -> Any:
        """Return the name of a backend, or None for the automatic choice.

        Raises:
            ValueError: none of the backends has this name; ``prefix`` says where it was given.
        """
        if value is not None and value not in self.names:
            raise ValueError(
                f"{prefix}unknown {self._kind} {value!r}; expected one of {', '.join(self.names)}"
            )
        return value

    def forced(self) -> tuple[str, str] | None:
        """Return the forced backend and who forces it, or None for the automatic choice."""
        name = self.get()
        if name is not None:
            return name, self._by_use
        name = os.environ.get(self._variable)
        if name:
            return self.checked(name, f"{self._variable}: "), self._by_variable
        return None


class Use:
    """Set a setting at once, or while a ``with`` block lasts.

    An object may be used any number of times, in any number of threads.
    """

    setting: Setting

    def __init__(self, value: Any) -> None:
        value = self.setting.checked(value)
        self._value = value
        self._blocks: list[_Block] = []
        self._previous: tuple[Any] | None = None
        setting = self.setting
        if torch.compiler.is_compiling():
            self._previous = setting._traced.value
            setting._traced.value = (value,)
            return
        self._before: _State | None = setting._state.get()
        setting.set(value)
        self._after = setting._state.get()

    def __enter__(self) -> Use:
        setting = self.setting
        if torch.compiler.is_compiling():
            setting._traced.value = (self._value,)
            return self
        if self._before is not None and setting._state.get() is self._after:
            # the block is what sets it, not the call that has made this object
            setting._put(self._before)
        self._before = None
        self._blocks.append(setting.enter(self._value))
        return self

    def __exit__(self, *exc: object) -> None:
        if torch.compiler.is_compiling():
            self.setting._traced.value = self._previous
        else:
            self.setting.leave(self._blocks)


@contextmanager
def holding(values: dict[Setting, Any]) -> Iterator[None]:
    """Give settings the values that :func:`held` has returned elsewhere."""
    blocks = [(setting, [setting.enter(value, shared=False)]) for setting, value in values.items()]
    try:
        yield
    finally:
        for setting, block in blocks:
            setting.leave(block, shared=False)


OPERATOR_BACKEND = BackendSetting(
    "operator_backend",
    kind="backend",
    names=("eager", "triton", "native"),
    variable="ANYFLOW_BACKEND",
    use="use_backend",
)
ATTENTION_BACKEND = BackendSetting(
    "attention_backend",
    kind="attention backend",
    names=("flash_attn_3", "flash_attn_2", "native", "cudnn", "flash", "efficient", "math"),
    variable="ANYFLOW_ATTENTION",
    use="use_attention_backend",
)
ASSUMED_CAPABILITY = Setting("assumed_capability")


def held() -> dict[Setting, Any]:
    """Return what holds here, for a backward or a recomputation later, in whatever thread."""
    return {
        setting: setting.get()
        for setting in (OPERATOR_BACKEND, ATTENTION_BACKEND, ASSUMED_CAPABILITY)
    }


def hold(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it would run here, for a later call in any thread."""
    values = held()

    def run(*args: Any, **kwargs: Any) -> Any:
        with holding(values):
            return function(*args, **kwargs)

    return run
