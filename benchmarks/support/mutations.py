"""Make trajectory files with deliberate errors, mostly in the structure of the HDF5 file rather than in the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shodh_moe.data import write_trajectory
from shodh_moe.solvers import Simulation

GRID, T = (4, 4, 4), 2
_EXTREMES = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]
_SIGNED = (b"OHDR", b"OCHK", b"FRHP", b"FHDB", b"FHIB", b"BTHD", b"BTLF", b"BTIN", b"FAHD", b"FADB", b"EAHD", b"EAIB")


@dataclass(frozen=True)
class Base:
    """A valid file to mutate.

    Attributes:
        name: the layout or feature that it represents.
        content: its bytes.
        metadata: positions of bytes that are not field values.
        sealed: (start, stop) of the parts that are followed by their checksum.
        values: velocity and pressure [T, 4, X, Y, Z], and solid [1, X, Y, Z], as the reader should return them.
    """

    name: str
    content: bytes
    metadata: np.ndarray
    sealed: list[tuple[int, int]]
    values: tuple[np.ndarray, np.ndarray]


def make_bases(folder: Path) -> list[Base]:
    """Write files in our layout, in layouts of other writers, and with links and storage outside the file."""
    ours = folder / "ours.hdf5"
    rng = np.random.default_rng(0)
    simulation = Simulation(
        velocity_T3XYZ=rng.standard_normal((T, 3, *GRID)).astype(np.float32),
        pressure_TXYZ=rng.standard_normal((T, *GRID)).astype(np.float32),
        solid_XYZ=rng.random(GRID) < 0.3,
        lid=True,
        time_T=np.arange(T, dtype=np.float32),
        parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
    )
    write_trajectory(ours, simulation, dataset_name="fuzz", domain="d", provenance={"seed": 1, "config": {"a": [1]}})
    gzip: dict[str, Any] = {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True}
    lzf: dict[str, Any] = {"compression": "lzf", "fletcher32": True}
    layouts: dict[str, tuple[Any, dict[str, Any]]] = {
        "new_format": ("latest", {}),
        "gzip": ("earliest", {**gzip, "one": True}),
        "lzf_new_format": ("latest", {**lzf, "one": True}),
        "extendable": ("earliest", {**lzf, "one": True, "maxshape": True}),
        "extendable_new_format": ("latest", {**gzip, "one": True, "maxshape": True}),
        "small_chunks_new_format": ("latest", {"chunks": True, "fletcher32": True}),
    }
    for name, (version, storage) in layouts.items():
        _copy(ours, folder / f"{name}.hdf5", version, storage)
    return [_base(path) for path in sorted(folder.glob("*.hdf5"))]


def _copy(source: Path, target: Path, version: Any, storage: dict[str, Any]) -> None:
    with h5py.File(source, "r") as given, h5py.File(target, "w", libver=version) as file:
        for key, value in given.attrs.items():
            file.attrs[key] = value
        for name, item in given.items():
            if name not in ("t0_fields", "t1_fields"):
                given.copy(item, file, name)
                continue
            group = file.create_group(name)
            group.attrs.update(item.attrs)
            for field, dataset in item.items():
                options = {key: value for key, value in storage.items() if key not in ("one", "maxshape", "chunks")}
                if storage.get("one"):
                    options["chunks"] = (1,) * (dataset.ndim > 4) + (1,) + dataset.shape[1 + (dataset.ndim > 4) :]
                elif storage:
                    options["chunks"] = tuple(min(n, 2) for n in dataset.shape)
                if storage.get("maxshape"):
                    options["maxshape"] = (
                        None,
                        *([None] if dataset.ndim > 4 else []),
                        *dataset.shape[1 + (dataset.ndim > 4) :],
                    )
                made = group.create_dataset(field, data=dataset[()], **options)
                made.attrs.update(dataset.attrs)
                for number in range(
                    12 if version == "latest" else 0
                ):  # enough that HDF5 moves them into a separate heap
                    made.attrs[f"note_{number}"] = "n" * number


def _base(path: Path) -> Base:
    content = path.read_bytes()
    metadata = np.ones(len(content), dtype=bool)
    with h5py.File(path, "r") as file:
        for name in ("t1_fields/velocity", "t0_fields/pressure", "t0_fields/solid"):
            dataset = file[name]
            if dataset.chunks is None:
                spans = [(dataset.id.get_offset(), dataset.nbytes)]
            else:
                chunks = [dataset.id.get_chunk_info(n) for n in range(dataset.id.get_num_chunks())]
                spans = [(chunk.byte_offset, chunk.size) for chunk in chunks]
            for start, size in spans:
                metadata[start : start + size] = False
        velocity, pressure = file["t1_fields/velocity"][0], file["t0_fields/pressure"][0]
        solid = file["t0_fields/solid"][0]
    fields = np.concatenate([np.moveaxis(velocity, -1, 1), pressure[:, None]], axis=1)
    return Base(path.stem, content, np.flatnonzero(metadata), _sealed(content), (fields, solid[None]))


def _sealed(content: bytes) -> list[tuple[int, int]]:
    """(start, stop) of the parts with a checksum, found by trial: the superblock and the blocks of the new format."""
    starts = [0] if content[8] >= 2 else []
    for signature in _SIGNED:
        start = content.find(signature)
        while start >= 0:
            starts.append(start)
            start = content.find(signature, start + 1)
    found = []
    for start in sorted(starts):
        for stop in range(start + 8, min(start + 1200, len(content) - 4)):
            if lookup3(content[start:stop]) == int.from_bytes(content[stop : stop + 4], "little"):
                found.append((start, stop))
                break
    return found


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata: Bob Jenkins' lookup3, hashlittle with initial value 0."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask

    def turned(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    whole = max(0, (len(data) - 1) // 12) * 12
    words = np.frombuffer(data[:whole], dtype="<u4").tolist()
    for n in range(0, len(words), 3):
        a, b, c = (a + words[n]) & mask, (b + words[n + 1]) & mask, (c + words[n + 2]) & mask
        a = ((a - c) & mask) ^ turned(c, 4)
        c = (c + b) & mask
        b = ((b - a) & mask) ^ turned(a, 6)
        a = (a + c) & mask
        c = ((c - b) & mask) ^ turned(b, 8)
        b = (b + a) & mask
        a = ((a - c) & mask) ^ turned(c, 16)
        c = (c + b) & mask
        b = ((b - a) & mask) ^ turned(a, 19)
        a = (a + c) & mask
        c = ((c - b) & mask) ^ turned(b, 4)
        b = (b + a) & mask
    tail = data[whole:]
    if not tail:
        return c
    x, y, z = np.frombuffer(tail.ljust(12, b"\0"), dtype="<u4").tolist()
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    c = ((c ^ b) - turned(b, 14)) & mask
    a = ((a ^ c) - turned(c, 11)) & mask
    b = ((b ^ a) - turned(a, 25)) & mask
    c = ((c ^ b) - turned(b, 16)) & mask
    a = ((a ^ c) - turned(c, 4)) & mask
    b = ((b ^ a) - turned(a, 14)) & mask
    return ((c ^ b) - turned(b, 24)) & mask


def mutate(bases: list[Base], rng: np.random.Generator) -> tuple[Base, str, bytes]:
    """Choose a base and mutate a copy. Returns the base, the mutation's name and the mutated content."""
    base = bases[rng.integers(len(bases))]
    content = bytearray(base.content)
    names = list(MUTATIONS)
    name = names[rng.choice(len(names), p=_WEIGHTS)]
    positions = base.metadata if rng.random() < 0.93 else np.arange(len(content))
    if base.sealed and rng.random() < 0.5:  # blocks of headers in the new format
        start, stop = base.sealed[rng.integers(len(base.sealed))]
        positions = np.arange(start, stop)
    for _ in range(1 if rng.random() < 0.6 else int(rng.integers(2, 12))):
        MUTATIONS[name](content, positions, rng, bases)
    if base.sealed and rng.random() < 0.8:
        for start, stop in base.sealed:
            if stop + 4 <= len(content):
                content[stop : stop + 4] = lookup3(bytes(content[start:stop])).to_bytes(4, "little")
    return base, name, bytes(content)


def _at(content: bytearray, positions: np.ndarray, rng: np.random.Generator) -> int:
    return min(int(positions[rng.integers(len(positions))]), max(len(content) - 1, 0))


def _bit(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    content[_at(content, positions, rng)] ^= 1 << int(rng.integers(8))


def _byte(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    content[_at(content, positions, rng)] = int(rng.integers(256))


def _number(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    """Replace a length, offset, count or version by an extreme, a neighbouring value or a position in the file."""
    at, size = _at(content, positions, rng), int(rng.choice([1, 2, 4, 8]))
    old = int.from_bytes(content[at : at + size], "little")
    kind = rng.integers(3)
    if kind == 0:
        value = int(rng.choice(_EXTREMES))
    elif kind == 1:
        value = old + int(rng.integers(-16, 17))
    else:
        value = int(rng.integers(len(content) + 64))
    content[at : at + size] = (value % 256**size).to_bytes(size, "little")


def _zeros(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    at, size = _at(content, positions, rng), min(int(2 ** rng.integers(1, 9)), len(content))
    content[at : at + size] = bytes([int(rng.choice([0, 0xFF]))]) * len(content[at : at + size])


def _shuffle(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    """Swap two blocks of bytes."""
    size = int(rng.choice([2, 8, 16, 32, 64, 512]))
    a, b = (_at(content, positions, rng) // 8 * 8 for _ in range(2))
    if max(a, b) + size <= len(content) and abs(a - b) >= size:
        content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def _splice(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    """Overwrite a piece with one from another file or position."""
    other = bases[rng.integers(len(bases))].content
    size = int(2 ** rng.integers(3, 11))
    source, at = int(rng.integers(len(other))), _at(content, positions, rng)
    piece = other[source : source + size][: len(content) - at]
    content[at : at + len(piece)] = piece


def _truncate(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    del content[int(rng.integers(len(content) + 1)) :]
    content += b"" if content else b"\0"


def _shift(content: bytearray, positions: np.ndarray, rng: np.random.Generator, bases: list[Base]) -> None:
    """Insert or delete bytes."""
    at, size = _at(content, positions, rng), int(rng.integers(1, 64))
    if rng.random() < 0.5:
        content[at:at] = rng.bytes(size)
    elif len(content) > size + 1:
        del content[at : at + size]


MUTATIONS: dict[str, Callable[[bytearray, np.ndarray, np.random.Generator, list[Base]], None]] = {
    "bit": _bit,
    "byte": _byte,
    "number": _number,
    "zeros": _zeros,
    "shuffle": _shuffle,
    "splice": _splice,
    "truncate": _truncate,
    "shift": _shift,
}
_WEIGHTS = np.array([3, 3, 6, 2, 2, 2, 1, 1]) / 20

_STATS = (
    "mean: {velocity: [0.1, 0.0, 0.0], pressure: 0.2}\nstd: {velocity: [0.5, 0.4, 0.3], pressure: 0.1}\n"
    "rms: {velocity: [0.5, 0.4, 0.3], pressure: 0.2}\nrms_delta: {velocity: [0.1, 0.1, 0.1], pressure: 0.05}\n"
)
_YAML = ["[" * 5000, "{" * 3000, "&a [*a, *a]", "1" + "0" * 500, "!!python/object:os.system x", ".nan", ".inf", "-1"]
_YAML += ["''", "2001-99-99", "? [1]", "\t", "\0", "0x", "!!binary x", "!!timestamp x", "!!int x", "[[1], [2, 3]]"]


def mutated_stats(rng: np.random.Generator) -> tuple[str, bytes]:
    """Mutate statistics: change bytes, truncate, or replace a value by something special in YAML."""
    content = bytearray(_STATS.encode())
    kind = str(rng.choice(["byte", "truncate", "value"]))
    if kind == "byte":
        for at in rng.integers(len(content), size=rng.integers(1, 8)):
            content[at] = rng.integers(256)
    elif kind == "truncate":
        del content[rng.integers(len(content)) :]
    else:
        values = [at for at in range(len(content)) if chr(content[at]) in "0[{"]
        at = int(rng.choice(values))
        content[at : at + 3] = _YAML[rng.integers(len(_YAML))].encode()
    return kind, bytes(content)
