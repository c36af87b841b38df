"""Lines on Python, packages and their requirements: pure functions of the results of gather_local.py."""

from __future__ import annotations

import re
from typing import Any

from shodh_moe.doctor.table import Line

Found = dict[str, Any]
# Names of MPI implementations by a word in the output of their library or mpirun.
MPI_NAMES = {"Open MPI": "Open MPI", "Intel": "Intel MPI", "MPICH": "MPICH", "HYDRA": "MPICH", "MVAPICH": "MVAPICH"}


def software_lines(found: Found) -> list[Line]:
    return [
        code_line(found),
        python_line(found),
        packages_line(found),
        torch_line(found),
        cuda_line(found),
        nccl_line(found),
        deepspeed_line(found),
        triton_line(found),
        apex_line(found),
        compiler_line(found),
        mpi_line(found),
        hdf5_line(found),
    ]


def number(version: str) -> tuple[int, ...]:
    """Parse the leading numbers of a version for comparison: 2.13.0+cpu gives (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def code_line(found: Found) -> Line:
    facts = found["facts"]
    if "error" in facts:
        return Line("error", "shodh_moe", facts["error"], "run this Python by hand and fix what it reports")
    version, code = facts["versions"]["shodh_moe"], facts["code"]
    if "none" in (version, code):
        return Line("error", "shodh_moe", "not installed", "pip install -e . in the source tree, or make venv")
    commit = found["git"]
    changed = ", changed since" if commit.endswith("+") else ""
    return Line(
        "ok", "shodh_moe", f"{version}, code {code}" + (f", commit {commit.rstrip('+')}{changed}" if commit else "")
    )


def python_line(found: Found) -> Line:
    if "error" in found["facts"]:
        return Line("error", "python", "unknown", "see shodh_moe above")
    version, wanted = found["facts"]["python"], found["requires_python"]
    low, high = (re.search(rf"{sign}\s*([\d.]+)", wanted) for sign in (">=", "<(?!=)"))
    if (low and number(version) < number(low[1])) or (high and number(version) >= number(high[1])):
        return Line("error", "python", f"{version}, needs {wanted}", "make venv PYTHON=python3.12")
    return Line("ok", "python", f"{version}, {found['facts']['executable']}")


def packages_line(found: Found) -> Line:
    """Check the versions of all requirements in setup.py. `torch_line` and `deepspeed_line` check the imports."""
    bad = []
    for text in found["requires"]:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([\d.]+))?", text)
        assert match, text
        installed = found["installed"].get(match[1], "none")
        if installed == "none":
            bad.append((match[1], f"{match[1]} missing"))
        elif match[2] and number(installed) < number(match[2]):
            bad.append((match[1], f"{match[1]} {installed} below {match[2]}"))
    if bad:
        wanted = " ".join(f"'{text}'" for text in found["requires"] if re.match(r"[\w.-]+", text)[0] in dict(bad))  # type: ignore[index]
        return Line("error", "packages", ", ".join(text for _, text in bad), f"pip install {wanted}")
    return Line("ok", "packages", f"all {len(found['requires'])} required packages, none too old")


def torch_line(found: Found) -> Line:
    torch = found["torch"]
    if "error" in torch:
        return Line(
            "error",
            "torch",
            f"cannot be imported: {torch['error']}",
            "pip install --force-reinstall torch, or make venv",
        )
    return Line("ok", "torch", f"{torch['version']}, built for {_build(torch)}")


def _build(torch: Found) -> str:
    return f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "the CPU"


def cuda_line(found: Found) -> Line:
    torch, cards, visible = found["torch"], found["nvidia"], found["visible"]
    if "error" in torch:
        return Line("error", "cuda", f"unknown; nvidia-smi lists {len(cards)} GPUs", "see torch above")
    devices, hidden = torch["devices"], f"CUDA_VISIBLE_DEVICES={visible}"
    if torch["reason"] and (devices or (cards and visible is None)):
        driver = f", driver {cards[0]['driver_version']}" if cards else ""
        return Line(
            "error",
            "cuda",
            f"torch {torch['version']} cannot use the GPU{driver}: {torch['reason']}",
            f"install a driver for {_build(torch)}, or a torch built for this driver and GPU (pytorch.org)",
        )
    if cards and not (torch["cuda"] or torch["hip"]):
        return Line(
            "error",
            "cuda",
            f"{_cards(cards)}, but torch is built for the CPU",
            f"install a torch built for driver {cards[0]['driver_version']} (pytorch.org), then make venv TORCH=system",
        )
    if cards and not devices:
        return Line("warning", "cuda", f"{_cards(cards)}, none for torch: {hidden}", "unset CUDA_VISIBLE_DEVICES")
    if not devices:
        return Line("ok", "cuda", "no GPU: trains on the CPU")
    first = devices[0]
    value = (
        f"{len(devices)} x {first['name']}, {first['memory'] / 2**30:.0f} GiB, compute capability {first['capability']}"
        + (f", driver {cards[0]['driver_version']}" if cards else "")
    )
    if len({(device["name"], device["memory"]) for device in devices}) > 1:
        return Line(
            "warning",
            "cuda",
            f"different GPUs: {', '.join(sorted({device['name'] for device in devices}))}",
            "the slowest GPU sets the pace: exclude it with CUDA_VISIBLE_DEVICES",
        )
    if cards and len(devices) != len(cards):
        if visible is not None:
            return Line("ok", "cuda", f"{value}; nvidia-smi lists {len(cards)}, {hidden}")
        return Line(
            "warning", "cuda", f"{value}; nvidia-smi lists {len(cards)}", "run `nvidia-smi` to see the missing ones"
        )
    return Line("ok", "cuda", value)


def _cards(cards: list[dict[str, str]]) -> str:
    return f"{len(cards)} x {cards[0]['name']}"


def nccl_line(found: Found) -> Line:
    torch = found["torch"]
    devices = len(torch.get("devices", []))
    if torch.get("nccl"):
        return Line("ok", "nccl", torch["nccl"])
    if devices > 1:
        return Line(
            "error", "nccl", "this torch has none, so GPUs cannot exchange tokens", "install another build of torch"
        )
    return Line("ok", "nccl", "none: ranks on CPUs communicate through gloo")


def deepspeed_line(found: Found) -> Line:
    deepspeed = found["deepspeed"]
    if "error" in deepspeed:
        return Line(
            "error", "deepspeed", f"cannot be imported: {deepspeed['error']}", "pip install 'deepspeed>=0.19.8'"
        )
    value = f"{deepspeed['version']}, accelerator {deepspeed['accelerator']}"
    if found["torch"].get("devices") and deepspeed["accelerator"] == "cpu":
        return Line("warning", "deepspeed", f"{value}, though torch has GPUs", "unset DS_ACCELERATOR")
    return Line("ok", "deepspeed", value)


def triton_line(found: Found) -> Line:
    triton, devices = found.get("triton"), found["torch"].get("devices")
    if triton and "error" not in triton:
        return Line("ok", "triton", triton["version"] + ("" if devices else ", not used on the CPU"))
    value = f"cannot be imported: {triton['error']}" if triton else "not installed"
    if triton:
        return Line("error" if devices else "warning", "triton", value, "pip install --force-reinstall triton")
    if devices:
        return Line(
            "warning", "triton", f"{value}: the slower torch reference is used", "pip install 'shodh_moe[triton]'"
        )
    return Line("ok", "triton", f"{value}, not needed on the CPU")


def apex_line(found: Found) -> Line:
    apex = found["torch"].get("apex", "none")
    if apex == "other":
        return Line(
            "warning",
            "apex",
            "the installed apex is not a usable NVIDIA apex; the package registry's apex is an unrelated project",
            "pip uninstall apex; the Dockerfile shows how to build NVIDIA's; without it torch's kernels are used",
        )
    return Line("ok", "apex", "NVIDIA's" if apex == "nvidia" else "not installed: torch's AdamW and norm are used")


def compiler_line(found: Found) -> Line:
    """Check the compilers: DeepSpeed compiles its optimizers when they are first used, and Triton its GPU kernels."""
    missing = [
        name
        for name, present in (
            ("C++ compiler", found["compiler"]),
            ("ninja", found["ninja"]),
            ("Python.h", found["headers"]),
        )
        if not present
    ]
    if not missing:
        return Line("ok", "compiler", f"{found['compiler'].splitlines()[0]}; ninja {found['ninja'].splitlines()[0]}")
    # On GPUs, only DeepSpeed's own optimizers need ninja.
    serious = missing != ["ninja"] or not found["torch"].get("devices")
    return Line(
        "error" if serious else "warning",
        "compiler",
        f"no {', no '.join(missing)}: DeepSpeed and Triton compile at the first start",
        "apt-get install g++ ninja-build python3-dev (or similar); a virtual environment's ninja must be on the PATH",
    )


def mpi_line(found: Found) -> Line:
    """Check MPI. Only launching with mpirun needs it, so problems are warnings."""
    ours, theirs = found.get("mpi4py"), found["mpirun"]
    if not ours and not theirs:
        return Line("ok", "mpi", "none: only needed to launch with mpirun")
    if not ours:
        return Line(
            "warning", "mpi", f"{theirs['path']}, but no mpi4py", "pip install 'mpi4py>=4' to launch with mpirun"
        )
    if "error" in ours:
        return Line(
            "warning",
            "mpi",
            f"mpi4py fails: {ours['error']}",
            "load the MPI that it was built for, or pip install 'shodh_moe[mpi]'",
        )
    library, runner = implementation(ours["library"]), implementation(theirs["version"] if theirs else "")
    value = f"mpi4py {ours['mpi4py']} with {' '.join(library)}"
    if not theirs:
        return Line("warning", "mpi", f"{value}, but no mpirun", "load or install that MPI's mpirun")
    # MPICH and its derivatives (Intel, MVAPICH) share one binary interface.
    same = library[0] == runner[0] or "Open MPI" not in (library[0], runner[0])
    if not same or (library[0] == runner[0] and number(library[1])[:1] != number(runner[1])[:1]):
        return Line(
            "warning",
            "mpi",
            f"{value}, but {theirs['path']} is {' '.join(runner)}: each rank would run as a single process",
            "put that MPI's mpirun first on the PATH, or rebuild mpi4py: pip install --no-binary mpi4py mpi4py",
        )
    return Line("ok", "mpi", f"{value}, {theirs['path']} {runner[1]}")


def implementation(text: str) -> tuple[str, str]:
    """Parse the name and version of an MPI implementation from the output of its library or mpirun."""
    for word, name in MPI_NAMES.items():
        if word in text:
            match = re.search(r"(?:Version\s*:?|v|\))\s*(\d[\d.]*)", text[text.index(word) :])
            match = match or re.search(r"(\d+(?:\.\d+)+)", text)
            return name, match[1] if match else ""
    return "an unknown MPI", ""


def hdf5_line(found: Found) -> Line:
    hdf5, locking = found["hdf5"], found["file_locking"]
    if "error" in hdf5:
        return Line("error", "hdf5", f"h5py fails: {hdf5['error']}", "pip install --force-reinstall h5py")
    if hdf5["locking"]:
        return Line(
            "error", "hdf5", hdf5["locking"], "export HDF5_USE_FILE_LOCKING=FALSE: this file system has no locks"
        )
    build = "parallel" if hdf5["parallel"] else "serial"
    lock_status = "file locking works" if locking is None else f"HDF5_USE_FILE_LOCKING={locking}"
    return Line("ok", "hdf5", f"h5py {hdf5['h5py']}, HDF5 {hdf5['hdf5']}, {build}, {lock_status}")
