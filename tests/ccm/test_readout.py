"""Readouts find the alpha of the data, use only permitted frames, and report when alpha cannot be determined."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm import readout
from shodh_moe.ccm.expert import Expert, compose
from shodh_moe.ccm.readout import BANK, FLAT, GAMMAS, clip, fit_prefix, fit_scale, golden_section, rollout_errors
from shodh_moe.operators import nrmse
from tests.ccm.synthetic import regime, truth


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (lambda x: (x - 0.3) ** 2, 0.3),
        (lambda x: abs(x + 0.7), -0.7),
        (lambda x: x, -1.0),
        (lambda x: -x, 1.0),
        (lambda x: math.cosh(3 * (x - 0.9)), 0.9),
    ],
)
def test_golden_section_closes_in_on_the_minimum(error: Callable[[float], float], place: float) -> None:
    asked = []

    def counted(x: float) -> float:
        asked.append(x)
        return error(x)

    found, value = golden_section(counted, -1.0, 1.0, steps=7)
    assert value == error(found) == min(error(x) for x in asked)
    # Two initial evaluations, then one per step, each of which leaves 61.8 % of the interval.
    assert len(asked) == 9
    assert abs(found - place) <= 2 * 0.6181**7 + 1e-12
    assert -1 <= min(asked) <= max(asked) <= 1
    closer, _ = golden_section(error, -1.0, 1.0, steps=20)
    assert closer == pytest.approx(place, abs=2e-4)


def test_alpha_is_clipped() -> None:
    assert [clip(alpha) for alpha in (-9.0, -1.5, 0.3, 1.6)] == [-1.5, -1.5, 0.3, 1.5]
    assert clip(1.3, reach=1.0) == 1.0


def test_errors_are_those_of_a_rollout_from_only_the_given_frames(ends: tuple[Expert, Expert]) -> None:
    fields = truth(*ends, 0.0, frames=5)
    low = ends[0]
    errors = rollout_errors(low, fields, 0.0, given=2)
    torch.testing.assert_close(errors, nrmse(low.predict(fields[:, 1:2], 3, 0.0), fields[:, 2:]))
    torch.testing.assert_close(rollout_errors(low, fields, 0.0, 2, batch=1), errors)
    later = fields.clone()
    later[:, 3:] = 1.0
    torch.testing.assert_close(rollout_errors(low, later, 0.0, 2)[:, 0], errors[:, 0])


@pytest.mark.parametrize("alpha", [0.6, -1.1, 1.25])
def test_a_prefix_reveals_its_alpha(ends: tuple[Expert, Expert], alpha: float) -> None:
    found = fit_prefix(*ends, truth(*ends, alpha, frames=4))
    assert found.alpha == pytest.approx(alpha, abs=0.02)
    assert not found.flat
    assert [float(key) for key in found.bank] == list(BANK)
    assert found.error <= min(found.bank.values())
    nearest = min(found.bank, key=lambda key: found.bank[key])
    assert abs(float(nearest) - alpha) <= 0.125 + 1e-9
    assert found.record()["sharpness"] == found.sharpness


def test_an_optimum_beyond_the_bank_is_moved_to_its_end(ends: tuple[Expert, Expert]) -> None:
    found = fit_prefix(*ends, truth(*ends, 1.9, frames=4))
    assert found.alpha == BANK[-1]
    # The error is smaller one step farther out, so this is not an optimum.
    assert found.sharpness < 0


def test_only_the_first_frames_count(ends: tuple[Expert, Expert]) -> None:
    fields = truth(*ends, 0.6, frames=7)
    spoilt = fields.clone()
    spoilt[:, 4:] = float("nan")
    assert fit_prefix(*ends, spoilt, 4) == fit_prefix(*ends, fields, 4) == fit_prefix(*ends, fields[:, :4], 4)
    assert fit_prefix(*ends, fields, 3) != fit_prefix(*ends, fields, 4)


def test_sharpness_is_the_smaller_increase_one_step_away(
    ends: tuple[Expert, Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "compose", lambda low, high, alpha: alpha)

    def rising(rise: float) -> readout.Prefix:
        def errors(alpha: float, *_: object) -> torch.Tensor:
            steep = 3 * rise if alpha > 0.5 else rise
            return torch.tensor(1 + steep * abs(alpha - 0.5) / 0.25, dtype=torch.float64)

        monkeypatch.setattr(readout, "rollout_errors", errors)
        return fit_prefix(*ends, torch.zeros(1, 4, 2, 20, 20))

    sharp = rising(0.1)
    assert (sharp.alpha, sharp.error) == (0.5, 1.0)
    assert sharp.sharpness == pytest.approx(0.1)
    assert not sharp.flat
    assert rising(0.9 * FLAT).flat
    assert not rising(1.1 * FLAT).flat


def test_frames_that_do_not_depend_on_alpha_are_flat(ends: tuple[Expert, Expert]) -> None:
    # The change is a hundred times that of either expert, so all are equally wrong.
    fields = truth(*ends, 0.0, frames=4)
    fields[:, 1:] += 300 * torch.randn(fields[:, 1:].shape, generator=torch.Generator().manual_seed(0))
    found = fit_prefix(*ends, fields)
    assert found.flat
    assert found.sharpness < FLAT


def test_too_few_frames(ends: tuple[Expert, Expert]) -> None:
    fields = truth(*ends, 0.6, frames=3)
    with pytest.raises(UserError, match="has 3 frames, but 4 are needed"):
        fit_prefix(*ends, fields)
    with pytest.raises(UserError, match="leaves none to predict"):
        fit_prefix(*ends, fields, frames=1)


def test_scale_recovers_the_factor_of_the_validation_data(ends: tuple[Expert, Expert]) -> None:
    for gamma in (0.7, 1.2):
        regimes = [regime(truth(*ends, gamma * s, frames=6), s) for s in (-1.2, -0.6, 0.6, 1.2)]
        found = fit_scale(*ends, regimes)
        assert found["gamma"] == gamma
        assert list(found["errors"]) == [str(one) for one in GAMMAS]
        assert min(found["errors"].values()) == found["errors"][str(gamma)] < 1e-5
        # The mean over regimes of rollouts from the first four frames.
        expected = [rollout_errors(compose(*ends, clip(one.coordinate)), one.fields, 0.0, 4).mean() for one in regimes]
        assert found["errors"]["1.0"] == pytest.approx(sum(map(float, expected)) / 4, rel=1e-6)


def test_without_a_difference_gamma_is_1(ends: tuple[Expert, Expert]) -> None:
    assert fit_scale(*ends, [regime(truth(*ends, 0.3, frames=6), 0.0)])["gamma"] == 1.0


def test_a_diverging_rollout_is_never_chosen(ends: tuple[Expert, Expert], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "compose", lambda low, high, alpha: alpha)
    blown = {0.4: float("nan"), 1.0: float("inf")}
    monkeypatch.setattr(
        readout, "rollout_errors", lambda alpha, *_: torch.tensor(blown.get(alpha, 2 - alpha), dtype=torch.float64)
    )
    found = fit_scale(*ends, [regime(torch.zeros(1, 5, 2, 4, 4), 1.0)])
    assert found["gamma"] == 1.5  # gives the largest alpha; gamma 1.6 is clipped to the same
    assert found["errors"]["0.4"] == found["errors"]["1.0"] == float("inf")
