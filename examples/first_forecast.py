# %% [markdown]
# # A first forecast
#
# Load the model that `shodh run --config config.yaml` has trained, continue flows that it has never seen, and compare
# them with the truth.

# %%
import matplotlib

matplotlib.use("Agg")  # leave this line out in a notebook
import matplotlib.pyplot as plt

import shodh_moe

run = shodh_moe.open_run("runs/quickstart")
model = shodh_moe.load_model(run.folder)
dataset = run.dataset("test")
print(f"{len(dataset)} held-out flows of {', '.join(dataset.domains)}; the model needs {model.history} snapshots")

# %% [markdown]
# A dataset reads what an index asks for: trajectory 0, and of that the first snapshots. The model continues them.
# *Persistence*, the last given snapshot unchanged, is what a forecast has to beat.

# %%
STEPS = 3
for number, record in enumerate(dataset.records):
    given, truth = dataset[number, : model.history], dataset[number, model.history : model.history + STEPS]
    predicted = model.forecast(given, steps=STEPS)
    still = given["velocity"][-1:].expand_as(truth["velocity"])
    errors = shodh_moe.metrics.vrmse(predicted["velocity"], truth["velocity"])
    persistence = shodh_moe.metrics.vrmse(still, truth["velocity"])
    print(record.domain, *(f"{own:.3f} ({last:.3f})" for own, last in zip(errors, persistence, strict=True)))

# %% [markdown]
# Mass is conserved in every voxel, however wrong a forecast may be: the velocity on the faces of the voxels has no
# divergence but rounding, and it is zero in solids.

# %%
mass = shodh_moe.kernels.divergence(predicted["velocity_face"], model.operator)
inside = (predicted["velocity"] * predicted["solid"]).abs().max()
print(f"largest divergence {mass.abs().max():.1e}, largest velocity in solids {inside:.1e}")

# %%
flows = {"truth": truth["velocity"], "forecast": predicted["velocity"]}
fastest = float(truth["velocity"].norm(dim=1).max())
figure, axes = plt.subplots(2, STEPS, figsize=(3 * STEPS, 6), layout="constrained")
for row, (name, velocity_N3XYZ) in zip(axes, flows.items(), strict=True):
    for step, place in enumerate(row):
        speed_XYZ = velocity_N3XYZ[step].norm(dim=0)
        place.imshow(speed_XYZ[:, speed_XYZ.shape[1] // 2].T, origin="lower", vmin=0, vmax=fastest)
        place.set_title(f"{name}, step {step + 1}")
figure.savefig("first_forecast.png", dpi=80)
