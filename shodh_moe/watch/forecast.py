"""Draw forecasts of a run's newest checkpoint, in a process of its own.

``python -m shodh_moe.watch.forecast RUN FOLDER`` writes a picture for each domain, ``<domain>.png``, and prints
JSON with the step and the domains, or an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw(run: Path, folder: Path) -> dict[str, Any]:
    """Predict a test snapshot of each domain from the true ones before it, and draw it beside the truth.

    Raises:
        UserError: there is no intact checkpoint, or the dataset is no longer where the config leads to.
    """
    import torch

    from shodh_moe.data.dataset import Fields
    from shodh_moe.inference.loading import load_model
    from shodh_moe.report.figure import write_figures
    from shodh_moe.report.run.fields import field_slices
    from shodh_moe.report.run.load import RunData
    from shodh_moe.runs.run import open_run

    torch.set_num_threads(1)
    model, dataset = load_model(run), open_run(run).dataset("test")
    arrays: dict[str, Any] = {}
    domains: list[str] = []
    for number, record in enumerate(dataset.records):
        domain, now = record.domain, max(model.history, record.n_snapshots // 2)
        if domain in domains or now >= record.n_snapshots:
            continue
        domains.append(domain)
        fields = dataset[number, now - model.history : now + 1]
        given = Fields({name: values if name == "solid" else values[:-1] for name, values in fields.items()})
        predicted = model.forecast(given, steps=1)
        for name, source, at in (("true", fields, -1), ("pred", predicted, -1)):
            arrays[f"{domain}/{name}"] = torch.cat([source["velocity"][at], source["pressure"][at]]).double().numpy()
        arrays[f"{domain}/solid"] = fields["solid"][0].numpy()
    data = RunData(run.name, {}, [], [], arrays, domains, "", {})
    write_figures({domain: field_slices(data, domain) for domain in domains}, folder)
    return {"step": model.step, "domains": domains}


def main() -> int:
    from shodh_moe.base.errors import UserError

    try:
        print(json.dumps(draw(Path(sys.argv[1]), Path(sys.argv[2]))))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
