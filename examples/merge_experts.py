# %% [markdown]
# # Merge two experts
#
# Fine-tune the trained model for each kind of flow alone, and merge the two results along the line between them:
# alpha = -1 and +1 are the two experts, 0 is their average. One file, no further training.

# %%
import shodh_moe

CONFIG, STEPS = "config.yaml", 40  # a tenth of the learning rate, and few steps: the experts stay near their start
start = shodh_moe.open_run("runs/quickstart")
domains = start.dataset().domains

# %% [markdown]
# `start` takes the weights of another run, and `data.weights` chooses the domains. Both experts keep the tokenizer, so
# that their latents mean the same.

# %%
experts = []
for domain in domains:
    weights = ", ".join(f"{name}: {float(name == domain)}" for name in domains)
    overrides = [f"start={start.folder}", f"tokenizer.path={start.paths.tokenizer}", f"data.weights={{{weights}}}"]
    overrides += [f"training.steps={STEPS}", f"training.checkpoint_every={STEPS}", f"training.validate_every={STEPS}"]
    overrides += ["training.warmup_steps=4", "training.learning_rate=5e-4"]
    experts.append(shodh_moe.train(shodh_moe.load_config(CONFIG, overrides, f"expert_{domain}")))

# %%
shodh_moe.merge(
    {
        "merge_method": "ccm",
        "models": [{"model": str(run.checkpoint)} for run in experts],
        "sweep": {"alpha": [-1.0, 0.0, 1.0]},
    },
    "merged",
)

# %% [markdown]
# Each output is a model. One step ahead on held-out flows, beside the model that both experts started from. Few steps
# change little, and not always for the better: with the quickstart's model the expert for the open channel gains 1 %,
# and the one for porous media loses 2 %.

# %%
dataset = experts[0].dataset("test")
places = {"start": str(start.folder), **{f"alpha {alpha:+.0f}": f"merged/alpha={alpha}" for alpha in (-1.0, 0.0, 1.0)}}
print("velocity error", *domains)
for name, place in places.items():
    model = shodh_moe.load_model(place)
    errors: dict[str, list[float]] = {domain: [] for domain in domains}
    for number, record in enumerate(dataset.records):
        predicted = model.forecast(dataset[number, : model.history], steps=1)
        truth = dataset[number, model.history]
        errors[record.domain].append(float(shodh_moe.metrics.vrmse(predicted["velocity"], truth["velocity"])))
    print(name, *(f"{sum(found) / len(found):.4f}" for found in errors.values()))
