"""Fixtures shared by the tests of the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))
