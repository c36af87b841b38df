"""``shodh finetune``: train an exported model further on the user's own domain, and export the result.

The steps are those of `pipeline`: check the data, encode them with the model's tokenizer, train from the model's
weights, and export. The run folder holds what is needed to resume, and ``start``, the weights it begins with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, whole_folder
from shodh_moe.checkpoint import CheckpointReader, CheckpointWriter, checkpoints_at, model_fragments
from shodh_moe.config import Config
from shodh_moe.config.compare import differing_model_keys
from shodh_moe.config.load import config_of_tree, read_yaml
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.data import list_trajectories
from shodh_moe.data.listing import SPLITS
from shodh_moe.data.prediction_file import unknown_fields
from shodh_moe.inference import contexts
from shodh_moe.inference.contexts import Contexts
from shodh_moe.inference.export import export
from shodh_moe.inference.growth import Grown, grow, require_growable
from shodh_moe.inference.loading import ModelSource, find_source, load_source
from shodh_moe.inference.model import Model
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.metrics.latents import mse_beside_persistence
from shodh_moe.model import LatentTransformer
from shodh_moe.model.low_rank import add_low_rank
from shodh_moe.parallel import ExpertParallel
from shodh_moe.runs import pipeline
from shodh_moe.runs.folder import claim_run_folder
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.tokenizer.tokenizer import FIELDS, tokenizer_sha256

START = "start"  # folder of the weights that a run begins with, in the run folder
# Settings of a fine-tuning that differ from those of the model's own training; the user's come after them. All samples
# are of a new domain, so they neither fit into the capacity of one expert nor should they spread over all.
SETTINGS: dict[str, Any] = {
    "training": {
        "steps": 200,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-5,
        "warmup_steps": 20,
        "checkpoint_every": 50,
        "validate_every": 50,
        "keep_last": 1,
        "keep_every": 0,
    },
    "model": {"moe": {"dropless": True, "router": {"balance_weight": 0.0, "z_weight": 0.0}}},
    # These belong to the machine or the dataset that the model was trained with.
    "parallel": None,
    "deepspeed": None,
    "data": None,
    "runs": None,
}


@dataclass(frozen=True)
class Request:
    """What to fine-tune.

    Attributes:
        model: a run, a checkpoint or an exported model.
        data: folder of a dataset.
        output: folder for the fine-tuned model, which must not exist.
        config: YAML file with settings that differ from the model's.
        overrides: settings as ``key.sub=value``.
        tokenizer: folder of the model's tokenizer, if its config no longer leads to it.
    """

    model: Path | str
    data: Path
    output: Path
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    tokenizer: Path | None = None


def finetune(request: Request) -> Path:
    """Fine-tune a model, export it to ``request.output``, and print its errors on the validation split.

    A run that was interrupted resumes, and one that is complete is exported again. The tokenizer and all its statistics
    stay those of the model.

    Raises:
        UserError: the model, data, settings or output cannot be used, or do not fit together.
        TrainingFailed: the launcher exited with an error.
    """
    if request.output.exists():
        raise UserError(f"{request.output} exists: give --output a new folder, or remove it")
    require_writable(request.output.parent)
    source = find_source(request.model, request.tokenizer)
    model = load_source(source)
    config = _config(request, source, model)
    settings = config.finetune
    assert settings is not None
    name = str(request.model)
    known = contexts.contexts_of(source) if settings.train in ("expert", "paths", "router") else None
    if settings.train == "expert":
        require_growable(config.model, name)
        if known is None:
            raise UserError(
                f"{name} records no contexts of its training data, from which a new path must keep away: export it "
                "again in the folder in which it was trained, or use --train all or lora"
            )
    if settings.train == "router" and not any(list(router.parameters()) for router in model.transformer.routers):
        raise UserError(f"{name} has no router that could learn: use --train all or lora")
    paths = resolve_paths(config)
    _require_known_fields(config, paths, settings.ignore_fields, name)
    pipeline.make_data(config, paths)
    pipeline.make_latents(config, paths)

    grown = _grown(config, paths, model, known) if settings.train == "expert" and known else None
    if grown:
        tree = {**config.model_dump(), "model": grown.model.model_dump()}
        config = config_of_tree(Config, tree, str(request.config or request.model))
    claim_run_folder(config, write=False)
    _write_start(config, paths, model, source, grown, known)
    pipeline.check(config, paths)
    pipeline.pretrain(config, paths)
    export(paths.run, request.output)
    _report(config, paths, model, request.output)
    return request.output


def _config(request: Request, source: ModelSource, model: Model) -> Config:
    """The config of the fine-tuning run: the model's, with `SETTINGS`, then the user's file and overrides.

    Raises:
        UserError: a setting is unknown or wrong, or would make the weights another model.
    """
    folder = re.sub(r"[^A-Za-z0-9_.+=-]", "_", request.data.resolve().name).lstrip(".+=-") or "data"
    name = request.output.resolve().name
    tree = source.config.model_dump()
    for key, value in SETTINGS.items():
        if value is None:
            del tree[key]
    tree["finetune"] = {}  # not that of a model that was fine-tuned before
    _update(tree, {key: value for key, value in SETTINGS.items() if value is not None})
    tokenizer = str(source.tokenizer_folder())
    fixed = {
        "name": name,
        "start": None,
        "data": {"name": folder[:100], "path": str(request.data), "grid": model.grid},
        "tokenizer": {"path": tokenizer, "root": Config().tokenizer.root},
    }
    _update(tree, fixed)
    if request.config:
        _update(tree, read_yaml(request.config))
    config = config_of_tree(Config, tree, str(request.config or request.model), list(request.overrides))
    for given, theirs, key in (
        (config.data.path, str(request.data), "data.path"),
        (config.data.grid, model.grid, "data.grid"),
        (config.tokenizer.path, tokenizer, "tokenizer.path"),
        (config.start, None, "start"),
        (config.name, name, "name"),
    ):
        if given != theirs:
            raise UserError(f"{key} follows from --model, --data and --output: leave it out")
    if differing := differing_model_keys(source.config.model.model_dump(), config.model.model_dump()):
        raise UserError(f"model.{differing[0]} belongs to {request.model} and cannot change: leave it out")
    return config.model_copy(update={"start": str(Path(config.runs) / name / START)})


def _update(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Replace values of nested dictionaries in place."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _update(tree[key], value)
        else:
            tree[key] = value


def _require_known_fields(config: Config, paths: Paths, ignored: list[str], model: str) -> None:
    """Raise `UserError` if the data have a field that the model lacks, unless the user leaves it out."""
    for split in SPLITS:
        records = list_trajectories(paths.dataset, split, config.data.grid, config.data.skip_bad)
        for path in dict.fromkeys(record.path for record in records):
            if unknown := [name for name in unknown_fields(path) if name not in ignored]:
                raise UserError(
                    f"{path} has the field {unknown[0]}, which {model} does not have (only {', '.join(FIELDS)}): "
                    f"leave it out with finetune.ignore_fields=[{', '.join([*ignored, *unknown])}], or use a model "
                    "that was trained with it"
                )


def _grown(config: Config, paths: Paths, model: Model, known: Contexts) -> Grown:
    """The model with a path for the new domain.

    Raises:
        UserError: the data have several domains, or look like a known one.
    """
    new = contexts.collect(paths.latents, config.model, paths.tokenizer, config.data.weights)
    if len(new.domains) != 1:
        raise UserError(
            f"{paths.dataset} has the domains {', '.join(new.domains)}: --train expert adds one path for one domain; "
            "set data.weights of the others to 0"
        )
    grown = grow(model.transformer, config.model, known, new)
    count = config.model.moe.num_experts
    print(
        f"[finetune] path {count} starts as a copy of path {grown.copied}; it takes {grown.taken:.0%} of the "
        f"validation samples of {new.domains[0]} and none of the {len(known.rows_MF)} recorded contexts of "
        f"{', '.join(known.domains)} (nearest: {grown.nearest})",
        flush=True,
    )
    return grown


def _write_start(
    config: Config, paths: Paths, model: Model, source: ModelSource, grown: Grown | None, known: Contexts | None
) -> None:
    """Write the weights that the run begins with as a checkpoint, unless they are there.

    Raises:
        UserError: those that are there are of another model.
    """
    folder, origin = paths.run / START, model.weights_sha256
    assert config.finetune is not None
    if found := checkpoints_at(folder):
        if CheckpointReader(found[-1]).state.get("weights_sha256") != origin:
            raise UserError(
                f"run folder {paths.run} was started from another model than {source.path}: give another --output, or "
                f"remove {paths.run}"
            )
        return
    tokenizer, transformer = model.tokenizer, model.transformer
    ep = ExpertParallel()
    if grown or config.finetune.train == "lora":
        made = LatentTransformer(config.model, tokenizer.config.latent_channels, tokenizer.latent_grid, config.seed, ep)
        made.load_state_dict(grown.weights if grown else transformer.state_dict())
        transformer = made
    if config.finetune.train == "lora":
        torch.manual_seed(config.seed)
        add_low_rank(transformer, config.finetune.rank)
    fragments, shapes = model_fragments(transformer, ep)
    facts = {
        "config": config.model_dump(),
        "ep_size": 1,
        "tokenizer_sha256": tokenizer_sha256(paths.tokenizer),
        "weights_sha256": origin,
    }
    with whole_folder(folder) as temporary:
        writer = CheckpointWriter(temporary, 0, 1, 1, 0, START)
        writer.save(model.step, fragments, shapes, {}, facts)
        writer.finish()
        if known:
            contexts.save(known, temporary / contexts.FILE)


def _report(config: Config, paths: Paths, before: Model, output: Path) -> None:
    """Print the validation errors of the model before and after, beside those of persistence."""
    valid = load_latents(paths.latents, "valid", paths.tokenizer)
    samples = LatentSamples(valid, config.model.history, strides=[config.measured_stride])
    after = load_source(find_source(output))
    errors = [_errors(model.transformer, samples, config) for model in (before, after)]
    for domain, (first, last) in enumerate(zip(*errors, strict=True)):
        print(
            f"[finetune] {samples.domains[domain]}, latent MSE one step ahead on validation data: "
            f"{first[0]:.4g} before, {last[0]:.4g} after, persistence {first[1]:.4g}"
        )
    print(f"[finetune] {output}")


def _errors(transformer: LatentTransformer, samples: LatentSamples, config: Config) -> list[list[float]]:
    """Mean latent MSE of the model and of persistence for each domain."""
    found = []
    for domain, size in enumerate(samples.sizes):
        windows = [(domain, number) for number in range(size)]
        rows = [
            mse_beside_persistence(part.latent_BCxyz, part.batch.history_BHCxyz, part.batch.target_BCxyz)
            for part in predict_windows(transformer, samples, windows, config.evaluation.batch_size)
        ]
        found.append(torch.cat(rows).double().mean(0).tolist())
    return found
