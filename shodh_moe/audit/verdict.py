"""The verdicts in words: pure functions of the intervals, by a rule that was stated before the runs.

All intervals are 95 % Student t intervals over seeds of differences paired by seed, relative to the base. There is none
with fewer than 3 seeds, or where a run diverged; a rule that asks for one is then not met. The margin is 2 %.

Joint training of the dense model with the same active parameters, on one domain:
- ``harms``: the interval of its negative transfer lies wholly above 0;
- ``does not harm``: it lies wholly below the margin;
- ``not shown``: neither.

Does the mixture of experts end negative transfer?
- ``no harm to end``: the dense model does not harm any domain;
- ``shown``: the dense model harms at least one domain; in every domain the upper end of the interval of the mixture's
  negative transfer is at most the margin; and in each harmed domain the mixture is better than the dense model (the
  interval of their difference lies wholly below 0);
- ``refuted``: the dense model harms a domain, and there the interval of the mixture lies wholly above the margin;
- ``not shown``: everything else.

Two arms on one domain are ``better`` or ``worse`` where the interval of their difference lies wholly below or above 0,
otherwise ``no difference shown``. Over several domains: ``better`` if on one or more and worse on none, ``worse`` the
other way round, ``mixed`` if both occur. As good as oracle routing: ``as good`` if in every domain the upper end is at
most the margin, ``worse`` if in one the interval lies wholly above it, else ``not shown``.

The router ``splits`` the domains if every layer is bifurcated on every seed, at least 3, and none diverged; it ``does
not split`` them if this holds on no seed, of at least 3; else ``on some seeds`` or, with fewer, ``not shown``. It
``reads more than the mask`` if the interval of I(expert; domain | solid fraction) / I(expert; domain) lies wholly above
the margin, and ``tells no more than the mask`` if it lies wholly below it, else ``not shown``.
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
    """An answer, which is a fixed phrase of the rules above, and the reason for it in words."""

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
    """Does joint training harm this domain? ``transfer``: the dense model's negative transfer there."""
    return "harms" if above(transfer, 0.0) else "does not harm" if below(transfer, MARGIN) else NOT_SHOWN


def difference(one: Estimate) -> str:
    """Compare an arm with its base on one domain."""
    return "better" if below(one, 0.0) else "worse" if above(one, 0.0) else "no difference shown"


def ends_negative_transfer(dense: Domains, moe: Domains, against_dense: Domains) -> Verdict:
    """Answer the main question.

    Args:
        dense: negative transfer of the dense model with the same active parameters, by domain.
        moe: negative transfer of the mixture of experts.
        against_dense: relative difference of the mixture to the dense model.
    """
    if not dense or set(dense) != set(moe) or set(dense) != set(against_dense):
        return Verdict(NOT_SHOWN, "some of the runs it takes are missing")
    harms = {domain: harm(one) for domain, one in dense.items()}
    harmed = [domain for domain, answer in harms.items() if answer == "harms"]
    if all(answer == "does not harm" for answer in harms.values()):
        return Verdict("no harm to end", f"dense joint training costs less than {MARGIN:.0%} in {_list(dense)}")
    if not harmed:
        open_ones = [domain for domain, answer in harms.items() if answer == NOT_SHOWN]
        why = "; ".join(f"{_word(domain)}: {_uncertain(dense[domain])}" for domain in open_ones)
        return Verdict(NOT_SHOWN, f"that dense joint training harms a domain is itself not shown ({why})")
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
            f"and in {_list(moe)} at most {MARGIN:.0%} worse than a model of that domain alone",
        )
    reasons = [
        f"that the mixture is at most {MARGIN:.0%} worse than a model of {_word(domain)} alone: "
        f"{_uncertain(moe[domain])}"
        for domain in worse
    ] + [
        f"that it is better than the dense model in {_word(domain)}: {_uncertain(against_dense[domain])}"
        for domain in not_better
    ]
    return Verdict(NOT_SHOWN, f"dense joint training harms {_list(harmed)}, but not shown is " + "; ".join(reasons))


def compare(differences: Domains) -> Verdict:
    """Compare one arm with another over all domains, given the relative differences of their errors."""
    answers = {domain: difference(one) for domain, one in differences.items()}
    better, worse = "better" in answers.values(), "worse" in answers.values()
    answer = "mixed" if better and worse else "better" if better else "worse" if worse else "no difference shown"
    return Verdict(answer, _each(answers, differences))


def as_good(differences: Domains) -> Verdict:
    """Whether an arm is as good as another, within the margin, in every domain."""
    if any(above(one, MARGIN) for one in differences.values()):
        answer = "worse"
    else:
        answer = "as good" if differences and all(at_most(one, MARGIN) for one in differences.values()) else NOT_SHOWN
    return Verdict(answer, _each({domain: difference(one) for domain, one in differences.items()}, differences))


def splits(bifurcated: Mapping[int, bool | None]) -> Verdict:
    """Does the router give each domain its own expert?

    Args:
        bifurcated: by seed, whether every layer is; None where the run diverged.
    """
    count = sum(value is True for value in bifurcated.values())
    diverged = [seed for seed, value in bifurcated.items() if value is None]
    reason = f"bifurcated on {count} of {len(bifurcated)} seeds" + (f", {len(diverged)} diverged" if diverged else "")
    if len(bifurcated) - len(diverged) < MIN_SEEDS:
        return Verdict(NOT_SHOWN, f"{reason}; it takes at least {MIN_SEEDS} that did not diverge")
    if count == 0:
        return Verdict("does not split", reason)
    return Verdict("splits" if count == len(bifurcated) else "on some seeds", reason)


def reads_mask(share: Estimate) -> Verdict:
    """Does the router only read the mask? ``share``: I(expert; domain | solid fraction) / I(expert; domain)."""
    if share.value is None:
        return Verdict(NOT_SHOWN, "the expert tells nothing of the domain")
    reason = (
        f"with the solid fraction known the expert still tells of the domain {share.value:.0%} of what it tells without"
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
        return f"{len(one.by_seed)} of the {MIN_SEEDS} seeds that an interval takes"
    return f"the interval is {interval(one)}"


def interval(one: Estimate) -> str:
    """Format the interval as ``[+1.2 %, +3.4 %]``; empty if there is none."""
    return "" if one.low is None or one.high is None else f"[{100 * one.low:+.1f} %, {100 * one.high:+.1f} %]"


def _each(answers: Mapping[str, str], differences: Domains) -> str:
    if not answers:
        return "these runs are missing"
    return "; ".join(f"{_word(d)}: {answer} ({_uncertain(differences[d])})" for d, answer in answers.items())


def _word(domain: str) -> str:
    return domain.replace("_", " ")


def _list(domains: Mapping[str, Estimate] | list[str]) -> str:
    return " and ".join(map(_word, domains))
