"""Strides and noise that training draws for its samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.draws import add_noise, draw_noise, draw_strides
from tests.training.synthetic import write_latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draws")
    write_latents(folder, snapshots=9)
    return folder


def _samples(folder: Path, strides: list[int], ahead: int = 1) -> LatentSamples:
    return LatentSamples(load_latents(folder, "train"), 2, strides=strides, ahead=ahead)


def test_a_sample_consists_of_every_stride_th_snapshot(folder: Path) -> None:
    samples = _samples(folder, [1, 2], ahead=2)
    picks = [(0, 0), (1, 1), (1, 3)]
    batch = samples.batch(picks, [2, 1, 1])
    assert batch.stride_B.tolist() == [2, 1, 1]
    for row, ((domain, index), stride) in enumerate(zip(picks, (2, 1, 1), strict=True)):
        number, start = samples.index[domain][index]
        z_TCxyz = samples.trajectories[number].read()[start::stride]
        assert torch.equal(batch.history_BHCxyz[row], z_TCxyz[:2])
        assert torch.equal(batch.targets_BUCxyz[row], z_TCxyz[2:4])
    assert torch.equal(batch.target_BCxyz, batch.targets_BUCxyz[:, 0])


def test_samples_begin_wherever_the_smallest_stride_fits(folder: Path) -> None:
    assert _samples(folder, [1, 4]).sizes == _samples(folder, [1]).sizes == (3 * 7, 3 * 7)
    assert _samples(folder, [2]).sizes == (3 * 5, 3 * 5)
    samples = _samples(folder, [1, 2, 4])
    fitting = [samples.fitting_strides(0, index) for index in range(7)]
    assert fitting == [[1, 2, 4], [1, 2], [1, 2], [1, 2], [1, 2], [1], [1]]


def test_strides_that_fit_are_drawn_evenly_and_anew_in_each_step(folder: Path) -> None:
    samples = _samples(folder, [1, 2, 4])
    drawn = [draw_strides(samples, [(0, 0), (0, 1), (0, 6)], seed=0, step=step) for step in range(300)]
    first, second, last = (Counter(column) for column in zip(*drawn, strict=True))
    assert set(first) == {1, 2, 4}
    assert min(first.values()) > 70
    assert set(second) == {1, 2}
    assert set(last) == {1}


def test_draws_depend_on_seed_step_and_sample_alone(folder: Path) -> None:
    samples = _samples(folder, [1, 2])
    picks = [(0, 0), (1, 0), (0, 1), (1, 2)]
    history = samples.batch(picks).history_BHCxyz

    def drawn(picks: list[tuple[int, int]], seed: int, step: int) -> tuple[list[int], torch.Tensor]:
        return draw_strides(samples, picks, seed, step), draw_noise(samples, picks, seed, step)

    strides, noise = drawn(picks, 0, 5)
    assert noise.shape == history.shape
    assert torch.equal(draw_noise(samples, picks, 0, 5, slice(1, 2)), noise[:, :, :, 1:2])
    for row, pick in enumerate(picks):  # as another rank or micro-batch would draw it
        alone = drawn([pick], 0, 5)
        assert alone[0] == strides[row : row + 1]
        assert torch.equal(alone[1][0], noise[row])
    assert len({float(one.flatten()[0] / one.square().mean().sqrt()) for one in noise}) == len(picks)
    for other in ((1, 5), (0, 6)):
        assert not torch.isclose(drawn(picks, *other)[1], noise).any()


def test_noise_is_a_share_of_each_samples_history(folder: Path) -> None:
    samples = _samples(folder, [1])
    history = samples.batch([(0, 0), (1, 0)]).history_BHCxyz * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1, 1, 1)
    drawn = [draw_noise(samples, [(0, 0), (1, 0)], seed=0, step=step) for step in range(100)]
    noise = torch.stack([add_noise(history, one, 0.1) - history for one in drawn]).double()
    for sample in (0, 1):
        size = history[sample].double().square().mean().sqrt()
        assert float(noise[:, sample].std() / size) == pytest.approx(0.1, rel=0.03)
        assert abs(float(noise[:, sample].mean() / size)) < 0.003


def test_a_stride_or_unroll_for_which_all_trajectories_are_too_short_is_refused(folder: Path) -> None:
    for strides, ahead, says in (
        ([1, 5], 1, "the 11 snapshots that model.history 2 with model.strides 5 needs, the longest has 9"),
        ([1], 8, "the 10 snapshots that model.history 2 with training.unroll 8 needs"),
        ([1, 3], 3, "the 13 snapshots that model.history 2 with model.strides 3 and training.unroll 3 needs"),
    ):
        with pytest.raises(UserError, match=f"no trajectory of domain open_channel has {says}.*lower that"):
            _samples(folder, strides, ahead)
