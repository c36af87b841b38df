"""A dispatch mode in which tensors on a CUDA device are fake, and which records what a GPU would do with them.

Tensors on the CPU stay real and so does all work on them. Tensors on ``cuda`` are torch's fake tensors: they have
shapes, dtypes and a device, but no memory. Operations that mix devices raise, as on a GPU.

Code on the CPU may read numbers from the device: for these, small tensors have a *shadow*, a real tensor with plausible
numbers. Copies to the device, constants and the kernels of `SEEDS` give one; operations whose inputs all have one pass
it on. What has no shadow reads as zeros.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import shodh_moe.kernels
from shodh_moe.runs.live_bytes import Storages

aten, c10d = torch.ops.aten, torch.ops.c10d

PACKAGE = Path(shodh_moe.__file__).parent
KERNELS = Path(shodh_moe.kernels.__file__).parent
MOST_INTEGERS, MOST_FLOATS = 2**20, 2**12  # largest shadows, in elements

READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
RANDOM = {aten.uniform_.default, aten.normal_.default, aten.randn.default, aten.rand.default, aten.randint.default}
PRODUCTS = {
    *("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
}
KINDS = {
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_": "reduce",
    "barrier": "barrier",
}


class Wait(NamedTuple):
    """A place where the host waits for the device.

    Attributes:
        phase: what the run was doing.
        place: file and function, ``model/plan.py count_E``.
        what: the operation.
    """

    phase: str
    place: str
    what: str


class Collective(NamedTuple):
    """A kind of communication: ``phase``, the group's name, and ``kind`` such as all_reduce."""

    phase: str
    group: str
    kind: str


class Product(NamedTuple):
    """A kind of matrix product: where it is, and the dtypes of its inputs."""

    phase: str
    place: str
    operation: str
    dtypes: tuple[torch.dtype, ...]


class _Fake(FakeTensorMode):
    """Never touches a device, and keeps no constants, because shadows take their place."""

    @property
    def avoid_device_init(self) -> bool:
        return True

    def may_turn_const(self, t: Tensor) -> bool:
        return False


class Watch(TorchDispatchMode):
    """Records while it is active. See the module for what is fake.

    Attributes:
        phase: name of what the run does now; records carry it.
        waits: number of times for each `Wait`.
        collectives, sent: number and bytes of each `Collective`: bytes of the tensor that is reduced or broadcast, that
            all ranks together gather, or that a rank sends in an all-to-all.
        products: number of each `Product`.
        memory: the bytes of the tensors on the device.
        peaks: largest number of these bytes, by phase.
        groups: names of process groups by torch's names for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self.waits: Counter[Wait] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.sent: Counter[Collective] = Counter()
        self.products: Counter[Product] = Counter()
        self.memory = Storages()
        self.groups: dict[str, str] = {}
        self._fake = _Fake(allow_non_fake_inputs=True)
        self._pinned: set[int] = set()
        self._synchronize: Callable[..., None] = torch.cuda.synchronize

    def __enter__(self) -> Watch:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` then makes a copy that is seen
        self._synchronize = torch.cuda.synchronize
        torch.cuda.synchronize = lambda device=None: self._wait("synchronize")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.cuda.synchronize = self._synchronize
        torch._C._set_only_lift_cpu_tensors(False)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Give records made inside the block this phase, which stays if the block fails."""
        self.phase, self.memory.peak = phase, self.memory.now
        yield
        self.peaks[phase] = self.memory.peak
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if func is aten._pin_memory.default:
            return self._pin(args[0])
        if func is aten.is_pinned.default:
            return args[0].untyped_storage()._cdata in self._pinned
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes and (device is None or device.type != "cuda"):
            if not kwargs.pop("pin_memory", None):
                return func(*args, **kwargs)
            return self._pinned_now(func(*args, **kwargs))
        if func is aten.record_stream.default:
            return None
        if func in READS:
            self._wait(_name(func))
            return func(*(_number_of(arg) for arg in args))
        if (fakes and device is not None and device.type == "cpu") or (
            func is aten.copy_.default and not _fake(args[0])
        ):
            return self._to_host(func, args, kwargs)
        self._check_inputs(func, args, kwargs)
        return self._on_device(func, args, kwargs, fakes)

    def _on_device(self, func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor]) -> Any:
        shadows = self._shadows_of(func, args, kwargs)
        try:
            with self._fake:
                result = FORMS.get(func, func)(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            self._wait(f"{_name(func)}, whose shape depends on values")
            if shadows is None:
                raise
            with self._fake:
                result = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="cuda"), shadows[0])
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        for output in outputs:
            self.memory.add(output)
        if (name := _name(func)) in PRODUCTS:
            inputs = tuple(t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim > 1)
            self.products[Product(self.phase, self._place(), name, inputs)] += 1
        if seed := SEEDS.get(name):
            seed(outputs)
        else:
            found = [] if shadows is None else [leaf for leaf in tree_leaves(shadows[0]) if isinstance(leaf, Tensor)]
            for output, shadow in zip_longest(outputs, found[: len(outputs)]):
                _set_shadow(output, shadow)
        return result

    def _shadows_of(self, func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """Run an operation on the shadows of its inputs, if all have one; None otherwise."""
        if func in RANDOM or func.namespace != "aten":
            return None
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(_shadow(leaf) is None for leaf in leaves):
            return None
        if not leaves and _too_large(args, kwargs):
            return None
        args, kwargs = tree_map_only(Tensor, _shadow, (args, kwargs))
        kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        with torch.no_grad():
            result = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
        kept = [_keep(leaf) for leaf in tree_leaves(result)]
        return (result,) if all(kept) else None

    def _check_inputs(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note a hidden wait: a copy from memory that is not pinned, or indices on the CPU or of bool."""
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if not _fake(source):
                pinned = source.untyped_storage()._cdata in self._pinned
                pinned &= kwargs.get("dtype") in (None, source.dtype)  # else torch converts it in ordinary memory
                if waits or not pinned:
                    self._wait("copy to the device" if pinned else "copy to the device from memory that is not pinned")
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            for index in args[1]:
                if index is not None and index.ndim and not _fake(index):
                    self._wait("indices on the CPU")
                elif index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._wait("indices of bool")

    def _to_host(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Copy to the CPU: the copy is real and has the shadow's numbers, or zeros."""
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            if not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self._wait("copy to the CPU")
            return target.copy_(_number_of(source).to(target.dtype).expand_as(target))
        if not kwargs.get("non_blocking", False):
            self._wait("copy to the CPU")
        return _number_of(args[0]).to(kwargs.get("dtype") or args[0].dtype).clone()

    def _pin(self, tensor: Tensor) -> Tensor:
        return self._pinned_now(tensor.clone(memory_format=torch.contiguous_format))

    def _pinned_now(self, pinned: Tensor) -> Tensor:
        # The number of a freed storage may come back, which at worst hides a copy from memory that is not pinned.
        self._pinned.add(pinned.untyped_storage()._cdata)
        return pinned

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        group = next(_group(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        kind = KINDS.get(name := _name(func), name)
        tensors = tree_leaves(args[1] if kind == "reduce_scatter" or kind == "all_to_all" else args[0])
        tensors = [leaf for leaf in tensors if isinstance(leaf, Tensor)]
        key = Collective(self.phase, self._group_name(group), kind)
        self.collectives[key] += 1
        self.sent[key] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        if kind == "barrier":
            self._wait("barrier")
        for tensor in tensors:
            if kind != "barrier" and not _fake(tensor):
                raise RuntimeError(
                    f"{self._place()}: {kind} of a tensor on the CPU, which NCCL cannot send: put it on the device"
                )
        if kind in ("all_to_all", "all_gather"):
            _pass_on(args, group.rank(), group.size())
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _group_name(self, group: dist.ProcessGroup) -> str:
        known = self.groups.get(group.group_name)
        return known or ("world" if group.size() == dist.get_world_size() else f"{group.size()} ranks")

    def _wait(self, what: str) -> None:
        self.waits[Wait(self.phase, self._place(), what)] += 1

    def _place(self) -> str:
        """Return file and function of the innermost frame that belongs to this project or to DeepSpeed."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if place := _place_of(frame.f_code):
                return place
            frame = frame.f_back
        return "elsewhere"

    def place_of(self, error: BaseException) -> str:
        """Return file and function of the innermost frame of this project or DeepSpeed that an error passed through."""
        frames = [_place_of(frame.f_code) for frame, _ in traceback.walk_tb(error.__traceback__)]
        return next((place for place in reversed(frames) if place), "elsewhere")


def _name(func: Any) -> str:
    return func._schema.name.rpartition("::")[2]


def _place_of(code: CodeType) -> str:
    """File and function of code of this project or DeepSpeed, "" for other code and that of the rehearsal."""
    path, name = Path(code.co_filename), code.co_name
    if name.startswith("<"):  # a comprehension; since Python 3.12 most have no frame of their own
        return ""
    if path.is_relative_to(KERNELS):
        return f"kernels/{path.name} {name}"
    if path.is_relative_to(PACKAGE):
        return "" if path.is_relative_to(Path(__file__).parent) else f"{path.relative_to(PACKAGE).as_posix()} {name}"
    _, found, inside = path.as_posix().rpartition("/deepspeed/")
    return f"deepspeed/{inside} {name}" if found else ""


def _group(argument: torch.ScriptObject) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(argument)


def _fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)


def _shadow(tensor: Tensor) -> Tensor | None:
    """The real tensor that stands for ``tensor``: a small one on the CPU stands for itself."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "shadow", None)
    return tensor.detach() if _keep(tensor) else None


def _set_shadow(tensor: FakeTensor, shadow: Tensor | None) -> None:
    tensor.shadow = shadow  # type: ignore[attr-defined]


def _keep(result: Any) -> bool:
    if not isinstance(result, Tensor):
        return True
    return result.numel() <= (MOST_FLOATS if result.is_floating_point() else MOST_INTEGERS)


def _too_large(args: Any, kwargs: Any) -> bool:
    """Whether a function that makes a tensor from nothing would make one that is too large for a shadow."""
    sizes = next((arg for arg in args if isinstance(arg, (list, tuple, torch.Size))), None)
    if sizes is None:
        return any(isinstance(arg, int) and arg > MOST_INTEGERS for arg in args)
    count = 1
    for size in sizes:
        count *= size
    return count > MOST_FLOATS


def _number_of(value: Any) -> Any:
    """A real tensor for one on the device."""
    if not isinstance(value, FakeTensor):
        return value
    shadow = _shadow(value)
    return torch.zeros(value.shape, dtype=value.dtype) if shadow is None else shadow


def _pass_on(args: Any, rank: int, size: int) -> None:
    """Let what arrives from other ranks be what this rank sends, as if all ranks had the same numbers.

    With one exception: when all ranks tell each other how many of their samples go to which rank, those of rank r are
    this rank's moved on by r, so that each rank gets as many as the others.
    """
    outputs = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
    inputs = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
    shadow = _shadow(inputs[0])
    if shadow is not None and shadow.shape == (size, size) and torch.equal(shadow, shadow[0].expand(size, -1)):
        shadow = torch.stack([shadow[0].roll(other - rank) for other in range(size)])
    for output in outputs:
        if isinstance(output, FakeTensor):
            fits = shadow is not None and shadow.numel() == output.numel()
            _set_shadow(output, shadow.reshape(output.shape).clone() if fits else None)  # type: ignore[union-attr]


def _even_gating(outputs: list[FakeTensor]) -> None:
    """Give a gating kernel's results shadows: each expert gets the same number of consecutive tokens."""
    expert_N, routed_E, kept_E = outputs[1], outputs[3], outputs[4]
    experts, choices = len(routed_E), expert_N.numel()
    even_N = torch.arange(choices) * experts // choices
    _set_shadow(expert_N, even_N.view(expert_N.shape))
    for count_E in (routed_E, kept_E):
        _set_shadow(count_E, torch.bincount(even_N, minlength=experts))


SEEDS = {"topk_gating": _even_gating, "cosine_topk_gating": _even_gating}


def _rms_norm_shapes(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """The fused norm's results: the normalised rows, and the scale of each row."""
    scales = [*x.shape[: x.ndim - len(shape)], *[1] * len(shape)]
    return torch.empty_like(x), x.new_empty(scales, dtype=torch.promote_types(x.dtype, torch.float32))


# Results of operations for which torch has no fake form, because a CPU build uses several operations instead.
FORMS: dict[Any, Callable[..., Any]] = {aten._fused_rms_norm.default: _rms_norm_shapes}
