"""Check that an HDF5 file is a complete tree of objects of reasonable size, without references to other files."""

from __future__ import annotations

import math
from collections.abc import Iterator

import h5py

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable

# Limits of a file that is accepted.
ATTRIBUTE_BYTES = 64 * 2**10
ATTRIBUTES = 1024  # per object
OBJECTS = 10_000
CHUNK_BYTES = 2**29
FIELDS = ("t0_fields/", "t1_fields/", "t2_fields/")
LZF = 32000  # HDF5's registered number of the lzf filter
# Other filters are not available everywhere, or are known to crash on damaged data.
FILTERS = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, LZF)
CHECKSUM_BYTES = 4
SMALL_BYTES = 64 * 2**10  # a dataset of at most this size is read as a check
# Largest ratio of unpacked to stored bytes: deflate expands data at most 1,032 times, lzf less.
EXPANSION = 1100


def check_structure(file: h5py.File) -> None:
    """Visit every object in the file; read every attribute, and every small dataset that is not a field.

    Raises:
        UserError: a link, dataset or attribute has a refused kind or size; the message names it.
        Exception: any error of h5py on a damaged file.
    """
    size = file.id.get_filesize()
    _check_attributes("the root group", file)
    for number, (name, item) in enumerate(_objects(file)):
        if number >= OBJECTS:
            raise UserError(f"more than {OBJECTS} groups and datasets: expected a dataset of flow fields")
        kind = {h5py.Group: "group", h5py.Dataset: "dataset"}.get(type(item), "datatype")
        full = f"{kind} {name}"
        try:
            _check_attributes(full, item)
            if isinstance(item, h5py.Dataset):
                _check_storage(name, item, size)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{full} is damaged ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """Return an exception's text on one line, to end a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def why_unreadable(dataset: h5py.Dataset, error: OSError) -> str:
    """Explain an HDF5 read error by the reason that HDF5 reports."""
    if "filter" not in str(error):
        return f"HDF5 reports: {one_line(error)}"
    parts = ["checksum"] * dataset.fletcher32 + ["compressed data"] * (dataset.compression is not None)
    return f"wrong {' or '.join(parts) or 'data'} in a chunk of {dataset.chunks}"


def _objects(file: h5py.File) -> Iterator[tuple[str, h5py.HLObject]]:
    """Yield (name, object) for every group and dataset below the root.

    Raises:
        UserError: a link is soft or external, a group has two links, or an object is damaged.
    """
    groups = [("", file)]
    seen = {h5py.h5o.get_info(file.id).addr}
    while groups:
        parent, group = groups.pop()
        for key in group:
            name = f"{parent}/{key}".lstrip("/")
            _require_printable("an object", name)
            link = group.get(key, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise UserError(f"{name} is an external link to {link.filename}: expected the data itself")
            if not isinstance(link, h5py.HardLink):
                raise UserError(f"{name} is a soft link to {link.path}: expected the data itself")
            try:
                item = group[key]
                address = h5py.h5o.get_info(item.id).addr
            except Exception as error:
                raise UserError(f"{name} is damaged ({one_line(error)})") from error
            if isinstance(item, h5py.Group):
                if address in seen:
                    raise UserError(f"group {name} is linked from two places: expected a tree without cycles")
                seen.add(address)
                groups.append((name, item))
            yield name, item


def _check_attributes(name: str, item: h5py.HLObject) -> None:
    number = h5py.h5a.get_num_attrs(item.id)
    if number > ATTRIBUTES:
        raise UserError(f"{name} has {number} attributes: expected at most {ATTRIBUTES}")
    for index in range(number):
        attribute = h5py.h5a.open(item.id, index=index)
        number_of_values = attribute.get_space().get_simple_extent_npoints()
        _require_small(name, attribute.name, number_of_values * attribute.get_type().get_size())
    for key, value in item.attrs.items():
        _require_printable(f"an attribute of {name}", key)
        # Variable-length text is stored elsewhere; its size is known only after reading.
        texts = [value] if isinstance(value, (str, bytes)) else getattr(value, "flat", ())
        _require_small(name, key, sum(len(text) for text in texts if isinstance(text, (str, bytes))))


def _require_printable(what: str, name: str) -> None:
    if not name.isprintable():
        shown = printable(name)[:80]
        raise UserError(f"{what} is named {shown}: expected a name without control characters; rename it")


def _require_small(name: str, key: str | bytes, size: int) -> None:
    if size > ATTRIBUTE_BYTES:
        key = key.decode(errors="replace") if isinstance(key, bytes) else key
        raise UserError(f"attribute {key[:80]} of {name} takes {size} bytes: expected at most {ATTRIBUTE_BYTES}")


def _check_storage(name: str, dataset: h5py.Dataset, file_size: int) -> None:
    """Check that a dataset's values are in this file, and that the file is large enough to contain them."""
    properties = dataset.id.get_create_plist()
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise UserError(f"dataset {name} is virtual, its values are in other files: expected the data itself")
    if properties.get_external_count():
        other = properties.get_external(0)[0].decode(errors="replace")
        raise UserError(f"dataset {name} has its values in another file, {other}: expected the data itself")
    shape = dataset.shape or ()
    size = math.prod(shape) * dataset.id.get_type().get_size()
    limit = file_size
    if properties.get_layout() == h5py.h5d.CHUNKED:
        limit = file_size * EXPANSION
        if (chunk := _chunk_bytes(dataset)) > CHUNK_BYTES:
            raise UserError(f"dataset {name} has chunks of {chunk} bytes: expected at most {CHUNK_BYTES}")
    if size > limit:
        raise UserError(
            f"dataset {name} claims shape {shape}, {size} bytes, in a file of {file_size}: expected at most {limit}"
        )
    if dataset.shape is not None and size <= SMALL_BYTES and not name.startswith(FIELDS):
        dataset[()]


def _chunk_bytes(dataset: h5py.Dataset) -> int:
    return math.prod(dataset.chunks) * dataset.id.get_type().get_size()


def check_written(name: str, dataset: h5py.Dataset) -> None:
    """Check that every value of the dataset is stored in a form that this HDF5 library can read.

    Raises:
        UserError: the dataset uses a filter other than gzip, lzf, shuffle and fletcher32, or chunks are missing, lie
            outside the file or have a wrong size.
    """
    properties = dataset.id.get_create_plist()
    codes = []
    for index in range(properties.get_nfilters()):
        code, _, values, text = properties.get_filter(index)
        if code not in FILTERS:
            title = text.decode(errors="replace")[:80]
            raise UserError(
                f"{name} is compressed with filter {code} ({title}): expected gzip, lzf, shuffle or fletcher32; where "
                "that filter is installed, convert the file with `h5repack -f GZIP=4 in.h5 out.h5`"
            )
        codes.append(code)
        # lzf allocates its output buffer from this parameter.
        if code == LZF and (len(values) < 3 or values[2] != _chunk_bytes(dataset)):
            raise UserError(f"{name} has lzf filter parameters {values}, which do not fit its chunks")
    if dataset.chunks is None:
        return
    wanted = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    number = dataset.id.get_num_chunks()
    if number != wanted:
        raise UserError(f"{name} has {number} of {wanted} chunks: the others were never written")
    file_size, chunk_bytes = dataset.file.id.get_filesize(), _chunk_bytes(dataset)

    def check(chunk: h5py.h5d.StoreInfo) -> None:
        if chunk.byte_offset is None or chunk.byte_offset + chunk.size > file_size:
            raise UserError(f"{name}: the chunk at {chunk.chunk_offset} lies outside the file")
        applied = [code for bit, code in enumerate(codes) if not chunk.filter_mask >> bit & 1]
        # HDF5 copies a full chunk whatever its stored size, and reads beyond its buffer if that size is smaller.
        wanted = chunk_bytes + CHECKSUM_BYTES * applied.count(h5py.h5z.FILTER_FLETCHER32)
        keeps_size = all(code in (h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_SHUFFLE) for code in applied)
        if chunk.size != wanted if keeps_size else chunk.size == 0:
            raise UserError(f"{name}: the chunk at {chunk.chunk_offset} has {chunk.size} bytes, expected {wanted}")

    dataset.id.chunk_iter(check)
