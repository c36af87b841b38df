"""The table's lines about Python and its packages."""

from __future__ import annotations

from typing import Any

import pytest

from shodh_moe.doctor.software import code_line, implementation, software_lines
from tests.doctor.found import CARD, GPU, cpu, facts, here, torch

BROKEN = {"error": "ImportError: libcudart.so.12: cannot open shared object file"}


def line(what: str, found: dict[str, Any]) -> tuple[str, str, str]:
    (one,) = (one for one in software_lines(found) if one.what == what)
    assert bool(one.remedy) == (one.status != "ok")
    return one.status, one.value, one.remedy


@pytest.mark.parametrize("found", [here(), here(**cpu())])
def test_a_healthy_host_is_all_ok(found: dict[str, Any]) -> None:
    assert {one.status for one in software_lines(found)} == {"ok"}


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("shodh_moe", {"facts": facts(code="none")}, "error", "not installed"),
    ("shodh_moe", {"facts": {"error": "no answer within 60 s"}}, "error", "no answer"),
    ("shodh_moe", {"git": "ce06311787+"}, "ok", "commit ce06311787, changed since"),
    ("shodh_moe", {"git": ""}, "ok", "0.1.0, code 0123456789ab"),
    ("python", {"facts": facts(python="3.9.18")}, "error", "3.9.18, needs >=3.10"),
    ("python", {"facts": facts(python="3.14.0")}, "error", "3.14.0, needs >=3.10"),
    ("python", {"facts": facts(python="3.10.0")}, "ok", "3.10.0"),
    ("python", {"facts": facts(python="3.13.9")}, "ok", "3.13.9"),
    ("python", {"facts": BROKEN}, "error", "unknown"),
    ("packages", {"installed": {"torch": "2.7.1+cu126", "numpy": "2.4.6"}}, "error", "torch 2.7.1+cu126 below 2.8"),
    ("packages", {"installed": {"torch": "2.13.0"}}, "error", "numpy missing"),
    ("packages", {"installed": {"torch": "2.10.0a0+git123", "numpy": "1.26.4"}}, "ok", "all 2"),
    ("torch", {"torch": BROKEN}, "error", "libcudart"),
    ("torch", {"torch": torch(cuda=None, hip="6.4")}, "ok", "ROCm 6.4"),
    ("cuda", {"torch": BROKEN}, "error", "nvidia-smi lists 2 GPUs"),
    ("cuda", {}, "ok", "2 x NVIDIA H100 80GB HBM3, 79 GiB, compute capability 9.0, driver 570.86"),
    ("cuda", {**cpu(), "nvidia": [CARD]}, "error", "1 x NVIDIA H100 80GB HBM3, but torch is built for the CPU"),
    ("cuda", {"torch": torch(devices=[], reason="The NVIDIA driver is too old")}, "error", "driver 570.86: The NVIDIA"),
    ("cuda", {"torch": torch(reason="no kernel image is available")}, "error", "no kernel image"),
    ("cuda", {"torch": torch(devices=[], reason="No CUDA GPUs"), "visible": ""}, "warning", "CUDA_VISIBLE_DEVICES="),
    ("cuda", {"torch": torch(devices=[], reason="no driver"), "nvidia": []}, "ok", "no GPU"),
    ("cuda", {"torch": torch(devices=[GPU])}, "warning", "nvidia-smi lists 2"),
    ("cuda", {"torch": torch(devices=[GPU]), "visible": "1"}, "ok", "CUDA_VISIBLE_DEVICES=1"),
    ("cuda", {"torch": torch(devices=[GPU, {**GPU, "name": "NVIDIA L4"}])}, "warning", "different GPUs"),
    ("cuda", {"nvidia": []}, "ok", "2 x NVIDIA H100"),
    ("nccl", {"torch": torch(nccl=None)}, "error", "cannot exchange"),
    ("nccl", cpu(), "ok", "gloo"),
    ("deepspeed", {"deepspeed": BROKEN}, "error", "libcudart"),
    ("deepspeed", {"deepspeed": {"version": "0.19.8", "accelerator": "cpu"}}, "warning", "though torch has GPUs"),
    ("triton", {"triton": None}, "warning", "slower torch reference"),
    ("triton", {"triton": BROKEN}, "error", "libcudart"),
    ("triton", {**cpu(), "triton": BROKEN}, "warning", "libcudart"),
    ("triton", {**cpu(), "triton": None}, "ok", "not needed"),
    ("apex", {"torch": torch(apex="other")}, "warning", "unrelated project"),
    ("apex", {"torch": torch(apex="none")}, "ok", "not installed"),
    ("compiler", {"compiler": None}, "error", "no C++ compiler"),
    ("compiler", {"ninja": None}, "warning", "no ninja"),
    ("compiler", {**cpu(), "ninja": None}, "error", "no ninja"),
    ("compiler", {"headers": False}, "error", "Python.h"),
    ("mpi", {"mpi4py": None, "mpirun": None}, "ok", "none"),
    ("mpi", {"mpi4py": None}, "warning", "no mpi4py"),
    ("mpi", {"mpirun": None}, "warning", "no mpirun"),
    ("mpi", {"mpi4py": {"error": "RuntimeError: cannot load MPI library"}}, "warning", "cannot load"),
    (
        "mpi",
        {"mpirun": {"path": "/m", "version": "HYDRA build details:\n Version:    4.2.1"}},
        "warning",
        "MPICH 4.2.1",
    ),
    ("mpi", {"mpirun": {"path": "/m", "version": "mpirun (Open MPI) 4.1.4"}}, "warning", "Open MPI 4.1.4"),
    ("hdf5", {"hdf5": BROKEN}, "error", "libcudart"),
    ("hdf5", {"hdf5": here()["hdf5"] | {"locking": "unable to lock file, errno = 524"}}, "error", "unable to lock"),
    ("hdf5", {"hdf5": here()["hdf5"] | {"parallel": True}, "file_locking": "FALSE"}, "ok", "parallel, HDF5_USE_FILE"),
]


@pytest.mark.parametrize(("what", "changes", "status", "text"), CASES)
def test_each_problem_of_the_software_is_reported(what: str, changes: dict[str, Any], status: str, text: str) -> None:
    result = line(what, here(**changes))
    assert result[0] == status
    assert text in result[1]


def test_the_remedy_installs_missing_packages() -> None:
    assert line("packages", here(installed={}))[2] == "pip install 'torch>=2.8' 'numpy>=1.26'"


def test_everything_may_be_broken_at_once() -> None:
    found = here(facts=BROKEN, torch=BROKEN, deepspeed=BROKEN, triton=BROKEN, mpi4py=BROKEN, hdf5=BROKEN, nvidia=[])
    assert [one.status for one in software_lines(found)].count("error") >= 6
    assert code_line(found).status == "error"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Open MPI v5.0.11, package: Open MPI user@host, ident: 5.0.11", ("Open MPI", "5.0.11")),
        ("mpirun (Open MPI) 4.1.4", ("Open MPI", "4.1.4")),
        ("MPICH Version:      4.2.1\nMPICH Release date: 2024", ("MPICH", "4.2.1")),
        ("HYDRA build details:\n    Version:                                 4.2.1", ("MPICH", "4.2.1")),
        ("Intel(R) MPI Library 2021.12 for Linux* OS", ("Intel MPI", "2021.12")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.12 Build 20240213", ("Intel MPI", "2021.12")),
        ("MVAPICH2 Version      :    2.3.7", ("MVAPICH", "2.3.7")),
        ("", ("an unknown MPI", "")),
    ],
)
def test_mpi_implementations_are_recognised(text: str, expected: tuple[str, str]) -> None:
    assert implementation(text) == expected
