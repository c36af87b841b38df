"""The runs of the audit: one config for each arm, seed and learning rate. All other settings are equal.

`arm_models` describes the arms. ``single`` is trained on one domain, with the same samples of that domain in the same
order as the other arms.

The learning rates of the mixture and of its rivals are chosen in the same way: on validation data, with seeds used for
nothing else. One seed is not enough, because a high rate that is best for one seed can be unstable for the next. An arm
that removes one part of the mixture is trained at the mixture's rate, and all dense networks at that of the smallest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from shodh_moe.audit.arm_models import ARMS, SINGLE
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import validation_score
from shodh_moe.base.errors import UserError
from shodh_moe.config import Config, ModelConfig
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import resolve_paths, tokenizer_seed

SET_ARMS = {
    "main": tuple(arm for arm in ARMS if arm not in ("window", "both")),
    "long": ("moe", "dense_active", SINGLE),
    "hard": ("moe", "dense_active", SINGLE),
    "four": ("moe", "dense_active", "oracle", SINGLE),
    "bed": ("moe", "window", "both", "dense_active", SINGLE),
}
RELEARNING = ("moe", "layer", "dense_active")  # arms of the main set that learn a third domain
ALL_SEEDS = ("moe", "dense_active", SINGLE)  # arms of the main set that are trained with `seeds`, others `more_seeds`


@dataclass(frozen=True)
class Run:
    """One training run in a set of the audit.

    Attributes:
        set: name of the set, a key of `SET_ARMS`.
        arm: name of the arm.
        experts: number of routed experts; 0 for dense networks, those with a single expert included.
        domains: the domains it is trained on, sorted.
        config: the config that it is trained with.
    """

    set: str
    arm: str
    experts: int
    domains: list[str]
    config: Config

    @property
    def name(self) -> str:
        """Name of the run folder. Two sets that contain the same run share its folder."""
        return self.config.name

    @property
    def tuned_as(self) -> str:
        """The name under which its learning rate is chosen."""
        return tuned_as(self.arm, self.domains)


def tuned_as(arm: str, domains: list[str]) -> str:
    """The name under which a learning rate is chosen: the arm, with the domain for single-domain networks."""
    return f"{arm}:{domains[0]}" if arm == SINGLE else arm


def trained_together(arm: str, mixed: list[str]) -> list[list[str]]:
    """The domains of each run of an arm in a set that mixes these: all of them, or each alone for ``single``."""
    return [[one] for one in mixed] if arm == SINGLE else [mixed]


def rate_of(audit: AuditConfig, arm: str, domains: list[str], rates: dict[str, float]) -> float:
    """The learning rate of an arm on some domains, of the rates by `tuned_as` that were chosen.

    Domains that the main set lacks use the rate of its first domain.
    """
    own = tuned_as(arm, domains)
    return rates[own if own in rates else ARMS[arm].rate_of or tuned_as(arm, audit.domains)]


def set_domains(audit: AuditConfig, set_name: str) -> list[str]:
    """The domains mixed in a set, sorted."""
    four = [name for name in audit.all_domains if name not in set(audit.bed) - set(audit.domains)]
    return sorted(
        {"main": audit.domains, "long": audit.domains, "hard": audit.hard, "four": four, "bed": audit.bed}[set_name]
    )


def shared_config(audit: AuditConfig) -> Config:
    """The base config for one rank, with the tokenizer and latents that all runs share (see `resolve_paths`)."""
    base = audit.base
    return base.model_copy(
        update={
            "name": audit.name,
            "runs": str(audit.folder / "arms"),
            # A path and a seed of its own make the tokenizer independent of a run's domains and seed.
            "tokenizer": base.tokenizer.model_copy(
                update={"path": str(resolve_paths(base).tokenizer), "seed": tokenizer_seed(base)}
            ),
            "parallel": base.parallel.model_copy(update={"processes": 1, "ep_size": "auto", "context_size": 1}),
        }
    )


def with_all_domains(audit: AuditConfig, config: Config) -> Config:
    """A config for making data and latents: its micro-batch, which no run uses, fits the domains of all sets."""
    training = config.training.model_copy(update={"batch_size": len(audit.all_domains)})
    return config.model_copy(update={"training": training})


def unseen_config(audit: AuditConfig) -> Config:
    """The config whose data have geometry unseen in training, encoded by the same tokenizer."""
    config, names = shared_config(audit), [name for name, _ in audit.unseen.items()]
    data = config.data
    return config.model_copy(
        update={
            "data": data.model_copy(
                update={"name": f"{data.name}_unseen", "domains": audit.unseen, "seed": (data.seed + 1) % 2**64}
            ),
            "tokenizer": config.tokenizer.model_copy(update={"latent_copies": 1}),
            "training": config.training.model_copy(update={"batch_size": max(len(names), 1)}),
        }
    )


def arm_config(
    audit: AuditConfig,
    set_name: str,
    arm: str,
    seed: int,
    learning_rate: float,
    experts: int | None = None,
    domain: str | None = None,
) -> Config:
    """The config of one run, for one rank.

    Args:
        experts: number of routed experts; None uses the base config's.
        domain: the only domain of a ``single`` run.

    Returns:
        a config whose name ends in a hash of its other settings.
    """
    mixed = set_domains(audit, set_name)
    domains = [domain] if domain else mixed
    # A single-domain network sees as many samples of its domain as the joint one.
    training = {
        "steps": audit.long_steps if set_name == "long" and audit.long_steps else audit.base.training.steps,
        "batch_size": audit.base.training.batch_size * len(domains) // len(mixed),
        "learning_rate": learning_rate,
    }
    if seed not in audit.tuning_seeds and arm != SINGLE:
        every = -(-training["steps"] // audit.probes)
        training |= {"keep_every": every, "checkpoint_every": every}
    experts = audit.base.model.moe.num_experts if experts is None else experts
    label = f"{arm}{experts}" if set_name == "four" and arm == "moe" else arm
    return run_config(audit, label, ARMS[arm].model(audit.base, experts), domains, seed, training)


def run_config(
    audit: AuditConfig,
    label: str,
    model: ModelConfig,
    domains: list[str],
    seed: int,
    training: dict[str, Any],
    start: str | None = None,
) -> Config:
    """The shared config for a run on some domains. Its name starts with ``label`` and ends in a hash of its settings.

    Args:
        training: training settings that replace those of the shared config.
        start: run folder whose trained network the run starts from; None starts from scratch.
    """
    config, available = shared_config(audit), audit.all_domains
    weights = {name: float(name in domains) for name in available} if len(domains) < len(available) else None
    config = config.model_copy(
        update={
            "name": "",
            "seed": seed,
            "start": start,
            "data": config.data.model_copy(update={"weights": weights}),
            "model": model,
            # A run that diverges stops there and is reported as diverged.
            "training": config.training.model_copy(update={"on_nonfinite": "halt", **training}),
        }
    )
    on = "all" if weights is None else "+".join(domains)
    name = f"{label}-{on}-{seed}-{fingerprint(config.model_dump())}"
    # `model_copy` does not validate, so the result is validated here.
    return Config.model_validate({**config.model_dump(), "name": name})


def set_runs(
    audit: AuditConfig, set_name: str, seeds: list[int], rates: dict[str, float], arms: Sequence[str] = ()
) -> Iterator[Run]:
    """Yield the runs of a set, arm by arm.

    Args:
        rates: learning rates by `tuned_as`. See `choose_rates`.
        arms: which arms; default: all of the set.
    """
    mixed = set_domains(audit, set_name)
    for arm in arms or SET_ARMS[set_name]:
        counts: list[int | None] = [None]
        if set_name == "four" and arm == "moe":
            counts = list(audit.experts)
        elif set_name == "four" and arm == "oracle":
            counts = [len(mixed)]
        for domains in trained_together(arm, mixed):
            rate = rate_of(audit, arm, domains, rates)
            for experts in counts:
                for seed in seeds:
                    one = domains[0] if arm == SINGLE else None
                    config = arm_config(audit, set_name, arm, seed, rate, experts, one)
                    routed = config.model.moe.num_experts
                    yield Run(set_name, arm, routed if routed > 1 else 0, domains, config)


def all_runs(audit: AuditConfig, rates: dict[str, float]) -> list[Run]:
    """All runs to measure, set by set."""
    runs = [
        run
        for arm in SET_ARMS["main"]
        for run in set_runs(audit, "main", audit.seeds if arm in ALL_SEEDS else audit.more_seeds, rates, [arm])
    ]
    if audit.long_steps:
        runs += set_runs(audit, "long", audit.more_seeds, rates)
    if audit.hard:
        runs += set_runs(audit, "hard", audit.more_seeds, rates)
    if audit.experts:
        runs += set_runs(audit, "four", audit.more_seeds, rates)
    if audit.bed:
        runs += set_runs(audit, "bed", audit.more_seeds, rates)
    return runs


def tuning_runs(audit: AuditConfig) -> dict[str, dict[float, list[Run]]]:
    """The runs among which learning rates are chosen, by `tuned_as` and rate."""
    found: dict[str, dict[float, list[Run]]] = {}
    arms = [arm for arm in SET_ARMS["main"] if not ARMS[arm].rate_of]
    names = {tuned_as(arm, [one]) for arm in arms for one in audit.domains}
    for rate in audit.learning_rates:
        for run in set_runs(audit, "main", audit.tuning_seeds, dict.fromkeys(names, rate), arms):
            found.setdefault(run.tuned_as, {}).setdefault(rate, []).append(run)
    return found


def tuning(audit: AuditConfig) -> dict[str, Any]:
    """Choose the learning rate of each arm.

    Returns:
        by `tuned_as`: ``learning_rates``; ``valid_latent_mse`` of each, relative to persistence (mean of
        `validation_score` over ``tuning_seeds``), infinite where a run diverged; ``chosen``, the best rate, or the
        smallest if all diverged; ``at_edge``, whether a better rate may lie outside the range. If the config gives a
        single rate, it is chosen without runs and ``valid_latent_mse`` is empty.
    """
    rates, found = audit.learning_rates, {}
    for name, runs in tuning_runs(audit).items():
        scores = [fmean(validation_score(run.config) for run in runs[rate]) for rate in rates] if len(rates) > 1 else []
        chosen = rates[scores.index(min(scores))] if scores else rates[0]
        found[name] = {
            "learning_rates": rates,
            "valid_latent_mse": scores,
            "chosen": chosen,
            "at_edge": bool(scores) and chosen in (rates[0], rates[-1]),
        }
    return found


def choose_rates(audit: AuditConfig) -> dict[str, float]:
    """The chosen learning rate of each arm, by `tuned_as`."""
    return {name: record["chosen"] for name, record in tuning(audit).items()}


def find_run(audit: AuditConfig, name: str) -> Run:
    """Find a run to measure by its name.

    Raises:
        UserError: no run has this name.
    """
    for one in all_runs(audit, choose_rates(audit)):
        if one.name == name:
            return one
    raise UserError(f"the audit {audit.folder} has no run {name}: run `shodh audit` with its config")
