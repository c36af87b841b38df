"""Run an operation in a chosen form: the torch reference, or Triton (interpreted without a GPU)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """``SHODH_KERNELS=name`` inside the block."""
    with mock.patch.dict(os.environ, {"SHODH_KERNELS": name}):
        yield
