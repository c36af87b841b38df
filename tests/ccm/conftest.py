"""Fixtures shared by the tests of merging experts."""

from __future__ import annotations

import pytest

from shodh_moe.ccm.expert import Expert
from tests.ccm.synthetic import make_ends


@pytest.fixture(scope="module")
def ends() -> tuple[Expert, Expert]:
    """A low and a high expert of one anchor."""
    return make_ends()
