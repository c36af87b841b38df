"""Sent to every host of a hostfile: looks for shared folders, and listens on a port or connects to one.

``python - JSON`` with this file as standard input. The JSON: ``folders``, pairs of a folder and the name of a folder in
it that holds the file ``token``; ``number`` of this host; ``token``; ``port``; ``seconds``; ``addresses`` to connect
to, or ``visits`` to wait for as the one that listens. Prints one line of JSON. The standard library alone.
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
    """Read each token, write one, and note what is wrong ("" if nothing) and the free bytes."""
    for folder, inside in order["folders"]:
        place = Path(folder, inside)
        try:
            if not Path(folder).is_dir():
                found[folder] = {"error": "is not there"}
            elif not place.is_dir():
                found[folder] = {"error": "is another folder of the same name, not a shared one"}
            else:
                read = (place / "token").read_text()
                with open(place / f"host-{order['number']}", "w") as file:
                    file.write(order["token"])
                    file.flush()
                    os.fsync(file.fileno())
                wrong = "" if read == order["token"] else "shows another content of a file"
                found[folder] = {"error": wrong, "free": shutil.disk_usage(folder).free}
        except OSError as error:
            found[folder] = {"error": f"cannot be used: {error.strerror or error}"}


def listen(order: dict) -> str:
    """Answer the other hosts with the token until all have come or the time is over; "" or what is wrong."""
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
    """Try until the other host listens or the time is over; "" in place of what is wrong."""
    deadline = time.monotonic() + order["seconds"]
    while True:
        try:
            with socket.create_connection(
                (address, order["port"]), timeout=max(deadline - time.monotonic(), 0.1)
            ) as one:
                said = one.recv(100).decode(errors="replace")
            found[address] = "" if said == order["token"] else "another program answers on the port"
            return
        except OSError as error:
            found[address] = error.strerror or str(error)
        if time.monotonic() > deadline - 0.2:
            return
        time.sleep(0.1)


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    # What is not done in time is told as such: a folder that hangs must not hide the ports.
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
