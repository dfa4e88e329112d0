"""`run FILE`: the service in the foreground, as systemd or a person starts it.

The first SIGINT or SIGTERM ends it in good order (its VMs within two seconds); a second one does
not wait for the guests.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import default_directory, named_socket

if TYPE_CHECKING:
    import trio

    from ..config.model import Config
    from ..service.app import Service

__all__ = ["live", "run", "unwrapped", "with_listen"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--state-dir", type=click.Path(path_type=Path, file_okay=False), default=None,
              metavar="DIR", help="Lock, serial logs and, unless --socket says otherwise, the "
                                  "control socket. Default: [host] state_dir of the file, else "
                                  "/run/mixvisor or below XDG_RUNTIME_DIR.")
@click.option("--listen", default=None, metavar="HOST:PORT",
              help="Where Prometheus finds the metrics, instead of what the file says; \"none\" "
                   "for nowhere.")
@click.option("--log", "log_kind", type=click.Choice(["auto", "json", "text"]), default="auto",
              show_default=True, help="auto: readable on a terminal, JSON elsewhere.")
def run(file: Path, state_dir: Path | None, listen: str | None, log_kind: str) -> None:
    """Run the VMs of a configuration file as a service; Ctrl-C ends all of them."""
    import trio

    from ..vm.host import HostFacts
    from .files import load_file
    from .logs import logging_to

    facts = HostFacts.read()
    config = with_listen(load_file(file, facts), listen)
    from ..service.app import Service  # slow to load: a wrong file is told at once
    directory = state_dir or config.host.state_dir or default_directory()
    socket = named_socket() or directory / "control.sock"

    async def serve() -> None:
        service = Service(config, state_dir=directory, socket=socket, facts=facts)

        async def ready() -> None:
            _say_ready(service, socket)
            await trio.sleep_forever()

        await live(service, ready, service.request_shutdown)

    with logging_to(log_kind), unwrapped():  # type: ignore[arg-type]
        trio.run(serve)


async def live(
    service: Service, meanwhile: Callable[[], Awaitable[None]], on_signal: Callable[[], None],
) -> None:
    """Run a service from start to end: until it ends, or `meanwhile` returns.

    `meanwhile` begins once the service is up. The first SIGINT or SIGTERM calls `on_signal`; one
    before the service is up, and every further one, cancels.
    """
    import trio

    async with trio.open_nursery() as nursery:
        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            await service.run(task_status)
            nursery.cancel_scope.cancel()

        async def obey(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                asked = False
                async for _number in signals:
                    if asked or not service.ready:
                        nursery.cancel_scope.cancel()
                    else:
                        on_signal()
                        asked = True

        await nursery.start(obey)
        await nursery.start(serve)
        await meanwhile()
        service.request_shutdown()


def _say_ready(service: Service, socket: Path) -> None:
    import structlog
    structlog.get_logger("mixvisor").info(
        "ready", code="ready", pid=os.getpid(), socket=str(socket),
        metrics=service.metrics_address or "none", vms=len(service.config.vms))


def with_listen(config: Config, listen: str | None) -> Config:
    """The same configuration with another metrics address. Raises click.BadParameter."""
    if listen is None:
        return config
    from pydantic import ValidationError

    from ..config.model import LISTEN_ALLOWED, MetricsConfig
    try:
        metrics = MetricsConfig.model_validate({**config.metrics.model_dump(), "listen": listen})
    except ValidationError as error:
        raise click.BadParameter(f"{listen!r} is not {LISTEN_ALLOWED}",
                                 param_hint="--listen") from error
    return config.model_copy(update={"metrics": metrics})


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """The ServiceError of a nursery comes out of its groups, so that it is one sentence."""
    from ..service.backend import ServiceError
    try:
        yield
    except BaseExceptionGroup as group:
        refusal, rest = group.split(ServiceError)
        if refusal is None or rest is not None:
            raise
        error: BaseException = refusal
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group
