"""The ``finetune`` section: what a fine-tuned model learns, and what stays as it was."""

from __future__ import annotations

from typing import Literal

from shodh_moe.base.section import Positive, Section, setting


class FineTuningConfig(Section):
    """Fine-tuning of a trained model on the data of another domain (docs/finetune.md)."""

    train: Literal["all", "expert", "paths", "lora", "router"] = setting(
        "all",
        changes="run",
        description="weights that learn: all; a new path beside the others, which stay; what the paths of the samples "
        "have for themselves; low-rank additions to all matrices; or the router alone",
    )
    rank: Positive = setting(8, changes="run", description="with train lora, rank of the additions")
    ignore_fields: list[str] = setting(
        [], changes="run", description="fields of the data that the model lacks and that may be left out"
    )
