# %% [markdown]
# # Your own data
#
# Arrays in a common format (HDF5, NetCDF, NumPy, MATLAB, VTK, ...) are imported once, with a YAML file that says what
# is what. Then they are a dataset like any other.

# %%
import subprocess
from pathlib import Path

import numpy as np

import shodh_moe

model = shodh_moe.load_model("runs/quickstart")

# %% [markdown]
# For want of your arrays, this writes some: decaying Taylor-Green vortices, an exact solution of the Navier-Stokes
# equations, as `.npz` files with axes (t, x, y, z).

# %%
VISCOSITY, TIME_STEP, SPEED = 0.01, 50.0, 0.03
arrays = Path("arrays")
arrays.mkdir(exist_ok=True)
x, y, _ = np.meshgrid(*[2 * np.pi * (np.arange(n) + 0.5) / n for n in model.grid], indexing="ij")
k = [2 * np.pi / n for n in model.grid[:2]]
times = TIME_STEP * np.arange(6)
for number, speed in enumerate([SPEED, 0.8 * SPEED, 0.6 * SPEED]):
    decay = speed * np.exp(-VISCOSITY * (k[0] ** 2 + k[1] ** 2) * times)[:, None, None, None]
    u, v = decay * np.sin(x) * np.cos(y), -decay * np.cos(x) * np.sin(y) * k[0] / k[1]
    pressure = decay**2 / 4 * (np.cos(2 * x) + (k[0] / k[1]) ** 2 * np.cos(2 * y))
    np.savez(arrays / f"vortex_{number}.npz", u=u, v=v, w=0 * u, p=pressure, t=times)

# %%
Path("vortices.yaml").write_text(
    """\
name: vortices
domain: vortices
output: data/vortices
source: Taylor-Green vortices, exact solution
files: {train: [arrays/vortex_0.npz], valid: [arrays/vortex_1.npz], test: [arrays/vortex_2.npz]}
axes: [t, x, y, z]
velocity: [u, v, w]
pressure: p
time: t
spacing: 1.0
boundaries: {x: periodic, y: periodic, z: periodic}
units: {length: cell, time: step}
scalars: {viscosity: 0.01}
"""
)
subprocess.run(["shodh", "data", "import", "vortices.yaml"], check=True)
subprocess.run(["shodh", "data", "check", "data/vortices"], check=True)

# %% [markdown]
# The model was trained on other flows, so this forecast is extrapolation. Its errors say how far to trust it. Mass is
# conserved all the same.

# %%
dataset = shodh_moe.open_dataset("data/vortices", "test")
given, truth = dataset[0, : model.history], dataset[0, model.history :]
predicted = model.forecast(given, steps=len(truth["velocity"]))
print("units", given.source.units)
errors = shodh_moe.metrics.nrmse(predicted["velocity"], truth["velocity"])
print("error at each step", *(f"{error:.3f}" for error in errors))
mass = shodh_moe.kernels.divergence(predicted["velocity_face"], model.operator)
print(f"largest divergence {mass.abs().max():.1e}")

# %% [markdown]
# A model takes every grid whose sizes are multiples of its `size_step`, and refuses others in one line.

# %%
cut = {"velocity": given["velocity"][..., :-1], "pressure": given["pressure"][..., :-1]}
try:
    model.forecast(cut, steps=1)
except shodh_moe.UserError as error:
    print("refused:", error)

# %% [markdown]
# To train on your data instead, beside or in place of the simulated flows:
#
#     shodh run --config config.yaml --name mine data.path=data/vortices
