"""A run from Python: train it, and read what it has recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.records import read_run
from shodh_moe.checkpoint import find_checkpoint
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.data.dataset import Dataset, open_dataset

if TYPE_CHECKING:
    import pandas
    import xarray

BY_DOMAIN = ("dropped_fraction", "entropy", "mean_gate")  # of a routing record, beside the load (docs/telemetry.md)


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it is; `shodh_moe.load_model` takes it.
        config: what it was trained with.
    """

    folder: Path
    config: Config

    @property
    def paths(self) -> Paths:
        """The folders of dataset, tokenizer and latents that the config leads to from the working folder.

        Raises:
            UserError: ``data.path`` or ``tokenizer.path`` of the config is not a folder.
        """
        return resolve_paths(self.config)

    @property
    def checkpoint(self) -> Path:
        """The newest intact checkpoint, as `shodh_moe.merge` takes it.

        Raises:
            UserError: there is none.
        """
        found = find_checkpoint(self.folder / "checkpoints")
        if found is None:
            raise UserError(f"{self.folder} holds no checkpoint: make one with `shodh pretrain`")
        return found[0]

    def dataset(self, split: str = "test") -> Dataset:
        """Open the dataset of the run; see `shodh_moe.open_dataset`.

        Raises:
            UserError: it is no longer where the config leads to, or cannot be read.
        """
        return open_dataset(self.paths.dataset, split, skip_bad=self.config.data.skip_bad)

    @property
    def metrics(self) -> dict[str, Any]:
        """The last evaluation, the content of ``metrics.json``.

        Raises:
            UserError: it has not been evaluated, or the file is damaged.
        """
        path = self.folder / "metrics.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: make it with `shodh evaluate`") from None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): make it again with `shodh evaluate`") from None
        return found

    def records(self, kind: str = "train") -> pandas.DataFrame:
        """Return the numbers that training has recorded: a row per record, by step; needs the package pandas.

        A number by domain has a column for each domain, such as ``latent_mse.open_channel``. `routing` has what the
        routers recorded.

        Args:
            kind: ``train`` or ``valid``.

        Raises:
            UserError: ``kind`` is neither, there are no records of it, a record is damaged, or pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("a run's records need pandas: pip install 'shodh_moe[analysis]'") from None
        rows = [{key: row[key] for key in row if key not in ("kind", "routing")} for row in self._read(kind)]
        return pandas.json_normalize(rows).set_index("step")

    def routing(self) -> xarray.Dataset:
        """Return what the routers have recorded, by step, layer, domain and expert; needs the package xarray.

        Raises:
            UserError: the run has no such records, a record is damaged, or xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise UserError("a run's routing needs xarray: pip install 'shodh_moe[analysis]'") from None
        recorded = [(row["step"], row["routing"]) for row in self._read("train") if row.get("routing")]
        if not recorded:
            raise UserError(f"{self.folder} has no records of routing: train a model with experts")
        layers = recorded[0][1]
        domains = sorted(layers[0]["load"])
        load = [[[layer["load"][name] for name in domains] for layer in rows] for _, rows in recorded]
        variables: dict[str, Any] = {"load": (("step", "layer", "domain", "expert"), load)}
        for key in BY_DOMAIN:
            values = [[[layer[key][name] for name in domains] for layer in rows] for _, rows in recorded]
            variables[key] = (("step", "layer", "domain"), values)
        steps, numbers = [step for step, _ in recorded], [layer["layer"] for layer in layers]
        return xarray.Dataset(variables, {"step": steps, "layer": numbers, "domain": domains}).astype(float)

    def _read(self, kind: str) -> list[dict[str, Any]]:
        if kind not in ("train", "valid"):
            raise UserError(f"no records of kind {kind!r}: choose train or valid")
        found = read_run(self.folder, kind)
        if not found:
            raise UserError(f"{self.folder} has no records of kind {kind} yet: train it longer")
        return found


def open_run(folder: Path | str) -> Run:
    """Open a run folder.

    Raises:
        UserError: there is no run folder, or this version does not understand its config.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"there is no run folder {folder}: make one with `shodh run`")
    return Run(folder, load_config(folder / "config.yaml"))


def train(config: Config) -> Run:
    """Run every stage that is not up to date, from data to report, as ``shodh run`` does.

    The ranks are processes of their own under the DeepSpeed launcher. An interrupted run resumes.

    Raises:
        UserError: the config or an input is wrong.
        TrainingFailed: a rank has failed; its output says why.
    """
    from shodh_moe.runs import pipeline

    paths = resolve_paths(config)
    pipeline.run_all(config, paths)
    return Run(paths.run, config)
