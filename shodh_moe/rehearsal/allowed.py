"""Waits for the device and wide matrix products that a rehearsal accepts, each with its reason.

A place is a file and a function. Phases are named by their last word: the first one of a training may wait once, before
the first step.
"""

from __future__ import annotations

_SIZES = "the host must know the sizes of an exchange before it can start it"
_RECORD = "the host writes the numbers of a record, once in training.log_every or telemetry.every steps"
_RESULT = "the host writes the result, once for each validation"
_STRIDE = "a stride that the model was not trained with must be refused, outside of training"
_FLOAT32 = "a product of rows sorted by expert in float32, for which there is no grouped kernel"

# By the last word of the phase, or "" for all phases: places where the host may wait, and why.
WAITS: dict[str, dict[str, str]] = {
    "": {
        "training/engine.py _clipped": "once a step: norms, bad losses and stop requests decide the step",
        "parallel/sample_exchange.py __init__": _SIZES,
        "model/plan.py splits": _SIZES,
        "parallel/expert_parallel.py check_same_tokens": "once for each number of tokens, in the first step",
    },
    "record": {
        "training/trainer.py _mean_over_ranks": _RECORD,
        "training/telemetry.py summary": _RECORD,
        "training/telemetry.py _mean_over_ranks": _RECORD,
        "training/telemetry.py layer_records": _RECORD,
        "parallel/expert_parallel.py _elapsed_ms": _RECORD,
    },
    "validation": {
        "training/pretrain.py validate": _RESULT,
        "training/tokenizer_task.py validate": _RESULT,
        "model/stride.py forward": _STRIDE,
    },
    "predict": {
        "inference/model.py continue_flows": "the predicted fields are read by the host",
        "model/stride.py forward": _STRIDE,
        "model/plan.py count_E": _FLOAT32,
        "model/experts.py grouped": _FLOAT32,
    },
}
BUILD = "build"  # the last word of phases that may wait anywhere

# Places where matrix products stay in float32 under autocast.
WIDE = {
    "model/routers/cosine.py logits": "the router decides in float32",
    "model/routers/linear.py logits": "the router decides in float32",
    "kernels/cosine_gating.py reference_logits": "the router decides in float32",
    "kernels/cosine_gating.py _gradient": "the gradient of such a decision",
}
# The last words of phases that run in float32, whatever the precision of the training.
FLOAT32_PHASES = ("predict", "statistics")


def may_wait(phase: str, place: str) -> bool:
    """Whether the host may wait for the device in this phase and place."""
    kind = phase.rpartition(" ")[2]
    return kind == BUILD or place in WAITS[""] or place in WAITS.get(kind, {})
