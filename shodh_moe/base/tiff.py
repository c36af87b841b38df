"""Read TIFF stacks; tifffile only logs that pages are missing, which is an error here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tifffile


class _Collector(logging.Handler):
    """Keeps the messages of errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@contextmanager
def open_tiff(path: Path | str) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF file; its ``series`` are its arrays.

    Raises:
        ValueError: the file is damaged, or tifffile reports an error within the block.
        OSError: the file cannot be opened.
    """
    errors, logger = _Collector(), logging.getLogger("tifffile")
    logger.addHandler(errors)
    try:
        with tifffile.TiffFile(path) as file:
            yield file
    except OSError:
        raise
    except Exception as error:  # a damaged file raises errors of many kinds
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        logger.removeHandler(errors)
    if errors.found:
        raise ValueError(errors.found[0])
