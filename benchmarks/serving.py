"""Load a service over the loopback: requests per second, latencies and memory.

    python benchmarks/serving.py quickstart_model --json serving.json
    python benchmarks/serving.py quickstart_model --requests 200 --clients 2

It starts ``shodh serve`` with the model, sends the example flow from several clients, each as soon as it has its last
answer, and reads the resident memory of the service as it goes. It ends after ``--requests`` answers or ``--seconds``.
Clients and service share the machine, so a client's work (sending and reading) costs the service time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from shodh_moe.base.environment import describe_environment


def start(model: str, batch: int, threads: int) -> tuple[subprocess.Popen[str], int]:
    """Start a service on a free port; return its process and port."""
    command = [sys.executable, "-m", "shodh_moe.cli", "serve", model, "--port", "0", "--max-batch", str(batch)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("[serve]"):
        raise SystemExit(process.wait() or 1)
    return process, int(line.rstrip("/\n").rpartition(":")[2])


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


class Load:
    """The clients' shared state."""

    def __init__(self, port: int, path: str, body: bytes, requests: int, ends: float):
        self.port, self.path, self.body, self.left, self.ends = port, path, body, requests, ends
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()

    def client(self) -> None:
        """Send one request after another over one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        while True:
            with self.lock:
                if self.left <= 0 or time.monotonic() > self.ends:
                    break
                self.left -= 1
            began = time.perf_counter()
            status, _ = ask(connection, "POST", self.path, self.body)
            with self.lock:
                self.seconds.append(time.perf_counter() - began)
                self.statuses[status] += 1
        connection.close()


def measure(
    model: str, requests: int, clients: int, steps: int, batch: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Run the load and return what was measured; memory in MB after each twentieth of the answers."""
    process, port = start(model, batch, threads)
    try:
        service = psutil.Process(process.pid)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        _, body = ask(connection, "GET", "/example")
        path = f"/forecast?steps={steps}"
        for _ in range(10):  # compiled kernels and the allocator's pools
            status, _ = ask(connection, "POST", path, body)
            assert status == 200, status
        connection.close()
        load = Load(port, path, body, requests, time.monotonic() + seconds)
        threads_of_clients = [threading.Thread(target=load.client) for _ in range(clients)]
        began, memory = time.perf_counter(), [(0, service.memory_info().rss / 1e6)]
        for one in threads_of_clients:
            one.start()
        while any(one.is_alive() for one in threads_of_clients):
            done = len(load.seconds)
            if done - memory[-1][0] >= max(requests // 20, 1):
                memory.append((done, round(service.memory_info().rss / 1e6, 1)))
            time.sleep(0.02)
        wall = time.perf_counter() - began
        memory.append((len(load.seconds), round(service.memory_info().rss / 1e6, 1)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    ordered = sorted(load.seconds)
    half = [megabytes for done, megabytes in memory if done >= len(ordered) / 2]
    return {
        "requests": len(ordered),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "requests_per_second": len(ordered) / wall,
        "latency_s": {
            "median": statistics.median(ordered),
            "p99": ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)],
            "largest": ordered[-1],
        },
        "memory_mb": memory,
        "memory_growth_mb_in_second_half": round(half[-1] - half[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an exported folder or a run")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="snapshots of each forecast")
    parser.add_argument("--batch", type=int, default=4, help="largest batch of the service")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of the service")
    parser.add_argument("--seconds", type=float, default=1800.0, help="end after this time at the latest")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = vars(parser.parse_args())
    target = options.pop("json")
    found = measure(**options)
    result = {
        **options,
        "model": Path(options["model"]).name,
        "asked": options["requests"],
        **found,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "packages": describe_environment()["packages"],
    }
    latency, memory = found["latency_s"], found["memory_mb"]
    print(
        f"{found['requests']} requests ({found['statuses']}), {found['requests_per_second']:.1f} per second; latency "
        f"median {1e3 * latency['median']:.0f} ms, p99 {1e3 * latency['p99']:.0f} ms; memory {memory[0][1]:.0f} "
        f"to {memory[-1][1]:.0f} MB, {found['memory_growth_mb_in_second_half']:+.1f} MB in the second half"
    )
    if target:
        target.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if set(found["statuses"]) == {"200"} else 1


if __name__ == "__main__":
    sys.exit(main())
