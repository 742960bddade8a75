"""Runs the operator in a process of its own, until a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
import warnings
from typing import TYPE_CHECKING

from .api import Api
from .reconcile import Settings
from .run import Operator

if TYPE_CHECKING:
    from .webhook.service import WebhookSettings

CHATTY = ("httpx", "httpcore", "kopf", "kr8s", "uvicorn")  # loggers with a line for every request or event


def run_until_signal(
    settings: Settings, namespaces: tuple[str, ...], lease_namespace: str, webhook: WebhookSettings | None = None
) -> None:
    """Work until SIGTERM or SIGINT. Raises what `Operator.run` raises."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", "Kubernetes version .* is not supported"
    )  # kr8s was not tried with it; the operator was
    asyncio.run(_run(settings, namespaces, lease_namespace, webhook))


async def _run(
    settings: Settings, namespaces: tuple[str, ...], lease_namespace: str, webhook: WebhookSettings | None
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    api = await Api.connect()
    await Operator(api, settings, namespaces, lease_namespace, webhook).run(stop)
