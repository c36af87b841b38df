"""A CUDA device that is not there: torch and DeepSpeed find one in this process, but nothing can run on it.

The changes are those of a whole process and last until it ends, so a rehearsal has a process of its own.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from shodh_moe.base.errors import UserError

STUB = Path(__file__).with_name("cuda_stub.cpp")
_LIBRARY = torch.library.Library("aten", "IMPL")
CAPABILITY = (9, 0)  # of the pretended GPU, an H100


def pretend_cuda(rank: int, world: int) -> None:
    """Make this process rank ``rank`` of ``world``, with a GPU and a process group that sends nothing.

    The GPU is number 0 of its host, whatever the rank. Call it before DeepSpeed is imported.

    Raises:
        UserError: there is a CUDA build of torch, or the stub cannot be compiled.
    """
    if torch.version.cuda or torch.version.hip:
        raise UserError(
            "a rehearsal needs a torch without CUDA, because it takes the place of the device: install the CPU build "
            "of torch in an environment of its own"
        )
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ["DS_ACCELERATOR"] = "cuda"
    _load_stub()
    _replace_torch_cuda()
    # The engine would run backward passes on a thread of the device's own, where no frame says which code asked.
    torch.autograd.set_multithreading_enabled(False)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    import deepspeed

    from shodh_moe.training.deepspeed_patches import without_shared_memory_operation

    with without_shared_memory_operation():
        deepspeed.init_distributed(dist_backend="nccl", auto_mpi_discovery=False, verbose=False)


def _load_stub() -> None:
    """Compile the stub, unless an earlier process has, and load it. Takes about ten seconds the first time."""
    from torch.utils.cpp_extension import load

    name = f"shodh_cuda_stub_{torch.__version__.replace('.', '_').replace('+', '_')}"
    try:
        load(name, [str(STUB)], extra_cflags=["-O0"], is_python_module=False, with_cuda=False)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"a rehearsal compiles a small C++ file, which failed ({reason}): install a C++ compiler and ninja"
        ) from error


class Event:
    """An event that is always over. Times are zero."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def _replace_torch_cuda() -> None:
    """Replace what this project and DeepSpeed call in `torch.cuda`. Other functions still raise torch's own errors."""
    stream = _Stream()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: "pretended GPU",
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: SimpleNamespace(
            total_memory=80 * 2**30, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132
        ),
        "is_bf16_supported": lambda including_emulation=True: True,
        "Event": Event,
        "Stream": _Stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    nn.Module._apply = _apply  # type: ignore[method-assign]
    # A CUDA build has one kernel for each of these. A CPU build would use several operations, which keep more memory.
    for operation in ("silu_backward", "_fused_rms_norm"):
        _LIBRARY.impl(operation, _never, "CUDA")
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]
    # One copy, as of a real tensor, not one for each element.
    FakeTensor.tolist = lambda self: self.cpu().tolist()  # type: ignore[method-assign]


def _never(*args: Any) -> None:
    """A kernel that only has to exist, because fake tensors never reach it."""


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with the fused kernels that a GPU has; a CPU build of torch would choose separate products."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    if query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value)[0]


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Stands for the method behind `nn.Module.to`, which cannot exchange the contents of fake tensors."""
    for owner in module.modules() if recurse else [module]:
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or (changed := function(parameter.data)) is parameter.data:
                continue
            if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
                replacement = nn.Parameter(changed, parameter.requires_grad)
                replacement.__dict__.update(parameter.__dict__)
                owner._parameters[name] = replacement
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = function(buffer)
    return module
