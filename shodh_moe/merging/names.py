"""Give models of one architecture the same names of tensors, which wrappers of torch and Lightning prefix.

DistributedDataParallel adds ``module.``, torch.compile ``_orig_mod.``, Lightning the name of its attribute, such as
``model.``; a compiled, sharded or checkpointed part of a model has a wrapper inside of its tensors' names.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

from shodh_moe.merging.inputs import InputModel

INNER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_wrappers(models: list[InputModel]) -> list[InputModel]:
    """Rename the tensors of models that have the same ones but for wrappers' prefixes; others are left as they are.

    A prefix that all of them have is kept, so the names are those of the model with the shortest ones. Models are
    returned in the same order; a renamed one has a note.
    """
    prefixes = [_prefix(model) for model in models]
    kinds = [
        frozenset(_bare(name)[len(prefix) :] for name in m.tensors) for m, prefix in zip(models, prefixes, strict=True)
    ]
    result = []
    for model, prefix, kind in zip(models, prefixes, kinds, strict=True):
        alike = [number for number, other in enumerate(kinds) if other == kind]
        shortest = min((prefixes[number] for number in alike), key=len)
        names = {name: shortest + _bare(name)[len(prefix) :] for name in model.tensors}
        given = {frozenset(models[number].tensors) for number in alike}
        fits = all(prefixes[number].endswith(shortest) for number in alike) and len(set(names.values())) == len(names)
        if len(given) == 1 or not fits or list(names) == list(names.values()):
            result.append(model)
            continue
        old, new = next((old, new) for old, new in names.items() if old != new)
        note = f"{model.path}: prefixes of a wrapper are left out of its tensors' names ({old} is {new})"
        tensors = {names[name]: tensor for name, tensor in model.tensors.items()}
        result.append(replace(model, tensors=tensors, notes=[*model.notes, note]))
    return result


def _bare(name: str) -> str:
    return INNER.sub("", name)


def _prefix(model: InputModel) -> str:
    """Return the modules that contain all tensors of a model, such as ``module.`` or nothing."""
    parts = [_bare(name).split(".")[:-1] for name in model.tensors]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return "".join(f"{column[0]}." for column in shared)
