"""Inspect this host: ``python - PART [ARGUMENT]``, with this file as standard input, prints a last line of JSON.

Each part runs in its own process, because its imports may be missing, be broken or end the process. Exceptions are not
caught: the last line of the traceback says what is wrong.
"""

import json
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path


def torch() -> dict:
    import torch

    found: dict = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    found |= {"devices": [], "reason": "", "nccl": None, "apex": "none"}
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
            for index in range(torch.cuda.device_count()):
                known = torch.cuda.get_device_properties(index)
                found["devices"].append(
                    {"name": known.name, "memory": known.total_memory, "capability": f"{known.major}.{known.minor}"}
                )
            if found["devices"]:
                torch.ones(2, device="cuda").sum().item()  # a build without kernels for this device fails here
        except Exception as error:
            found["reason"] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        with suppress(Exception):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if find_spec("apex"):
        from shodh_moe.base.environment import has_apex

        found["apex"] = "nvidia" if has_apex() else "other"
    return found


def deepspeed() -> dict:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    return {"version": deepspeed.__version__, "accelerator": get_accelerator().device_name()}


def triton() -> dict:
    import triton

    return {"version": triton.__version__}


def mpi() -> dict:
    import mpi4py

    mpi4py.rc.initialize = False  # the library's version is available without initialising MPI
    from mpi4py import MPI

    return {"mpi4py": mpi4py.__version__, "library": MPI.Get_library_version().strip("\0 \n").splitlines()[0]}


def hdf5(folder: str) -> dict:
    import h5py

    path = existing(folder) / f".shodh-doctor-{os.getpid()}.hdf5"
    locking = ""
    try:
        for mode in ("w", "r"):
            with h5py.File(path, mode):
                pass
    except OSError as error:
        if "lock" in str(error):  # other problems with the folder are reported by `folder`
            locking = str(error)
    finally:
        with suppress(OSError):
            path.unlink()
    parallel = bool(h5py.get_config().mpi)
    return {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version, "parallel": parallel, "locking": locking}


def folder(name: str) -> dict:
    """Test whether a folder, or the one it will be created in, is writable; return its file system and free bytes."""
    where = existing(name)
    path = where / f".shodh-doctor-{os.getpid()}"
    try:
        path.write_text("token")
        error = ""
    except OSError as failure:
        error = failure.strerror or str(failure)
    finally:
        with suppress(OSError):
            path.unlink()
    stat = os.statvfs(where)
    return {"exists": Path(name).is_dir(), "type": file_system(where), "free": stat.f_bavail * stat.f_frsize} | (
        {"refused": error} if error else {}
    )


def existing(name: str) -> Path:
    path = Path(name).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """Return the file system type of the innermost mount that contains ``path``; "unknown" if it is not known."""
    best, found = -1, "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            mount = left.split()[4].replace("\\040", " ")
            if path.resolve().is_relative_to(mount) and len(mount) >= best:
                best, found = len(mount), right.split()[0]
    return found


def port(number: str) -> dict:
    """Return the process that listens on a port."""
    from shodh_moe.base.network import port_holder

    return {"holder": port_holder(int(number))}


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry]  # drop the working folder, which training ignores too
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
    os._exit(0)  # imported libraries may have threads that crash at exit
