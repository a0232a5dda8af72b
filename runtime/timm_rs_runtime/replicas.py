"""Replicas of an AdaptiveSession behind an HTTP service: sizes bend with the load, Ray Serve adds replicas

A process reads uploads, keeps deadlines and answers in JSON (see `service`): that of `serve`, or a Front. Replicas,
which Ray Serve runs on any machine of its cluster, answer images, and refuse those that they cannot answer in time.
"""
import asyncio
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Any, Dict, Optional

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
os.environ.setdefault('RAY_SERVE_USE_GRPC_BY_DEFAULT', '1')  # straight to a replica, some ms less than a task of Ray

try:
    import ray
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from ray import serve as ray_serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
except ImportError as e:
    raise ImportError("Ray needs the packages of: pip install './runtime[ray]'.") from e

from .adaptive import AdaptiveSession
from .controller import Estimate
from .errors import UserError, one_line
from .fields import check_argument, integer
from .images import MAX_BYTES, MAX_PIXELS
from .service import MAX_ONGOING, MAX_UPLOAD, Answer, Replica, create_app

__all__ = ['Replicas', 'Settings', 'app', 'serve']

STATS_SECONDS = 2.
TARGET_ONGOING = 2.  # requests in a replica, in the mean, above which Ray Serve starts another one ...
SCALE_SECONDS = 10.  # ... after so long
SHUTDOWN_SECONDS = 5  # that uploads get, besides the budget of those that have arrived


def connect(address: Optional[str], **options: Any) -> None:
    """Connect to a Ray cluster, or start one for this process, with these options of ray.init.

    Raises:
        UserError: There is none at this address, or none can be started.
    """
    host, _, port = (address or '').rpartition(':')
    try:
        if host and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray would try for minutes
        os.environ.setdefault('RAY_worker_niceness', '0')  # otherwise 15
        if not address:  # a token of this cluster only
            os.environ.setdefault('RAY_AUTH_TOKEN', secrets.token_hex(32))
        ray.init(
            address or 'local', log_to_driver=False, logging_level='ERROR',
            **({} if address else dict(options, include_dashboard=False)))
    except Exception as e:  # Ray raises plain ones, on a machine that is too busy to start it in time
        what = f'No Ray cluster answers at {address}' if address else 'Ray does not start'
        raise UserError(f'{what}: {one_line(e, 300)}') from None


class Replicas:
    """The replicas behind a handle of Ray Serve; a request whose replica dies goes to another one.

    Only so many requests are on their way as come back in time: the window begins with what one replica holds, shrinks
    by a fifth in a budget that saw a refusal and grows by one in the time of an answer, as TCP's. One more is refused
    here, at once.
    """

    def __init__(self, handle: Any):
        self._handle = handle
        self._hop = Estimate(0.002)  # seconds that a request takes to a replica and back
        self._ongoing, self._window, self._shrinks_at = 0, float(MAX_ONGOING), 0.

    async def predict(self, content: bytes, budget_ms: float) -> Answer:
        """Answer an image within a budget."""
        if self._ongoing >= self._window:
            return 503, dict(error=f'{self._ongoing} requests are on their way, try again later.', retry_after=1.)
        self._ongoing += 1
        try:
            status, found = await self._predict(content, budget_ms)
        finally:
            self._ongoing -= 1
        now = time.perf_counter()
        if status == 200 and 2 * (self._ongoing + 1) >= self._window:
            self._window += 1 / self._window
        elif status == 503 and now > self._shrinks_at:
            self._window, self._shrinks_at = max(0.8 * self._window, 4.), now + budget_ms / 1e3
        return status, found

    async def _predict(self, content: bytes, budget_ms: float) -> Answer:
        start = time.perf_counter()
        while True:
            sent = time.perf_counter()
            left = budget_ms / 1e3 - (sent - start)
            inside = left - self._hop.upper(2)
            if inside <= 0:
                break
            response = self._handle.predict.remote(content, 1e3 * inside)
            try:
                status, found = await asyncio.wait_for(response, left)
            except asyncio.TimeoutError:
                response.cancel()
                break
            except RayActorError:
                continue
            except (BackPressureError, DeploymentUnavailableError):
                break
            if status == 200:
                self._hop.update(time.perf_counter() - sent - found['milliseconds'] / 1e3)
            return status, found
        return 503, dict(error='No replica can answer in time; try again later.', retry_after=1.)

    async def stats(self) -> Dict[str, Dict[str, Any]]:
        """Return AdaptiveSession.stats() of each replica, by its name; nothing if none is there."""
        try:
            found = await self._handle.broadcast('stats').results_async(
                timeout_s=STATS_SECONDS, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return {}
        return dict(row for row in found if isinstance(row, tuple))


class Settings(BaseModel):
    """What to serve, and how.

    `min_replicas` start. More follow, up to `replicas`, while more than TARGET_ONGOING requests are in each for
    SCALE_SECONDS: the sizes bend first.

    Args:
        path: File of `timm-rs export --format onnx`; it has this path on every machine of the cluster.
        budget_ms: Milliseconds from the end of an upload to its answer.
        replicas: Most replicas, each with a core.
        min_replicas: Fewest; with two or more, requests go to the others when one dies.
        k: Classes of an answer.
        max_bytes: Bytes of a request.
        max_pixels: Pixels of an image.
    """

    path: str
    budget_ms: float
    replicas: int = 1
    min_replicas: int = 1
    k: int = 5
    max_bytes: int = MAX_UPLOAD
    max_pixels: int = MAX_PIXELS


@ray_serve.ingress()
class Front:
    """What uploads go through where the proxies of Ray Serve listen."""

    def __init__(self, handle: Any, settings: Settings):
        self._front, self._settings = Replicas(handle), settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _app_of(self._front, self._settings)


def app(args: Settings) -> Any:
    """Return what a configuration of Ray Serve starts: its `import_path` is timm_rs_runtime.replicas:app."""
    return ray_serve.deployment(Front).options(max_ongoing_requests=2 * MAX_ONGOING).bind(_replicas(args), args)


def serve(settings: Settings, address: Optional[str] = None, host: str = '127.0.0.1', port: int = 8000) -> None:
    """Serve a file until SIGTERM or Ctrl-C. SIGHUP opens the file again, replica by replica.

    Args:
        settings: What to serve.
        address: Address of a Ray cluster, 'auto' for the one that runs here; if None one is started for this process.
        host: Address to listen at, by default only that of this machine.
        port: Port to listen at.

    Raises:
        UserError: The file is not an export of timm_rs, no size keeps the budget, the port is taken, or an argument is
            not usable.
    """
    check_argument('port', port, integer(1, 65535))
    settings = settings.model_copy(update=dict(path=os.path.abspath(settings.path)))
    application = _replicas(settings)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET)
    except OSError as e:
        raise UserError(f'Cannot listen at {host}, port {port}: {e.strerror or e}.') from None
    connect(address, num_cpus=settings.replicas + 1)  # one more for an update
    try:
        logging.getLogger('ray.serve').setLevel(logging.ERROR)
        ray_serve.start(proxy_location='Disabled')
        name = f'timm_rs-{socket.gethostname()}-{port}'
        front = Replicas(_deploy(name, application))

        def update() -> None:
            try:
                _deploy(name, _replicas(settings))
                print(f'{settings.path}: opened again', flush=True)
            except (RuntimeError, UserError) as e:
                print(f'{settings.path} is not opened again: {one_line(e)}', file=sys.stderr, flush=True)

        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=update, daemon=True).start())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises it again at the end
        print(f'{settings.path}: http://{host}:{port}/predict', flush=True)
        try:
            uvicorn.Server(uvicorn.Config(
                _app_of(front, settings), log_level='critical', access_log=False,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS + math.ceil(settings.budget_ms / 1e3))).run([listener])
        finally:
            ray_serve.delete(name)
    finally:
        ray.shutdown()


def _app_of(front: Replicas, settings: Settings) -> FastAPI:
    return create_app(front.predict, front.stats, settings.budget_ms, settings.max_bytes)


def _replicas(settings: Settings) -> Any:
    """Return the replicas as Ray Serve takes them; the settings and the file are checked."""
    for name, most in (
            ('replicas', 10 ** 4), ('min_replicas', settings.replicas), ('k', 1000), ('max_bytes', MAX_BYTES),
            ('max_pixels', MAX_PIXELS)):
        check_argument(name, getattr(settings, name), integer(1, most))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # an error here
        with AdaptiveSession(settings.path, settings.budget_ms, threads=1) as session:
            session.session.check_classifies()
            smallest_ms = min(session.stats()['expected_ms'].values())
    if not session.feasible:
        raise UserError(
            f'The smallest size of {settings.path} takes {smallest_ms:.1f} ms here, expected at most the budget.')
    fewest, most = settings.min_replicas, settings.replicas
    scaling = dict(num_replicas=most) if fewest == most else dict(autoscaling_config=dict(
        min_replicas=fewest, max_replicas=most, target_ongoing_requests=TARGET_ONGOING, upscale_delay_s=SCALE_SECONDS,
        look_back_period_s=1.5 * SCALE_SECONDS))  # more than Ray's interval between its metrics
    return ray_serve.deployment(Replica).options(
        max_ongoing_requests=MAX_ONGOING, max_queued_requests=MAX_ONGOING, max_surge_percent=10,
        health_check_period_s=2, **scaling).bind(
            settings.path, settings.budget_ms, settings.k, settings.max_pixels, threads=1)


def _deploy(name: str, application: Any) -> Any:
    """Start or replace the replicas, new ones before old ones end, and return their handle."""
    return ray_serve.run(
        application, name=name, route_prefix=None, logging_config=dict(log_level='ERROR', enable_access_log=False))
