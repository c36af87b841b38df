"""The verdicts in words: pure functions of the intervals, by rules that were written before the runs.

All intervals are 95 % Student t intervals over seeds of relative differences paired by seed. An estimate from fewer
than 3 seeds or with a diverged run has no interval, and a rule that requires one is then not met. The margin is 2 %.

Joint training of the dense model with the same active parameters as the mixture, judged on one domain:
- ``harms``: the interval of its negative transfer lies wholly above 0;
- ``does not harm``: the interval lies wholly below the margin;
- ``not shown``: neither.

Does the mixture of experts end negative transfer?
- ``no harm to end``: the dense model does not harm any domain;
- ``shown``: the dense model harms at least one domain; in every domain the upper end of the interval of the mixture's
  negative transfer is at most the margin; and in each harmed domain the mixture is better than the dense model (the
  interval of their difference lies wholly below 0);
- ``refuted``: the dense model harms a domain in which the mixture's interval, too, lies wholly above the margin;
- ``not shown``: anything else.

On one domain, an arm is ``better`` or ``worse`` than another if the interval of their difference lies wholly below or
above 0, otherwise ``no difference shown``. Over several domains: ``better`` if better on at least one and worse on
none, ``worse`` in the opposite case, ``mixed`` if both occur. Compared with oracle routing: ``as good`` if in every
domain the upper end of the interval is at most the margin, ``worse`` if in any domain the interval lies wholly above
the margin, else ``not shown``.

The router ``splits`` the domains if every layer is bifurcated for every seed and no run diverged; it ``does not split``
them if there is no seed for which every layer is bifurcated; otherwise the verdict is ``on some seeds``. With fewer
than 3 seeds that did not diverge it is ``not shown``. The router ``reads more than the mask`` if the interval of
I(expert; domain | solid fraction) / I(expert; domain) lies wholly above the margin, and ``tells no more than the mask``
if it lies wholly below the margin, else ``not shown``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shodh_moe.audit.results import MIN_SEEDS, Estimate

MARGIN = 0.02
NOT_SHOWN = "not shown"
Domains = Mapping[str, Estimate]


@dataclass(frozen=True)
class Verdict:
    """An answer, one of the fixed phrases in the rules above, and the reason for it in words."""

    answer: str
    reason: str


def above(one: Estimate, bound: float) -> bool:
    """Whether there is an interval and it lies entirely above ``bound``."""
    return one.low is not None and one.low > bound


def below(one: Estimate, bound: float) -> bool:
    """Whether there is an interval and it lies entirely below ``bound``."""
    return one.high is not None and one.high < bound


def at_most(one: Estimate, bound: float) -> bool:
    """Whether there is an interval and its upper end is at most ``bound``."""
    return one.high is not None and one.high <= bound


def harm(transfer: Estimate) -> str:
    """Whether joint training harms a domain, given the dense model's negative transfer on it."""
    return "harms" if above(transfer, 0.0) else "does not harm" if below(transfer, MARGIN) else NOT_SHOWN


def difference(one: Estimate) -> str:
    """Compare an arm with its base on one domain."""
    return "better" if below(one, 0.0) else "worse" if above(one, 0.0) else "no difference shown"


def ends_negative_transfer(dense: Domains, moe: Domains, against_dense: Domains) -> Verdict:
    """Answer the main question.

    Args:
        dense: negative transfer of the dense model with the same active parameters, by domain.
        moe: negative transfer of the mixture of experts.
        against_dense: relative difference between the errors of the mixture and of the dense model.
    """
    if not dense or set(dense) != set(moe) or set(dense) != set(against_dense):
        return Verdict(NOT_SHOWN, "some of the required runs are missing")
    harms = {domain: harm(one) for domain, one in dense.items()}
    harmed = [domain for domain, answer in harms.items() if answer == "harms"]
    if all(answer == "does not harm" for answer in harms.values()):
        return Verdict("no harm to end", f"dense joint training costs less than {MARGIN:.0%} in {_list(dense)}")
    if not harmed:
        undecided = [domain for domain, answer in harms.items() if answer == NOT_SHOWN]
        why = "; ".join(f"{_word(domain)}: {_uncertain(dense[domain])}" for domain in undecided)
        return Verdict(NOT_SHOWN, f"it is not shown that dense joint training harms any domain ({why})")
    if refuted := [domain for domain in harmed if above(moe[domain], MARGIN)]:
        return Verdict(
            "refuted",
            f"dense joint training harms {_list(refuted)}, and so does the mixture, by more than {MARGIN:.0%}",
        )
    worse = [domain for domain, one in moe.items() if not at_most(one, MARGIN)]
    not_better = [domain for domain in harmed if not below(against_dense[domain], 0.0)]
    if not worse and not not_better:
        return Verdict(
            "shown",
            f"dense joint training harms {_list(harmed)}; the mixture is better there, "
            f"and in {_list(moe)} at most {MARGIN:.0%} worse than the single-domain model",
        )
    reasons = [
        f"that the mixture is at most {MARGIN:.0%} worse than the single-domain model of {_word(domain)} "
        f"({_uncertain(moe[domain])})"
        for domain in worse
    ] + [
        f"that the mixture is better than the dense model in {_word(domain)} ({_uncertain(against_dense[domain])})"
        for domain in not_better
    ]
    return Verdict(NOT_SHOWN, f"dense joint training harms {_list(harmed)}, but it is not shown {'; '.join(reasons)}")


def compare(differences: Domains) -> Verdict:
    """Compare one arm with another over all domains, given the relative differences of their errors."""
    answers = {domain: difference(one) for domain, one in differences.items()}
    better, worse = "better" in answers.values(), "worse" in answers.values()
    answer = "mixed" if better and worse else "better" if better else "worse" if worse else "no difference shown"
    return Verdict(answer, _each(answers, differences))


def as_good(differences: Domains) -> Verdict:
    """Judge whether an arm is as good as another in every domain, within the margin."""
    if any(above(one, MARGIN) for one in differences.values()):
        answer = "worse"
    else:
        answer = "as good" if differences and all(at_most(one, MARGIN) for one in differences.values()) else NOT_SHOWN
    return Verdict(answer, _each({domain: difference(one) for domain, one in differences.items()}, differences))


def splits(bifurcated: Mapping[int, bool | None]) -> Verdict:
    """Judge whether the router gives each domain its own expert.

    Args:
        bifurcated: whether every layer is bifurcated, by seed; None where the run diverged.
    """
    count = sum(value is True for value in bifurcated.values())
    diverged = [seed for seed, value in bifurcated.items() if value is None]
    reason = f"bifurcated on {count} of {len(bifurcated)} seeds" + (f", {len(diverged)} diverged" if diverged else "")
    if len(bifurcated) - len(diverged) < MIN_SEEDS:
        return Verdict(NOT_SHOWN, f"{reason}; at least {MIN_SEEDS} that did not diverge are needed")
    if count == 0:
        return Verdict("does not split", reason)
    return Verdict("splits" if count == len(bifurcated) else "on some seeds", reason)


def reads_mask(share: Estimate) -> Verdict:
    """Judge whether the router only reads the solid mask.

    Args:
        share: I(expert; domain | solid fraction) / I(expert; domain).
    """
    if share.value is None:
        return Verdict(NOT_SHOWN, "the expert carries no information about the domain")
    reason = (
        "given the solid fraction, the expert carries "
        f"{share.value:.0%} of the information about the domain that it carries otherwise"
    )
    if above(share, MARGIN):
        return Verdict("reads more than the mask", reason)
    if below(share, MARGIN):
        return Verdict("tells no more than the mask", reason)
    return Verdict(NOT_SHOWN, f"{reason}; {_uncertain(share)}")


def _uncertain(one: Estimate) -> str:
    """Say why an interval does not settle a question."""
    if one.diverged:
        return f"seed {', '.join(map(str, one.diverged))} diverged"
    if one.low is None or one.high is None:
        return f"{len(one.by_seed)} of the {MIN_SEEDS} seeds that an interval requires"
    return f"the interval is {interval(one)}"


def interval(one: Estimate) -> str:
    """Format the interval as ``[+1.2 %, +3.4 %]``; empty if there is none."""
    return "" if one.low is None or one.high is None else f"[{100 * one.low:+.1f} %, {100 * one.high:+.1f} %]"


def _each(answers: Mapping[str, str], differences: Domains) -> str:
    if not answers:
        return "the runs to compare are missing"
    return "; ".join(f"{_word(d)}: {answer} ({_uncertain(differences[d])})" for d, answer in answers.items())


def _word(domain: str) -> str:
    return domain.replace("_", " ")


def _list(domains: Mapping[str, Estimate] | list[str]) -> str:
    return " and ".join(map(_word, domains))
