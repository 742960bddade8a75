"""`make demo-remote`: starts a Redis server, runs `kvkern demo --remote` on it, and stops the server.

python -m kvkern.demo_remote [OPTIONS OF kvkern demo]
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from .cli import app
from .demo.engine_process import exit_on_signals
from .demo.preconditions import NotReadyError
from .demo.redis_server import running

EXIT_NOT_READY = 2


def main(arguments: Sequence[str]) -> None:
    """Run the demo on a Redis server of its own and exit with the demo's status."""
    exit_on_signals(signal.SIGTERM, signal.SIGHUP)
    try:
        with running() as url:
            app(["demo", "--remote", url, *arguments], prog_name="kvkern")
    except NotReadyError as failure:
        print(f"kvkern demo: {failure}", file=sys.stderr)
        sys.exit(EXIT_NOT_READY)


if __name__ == "__main__":
    main(sys.argv[1:])
