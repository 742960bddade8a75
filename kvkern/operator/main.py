"""Runs the operator in a process of its own, until a signal."""

from __future__ import annotations

import asyncio
import signal

from .api import Api
from .reconcile import Settings
from .run import Operator


def run_until_signal(settings: Settings, namespaces: tuple[str, ...], lease_namespace: str) -> None:
    """Work until SIGTERM or SIGINT. Raises ApiError if there is no API server at the start."""
    asyncio.run(_run(settings, namespaces, lease_namespace))


async def _run(settings: Settings, namespaces: tuple[str, ...], lease_namespace: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    api = await Api.connect()
    await Operator(api, settings, namespaces, lease_namespace).run(stop)
