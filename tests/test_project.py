"""The wheel, outside of the checkout: what it holds, and an example project with it, from `shodh init` to a merge."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "shodh_moe", "kernels", "configs", "examples")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
FLOW = {"trajectories": {"train": 2, "valid": 1, "test": 1}, "spinup_steps": 4, "steps_per_snapshot": 4}
TINY = {
    "data": {"grid": [16, 16, 16], "snapshots": 6, "domains": {"open_channel": FLOW, "porous_media": FLOW}},
    "tokenizer": {"latent_channels": 16, "widths": [8, 8, 8], "steps": 3, "batch_size": 4, "latent_copies": 1},
    "model": {"dim": 24, "heads": 2},
    "training": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 4, "log_every": 1},
    "telemetry": {"every": 1},
    "parallel": {"processes": 1},
    "evaluation": {"rollout_steps": 2},
}
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution. Builds leave files behind, so they work on a copy."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run([sys.executable, "-c", build], folder / "source")
    (source,) = folder.glob("*.tar.gz")
    offline = ["--no-index", "--no-deps", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", ".", source.name], folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel in it, and the packages of this one without the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", "."], folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # Python ignores .pth files in these folders, among them that of the checkout's editable installation.
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--ignore-installed"]
    run([*command, "--no-index", "--no-deps", "--disable-pip-version-check", str(wheel)], folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def project(bin_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An example project in which a tiny training has run."""
    folder = tmp_path_factory.mktemp("project")
    shodh(bin_folder, folder, "init", "flows")
    config = yaml.safe_load((folder / "flows/config.yaml").read_text())
    for name, section in TINY.items():
        config[name] = config.get(name, {}) | section
    (folder / "flows/config.yaml").write_text(yaml.safe_dump(config))
    shodh(bin_folder, folder / "flows", "run", "--config", "config.yaml")
    return folder / "flows"


def run(command: list[str], folder: Path, bin_folder: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if bin_folder:
        environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shodh(bin_folder: Path, folder: Path, *arguments: str) -> str:
    return run([str(bin_folder / "shodh"), *arguments], folder, bin_folder)


def test_the_wheel_has_all_files(wheel: Path) -> None:
    """Each file of the package is in it, and each of the checkout's configs and examples; no tests, nothing generic."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    wanted = set()
    for folder, place in (("shodh_moe", ""), *((name, "shodh_moe/") for name in ("kernels", "configs", "examples"))):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != "tuned.json":
                wanted.add(place + str(path.relative_to(ROOT)))
    assert names - {"shodh_moe/kernels/tuned.json"} == wanted


def test_the_package_is_the_wheels(bin_folder: Path, tmp_path: Path) -> None:
    code = "import shodh_moe, shodh_moe.kernels as k; print(shodh_moe.__file__); print(k.__file__)"
    for path in run([str(bin_folder / "python"), "-c", code], tmp_path).split():
        assert path.startswith(str(bin_folder.parent))


def test_configs_come_with_the_package(bin_folder: Path, tmp_path: Path) -> None:
    assert "GiB" in shodh(bin_folder, tmp_path, "plan", "--config", "configs/quickstart.yaml", "--world", "2")


def test_a_project_starts_with_a_config_that_is_the_quickstart(project: Path) -> None:
    names = {path.name for path in project.iterdir()} - {"data", "runs", "tokenizers"}
    assert names >= {"README.md", "config.yaml", ".gitignore", *EXAMPLES}
    listed = re.findall(r"^\| `python (\w+\.py)`", (project / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(project: Path, bin_folder: Path, name: str) -> None:
    script, steps = project / name, 'CONFIG, STEPS = "config.yaml", '
    script.write_text(re.sub(rf"({steps})\d+", r"\g<1>4", script.read_text()))  # fewer steps of training
    shown = run([str(bin_folder / "python"), name], project, bin_folder)
    for words in EXPECTED[name]:
        assert re.search(words, shown), shown


EXPECTED = {
    "first_forecast.py": [r"open_channel [0-9.]+ \(", "divergence [0-9.]+e-1[0-9], largest velocity in solids 0.0e"],
    "own_data.py": [
        r"error at each step( [0-9.]+){4}\n",
        "largest divergence [0-9.]+e-1[0-9]",
        r"refused: the grid of the fields is \[\d+, \d+, \d+\], not a multiple of 8",
    ],
    "router.py": [
        "bifurcated: (True|False)",
        "porous_media: .* tokens, purity [01][.]",
        "mutual information [0-9.]+ nats",
    ],
    "merge_experts.py": [r"alpha \+0 [0-9.]+ [0-9.]+"],
}


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_blocks_of_the_python_page_run(project: Path, bin_folder: Path) -> None:
    (dataset,) = (project / "data").glob("quickstart-*")
    (project / "data/quickstart").symlink_to(dataset.name)
    for name in ("quickstart_model", "other_model"):
        shodh(bin_folder, project, "checkpoint", "export", "runs/quickstart", "--output", name)
    blocks = python_blocks("docs/python.md")
    assert len(blocks) >= 5
    shown = run([str(bin_folder / "python"), "-c", "\n".join(blocks)], project, bin_folder)
    assert "2 ['open_channel', 'porous_media'] torch.Size([6, 3, 16, 16, 16])" in shown
