"""Expert-parallel training of multi-physics foundation models on divergence-free latents.

The names in ``__all__`` are the public interface of this package (docs/python.md). They are imported on demand: torch
takes a second or more to load, and nothing here needs DeepSpeed before `train` is called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shodh_moe.base.home import ensure_home

if TYPE_CHECKING:
    from shodh_moe import kernels, metrics
    from shodh_moe.base.errors import UserError
    from shodh_moe.config import Config
    from shodh_moe.config.load import load_config
    from shodh_moe.data.dataset import Dataset, Fields, open_dataset
    from shodh_moe.inference import Model, load_model
    from shodh_moe.merging import merge
    from shodh_moe.runs.run import Run, open_run, train
    from shodh_moe.tokenizer import Tokenizer, load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Dataset",
    "Fields",
    "Model",
    "Run",
    "Tokenizer",
    "UserError",
    "kernels",
    "load_config",
    "load_model",
    "load_tokenizer",
    "merge",
    "metrics",
    "open_dataset",
    "open_run",
    "train",
]

_HOME = {
    "Config": "config",
    "Dataset": "data.dataset",
    "Fields": "data.dataset",
    "Model": "inference",
    "Run": "runs.run",
    "Tokenizer": "tokenizer",
    "UserError": "base.errors",
    "load_config": "config.load",
    "load_model": "inference",
    "load_tokenizer": "tokenizer",
    "merge": "merging",
    "open_dataset": "data.dataset",
    "open_run": "runs.run",
    "train": "runs.run",
}

ensure_home()  # before any library that looks for a home folder is imported


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
