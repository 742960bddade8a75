"""Runs the operator in a process of its own, until a signal."""

from __future__ import annotations

import asyncio
import logging
import signal

from .api import Api
from .reconcile import Settings
from .run import Operator

CHATTY = ("httpx", "httpcore", "kopf", "kr8s")  # loggers with a line for every request or event


def run_until_signal(settings: Settings, namespaces: tuple[str, ...], lease_namespace: str) -> None:
    """Work until SIGTERM or SIGINT. Raises ApiError if there is no API server at the start."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    asyncio.run(_run(settings, namespaces, lease_namespace))


async def _run(settings: Settings, namespaces: tuple[str, ...], lease_namespace: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    api = await Api.connect()
    await Operator(api, settings, namespaces, lease_namespace).run(stop)
