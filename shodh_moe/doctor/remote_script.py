"""Check shared folders, and listen on a port or connect to one; runs on every host of a hostfile.

``python - JSON``, with this file as standard input, prints one line of JSON. It uses only the standard library. Keys of
the argument: ``folders``, pairs of a folder and the name of its subfolder with the file ``token``; ``number`` of this
host; ``token``; ``port``; ``seconds``, the time to listen or connect; ``addresses`` to connect to; ``visits``, the
number of connections to wait for, 0 on hosts that do not listen.
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path


def look(order: dict, found: dict) -> None:
    """Read each folder's token, write it to a file of this host, and store the error ("" if none) and free bytes."""
    for folder, inside in order["folders"]:
        place = Path(folder, inside)
        try:
            if not Path(folder).is_dir():
                found[folder] = {"error": "does not exist"}
            elif not place.is_dir():
                found[folder] = {"error": "is another folder of the same name, not a shared one"}
            else:
                read = (place / "token").read_text()
                with open(place / f"host-{order['number']}", "w") as file:
                    file.write(order["token"])
                    file.flush()
                    os.fsync(file.fileno())
                wrong = "" if read == order["token"] else "shows different file contents"
                found[folder] = {"error": wrong, "free": shutil.disk_usage(folder).free}
        except OSError as error:
            found[folder] = {"error": f"cannot be used: {error.strerror or error}"}


def listen(order: dict) -> str:
    """Send the token to each host that connects, until all have connected or time is up. Returns an error or ""."""
    deadline = time.monotonic() + order["seconds"]
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", order["port"]))
        except OSError as error:
            return error.strerror or str(error)
        listener.listen(128)
        for _ in range(order["visits"]):
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                visitor, _ = listener.accept()
            except OSError:
                break
            with visitor:
                visitor.sendall(order["token"].encode())
    return ""


def connect(address: str, order: dict, found: dict) -> None:
    """Try to connect until the other host listens or time is up, and store an error or ""."""
    deadline = time.monotonic() + order["seconds"]
    while True:
        try:
            with socket.create_connection(
                (address, order["port"]), timeout=max(deadline - time.monotonic(), 0.1)
            ) as one:
                reply = one.recv(100).decode(errors="replace")
            found[address] = "" if reply == order["token"] else "another program answers on the port"
            return
        except OSError as error:
            found[address] = error.strerror or str(error)
        if time.monotonic() > deadline - 0.2:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    # Results of checks that do not finish in time: a hanging folder must not hide the results for ports.
    folders = {folder: {"error": "does not answer: its mount hangs"} for folder, _ in order["folders"]}
    reached = dict.fromkeys(order["addresses"], "timed out")
    work = [threading.Thread(target=look, args=(order, folders), daemon=True)]
    work += [threading.Thread(target=connect, args=(address, order, reached), daemon=True) for address in reached]
    for thread in work:
        thread.start()
    listened = listen(order) if order["visits"] else ""
    end = time.monotonic() + order["seconds"]
    for thread in work:
        thread.join(max(end - time.monotonic(), 0))
    print(json.dumps({"folders": folders, "reached": reached, "listened": listened}), flush=True)
    os._exit(0)
