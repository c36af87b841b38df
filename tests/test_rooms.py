"""The order of the package's folders: no import runs upwards, and no two files import each other.

docs/design.md, section 4, describes the folders. Imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom to the top: a file may import from its own folder and from those before it.
ROOMS = [
    *("base", "kernels", "metrics", "solvers", "operators", "parallel", "config", "inspection", "formats", "data"),
    *("checkpoint", "model", "tokenizer", "launching", "merging", "trackers", "training", "inference", "evaluation"),
    *("report", "serving", "runs", "plan", "rehearsal", "watch", "audit", "ccm", "forecast", "doctor", "cli"),
]


def modules() -> dict[str, Path]:
    """Return every module of the package and of kernels/ by its name without ``shodh_moe.``."""
    found = {}
    for folder, prefix in (("shodh_moe", ()), ("kernels", ("kernels",))):
        for path in (ROOT / folder).rglob("*.py"):
            parts = [*prefix, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path], package: str = "shodh_moe.") -> Iterator[str]:
    """Yield the modules in ``known`` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from shodh_moe.data import listing` imports a module, `... import SPLITS` a name of the package.
            names = [name if name.removeprefix(package) in known else node.module for name in full]
        else:
            continue
        for name in names:
            if name.startswith(package) and (short := name.removeprefix(package)) in known:
                yield short


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of files that import each other, directly or indirectly (Tarjan's components of several files)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def package_graph() -> dict[str, set[str]]:
    known = modules()
    return {name: {other for other in imports(path, known) if other != name} for name, path in known.items()}


def test_every_folder_is_in_the_order() -> None:
    folders = {path.name for path in (ROOT / "shodh_moe").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders | {"kernels"} == set(ROOMS)
    loose = [path.name for path in (ROOT / "shodh_moe").glob("*.py")]
    assert loose == ["__init__.py"]


def test_no_import_runs_upwards() -> None:
    upwards = [
        f"{name} imports {other}"
        for name, others in package_graph().items()
        for other in others
        if name and other and ROOMS.index(other.split(".")[0]) > ROOMS.index(name.split(".")[0])
    ]
    assert upwards == []


def test_no_two_files_import_each_other() -> None:
    assert import_cycles(package_graph()) == []


def script_graph(folder: str) -> dict[str, set[str]]:
    """Return the imports of each script in a folder, by the names under which the scripts import each other."""
    scripts = {}
    for path in (ROOT / folder).rglob("*.py"):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        scripts[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: set(imports(path, scripts, "")) - {name} for name, path in scripts.items()}


@pytest.mark.parametrize("folder", ["benchmarks", "launch"])
def test_no_two_scripts_import_each_other(folder: str) -> None:
    assert import_cycles(script_graph(folder)) == []


def test_benchmark_scripts_share_code_only_through_support() -> None:
    graph = script_graph("benchmarks")
    assert "support.timing" in graph["gating"]
    assert "studies.lattice_flows" in graph["studies.lattice_validation"]
    for name, others in graph.items():
        folder = name.split(".")[0]
        allowed = {"support", folder} if folder in ("support", "studies") else {"support"}
        assert {other.split(".")[0] for other in others} <= allowed, name


def test_an_import_cycle_is_found() -> None:
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
