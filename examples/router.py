# %% [markdown]
# # What the router does
#
# The transformer is a mixture of experts. A router, which is never told the kind of flow, sends each sample to one
# expert. Does it separate the kinds of flow, and when did it begin to?

# %%
import torch

import shodh_moe

run = shodh_moe.open_run("runs/quickstart")
model = shodh_moe.load_model(run.folder)

# %% [markdown]
# Training has recorded the share of tokens that each expert got, by step, layer and domain. With `scope: path` there is
# one decision for all layers, so the first one says it all.

# %%
load = run.routing()["load"].isel(layer=0)
print(load.isel(step=[0, -1]).to_series().unstack("expert").round(3))

# %% [markdown]
# The evaluation has measured the same on held-out flows. `purity` is the share of a domain's tokens at its favourite
# expert, and `bifurcated` says whether each domain has an expert of its own.

# %%
layer = run.metrics["routing"]["layers"][0]
print({domain: round(value, 3) for domain, value in layer["purity"].items()}, "bifurcated:", layer["bifurcated"])

# %% [markdown]
# The same by hand, with any flow: encode its snapshots, and ask the transformer for its decisions.

# %%
dataset = run.dataset("test")
experts = run.config.model.moe.num_experts
counts = torch.zeros(len(dataset.domains), experts)
with torch.no_grad():
    for number, record in enumerate(dataset.records):
        flow = dataset[number, : model.history]
        history = model.tokenizer.encode(flow.channels())[None]  # [1, H, C, x, y, z]
        geometry = model.tokenizer.encode_geometry(flow["solid"][None])
        chosen = model.transformer(history, geometry).routing[0].expert_N
        counts[dataset.domains.index(record.domain)] += torch.bincount(chosen.cpu(), minlength=experts)
for domain, counts_E in zip(dataset.domains, counts, strict=True):
    print(f"{domain}: {counts_E.int().tolist()} tokens, purity {shodh_moe.metrics.purity(counts_E):.3f}")

# %% [markdown]
# One number for the whole table: how many nats the expert tells about the domain, from 0 to ln 2 for two equal domains.

# %%
print(f"mutual information {shodh_moe.metrics.mutual_information(counts):.3f} nats")
