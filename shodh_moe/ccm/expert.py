"""Load trained experts from run folders or checkpoints without DeepSpeed, compare them, and merge them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.config import ExpertConfig, NetworkConfig
from shodh_moe.ccm.data import regimes
from shodh_moe.ccm.windows import Scale
from shodh_moe.checkpoint import (
    CheckpointReader,
    Damaged,
    checkpoints_at,
    find_checkpoint,
    list_checkpoints,
    mismatch,
    resolve_checkpoint,
)
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.inputs import Inputs, require_same_inputs
from shodh_moe.merging.config import Target
from shodh_moe.merging.methods import recipe
from shodh_moe.merging.recipe import TensorMerge, affine_sum
from shodh_moe.merging.settings import Lookup, Setting
from shodh_moe.operators import DPOT_SIZES, FNO_SIZES, DPOT2d, FNO2d, rollout
from shodh_moe.solvers.planar import PLANAR_VERSION


@dataclass
class Expert:
    """A trained network and the units it works in.

    Attributes:
        path: the checkpoint it was read from.
        config: the config it was trained with.
        scale: mean and standard deviation of its fields.
        network: in evaluation mode.
    """

    path: Path
    config: ExpertConfig
    scale: Scale
    network: FNO2d | DPOT2d

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name."""
        return dict(self.network.named_parameters())

    def with_weights(self, weights: dict[str, Tensor]) -> Expert:
        """A new expert with its own copy of the network and the given weights."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(weights)
        return Expert(self.path, self.config, self.scale, network)

    @torch.no_grad()
    def predict(self, frames_BTCHW: Tensor, steps: int, coordinate: float) -> Tensor:
        """Predict the next ``steps`` frames, [B, steps, C, H, W], in physical units and the dtype of the input.

        Args:
            frames_BTCHW: at least ``network.history`` frames in physical units; the last ones are used.
            coordinate: s of the regime; used only by a conditioned network.
        """
        frames = self.scale.normalise(frames_BTCHW)
        condition = frames.new_full((len(frames),), coordinate) if self.config.network.conditioned else None
        return self.scale.restore(rollout(self.network, frames, steps, condition))


def make_network(config: NetworkConfig, channels: int, seed: int) -> FNO2d | DPOT2d:
    """Make an untrained network for fields with ``channels`` channels."""
    common: dict[str, Any] = {"history": config.history, "conditions": int(config.conditioned), "seed": seed}
    common["coordinates"] = config.coordinates
    if config.kind == "dpot":
        return DPOT2d(DPOT_SIZES[config.size], channels, **common)
    return FNO2d(FNO_SIZES[config.size], channels, padding=config.padding, **common)


def facts_of(scale: Scale, channels: tuple[str, ...], dataset: str) -> dict[str, Any]:
    """The facts that an expert's checkpoint stores besides weights; ``dataset`` is the name of its family's folder."""
    units = {"mean": list(scale.mean), "std": list(scale.std)}
    return {"expert": {"channels": list(channels), **units, "dataset": dataset}}


def expert_inputs(config: ExpertConfig) -> Inputs:
    """What an expert's training depends on besides its config: the requests that its family's files answer."""
    requests = [regime.request for regime in regimes(config.family.family(), config.family.folder())]
    solved: Inputs = {} if config.family.source else {"data_version": PLANAR_VERSION}
    return {**solved, "data": fingerprint(requests)}


def require_same_dataset(config: ExpertConfig) -> None:
    """Refuse to resume a run whose family has been redefined since, or would be generated differently.

    Raises:
        UserError: the run's newest checkpoint was trained on data other than those that the config now names.
    """
    run = Path(config.runs) / config.name
    if found := find_checkpoint(run / "checkpoints"):
        trained, current = found[1].get("expert", {}).get("dataset"), config.family.folder().name
        if trained != current:
            raise UserError(
                f"run folder {run} was trained on {trained}, but family {config.family.name} is now {current}: "
                f"choose another name or remove {run}"
            )
        require_same_inputs(*found, expert_inputs(config))


def checkpoint_of(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, or the newest intact checkpoint of a run folder.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    if checkpoints_at(path) is None:
        raise UserError(f"{path} is neither a run folder nor a checkpoint: give one of an expert")
    try:
        found = resolve_checkpoint(path)
    except Damaged as reason:
        raise UserError(f"checkpoint {path} is refused: {reason}; use another checkpoint of its run") from None
    if found is None:
        raise UserError(f"{path} has no checkpoint yet: train it with `shodh expert train`")
    return found


def described(path: Path) -> tuple[ExpertConfig, Scale]:
    """Read config and scale from a checkpoint. Raises `UserError` if it is not an expert's."""
    state = CheckpointReader(path).state
    try:
        kept = state["expert"]
        scale = Scale(tuple(map(float, kept["mean"])), tuple(map(float, kept["std"])))
        return ExpertConfig.model_validate(state["config"]), scale
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise UserError(
            f"{path} is not a checkpoint of an expert, or is one of another version ({error}): give another checkpoint"
        ) from error


def units_of_start(config: ExpertConfig) -> Scale:
    """The units of the anchor that a config starts from. A run that resumes has stored them and needs no anchor.

    Raises:
        UserError: there is no usable anchor, or its network or number of channels differs.
    """
    assert config.start
    run = Path(config.runs) / config.name
    if list_checkpoints(run / "checkpoints"):
        return described(checkpoint_of(run))[1]
    path = checkpoint_of(Path(config.start))
    anchor, scale = described(path)
    if anchor.network != config.network:
        raise UserError(f"start: {path} has a different network from this config: change the network section")
    if len(scale.mean) != len(config.family.family().channels):
        raise UserError(f"start: {path} has fields with {len(scale.mean)} channels: give an anchor of this family")
    return scale


def load_expert(path: Path, device: str | torch.device = "cpu") -> Expert:
    """Load the expert at ``path``, a run folder or a checkpoint.

    Raises:
        UserError: there is no expert, it is damaged, or its weights do not fit its config's network.
    """
    path = checkpoint_of(path)
    config, scale = described(path)
    network = make_network(config.network, len(scale.mean), config.seed)
    reader = CheckpointReader(path)
    names = [name for name in reader.names() if name.startswith("model/")]
    shapes = {f"model/{name}": list(parameter.shape) for name, parameter in network.named_parameters()}
    if reason := mismatch({"tensors": {name: {"shape": reader.shape(name)} for name in names}}, shapes):
        raise UserError(f"checkpoint {path} is refused: {reason}")
    network.load_state_dict({name.removeprefix("model/"): reader.tensor(name) for name in names})
    return Expert(path, config, scale, network.to(device).eval())


def require_same_network(experts: list[Expert]) -> None:
    """Refuse experts with different networks or units. Raises `UserError`."""
    first = experts[0]
    for other in experts[1:]:
        if other.config.network != first.config.network:
            raise UserError(f"{first.path} and {other.path} have different networks: give experts of one anchor")
        if other.scale != first.scale:
            raise UserError(f"{first.path} and {other.path} have different units: give experts of one anchor")


def load_ends(target: Target) -> tuple[Expert, Expert]:
    """Load the low and the high expert of a ccm target with one axis, on a GPU if there is one.

    Raises:
        UserError: there are not two models; one of them is not an expert, is damaged, not finite or conditioned on the
            coordinate; or their networks, units or families differ; or their weights are the same.
    """
    if len(target.models) != 2:
        raise UserError(
            f"{target.output}: a readout is for two experts, but there are {len(target.models)}: leave out the one "
            "between them"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low, high = (load_expert(Path(path), device) for path in target.models)
    require_same_network([low, high])
    for key in ("name", "parameter", "low", "high", "scale", "interval", "solver"):
        one, other = (getattr(expert.config.family, key) for expert in (low, high))
        if one != other:
            raise UserError(
                f"{low.path} belongs to family {low.config.family.name}, {high.path} to {high.config.family.name}, "
                f"whose {key} differs ({one} and {other}): give experts of one family"
            )
    if low.config.network.conditioned:
        raise UserError(
            f"{low.path} has a network that takes the coordinate as input: give experts whose network does not"
        )
    for expert in (low, high):
        for name, values in expert.weights().items():
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"{expert.path}: tensor {name} has NaN or infinite values: use another checkpoint")
    weights = high.weights()
    if all(torch.equal(values, weights[name]) for name, values in low.weights().items()):
        raise UserError(f"{low.path} and {high.path} have the same weights: give the experts of both ends")
    return low, high


def compose(low: Expert, high: Expert, alpha: float) -> Expert:
    """Merge two experts at ``alpha`` on the line: (1 - alpha)/2 low + (1 + alpha)/2 high (DESIGN 3.7)."""
    inputs, coefficients = (low.weights(), high.weights()), [(1 - alpha) / 2, (1 + alpha) / 2]
    with torch.no_grad():
        return low.with_weights({name: affine_sum(coefficients, [one[name] for one in inputs]) for name in inputs[0]})


def from_anchor(method: str, anchor: Expert, models: list[Expert], parameters: dict[str, Setting]) -> Expert:
    """Merge by task arithmetic, TIES or DARE, with parameters as in `shodh merge` configs (docs/merging.md)."""
    inputs = [anchor.weights(), *(model.weights() for model in models)]
    lookup = Lookup(parameters, [{} for _ in models])
    with torch.no_grad():
        return anchor.with_weights({name: _tensor(method, lookup, name, inputs) for name in inputs[0]})


def _tensor(method: str, lookup: Lookup, name: str, inputs: list[dict[str, Tensor]]) -> Tensor:
    tensors = [one[name] for one in inputs]
    flat = [tensor.detach().flatten() for tensor in tensors]
    merge = TensorMerge(method, lookup, name, tuple(tensors[0].shape), 1, len(flat) - 1, True, flat[0].dtype)
    made = recipe(merge)
    for number in range(made.passes):
        made.observe(number, 0, [values.clone() for values in flat])
        made.end_pass(number)
    return made.result(0, flat).view(tensors[0].shape)
