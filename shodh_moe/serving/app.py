"""The addresses of the service.

    GET  /          a page that shows slices of a forecast
    GET  /info      the model and the limits
    GET  /example   an example flow, npz
    POST /forecast  a flow in the body, npz or HDF5, to its forecast
    GET  /health    whether forecasts are computed
    GET  /metrics   counters for Prometheus

Every error is JSON, {"error": reason}, with a status from 400 on. No request names a file of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from shodh_moe.base.errors import UserError
from shodh_moe.data.dataset import Fields
from shodh_moe.inference.model import Model
from shodh_moe.serving.batching import Batcher
from shodh_moe.serving.bodies import MEDIA, Given, read_body, slices, write_hdf5, write_npz
from shodh_moe.serving.limits import Limits, Refused

PAGE = Path(__file__).with_name("page.html")
# The page loads nothing, not even from this server, except by its own script.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
CLOSE = {"Connection": "close"}  # so that the rest of a refused body is not read


class Info(BaseModel):
    """What /info says."""

    name: str
    version: str
    step: int
    weights_sha256: str
    grid: list[int] = Field(description="numbers of voxels along x, y and z that every flow must have")
    history: int = Field(description="number of snapshots to send")
    operator: str = Field(description="derivative under which the velocity is divergence-free")
    arrays: dict[str, list[Any]] = Field(description="shapes of the arrays in an npz body")
    limits: dict[str, float]


class Failure(BaseModel):
    """What every error says."""

    error: str


class Metrics:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names: Any = {"registry": self.registry}
        self.requests = Counter("shodh_requests", "Requests by path and status", ["path", "status"], **names)
        self.seconds = Histogram("shodh_forecast_seconds", "Seconds from a body's first byte to its answer", **names)
        self.waiting = Gauge("shodh_requests_held", "Requests between their first byte and their answer", **names)
        sizes = (1, 2, 4, 8, 16, 32)
        self.batches = Histogram("shodh_batch_size", "Requests computed together", buckets=sizes, **names)
        self.steps = Counter("shodh_snapshots", "Snapshots predicted", **names)

    def on_batch(self, size: int, steps: int) -> None:
        """Count a batch."""
        self.batches.observe(size)
        self.steps.inc(size * steps)


def make_app(model: Model, name: str, example: Fields, limits: Limits) -> FastAPI:
    """Make the service of a model.

    Args:
        name: of the model, for /info and the page.
        example: the flow of /example.
    """
    metrics, batcher = Metrics(), None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(model, limits, metrics.on_batch)
        with TemporaryDirectory(prefix="shodh-serve-") as folder:
            app.state.folder = Path(folder)
            yield
        await asyncio.to_thread(batcher.close)

    # The pages of FastAPI about an interface load scripts from other servers.
    app = FastAPI(title="shodh_moe", version=version("shodh_moe"), docs_url=None, redoc_url=None, lifespan=lifespan)
    held = 0

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 503 else {}
        return JSONResponse({"error": error.reason}, error.status, {**CLOSE, **headers})

    @app.exception_handler(HTTPException)
    async def no_address(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def wrong_query(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422, CLOSE)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the service failed; its log says why"}, 500)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        known = request.url.path if request.scope.get("route") else "other"
        metrics.requests.labels(known, str(response.status_code)).inc()
        return response

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.get("/info")
    async def info() -> Info:
        grid = model.grid
        return Info(
            name=name,
            version=version("shodh_moe"),
            step=model.step,
            weights_sha256=model.weights_sha256,
            grid=grid,
            history=model.span(),
            operator=model.operator,
            arrays={"velocity": ["T", 3, *grid], "pressure": ["T", 1, *grid], "solid": [1, *grid], "time": ["T"]},
            limits={key: float(value) for key, value in vars(limits).items()},
        )

    @app.get("/example", response_class=Response)
    async def an_example() -> Response:
        return Response(await asyncio.to_thread(write_npz, example, "float32"), media_type=MEDIA["npz"])

    @app.get("/health")
    async def health() -> dict[str, str]:
        if batcher is None or not batcher.alive:
            raise Refused(503, "forecasts are not computed: the thread that computes them has ended")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def counters() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/forecast", response_class=Response, responses={code: {"model": Failure} for code in (413, 415, 422, 503)}
    )
    async def forecast(
        request: Request,
        steps: Annotated[int, Query(ge=1, description="number of snapshots to predict; /info has the limit")],
        format: Annotated[
            Literal["npz", "hdf5", "slices"] | None, Query(description="of the answer; default: that of the body")
        ] = None,
        dtype: Annotated[Literal["float32", "float64"], Query(description="of the answer's fields")] = "float32",
    ) -> Response:
        nonlocal held
        if steps > limits.steps:
            raise Refused(422, f"steps {steps}: the service predicts at most {limits.steps}")
        if held >= limits.waiting:
            raise Refused(503, f"the service already holds {held} requests: try again in some seconds")
        held += 1
        metrics.waiting.set(held)
        started = time.perf_counter()
        path = app.state.folder / f"{started:.9f}-{os.urandom(8).hex()}.hdf5"
        try:
            given = await _received(request, path, limits)
            assert batcher is not None
            done = asyncio.wrap_future(await _run(batcher.submit, given.fields, steps))
            try:
                found = await asyncio.wait_for(done, limits.seconds + 5)
            except (TimeoutError, asyncio.TimeoutError):
                raise Refused(504, f"the forecast took longer than {limits.seconds:g} s: ask for fewer steps") from None
            if format == "slices":
                return JSONResponse(await _run(slices, found))
            kind = format or ("hdf5" if given.record else "npz")
            if kind == "npz":
                data = await _run(write_npz, found, dtype)
            else:
                data = await _run(write_hdf5, found, given, dtype, model, path.with_suffix(".answer.hdf5"))
            headers = {"Content-Disposition": f'attachment; filename="forecast.{kind}"'}
            return Response(data, media_type=MEDIA[kind], headers=headers)
        except UserError as error:
            raise Refused(422, str(error)) from None
        finally:
            held -= 1
            metrics.waiting.set(held)
            metrics.seconds.observe(time.perf_counter() - started)
            path.unlink(missing_ok=True)

    return app


async def _run(work: Any, *arguments: Any) -> Any:
    """Run blocking work in a thread."""
    return await asyncio.to_thread(work, *arguments)


async def _received(request: Request, path: Path, limits: Limits) -> Given:
    """Store the body in a file and read the flow in it.

    Raises:
        Refused: the body is too large (before it is read, if its length is stated), too slow, or holds no flow.
    """
    too_large = Refused(413, f"the body is larger than {limits.body_bytes} bytes: send one flow, and fewer snapshots")
    stated = request.headers.get("Content-Length", "0")
    if not stated.isdecimal() or int(stated) > limits.body_bytes:
        raise too_large
    try:
        await asyncio.wait_for(_store(request, path, limits.body_bytes, too_large), limits.seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise Refused(408, f"the body took longer than {limits.seconds:g} s to arrive") from None
    try:
        return await asyncio.wait_for(_run(read_body, path, limits), limits.seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise Refused(422, f"the body took longer than {limits.seconds:g} s to examine: it may be damaged") from None


async def _store(request: Request, path: Path, most: int, too_large: Refused) -> None:
    size = 0
    with open(path, "wb") as file:
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise too_large
            await _run(file.write, piece)
