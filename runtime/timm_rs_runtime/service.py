"""An HTTP service that answers images within a budget: what an upload goes through, without the cluster behind it"""
import asyncio
import math
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Awaitable, Callable, Dict, Mapping, Optional, Tuple

try:
    from fastapi import FastAPI, HTTPException, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.formparsers import MultiPartException, MultiPartParser
    from starlette.requests import ClientDisconnect
except ImportError as e:
    raise ImportError("Serving over HTTP needs the packages of: pip install './runtime[ray]'.") from e

from .adaptive import AdaptiveSession, BudgetError, QueueFullError
from .errors import UserError, one_line
from .images import MAX_PIXELS, open_header
from .metrics import Collector
from .ort import InferenceError
from .predict import top
from .session import NotFiniteError

__all__ = ['MAX_ONGOING', 'MAX_UPLOAD', 'Answer', 'Replica', 'create_app']

MAX_UPLOAD = 2 ** 24  # bytes of a request
MAX_HELD = 2 ** 30  # bytes of all requests at a time
MAX_ONGOING = 256  # requests in a replica, and those that wait for one
UPLOAD_SECONDS = 30.

Answer = Tuple[int, Dict[str, Any]]  # status of HTTP, content
_ERROR = {'content': {'application/json': {'schema': {
    'type': 'object', 'required': ['error'], 'properties': {'error': {'type': 'string'}}}}}}
_ERRORS = {
    400: 'The body is not an image in one of the forms above.', 408: 'The body did not arrive in time.',
    413: 'Too many bytes or pixels.', 422: 'The image cannot be used, or never within the budget.',
    500: 'The network failed.', 503: 'It cannot be answered in time now; come back after Retry-After seconds.'}
_FILE = {'type': 'string', 'format': 'binary'}
_BODY = {'requestBody': {'required': True, 'content': {
    'application/octet-stream': {'schema': _FILE}, 'image/*': {'schema': _FILE},
    'multipart/form-data': {'schema': {
        'type': 'object', 'required': ['image'], 'properties': {'image': _FILE}}}}}}


class Replica:
    """Answers images in a process of its own.

    Args:
        path: File of `timm-rs export --format onnx`.
        budget_ms: Budget of a request.
        k: Classes of an answer.
        max_pixels: Pixels of an image.
        **options: Arguments of AdaptiveSession.
    """

    def __init__(self, path: str, budget_ms: float, k: int = 5, max_pixels: int = MAX_PIXELS, **options: Any):
        self.session = AdaptiveSession(path, budget_ms, refuse_late=True, **options)
        self.session.session.check_classifies()
        self._k, self._max_pixels = k, max_pixels
        self._threads = ThreadPoolExecutor(MAX_ONGOING)
        self._name = f'{socket.gethostname()}-{os.getpid()}'

    async def predict(self, content: bytes, budget_ms: float) -> Answer:
        """Answer an image that has so much of its budget left."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.answer, content, budget_ms)

    def answer(self, content: bytes, budget_ms: float) -> Answer:
        """Return the answer to an image, or the error."""
        session = self.session.session
        try:
            width, height = open_header(content).size
            if width * height > self._max_pixels:
                return 413, dict(error=f'The image is {width}x{height}, expected at most {self._max_pixels:,} pixels.')
            found = self.session.predict(content, budget_ms)
        except QueueFullError as e:
            return 503, dict(error=one_line(e), retry_after=e.retry_after)
        except (InferenceError, NotFiniteError) as e:
            return 500, dict(error=one_line(e))
        except BudgetError as e:
            return 422, dict(error=one_line(e), least_ms=e.least_ms)
        except UserError as e:
            return 422, dict(error=one_line(e))
        best = top(found.logits[0], session.class_names, self._k, session.threshold)
        return 200, dict(top=best, resolution=found.resolution, milliseconds=found.milliseconds)

    async def stats(self) -> Tuple[str, Dict[str, Any]]:
        """Return a name of this replica and the statistics of its session."""
        return self._name, self.session.stats()


def create_app(
        predict: Callable[[bytes, float], Awaitable[Answer]],
        stats: Callable[[], Awaitable[Mapping[str, Dict[str, Any]]]],
        budget_ms: float,
        max_bytes: int = MAX_UPLOAD,
        upload_seconds: float = UPLOAD_SECONDS,
) -> FastAPI:
    """Return the application: POST /predict, GET /healthz, /metrics and /openapi.json; every error is JSON.

    Args:
        predict: Answers an image within a budget in milliseconds.
        stats: Returns AdaptiveSession.stats() of each replica, by its name.
        budget_ms: Milliseconds from the end of an upload to its answer.
        max_bytes: Bytes of a request.
        upload_seconds: Seconds that an upload may take.
    """
    app = FastAPI(title='timm_rs', docs_url=None, redoc_url=None)  # these pages fetch scripts of others
    registry = CollectorRegistry()
    answers = Histogram(
        'timm_rs_answer_seconds', 'Time from the end of an upload to its answer, by HTTP status; refusals take none.',
        ['status'], registry=registry,
        buckets=[budget_ms / 1e3 * x for x in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.5)])
    held = 0

    def refuse(request: Request, status: int, reason: str, headers: Optional[Mapping[str, str]] = None) -> JSONResponse:
        if request.url.path == '/predict':
            answers.labels(status).observe(0)
        return JSONResponse(dict(error=reason), status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def explain(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return refuse(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def explain_value(request: Request, error: RequestValidationError) -> JSONResponse:
        reasons = (f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        return refuse(request, 422, one_line('; '.join(reasons)))

    @app.exception_handler(Exception)
    async def explain_bug(request: Request, error: Exception) -> JSONResponse:
        return refuse(request, 500, 'This is a bug of the service.')

    async def read(request: Request, content: bytearray) -> None:
        nonlocal held
        too_large = HTTPException(413, f'The body is larger than {max_bytes:,} bytes.', {'Connection': 'close'})
        if int(request.headers.get('content-length', 0)) > max_bytes:  # the server has checked that it is a number
            raise too_large
        async for chunk in request.stream():
            content += chunk
            held += len(chunk)
            if len(content) > max_bytes:
                raise too_large
            if held > MAX_HELD:
                raise HTTPException(503, 'Too many uploads; try again later.', {'Retry-After': '1'})

    async def image_of(request: Request, content: bytes) -> bytes:
        """Return the image in a body."""
        if not request.headers.get('content-type', '').lower().startswith('multipart/'):
            return content

        async def parts():
            yield content

        try:
            form = await MultiPartParser(request.headers, parts(), max_files=1, max_fields=16).parse()
        except MultiPartException as e:
            raise HTTPException(400, one_line(e.message)) from None
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if not files:
            raise HTTPException(400, 'The form holds no file, expected one with an image.')
        return await files[0].read()

    @app.post('/predict', openapi_extra=_BODY, responses={
        status: dict(_ERROR, description=text) for status, text in _ERRORS.items()})
    async def answer(
            request: Request,
            budget_ms: float = Query(budget_ms, gt=0, le=budget_ms, description='Milliseconds until the answer.'),
    ) -> Response:
        """Answer an image: the body, or the file in a form."""
        nonlocal held
        content = bytearray()
        try:
            await asyncio.wait_for(read(request, content), upload_seconds)
            start = time.perf_counter()
            image = await image_of(request, bytes(content))
            left_ms = budget_ms - 1e3 * (time.perf_counter() - start)
            status, found = 503, dict(error='The budget is over before the image is read.', retry_after=1.)
            if left_ms > 0:
                status, found = await predict(image, left_ms)
            if found.pop('least_ms', math.inf) <= budget_ms:  # it was too late only for what was left
                status, found = 503, dict(found, retry_after=1.)
        except asyncio.TimeoutError:
            raise HTTPException(
                408, f'The body did not arrive within {upload_seconds:g} s.', {'Connection': 'close'}) from None
        except ClientDisconnect:
            raise HTTPException(400, 'The body was cut short.') from None
        finally:
            held -= len(content)
        seconds = time.perf_counter() - start
        answers.labels(status).observe(seconds)
        headers = {}
        if status == 200:
            found.update(milliseconds=round(1e3 * seconds, 3), in_time=1e3 * seconds <= budget_ms)
        if 'retry_after' in found:
            headers['Retry-After'] = str(max(math.ceil(found.pop('retry_after')), 1))
        return JSONResponse(found, status, headers)

    @app.get('/healthz', responses={503: dict(_ERROR, description='No replica answers.')})
    async def healthz() -> Dict[str, int]:
        """Say how many replicas there are."""
        found = await stats()
        if not found:
            raise HTTPException(503, 'No replica answers.')
        return dict(replicas=len(found))

    @app.get('/metrics', response_class=Response, responses={200: {'content': {'text/plain': {}}}})
    async def metrics() -> Response:
        """Show the statistics of this process and of the replicas in the format of Prometheus."""
        found = await stats()
        replicas = CollectorRegistry()
        replicas.register(Collector(lambda: found))
        return Response(generate_latest(registry) + generate_latest(replicas), media_type=CONTENT_TYPE_LATEST)

    return app
