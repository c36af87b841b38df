"""Write a model's parts as graphs, with a page that shows how to use them.

portable/<part>.pt2     torch.export program of encoder, paths, step and decoder
portable/<part>.onnx    the same in ONNX; onnxruntime runs them
portable/portable.json  names, shapes and dtypes of every part's inputs and outputs, and how often to call ``paths``
portable/README.md      code that uses them, without this package
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.inference.model import Model
from shodh_moe.inference.portable.parts import make_parts

FOLDER = "portable"
KINDS = ("pt2", "onnx")
OUTPUTS = {
    "encoder": ("latents", "geometry"),
    "paths": ("expert", "gate"),
    "step": ("latent",),
    "decoder": ("velocity", "pressure", "velocity_face"),
}


def require_exporters(kinds: Sequence[str]) -> None:
    """Check that graphs can be written. Raises: UserError: a package is missing."""
    if "onnx" in kinds:
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"--portable onnx needs {error.name}: pip install 'shodh_moe[onnx]'") from None


def write_portable(model: Model, folder: Path, kinds: Sequence[str]) -> None:
    """Write the parts of a model to the new folder ``folder``.

    Args:
        kinds: of `KINDS`.

    Raises:
        UserError: the router needs the domain of a sample, or a package is missing.
    """
    require_exporters(kinds)
    parts, given = make_parts(model), _example(model)
    folder.mkdir()
    described: dict[str, Any] = {}
    with torch.no_grad(), _quiet():
        for name, part in parts.items():
            inputs = [one for one in inspect.signature(part.forward).parameters if one in given]
            results = part(*(given[one] for one in inputs))
            results = (results,) if isinstance(results, Tensor) else results
            outputs = OUTPUTS[name][: len(results)]
            _write(part, tuple(given[one] for one in inputs), outputs, folder / name, kinds)
            found = dict(zip(outputs, results, strict=True))
            described[name] = {
                "inputs": {one: _describe(given[one]) for one in inputs},
                "outputs": {one: _describe(tensor) for one, tensor in found.items()},
            }
            given |= found
    facts = {
        "format": 1,
        "kinds": list(kinds),
        "paths": _when(model),
        "history": model.history,
        "grid": model.grid,
        "operator": model.operator,
        "divergence_free": model.tokenizer.config.decoder != "direct",
        "parts": described,
    }
    (folder / "portable.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(_page(facts), encoding="utf-8")


def _write(
    part: nn.Module, given: tuple[Tensor, ...], outputs: Sequence[str], path: Path, kinds: Sequence[str]
) -> None:
    # Without a decomposition a program would hold contexts of autocast, which cannot be saved.
    program = torch.export.export(part.eval(), given, strict=False).run_decompositions({})
    if "pt2" in kinds:
        torch.export.save(program, path.with_suffix(".pt2"))
    if "onnx" in kinds:
        target = path.with_suffix(".onnx")
        torch.onnx.export(
            program, given, target, dynamo=True, output_names=list(outputs), external_data=False, verbose=False
        )


def _example(model: Model) -> dict[str, Tensor]:
    """A flow of the model's grid; a graph depends on shapes alone."""
    generator, grid = torch.Generator().manual_seed(0), model.grid
    solid_1XYZ = torch.zeros(1, *grid)
    solid_1XYZ[:, 0] = 1
    return {
        "velocity": torch.randn(model.history, 3, *grid, generator=generator),
        "pressure": torch.randn(model.history, 1, *grid, generator=generator),
        "solid": solid_1XYZ,
        "latent": torch.randn(
            model.tokenizer.config.latent_channels, *model.tokenizer.latent_grid, generator=generator
        ),
    }


def _when(model: Model) -> str:
    path = model.transformer.path
    if path is None:
        return "never"
    return "once" if path.config.router.context == "sample" else "every step"


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' remarks about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


LOAD = {
    "pt2": """import torch


def load(part):
    return torch.export.load(f"{part}.pt2").module()
""",
    "onnx": """import onnxruntime
import torch


def load(part):
    session = onnxruntime.InferenceSession(f"{part}.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*tensors):
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors)}
        results = [torch.from_numpy(one) for one in session.run(None, given)]
        return results[0] if len(results) == 1 else results

    return run
""",
}


def _page(facts: dict[str, Any]) -> str:
    """The text of README.md: what the parts are, and code that runs as it stands."""
    names = list(facts["parts"])
    fields = list(facts["parts"]["decoder"]["outputs"])
    once = 'paths = load("paths")(latents, geometry)  # a flow keeps the paths of its given snapshots'
    lines = {
        "never": ("paths = ()", ""),
        "once": (once, ""),
        "every step": ('choose = load("paths")', "    paths = choose(latents, geometry)\n"),
    }[facts["paths"]]
    use = f"""
encoder, step, decoder = load("encoder"), load("step"), load("decoder")
latents, geometry = encoder(velocity, pressure, solid)
{lines[0]}
forecast = []
for _ in range(steps):
{lines[1]}    latent = step(latents, geometry, *paths)
    latents = torch.cat([latents[1:], latent[None]])
    forecast.append(decoder(latent, solid))  # {", ".join(fields)}
"""
    rows = [
        f"| {part} | {kind[:-1]} | {name} | {' x '.join(map(str, one['shape']))} | {one['dtype']} |"
        for part in names
        for kind in ("inputs", "outputs")
        for name, one in facts["parts"][part][kind].items()
    ]
    table = "\n".join(rows)
    blocks = "\n\n".join(f"With `.{kind}` files:\n\n```python\n{LOAD[kind]}{use}```" for kind in facts["kinds"])
    name = "velocity_face" if "velocity_face" in fields else "velocity"
    conserved = f"The divergence of `{name}` vanishes to rounding in float64, {facts['operator']} operator."
    if not facts["divergence_free"]:
        conserved = "The decoder does not remove the velocity's divergence."
    return f"""# {", ".join(names)} as graphs

These files run without shodh_moe. They take the last {facts["history"]} snapshots of one flow, `velocity`, `pressure`
and `solid` (1 in solid voxels), in the units of the training data, and give the same forecast as shodh_moe to rounding
in float32. {conserved} Run the code in this folder, with `steps` set to the number of snapshots.

{blocks}

| part | | name | shape | dtype |
|---|---|---|---|---|
{table}
"""
