"""Start the service of a model on a port of this machine."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import port_holder
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.serving.example import example_flow
from shodh_moe.serving.limits import Limits


def serve(place: Path | str, host: str, port: int, limits: Limits, example: Path | None = None) -> None:
    """Answer requests until a signal ends the process; prints the address when it can be reached.

    Args:
        place: a model, as for `load_model`.
        port: 0 for any free one.
        example: file with the flow of /example.

    Raises:
        UserError: the model or the example cannot be used, the port is taken, or a package is missing.
    """
    try:
        import uvicorn

        from shodh_moe.serving.app import make_app
    except ImportError as error:
        raise UserError(f"shodh serve needs {error.name}: pip install 'shodh_moe[serve]'") from None
    listener = _listen(host, port)  # before the model is loaded, which takes longer
    with listener:
        source = find_source(place)
        model = load_source(source)
        app = make_app(model, source.config.name, example_flow(model, example), limits)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=16384,
        )
        where = f"[{host}]" if ":" in host else host
        print(
            f"[serve] {source.config.name}, step {model.step}: http://{where}:{listener.getsockname()[1]}/", flush=True
        )
        uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            holder = port_holder(port)
            by = f" by {holder}" if holder else ""
            raise UserError(
                f"port {port} of {host} is in use{by}: give another --port, or 0 for any free one"
            ) from None
        raise UserError(f"cannot listen on port {port} of {host} ({error}): give another --host or --port") from None
    return listener
