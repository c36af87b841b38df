"""Which grids a model takes."""

from __future__ import annotations

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig
from shodh_moe.config.sizes import misfit, require_size, require_slabs, size_step


def test_a_grid_is_a_multiple_of_latents_patches_and_windows():
    window = {"router": {"context": "window", "window": 3}}
    assert size_step(ModelConfig()) == 8
    assert size_step(ModelConfig(patch=2)) == 16
    assert size_step(ModelConfig.model_validate({"moe": window, "patch": 2})) == 48
    assert size_step(ModelConfig.model_validate({"moe": {**window, "num_experts": 0, "shared_experts": 1}})) == 8
    require_size([48, 32, 64], ModelConfig(patch=2), "grid")


def test_a_misfit_names_the_nearest_sizes():
    assert misfit([16, 24, 8], 8) is None
    assert str(misfit([50, 33, 64], 8)).endswith("along each axis: the nearest sizes are [48, 32, 64] and [56, 40, 64]")
    assert misfit([5, 16, 16], 8) == "not a multiple of 8 along each axis: the nearest sizes are [8, 16, 16]"
    with pytest.raises(UserError) as raised:
        require_size([24, 16, 16], ModelConfig(patch=2), "flow.hdf5 has grid")
    assert str(raised.value) == (
        "flow.hdf5 has grid [24, 16, 16], not a multiple of 16 along each axis: the nearest sizes are [16, 16, 16] and "
        "[32, 16, 16] (from the tokenizer's compression 8 times model.patch 2); crop, pad or resample to one"
    )


def test_slabs_cut_neither_tokens_nor_windows():
    require_slabs([16, 5, 5], ModelConfig(), 4)
    require_slabs([5, 5, 5], ModelConfig(), 1)
    with pytest.raises(UserError, match=r"context_size 3 does not divide the 16 tokens .*: set it to 2"):
        require_slabs([32, 32, 32], ModelConfig(patch=2), 3)
    windows = ModelConfig.model_validate({"moe": {"router": {"context": "window", "window": 2}}})
    require_slabs([8, 8, 8], windows, 4)
    for slabs, says in ((8, "context_size 8 cuts windows of 2 tokens"), (7, "context_size 7 does not divide the 8")):
        with pytest.raises(UserError, match=f"{says} .*: set it to 4"):
            require_slabs([8, 8, 8], windows, slabs)
