"""Waits for the device and wide matrix products that a rehearsal accepts, each with its reason."""

from __future__ import annotations

# By phase, or "" for all phases: file and function, and why the host may wait there.
WAITS: dict[str, dict[str, str]] = {
    "": {
        "training/engine.py _clipped": "one read a step: norms, bad losses and stop requests, which decide the step",
        "parallel/sample_exchange.py __init__": "the sizes of an exchange of samples are needed before it can start",
        "parallel/expert_parallel.py check_same_tokens": "once for each number of tokens, in the first step",
        "model/plan.py splits": "the sizes of a dropless exchange of tokens are needed before it can start",
    },
    "build": dict.fromkeys(
        (
            "model/routers/cosine.py __init__",
            "training/pretrain.py __init__",
            "deepspeed/runtime/zero/stage_1_and_2.py __init__",
            "tokenizer/autoencoder.py __init__",
            "tokenizer/tokenizer.py __init__",
        ),
        "once, before the first step",
    ),
    "record": dict.fromkeys(
        (
            "training/trainer.py _mean_over_ranks",
            "training/telemetry.py summary",
            "training/telemetry.py _mean_over_ranks",
            "training/telemetry.py layer_records",
            "parallel/expert_parallel.py _elapsed_ms",
        ),
        "a record is read by the host, every training.log_every and telemetry.every steps",
    ),
    "validation": {"training/pretrain.py validate": "the result, once for each validation"},
}

# Where matrix products stay in float32 under autocast.
WIDE = {
    "model/routers/cosine.py forward": "the router decides in float32",
    "kernels/cosine_gating.py reference_logits": "the router decides in float32",
    "model/routers/linear.py forward": "the router decides in float32",
}


def is_allowed(phase: str, place: str) -> bool:
    """Whether the host may wait for the device in this phase and place."""
    return place in WAITS[""] or place in WAITS.get(phase, {})
