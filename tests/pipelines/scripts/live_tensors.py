"""Count the bytes of tensors that live at once."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Record the most bytes of tensors that live at once and are made while the mode is on."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self._live = 0
        self._known = {id(tensor.untyped_storage()) for tensor in existing}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and id(storage := tensor.untyped_storage()) not in self._known
            ):
                self._known.add(id(storage))
                self._live += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.bytes = max(self.bytes, self._live)
        return out

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._live -= nbytes
