"""The model card of an exported model: architecture, training, data, errors and limits.

It begins with the metadata that the model hub reads, in YAML; ``config.json`` is read by the hub as well.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.config import Config, MoEConfig, TokenizerConfig
from shodh_moe.data import SPLITS, list_trajectories
from shodh_moe.data.opening import opened
from shodh_moe.inference.loading import ModelSource
from shodh_moe.inference.model import Model

# Rows of the error table: title, then the metrics keys of model, persistence, mean predictor and tokenizer alone.
ERRORS = (
    ("latent MSE", "latent_mse", "latent_mse_persistence", "latent_mse_mean", ""),
    (
        "physical MSE",
        "physical_mse",
        "physical_mse_persistence",
        "physical_mse_mean",
        "physical_mse_reconstruction",
    ),
    ("velocity VRMSE", "velocity_vrmse", "velocity_vrmse_persistence", "", ""),
    ("pressure VRMSE", "pressure_vrmse", "pressure_vrmse_persistence", "", ""),
)


LIBRARY = "shodh_moe"


def model_card(
    source: ModelSource,
    trained: Model,
    metrics: dict[str, Any] | None,
    portable: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """Return the text of README.md in Markdown.

    Args:
        source, trained: the model.
        metrics: content of metrics.json for these weights; None if they were not evaluated.
        portable: kinds of graphs in the folder.
        licence: of the weights, as the model hub names it. None: that of the software, if the data were simulated.
    """
    licence = licence or ("unknown" if source.config.data.path else "apache-2.0")
    parts = [
        _what(source, trained, licence),
        _data(source),
        _training(source.config, trained),
        _measured(metrics),
        _limits(source.config, trained),
        _use(trained, portable),
    ]
    return (
        _metadata(source, metrics, portable, licence)
        + "\n\n".join(_wrapped(block) for part in parts for block in part.split("\n\n"))
        + "\n"
    )


def hub_config(source: ModelSource, trained: Model) -> dict[str, Any]:
    """Return the content of config.json: what the model hub shows. config.yaml has all settings."""
    return {
        "library_name": LIBRARY,
        "model_type": LIBRARY,
        "architectures": [type(trained.transformer).__name__],
        "grid": trained.grid,
        "size_step": trained.size_step,
        "latent_grid": trained.tokenizer.latent_grid,
        "latent_channels": trained.tokenizer.config.latent_channels,
        "history": trained.history,
        "divergence_operator": trained.operator,
        "model": source.config.model.model_dump(mode="json"),
    }


def _metadata(source: ModelSource, metrics: dict[str, Any] | None, portable: Sequence[str], licence: str) -> str:
    """The block of YAML at the start of the card, as the model hub specifies it."""
    tags = [
        "physics",
        "fluid-dynamics",
        "mixture-of-experts",
        "neural-operator",
        *(["onnx"] if "onnx" in portable else []),
    ]
    data: dict[str, Any] = {"license": licence, "library_name": LIBRARY, "tags": tags}
    results = [
        {
            "task": {"type": "other", "name": "next snapshot of a 3D flow"},
            "dataset": {"type": domain, "name": f"{source.config.data.name}, {domain}", "split": "test"},
            "metrics": [
                {"type": key, "name": title, "value": float(values[key])}
                for title, key, *_ in ERRORS
                if values.get(key) is not None
            ],
        }
        for domain, values in (metrics or {"domains": {}})["domains"].items()
    ]
    if results:
        data["model-index"] = [{"name": source.config.name, "results": results}]
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n"


def _routed(moe: MoEConfig) -> str:
    return f"{moe.num_experts} ({'one' if moe.top_k == 1 else moe.top_k} used per token)"


def _wrapped(block: str) -> str:
    """Wrap prose; leave headings, tables, lists and code unchanged."""
    return block if block[0] in "#|- " else textwrap.fill(" ".join(block.split()), 100)


def _what(source: ModelSource, trained: Model, licence: str) -> str:
    parameters = sum(p.numel() for p in trained.transformer.parameters())
    experts = sum(p.numel() for p in trained.transformer.parameters() if marks(p).sharded)
    model, grid = source.config.model, trained.tokenizer.grid
    return f"""# {source.config.name}

A multi-physics foundation model for 3D flow: from the last {model.history} snapshots of velocity, pressure and the
solid mask it predicts the next one. A tokenizer compresses fields of {_by(grid)} cells to latents of
{_by(trained.tokenizer.latent_grid)} x {trained.tokenizer.config.latent_channels} numbers; a transformer with a sparse
mixture of experts advances the latents. It takes every grid whose sizes are multiples of {trained.size_step}.
{_conserved(trained.tokenizer.config)}

| | |
|---|---|
| parameters of the transformer | {parameters:,}, of which {experts:,} in routed experts |
| layers, width, heads | {model.depth}, {model.dim}, {model.heads} |
| routed experts per layer, shared experts | {_routed(model.moe)}, {model.moe.shared_experts} |
| scope of a routing decision | {model.moe.scope} |
| time strides, in snapshots of the training data | {", ".join(map(str, model.strides))} |
| training step of these weights | {trained.step} |
| weights (SHA-256 over all tensors) | {trained.weights_sha256} |

Licence of the software: Apache-2.0. Licence of the weights: {licence}. {_obligations(source, licence)}"""


def _obligations(source: ModelSource, licence: str) -> str:
    if licence == "unknown":
        return """The weights may carry obligations of the data they were trained on; state their licence here and in
the first lines of this file before publishing them."""
    if source.config.data.path:
        return "The weights may carry obligations of the data they were trained on."
    return "They were trained on simulations of this software alone."


def _conserved(tokenizer: TokenizerConfig) -> str:
    if tokenizer.decoder == "direct":
        return "The decoded velocity is not constrained to be free of divergence."
    faces = " (its values on the cells' faces; those at the centres are their means)"
    where = faces if tokenizer.operator == "staggered" else ""
    return f"""The decoded velocity is divergence-free to rounding for the
{tokenizer.operator} operator on the periodic box{where}."""


def _walls(tokenizer: TokenizerConfig) -> str:
    zero = tokenizer.decoder == "direct" or tokenizer.walls != "none"
    walls = f"Velocity in solid voxels is {'exactly zero' if zero else 'small but not exactly zero'}."
    if tokenizer.decoder == "direct":
        return f"{walls} Divergence is not zero for any operator."
    return f"""{walls} Divergence is zero for the {tokenizer.operator}
  operator only. In float32 files it is zero to float32 rounding."""


def _data(source: ModelSource) -> str:
    data = source.config.data
    if data.path:
        kind = f"An existing dataset, `{Path(data.path).name}`; its makers state its origin, units and licence."
    else:
        kind = (
            f"Synthetic: simulated by shodh_moe's own lattice-Boltzmann solver (D3Q19), seed {data.seed}, "
            f"{data.snapshots} snapshots per trajectory. Lattice units: cell size, time step and mean density are 1; "
            "speeds are in cells per time step. It contains no measured flow."
        )
    lines = ["## Data", "", f"{kind} Grid {_by(data.grid)}. Splits are by trajectory."]
    if not data.path:
        lines += ["", "| domain | trajectories: train, valid, test | settings they were drawn from |", "|---|---|---|"]
        for name, domain in data.domains.items():
            counts = domain.trajectories
            settings = domain.model_dump(exclude={"trajectories"})
            text = ", ".join(f"{key} {value}" for key, value in settings.items())
            lines.append(f"| {name} | {counts.train}, {counts.valid}, {counts.test} | {text} |")
    ranges = _ranges(source)
    if ranges:
        lines += ["", "Parameters of the training trajectories, smallest to largest:", ""]
        lines += ["| domain | training trajectories | parameters |", "|---|---|---|", *ranges]
    else:
        lines += [
            "",
            "The dataset was not available when this card was written, so its ranges are not listed.",
        ]
    return "\n".join(lines)


def _ranges(source: ModelSource) -> list[str]:
    """Return one table row per domain with the range of every scalar in the training files; [] without the files."""
    values: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    with contextlib.suppress(UserError, OSError):
        data = source.config.data
        for record in list_trajectories(source.paths.dataset, SPLITS[0], data.grid, data.skip_bad):
            counts[record.domain] = counts.get(record.domain, 0) + 1
            found = values.setdefault(record.domain, {})
            with opened(record.path) as file:
                for name, scalar in file.get("scalars", {}).items():
                    found.setdefault(name, []).extend(np.ravel(scalar[()]).astype(float).tolist())
    rows = []
    for domain, scalars in values.items():
        text = ", ".join(f"{name} {min(v):.4g} to {max(v):.4g}" for name, v in scalars.items())
        rows.append(f"| {domain} | {counts[domain]} | {text or 'none given'} |")
    return rows


def _training(config: Config, trained: Model) -> str:
    t = config.training
    samples = t.batch_size * t.accumulation * trained.world_size // config.parallel.context_size
    return f"""## Training

{trained.step} of {t.steps} steps, {samples} samples each, under the DeepSpeed engine; ranks: {trained.world_size},
expert-parallel size: {trained.ep_size}, seed {config.seed}. AdamW, learning rate {t.learning_rate:g} after
{t.warmup_steps} steps of warm-up, weight decay {t.weight_decay:g}, gradients clipped at {t.grad_clip:g}, precision
{t.precision}. Loss: mean squared error of the next normalised latent, plus balance and z losses of the routers. The
model was trained one step ahead only, not on its own predictions.{_fine_tuned(config)}"""


def _fine_tuned(config: Config) -> str:
    """A paragraph about a fine-tuning; "" for a model that was not fine-tuned."""
    learned = {
        "all": "all weights",
        "expert": "a new path alone, so the predictions of samples on all other paths are those of the model before",
        "paths": "what the paths of the samples have for themselves, so the predictions of samples on all other paths "
        "are those of the model before",
        "lora": "low-rank additions to all matrices, which are part of the weights here",
        "router": "the router alone",
    }
    if not config.finetune:
        return ""
    return f"""

Fine-tuned from another model, whose tokenizer and statistics stay. What learned: {learned[config.finetune.train]}.
Steps, samples and learning rate above are those of the fine-tuning."""


def _measured(metrics: dict[str, Any] | None) -> str:
    if not metrics:
        return """## Measured

These weights have not been evaluated: there is no metrics.json for them, and their quality is unknown. Run
`shodh evaluate` before relying on any prediction."""
    domains, divergence = metrics["domains"], metrics["divergence"]
    rows = [
        f"| {domain} | {title} | " + " | ".join(_number(values.get(key)) for key in keys) + " |"
        for domain, values in domains.items()
        for title, *keys in ERRORS
    ]
    worse = [
        f"{title} in {domain}"
        for domain, values in domains.items()
        for title, ours, *others, _ in ERRORS
        if any(values.get(other) is not None and values[ours] >= values[other] for other in others)
    ]
    verdict = f"Not better than a baseline: {', '.join(worse)}." if worse else "Better than each baseline in every row."
    table = "\n".join(rows)
    return f"""## Measured

One snapshot ahead on held-out test trajectories, from true snapshots. Latents normalised per channel, fields divided by
their training rms. Persistence repeats the last snapshot; the mean predictor returns the domain's training mean,
voxel by voxel; the tokenizer alone encodes and decodes the true snapshot.

| domain | quantity | model | persistence | mean predictor | tokenizer alone |
|---|---|---|---|---|---|
{table}

{verdict}

Free-running, with predictions fed back: relative velocity error (nRMSE) by number of snapshots, persistence in
brackets.

{_rollouts(domains)}

Divergence of the decoded velocity, {divergence["operator"]} operator, {divergence["dtype"]}, {divergence["norm"]}:
{divergence["rms_relative"]:.1e}."""


def _rollouts(domains: dict[str, Any]) -> str:
    lines = []
    for domain, values in domains.items():
        pairs = list(zip(values["rollout_nrmse"], values["rollout_nrmse_persistence"], strict=True))
        last = len(pairs) - 1
        shown = [f"{i + 1}: {pairs[i][0]:.3g} ({pairs[i][1]:.3g})" for i in sorted({0, last // 2, last})]
        behind = [i + 1 for i, (ours, still) in enumerate(pairs) if ours >= still]
        verdict = f"; not better than persistence at snapshot {', '.join(map(str, behind))}" if behind else ""
        lines.append(f"- {domain}: {', '.join(shown)}{verdict}")
    return "\n".join(lines)


def _limits(config: Config, trained: Model) -> str:
    if config.data.path:
        time_step = "the time step of its training data"
    else:
        steps = {name: domain.steps_per_snapshot for name, domain in config.data.domains.items()}
        time_step = "the time between two snapshots it was trained on: " + ", ".join(
            f"{count} lattice time steps ({name})" for name, count in steps.items()
        )
    return f"""## Limits

- Trained on a grid of {_by(config.data.grid)} cubic cells. Grids whose sizes are other multiples of
  {trained.size_step} are accepted, but its errors on them were not measured here.
- One time step: {time_step}.
  Data with another time step give wrong dynamics.
- Only the flows and parameter ranges under Data. Anything else is extrapolation. `shodh predict` warns of a flow whose
  statistics are unlike all training domains, if this folder has `contexts.safetensors`, but cannot notice everything.
- Free-running errors grow, because each prediction is made from the one before. Check a rollout of the length you need
  against true snapshots of the same kind of flow.
- The tokenizer loses fine detail; the smallest scales are predicted worst, and seams between its patches of 8 cells
  become visible as errors grow.
- {_walls(trained.tokenizer.config)}
- No claim is made that the model obeys any other law (momentum, energy), that it holds for measured flows, that the
  routing of tokens reflects physics, or that one model is better than one per domain. It must not be used for safety or
  design decisions."""


def _use(trained: Model, portable: Sequence[str]) -> str:
    graphs = (
        """ The folder `portable` has the model as graphs, which run without shodh_moe; its README.md has the code."""
        if portable
        else ""
    )
    return f"""## Use

    shodh predict --checkpoint FOLDER --input flow.hdf5 --steps 10 --output prediction.hdf5
    shodh evaluate --config FOLDER/config.yaml --checkpoint FOLDER --output measured

FOLDER is this folder; its files are first checked against `export.json`. `flow.hdf5` holds at least
{trained.span()} snapshots of velocity and pressure in the_well's HDF5 schema, on a grid whose sizes
are multiples of {trained.size_step}. Neither command needs DeepSpeed. Evaluation needs the dataset of the config. From
Python: `shodh_moe.load_model(FOLDER).forecast(...)`.{graphs}"""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _by(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))
