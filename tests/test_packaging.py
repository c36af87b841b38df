"""The contents of an installation, and the agreement of the files that describe it."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def pinned(name: str, python: str) -> list[Version]:
    """Return the versions that constraints.txt pins for a package on Linux under one Python version."""
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    return [
        Version(next(iter(pin.specifier)).version)
        for pin in constraints()
        if canonical(pin.name) == canonical(name) and (pin.marker is None or pin.marker.evaluate(environment))
    ]


def installed() -> metadata.Distribution:
    """Return the installation, not the egg-info folder that an editable install leaves in the checkout."""
    found = [one for one in metadata.distributions(name="shodh_moe") if one.read_text("RECORD") is not None]
    assert found, "shodh_moe is not installed: `make venv` does it"
    return found[0]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_nothing_generic_is_installed_at_top_level() -> None:
    listed = installed().read_text("top_level.txt")
    assert listed is not None
    assert listed.split() == ["shodh_moe"]


def test_installed_files_are_ours() -> None:
    files = installed().files
    assert files
    allowed = re.compile(r"shodh_moe[/-]|__editable__|__pycache__/__editable__|(\.\./)+bin/shodh$")
    assert [str(file) for file in files if not allowed.match(file.as_posix())] == []


def test_kernels_install_as_a_subpackage() -> None:
    kernels = importlib.import_module("shodh_moe.kernels")
    assert kernels.__name__ == "shodh_moe.kernels"
    assert kernels.__file__ is not None
    assert Path(kernels.__file__).name == "__init__.py"


def test_kernels_are_found_outside_the_checkout(tmp_path: Path) -> None:
    """The installation, and not the current folder, provides the package."""
    code = (
        "import importlib.util as u; assert u.find_spec('shodh_moe.kernels'); "
        "assert not u.find_spec('kernels'), 'a generic name at top level'"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=60)


def test_version_is_the_same_everywhere() -> None:
    declared = re.search(r'^    version="([^"]+)",$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert installed().version == declared[1]
    assert getattr(importlib.import_module("shodh_moe"), "__version__", declared[1]) == declared[1]


def test_the_citation_has_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited.keys() >= {"cff-version", "message", "title", "authors", "license"}
    assert str(cited["version"]) == installed().version
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(installed().version)}$", changes, re.MULTILINE)


def test_the_conda_recipe_agrees_with_setup() -> None:
    recipe = yaml.safe_load((ROOT / "conda/recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == installed().version
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # as conda-forge calls them
    wanted = [Requirement(line) for line in installed().requires or [] if "extra ==" not in line]
    expected = [f"{names.get(one.name, one.name)} {one.specifier}" for one in wanted]
    python, *packages = recipe["requirements"]["run"]
    assert sorted(packages) == sorted(expected)
    assert Requirement(python).specifier == SpecifierSet(installed().metadata["Requires-Python"])
    assert recipe["build"]["python"]["entry_points"] == ["shodh = shodh_moe.cli:main"]


def test_the_container_has_all_that_is_installed() -> None:
    """The Dockerfile copies every folder and file that setup.py reads."""
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names >= {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "shodh_moe",
        "kernels",
        "configs",
        "examples",
    }


def test_the_command_is_declared() -> None:
    scripts = [entry for entry in installed().entry_points if entry.group == "console_scripts"]
    assert [(entry.name, entry.value) for entry in scripts] == [("shodh", "shodh_moe.cli:main")]


def test_constraints_are_exact_pins() -> None:
    for pin in constraints():
        assert len(pin.specifier) == 1, pin
        assert next(iter(pin.specifier)).operator == "==", pin
        assert "*" not in str(pin.specifier), pin


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_once_and_within_its_range(python: str) -> None:
    for line in installed().requires or []:
        need = Requirement(line)
        versions = pinned(need.name, python)
        assert len(versions) == 1, f"{need.name} has {len(versions)} pins for Python {python}"
        assert versions[0] in need.specifier, f"{need.name}: {versions[0]} is outside {need.specifier}"


def test_apex_is_in_no_extra() -> None:
    """`apex` on PyPI is an unrelated project, which must never be installed by name."""
    names = {canonical(Requirement(line).name) for line in installed().requires or []}
    names |= {canonical(pin.name) for pin in constraints()}
    assert "apex" not in names


def dry_run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run launch/make_venv.sh without installing anything."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    return subprocess.run(
        [bash, str(ROOT / "launch" / "make_venv.sh"), str(folder / "venv"), "--dry-run"],
        env={**os.environ, "TORCH": "auto", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_python(folder: Path, *, torch: str, cuda: str | None) -> str:
    """Make an interpreter whose torch has only a version."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {torch!r}\nfrom . import version\n", encoding="utf-8")
    (folder / "torch" / "version.py").write_text(f"cuda = {cuda!r}\n", encoding="utf-8")
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def test_make_venv_refuses_bad_settings_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\necho 3.9.1\n", encoding="utf-8")
    old.chmod(0o755)
    for variables, word in (
        ({"PYTHON": "no-such-python"}, "no-such-python"),
        ({"PYTHON": str(old)}, "3.9.1"),
        ({"PYTHON": sys.executable, "TORCH": "newest"}, "newest"),
        ({"PYTHON": fake_python(tmp_path, torch="2.7.1+cu126", cuda="12.6"), "TORCH": "system"}, "2.7.1"),
    ):
        result = dry_run(tmp_path, **variables)
        assert result.returncode == 2, variables
        assert word in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("torch", "cuda", "setting", "expected"),
    [
        ("2.9.0+cu130", "13.0", "auto", "2.9.0+cu130 (gpu build)"),
        ("2.10.0a0+nv25.10", "13.0", "auto", "2.10.0a0+nv25.10 (gpu build)"),
        ("2.9.0+cpu", None, "auto", "pinned"),
        ("2.9.0+cpu", None, "system", "2.9.0+cpu (cpu build)"),
        ("2.7.1+cu126", "12.6", "auto", "older than 2.8"),
        ("2.9.0+cu130", "13.0", "pinned", "pinned"),
    ],
)
def test_make_venv_chooses_a_torch(tmp_path: Path, torch: str, cuda: str | None, setting: str, expected: str) -> None:
    result = dry_run(tmp_path, PYTHON=fake_python(tmp_path, torch=torch, cuda=cuda), TORCH=setting)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
    assert not (tmp_path / "venv").exists()
