"""Count the bytes of live tensors, as a GPU's allocator would."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages:
    """The bytes of storages that are alive; each counts once, until it is freed.

    Args:
        known: tensors whose storages do not count.

    Attributes:
        now: bytes alive now.
        peak: the largest value of ``now`` so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class LiveBytes(TorchDispatchMode):
    """A context manager that counts the bytes of all storages created inside its block, until they are freed.

    Tensors may be fake (inside a `FakeTensorMode`), which count although they have no memory. Those on the meta device
    do not count.

    Args:
        known: tensors that exist already and are not counted.
        workspace: returns the temporary bytes that an operation needs, given its name, inputs and outputs.

    Attributes:
        now: bytes alive now.
        peak: the largest value of ``now`` so far.
        bound: the largest value so far of ``now`` plus the running operation's workspace; 0 without ``workspace``.
    """

    def __init__(
        self, known: Iterable[Tensor] = (), workspace: Callable[[str, list[Tensor], list[Tensor]], int] | None = None
    ):
        super().__init__()
        self._storages, self.bound = Storages(known), 0
        self._workspace = workspace

    @property
    def now(self) -> int:
        return self._storages.now

    @property
    def peak(self) -> int:
        return self._storages.peak

    @peak.setter
    def peak(self, value: int) -> None:
        self._storages.peak = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type != "meta"]
        for leaf in outputs:
            self._storages.add(leaf)
        if self._workspace:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.bound = max(self.bound, self.now + self._workspace(str(func), inputs, outputs))
        return result
