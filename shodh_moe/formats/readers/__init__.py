"""Readers of file formats, one module each.

`shodh_moe.formats.known` lists them. A reader is a module with a function ``read(path, stack)`` that returns
an `ArrayFile`. What has to be closed goes onto the ``ExitStack``. It may raise any exception; the caller turns it into
a `UserError` that names the file.
"""
