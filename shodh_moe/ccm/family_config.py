"""The ``family`` section of a config: a built-in family, varied as the user likes, or a folder of a user's regimes."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from shodh_moe.base.errors import UserError
from shodh_moe.base.section import Name, PathText, Positive, PositiveFloat, Section, Seed, setting
from shodh_moe.ccm.family import FAMILIES, OTHER_PARAMETER, PARAMETERS, Family, Scale, require_sound
from shodh_moe.ccm.regime_folder import RegimeFolder, same_value, scan
from shodh_moe.config.compare import fingerprint
from shodh_moe.solvers.planar.shallow_water import ShallowWater

Split = Literal["support", "endpoint_low", "endpoint_high", "validation", "interpolation", "ood_low", "ood_high"]

GRID = 48  # of a built-in family
_TRAINING: tuple[Split, ...] = ("support", "endpoint_low", "endpoint_high")
_ONLY_BUILT_IN = ("solver", "coordinates", "grid", "seed")
_ONLY_SOURCE = ("table", "channels", "values")
# Numbers of the solvers' settings that may be zero, or have any sign; all others must be positive.
_NOT_NEGATIVE = ("forcing", "outer_height", "centre")
_ANY_SIGN = ("threshold",)


class FamilyConfig(Section):
    """The data: a family in shodh_moe/ccm/family.py, whose missing files are generated, or ``source``."""

    name: Name = setting(
        "reaction_diffusion",
        changes="data",
        description=f"a built-in family ({', '.join(FAMILIES)}); with source, any name",
    )
    root: PathText = setting("data", changes="nothing", description="folder that holds the families' data")
    source: PathText | None = setting(
        None,
        changes="nothing",  # the content of the files counts, not where they lie
        description="folder of your own regimes, in the HDF5 schema of The Well or PDEBench; null: a built-in family",
    )
    table: PathText | None = setting(
        None,
        changes="nothing",
        description="source: CSV file with the columns file and PARAMETER; null: the files hold the parameter",
    )
    channels: list[str] | None = setting(
        None, changes="data", description="source: names of the channels to use; null: all"
    )
    values: dict[Split, list[float]] = setting(
        {},
        changes="data",
        description="source: values of the parameter in each split. Of splits that are not given, endpoint_low is low, "
        "endpoint_high is high, and support is every value from low to high that no other split has",
    )
    parameter: str | None = setting(
        None, changes="data", description="the parameter that varies; null: that of the built-in family"
    )
    low: float | None = setting(
        None, changes="data", description="the parameter at s = -1; null: the built-in family's"
    )
    high: float | None = setting(
        None, changes="data", description="the parameter at s = 1; null: the built-in family's"
    )
    scale: Scale | None = setting(
        None,
        changes="data",
        description="s is linear in the parameter, its root or its logarithm; null: as is best for the parameter "
        "(source: linear)",
    )
    interval: PositiveFloat | None = setting(
        None,
        changes="data",
        description="time between snapshots; null: the family's own. source: a multiple of the files' interval",
    )
    solver: dict[str, float | int | str | list[float]] = setting(
        {},
        changes="data",
        description="settings of the built-in family's solver (shodh_moe/solvers/planar), and parameters that do not "
        "vary",
    )
    coordinates: dict[Split, list[float]] = setting(
        {}, changes="data", description="s of the regimes of a split, instead of the built-in family's default"
    )
    grid: Positive | None = setting(None, changes="data", description=f"cells along each side; null: {GRID}")
    snapshots: Positive = setting(21, changes="data", description="stored states per trajectory")
    trajectories: dict[Split, Positive] = setting(
        {},
        changes="data",
        description="trajectories per regime of a split, instead of the family's default. source: the most that are "
        "used",
    )
    seed: Seed = setting(0, changes="data")

    @model_validator(mode="before")
    @classmethod
    def _fill_grid(cls, tree: Any) -> Any:
        # Configs of earlier versions, which are compared with new ones, have the number.
        if isinstance(tree, dict) and tree.get("source") is None and tree.get("grid") is None:
            return {**tree, "grid": GRID}
        return tree

    @model_validator(mode="after")
    def _check(self) -> FamilyConfig:
        if self.source is None:
            _refuse(self, _ONLY_SOURCE, "is for a folder of your own: add source, or leave it out")
            if self.name not in FAMILIES:
                raise ValueError(
                    f"there is no built-in family {self.name!r}: choose from {', '.join(FAMILIES)}, or give source, a "
                    "folder of your own regimes"
                )
            try:
                require_sound(_built_in(self))
            except UserError as error:
                raise ValueError(str(error).removeprefix(f"family {self.name}: ")) from None
        else:
            _refuse(self, _ONLY_BUILT_IN, "is for data that are generated: leave it out, since source has its own")
            missing = [key for key in ("parameter", "low", "high") if getattr(self, key) is None]
            if missing:
                raise ValueError(f"a family with source needs {' and '.join(missing)}: add the key")
            _check_values(self)
        return self

    def family(self) -> Family:
        """The family with this config's settings.

        Raises:
            UserError: there are no such files in ``source``, or they do not fit the config.
        """
        return _built_in(self) if self.source is None else _from_source(self)

    def folder(self) -> Path:
        """Folder of the family's files; different settings, sizes or files of a source have a different folder."""
        family = self.family()
        return Path(self.root) / f"ccm-{fingerprint(type(family.settings).__name__, family.identity())}"


def _refuse(config: FamilyConfig, keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if getattr(config, key) != FamilyConfig.model_fields[key].default:
            raise ValueError(f"{key} {why}")


def _built_in(config: FamilyConfig) -> Family:
    own = FAMILIES[config.name]
    equation = type(own.settings)
    parameter, known = config.parameter or own.parameter, PARAMETERS[equation]
    if parameter not in known:
        raise UserError(f"{config.name} has no parameter {parameter!r}: choose from {', '.join(known)}")
    varies = parameter == own.parameter
    ends = (config.low, config.high)
    if not varies and None in ends:
        raise UserError(f"give low and high, the range of {parameter}: the built-in one is that of {own.parameter}")
    low, high = (given if given is not None else built for given, built in zip(ends, (own.low, own.high), strict=True))
    solver = _checked_solver(config, own, parameter)
    other = OTHER_PARAMETER[equation]
    fixed, height = {}, solver.pop("dam_height", own.fixed_dam_height)
    if equation is not ShallowWater and parameter != other:
        fixed = {other: solver.pop(other, own.value(0.0))}
    return replace(
        own,
        parameter=parameter,
        low=float(low),
        high=float(high),
        scale=config.scale or (own.scale if varies else known[parameter]),
        settings=replace(own.settings, **solver),  # type: ignore[type-var]
        interval=config.interval or own.interval,
        grid=config.grid or GRID,
        snapshots=config.snapshots,
        coordinates=own.coordinates | {str(split): tuple(places) for split, places in config.coordinates.items()},
        trajectories=own.trajectories | {str(split): count for split, count in config.trajectories.items()},
        seed=config.seed,
        fixed_dam_height=height,
        fixed=fixed,
    )


def _checked_solver(config: FamilyConfig, own: Family, parameter: str) -> dict[str, Any]:
    """The entries of ``solver``, in the types of the solver's settings. Raises `UserError`."""
    equation = type(own.settings)
    defaults = {one.name: getattr(own.settings, one.name) for one in fields(equation)}
    defaults[OTHER_PARAMETER[equation]] = 1.0
    found: dict[str, Any] = {}
    for key, value in config.solver.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            known = f"the nearest is {near[0]!r}" if near else f"choose from {', '.join(defaults)}"
            raise UserError(f"solver of {config.name} has no setting {key!r}; {known}")
        if key == parameter:
            raise UserError(f"solver.{key}: {key} is the parameter that varies: give low and high instead")
        found[key] = _checked_setting(key, value, defaults[key])
    if found.get("courant", 0.1) > 0.5:
        raise UserError(f"solver.courant is {found['courant']:g}: give at most 0.5")
    return found


def _checked_setting(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, str):
        if value not in ("outflow", "reflective"):
            raise UserError(f"solver.{key} is {value!r}: choose outflow or reflective")
        return value
    if isinstance(default, tuple):
        if not isinstance(value, list) or len(value) != 2 or not 0 < value[0] <= value[1]:
            raise UserError(f"solver.{key} is {value!r}: give the smallest and the largest, [0.5, 1.0]")
        return tuple(map(float, value))
    whole = isinstance(default, int)
    if not isinstance(value, int if whole else (int, float)):
        raise UserError(f"solver.{key} is {value!r}: give a {'whole ' if whole else ''}number")
    if value < 0 and key in _NOT_NEGATIVE:
        raise UserError(f"solver.{key} is {value:g}: give a number of at least 0")
    if value <= 0 and key not in (*_NOT_NEGATIVE, *_ANY_SIGN):
        raise UserError(f"solver.{key} is {value:g}: give a positive number")
    return value if whole else float(value)


def _check_values(config: FamilyConfig) -> None:
    """Refuse splits of which one would be tested on what another was trained or tuned on. Raises `ValueError`."""
    assert config.low is not None
    assert config.high is not None
    for split, end in (("endpoint_low", config.low), ("endpoint_high", config.high)):
        if [same_value(value) for value in config.values.get(split, [end])] != [same_value(end)]:  # type: ignore[call-overload]
            raise ValueError(f"values.{split} is {end:g}, the end of the range: leave it out, or change low and high")
    if not config.values.get("validation"):
        raise ValueError("values.validation is missing: name values of the parameter on which choices are made")
    used: dict[float, str] = {same_value(config.low): "endpoint_low", same_value(config.high): "endpoint_high"}
    for split, values in config.values.items():
        for value in map(same_value, values):
            other = used.setdefault(value, split)
            if other != split and not {other, split} <= set(_TRAINING):
                raise ValueError(
                    f"values: {value:g} is in {other} and in {split}: a value on which a network is tested or chosen "
                    "must be in no other split"
                )


def _from_source(config: FamilyConfig) -> Family:
    assert config.source
    assert config.parameter
    assert config.low is not None
    assert config.high is not None
    table = Path(config.table) if config.table else None
    found = scan(Path(config.source), config.parameter, table, config.channels, Path(config.root))
    family = Family(
        config.name,
        config.parameter,
        config.low,
        config.high,
        config.scale or "linear",
        found,
        interval=config.interval or found.interval,
        grid=0,
        snapshots=config.snapshots,
        trajectories={str(split): count for split, count in config.trajectories.items()},
    )
    where = f"family {config.name}"
    every = every_snapshot(family.interval, found.interval)
    if not every:
        raise UserError(
            f"{where}: interval is {family.interval:g}, but the files have a snapshot every {found.interval:g}: give a "
            "multiple of that"
        )
    if (available := (found.snapshots - 1) // every + 1) < config.snapshots:
        raise UserError(
            f"{where}: the files have {available} snapshots {family.interval:g} apart, but family.snapshots is "
            f"{config.snapshots}: give at most {available}"
        )
    return replace(family, coordinates=_coordinates(config, family, found))


def every_snapshot(wanted: float, stored: float) -> int:
    """The n for which every n-th snapshot of a file with the interval ``stored`` has the one ``wanted``; 0 for none."""
    every = max(1, round(wanted / stored)) if stored > 0 else 0
    return every if math.isclose(every * stored, wanted, rel_tol=1e-3) else 0


def _coordinates(config: FamilyConfig, family: Family, found: RegimeFolder) -> dict[str, tuple[float, ...]]:
    """s of the regimes of each split; unlisted values within the range are the support."""
    values = {str(split): [same_value(value) for value in listed] for split, listed in config.values.items()}
    ends = {"endpoint_low": [same_value(family.low)], "endpoint_high": [same_value(family.high)]}
    elsewhere = {value for split, listed in values.items() if split not in _TRAINING for value in listed}
    inside = [v for v in sorted(found.pieces) if family.low <= v <= family.high and v not in elsewhere]
    splits = {"support": inside, **ends, **values}
    for split, listed in splits.items():
        for value in listed:
            if value not in found.pieces:
                known = ", ".join(f"{one:g}" for one in sorted(found.pieces))
                raise UserError(
                    f"family {family.name}: {config.source} has no trajectories with {family.parameter} {value:g} "
                    f"({split}): it has {known}"
                )
            if family.scale != "linear" and value <= 0:
                raise UserError(
                    f"family {family.name}: {family.parameter} is {value:g} ({split}): use the linear scale, or leave "
                    "it out"
                )
    return {split: tuple(family.coordinate(value) for value in listed) for split, listed in splits.items()}
