"""The endpoints: ``create_app`` puts a server that speaks OpenAI's API in front of an engine.

    GET  /v1/models, /v1/models/NAME     the model and its adapters
    POST /v1/chat/completions            a conversation: messages in, a message out, whole or streamed
    POST /v1/completions                 a text or ids, continued
    GET  /health, /metrics               for whoever watches the server

A request's way: ``guard.py`` (key, limits) → ``schema.py`` (types) → ``options.py``, ``prompts.py`` (values, ids) →
``worker.py`` (the engine) → ``parsing.py``, ``answers.py`` (OpenAI's form) → whole, or as events.
"""

import asyncio
import contextlib
from collections.abc import Awaitable

from minillm.errors import UserError, missing_package
from minillm.serving.api.errors import CLIENT_LEFT, ApiError, from_validation
from minillm.serving.api.guard import Guard
from minillm.serving.api.metrics import Metrics
from minillm.serving.api.schema import ChatRequest, CompletionRequest
from minillm.serving.api.service import Job, ServerOptions, Service
from minillm.serving.api.worker import EngineWorker

EVENT_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx passes each event on at once


def create_app(engine, **server_options):
    """Return a FastAPI app that serves ``engine``. The app owns the engine from now on; its lifespan runs it.

    Args:
        server_options: fields of :class:`ServerOptions`.

    Raises:
        UserError: fastapi or prometheus-client is not installed; an adapter has the model's name.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.middleware.cors import CORSMiddleware
        from fastapi.responses import JSONResponse, Response, StreamingResponse
        from starlette.exceptions import HTTPException
    except ImportError:
        raise missing_package("fastapi", purpose="the server", extra="serve") from None
    settings = ServerOptions(**server_options)
    if settings.model_name in engine.adapter_names:
        raise UserError(f"an adapter has the model's name, {settings.model_name}: give one of them another name")
    worker = EngineWorker(engine)
    metrics = Metrics(lambda: worker.stats)
    service = Service(engine, worker, metrics, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        worker.start()
        yield
        await worker.stop()

    app = FastAPI(title="minillm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker, app.state.service = worker, service
    guard = {name: getattr(settings, name) for name in ("api_key", "max_body_bytes", "send_timeout_s")}
    app.add_middleware(Guard, metrics=metrics, **guard)
    if settings.cors_origins:  # outside of the guard: a browser's preflight request has no key
        origins = {"allow_origins": settings.cors_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **origins, expose_headers=["x-request-id"])

    @app.exception_handler(RequestValidationError)
    async def wrong_type(request: Request, error: RequestValidationError):
        raise from_validation(error.errors())

    @app.exception_handler(HTTPException)
    async def no_such_endpoint(request: Request, error: HTTPException):
        raise ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    async def answer(job: Job, request: Request):
        if job.is_streamed:
            return StreamingResponse(service.events(job), media_type="text/event-stream", headers=EVENT_HEADERS)
        return JSONResponse(await _unless_left(service.whole(job), request.receive))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        return await answer(await service.start_chat(body, request.state.trace), request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await answer(await service.start_completion(body, request.state.trace), request)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return service.model(name)

    @app.get("/health")
    async def health():
        return JSONResponse({"status": service.health()}, status_code=200 if service.health() == "ok" else 503)

    @app.get("/metrics")
    async def metrics_page():
        text, content_type = metrics.page()
        return Response(text, media_type=content_type)

    return app


async def _unless_left(work: Awaitable, receive):
    """Return the result of ``work``; stop it if the client leaves meanwhile."""
    result = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({result, left}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ApiError(CLIENT_LEFT, "the client left before its answer was complete")
        return result.result()
    finally:
        result.cancel()
        left.cancel()


async def _until_disconnect(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
