"""The service: forecasts in both formats, what it refuses and why, its limits, and its counters."""

from __future__ import annotations

import io
import json
import socket
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import shodh_moe
from shodh_moe.data.dataset import Fields
from shodh_moe.inference.export import export
from tests.serving.running import Service, arrays, npz, service
from tests.tiny import refused
from tests.trained import GRID, make_run

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    export(make_run(folder, operator="staggered", walls="exact"), folder / "model")
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Service]:
    with service(folder / "model", "--max-megabytes", "2", "--max-steps", "6", "--max-batch", "3") as found:
        yield found


@pytest.fixture(scope="module")
def flow(folder: Path) -> Fields:
    return shodh_moe.open_dataset(folder / "theirs", "test")[0, :2]


@pytest.fixture(scope="module")
def expected(folder: Path, flow: Fields) -> Fields:
    return shodh_moe.load_model(folder / "model").forecast(flow, 3)


def test_a_forecast_is_the_models_own(running: Service, flow: Fields, expected: Fields) -> None:
    status, body = running.ask("POST", "/forecast?steps=3&dtype=float64", npz(flow))
    assert status == 200, body
    found = arrays(body)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-6, err_msg=name)
    assert found["velocity"].dtype == np.float64
    u_B3XYZ = torch.from_numpy(found["velocity_face"])
    residual = shodh_moe.kernels.divergence(u_B3XYZ, "staggered")
    assert float(residual.square().mean().sqrt() / u_B3XYZ.square().mean().sqrt()) < 1e-13
    status, body = running.ask("POST", "/forecast?steps=1", npz(flow))
    assert arrays(body)["velocity"].dtype == np.float32


def test_hdf5_comes_back_in_the_wells_schema(running: Service, folder: Path, tmp_path: Path, expected: Fields) -> None:
    with h5py.File(folder / "theirs/data/test/calm.hdf5") as given, h5py.File(tmp_path / "two.hdf5", "w") as file:
        for key, value in given.attrs.items():
            file.attrs[key] = value
        for name in given:
            given.copy(name, file)
        for name in ("t0_fields/pressure", "t1_fields/velocity", "dimensions/time"):
            values, attributes = file[name][()], dict(file[name].attrs)
            del file[name]
            file[name] = values[:2] if name.endswith("time") else values[:, :2]
            file[name].attrs.update(attributes)
    status, body = running.ask("POST", "/forecast?steps=3", (tmp_path / "two.hdf5").read_bytes())
    assert status == 200, body
    (tmp_path / "answer.hdf5").write_bytes(body)
    found = shodh_moe.open_dataset(tmp_path / "answer.hdf5")[0]
    np.testing.assert_allclose(found["velocity"], expected["velocity"], atol=1e-6)
    assert found["time"].tolist() == [2, 3, 4]
    status, body = running.ask("POST", "/forecast?steps=3&format=npz", (tmp_path / "two.hdf5").read_bytes())
    np.testing.assert_allclose(arrays(body)["pressure"], expected["pressure"], atol=1e-6)


def test_concurrent_requests_are_computed_together(folder: Path, flow: Fields) -> None:
    """Different flows at the same time: each gets its own forecast."""
    model = shodh_moe.load_model(folder / "model")
    flows = [{**flow, "velocity": flow["velocity"] * (1 + number / 4)} for number in range(6)]
    with service(folder / "model", "--max-batch", "3") as running, ThreadPoolExecutor(6) as pool:
        bodies = list(pool.map(lambda one: running.ask("POST", "/forecast?steps=2", npz(one)), flows))
        for one, (status, body) in zip(flows, bodies, strict=True):
            assert status == 200, body
            np.testing.assert_allclose(arrays(body)["velocity"], model.forecast(one, 2)["velocity"], atol=1e-6)
        counters = running.ask("GET", "/metrics")[1].decode()
    assert 'shodh_requests_total{path="/forecast",status="200"} 6.0' in counters
    batches = float(counters.split("\nshodh_batch_size_count ")[1].split("\n")[0])
    assert 2 <= batches < 6  # 2 if all came in time
    assert "shodh_snapshots_total 12.0" in counters


def test_what_the_service_is(running: Service, folder: Path) -> None:
    status, body = running.ask("GET", "/info")
    info = json.loads(body)
    assert (status, info["name"], info["grid"], info["history"], info["step"]) == (200, "trained", list(GRID), 2, 7)
    assert info["limits"]["steps"] == 6
    assert running.ask("GET", "/health") == (200, b'{"status":"ok"}')
    assert running.ask("GET", "/nowhere")[0] == 404
    assert running.ask("GET", "/forecast")[0] == 405
    status, body = running.ask("GET", "/example")
    assert running.ask("POST", "/forecast?steps=1", body)[0] == 200
    schema = json.loads(running.ask("GET", "/openapi.json")[1])
    assert "/forecast" in schema["paths"]


def without(flow: Fields, *names: str) -> dict[str, Any]:
    return {name: values for name, values in flow.items() if name not in names}


def test_a_wrong_body_is_refused_with_the_reason(running: Service, flow: Fields, tmp_path: Path) -> None:
    def error(body: bytes, path: str = "/forecast?steps=1") -> tuple[int, str]:
        return running.error(path, body)

    assert error(b"hello")[0] == 415
    assert error(b"") == (415, error(b"hello")[1])
    assert error(npz(without(flow, "pressure"))) == (
        422,
        "the body has no pressure: send the arrays velocity and pressure, and solid for walls",
    )
    status, said = error(npz(without(flow, "velocity"), velocity=flow["velocity"][:, :, :8]))
    assert status == 422
    assert "velocity [2, 3, 8, 8, 24]" in said
    assert "[T, 3, 16, 8, 24]" in said
    assert error(npz({name: values[:1] for name, values in flow.items()}))[1].startswith("1 snapshots given")
    assert "3 axes" not in error(npz(flow, velocity=np.zeros(3)))[1]
    assert error(npz(flow, velocity=np.zeros(3)))[1] == "the array velocity has shape [3], not 5 axes: see /info"
    assert "has an array other" in error(npz(flow, other=np.zeros(3)))[1]
    assert "not finite" in error(npz({**flow, "velocity": flow["velocity"] * np.nan}))[1]
    assert "holds object" in error(npz(flow, velocity=np.array([None], dtype=object)))[1]
    whole = npz(flow)
    assert error(whole[:-100])[0] == 422
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    assert error(bytes(damaged))[0] == 422
    assert error(whole, "/forecast?steps=7") == (422, "steps 7: the service predicts at most 6")
    assert error(whole, "/forecast?steps=0")[0] == 422
    assert error(whole, "/forecast?steps=many")[0] == 422
    assert error(whole, "/forecast") == (422, "steps: Field required")
    assert error(whole, "/forecast?steps=1&format=png")[0] == 422
    assert error(whole, "/forecast?steps=1&format=hdf5")[1].startswith("an HDF5 answer continues an HDF5 body")


def test_an_array_that_claims_to_be_huge_is_not_read(running: Service) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 3, *GRID)})
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name in ("velocity", "pressure"):
            archive.writestr(f"{name}.npy", header.getvalue())
    status, said = running.error("/forecast?steps=1", body.getvalue())
    assert status == 413
    assert "bytes unpacked" in said
    bomb = npz({"velocity": np.zeros((400, 3, *GRID), dtype=np.float32)})
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bomb)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in ("velocity.npy",):
            new.writestr(name, old.read(name))
            new.writestr("pressure.npy", old.read(name))
    assert len(packed.getvalue()) < 2**20
    assert running.error("/forecast?steps=1", packed.getvalue())[0] == 413


def links(folder: Path, secret: Path) -> Iterator[tuple[Path, str]]:
    """HDF5 files that refer to another file of the server, and what their refusals say."""
    velocity, pressure = (1, 2, *GRID, 3), (1, 2, *GRID)
    for kind in ("external link", "is virtual", "in another file"):
        path = folder / f"{kind.replace(' ', '_')}.hdf5"
        with h5py.File(path, "w") as file:
            file.attrs["n_spatial_dims"] = 3
            if kind == "external link":
                file["t1_fields/velocity"] = h5py.ExternalLink(str(secret), "t1_fields/velocity")
            elif kind == "is virtual":
                layout = h5py.VirtualLayout(velocity, "f4")
                layout[:] = h5py.VirtualSource(str(secret), "t1_fields/velocity", velocity)
                file.create_virtual_dataset("t1_fields/velocity", layout)
            else:
                size = int(np.prod(velocity)) * 4
                file.create_dataset("t1_fields/velocity", velocity, "f4", external=[(str(secret), 0, size)])
            file["t0_fields/pressure"] = np.zeros(pressure, dtype=np.float32)
        yield path, kind


def test_hdf5_that_refers_to_other_files_is_refused(running: Service, folder: Path, tmp_path: Path) -> None:
    secret = folder / "theirs/data/test/calm.hdf5"
    for path, says in links(tmp_path, secret):
        status, said = running.error("/forecast?steps=1", path.read_bytes())
        assert status == 422
        assert says in said
        assert "shodh-serve" not in said  # where the service keeps bodies


def test_damaged_hdf5_is_refused_and_the_service_lives(running: Service, folder: Path) -> None:
    whole = (folder / "theirs/data/test/calm.hdf5").read_bytes()
    for at in range(64, 1600, 160):  # at 1664 HDF5 does not end until the inspection's limit of 10 s of CPU time
        damaged = bytearray(whole)
        damaged[at : at + 8] = b"\xff" * 8
        status, _ = running.ask("POST", "/forecast?steps=1", bytes(damaged))
        assert status in (200, 422)
    assert running.error("/forecast?steps=1", whole[: len(whole) // 2])[0] == 422
    assert running.ask("GET", "/health")[0] == 200


def test_ten_gigabytes_are_refused_before_they_are_sent(running: Service) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
        client.sendall(b"POST /forecast?steps=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
        said = b""
        while piece := client.recv(2**16):
            said += piece
    assert said.startswith(b"HTTP/1.1 413"), said
    assert b"larger than 2097152 bytes" in said
    # Without a stated length the body is refused where it passes the limit.
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
        client.sendall(b"POST /forecast?steps=1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent, piece = 0, b"100000\r\n" + bytes(2**20) + b"\r\n"
        try:
            while sent < 100:
                client.sendall(piece)
                sent += 1
        except OSError:  # the service closed the connection
            pass
    assert sent < 100


def test_a_full_service_and_slow_requests_are_refused(folder: Path, flow: Fields) -> None:
    with service(folder / "model", "--max-waiting", "1", "--max-seconds", "1") as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as slow:
            slow.sendall(b"POST /forecast?steps=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nPK")
            status, said = 0, ""
            for _ in range(100):  # until the slow request is held
                status, said = running.error("/forecast?steps=1", b"PK")
                if status == 503:
                    break
            assert (status, said) == (503, "the service already holds 1 requests: try again in some seconds")
            assert slow.recv(2**16).startswith(b"HTTP/1.1 408")
        status, said = running.error("/forecast?steps=100", npz(flow))
        assert status == 504
        assert "longer than 1 s" in said
        assert running.ask("GET", "/health")[0] == 200


def test_two_services_on_one_port(running: Service, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["serve", str(folder / "model"), "--port", str(running.port)]
    refused(capfd, *command, says=(f"port {running.port} of 127.0.0.1 is in use", "give another --port"))
    refused(capfd, "serve", str(folder / "model"), "--host", "nowhere.invalid", says=("cannot listen on",))
    refused(capfd, "serve", str(folder / "model"), "--max-steps", "0", says=("--max-steps 0",))


def test_a_model_of_a_newer_version(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    described = json.loads((folder / "model/export.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/export.json").write_text(json.dumps({**described, "format": 2}))
    says = ("has export format 2, a newer one, this version reads 1: update shodh_moe",)
    refused(capfd, "serve", str(tmp_path / "model"), "--port", "0", says=says)


def test_an_example_flow_of_a_file(folder: Path, flow: Fields, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "theirs/data/test/calm.hdf5"
    with service(folder / "model", "--example", str(path)) as running:
        found = arrays(running.ask("GET", "/example")[1])
    np.testing.assert_array_equal(found["velocity"], flow["velocity"])
    refused(capfd, "serve", str(folder / "model"), "--port", "0", "--example", "nothing.hdf5", says=("nothing.hdf5",))
