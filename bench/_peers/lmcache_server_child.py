"""Runs `lmcache server ARGUMENTS` and stops it when stdin ends, so that it ends with its parent. Knows nothing else."""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> None:
    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # on SIGTERM the server removes its shared memory

    os.dup2(2, 1)  # stdout is for rows, and a server has none
    threading.Thread(target=watch, name="stdin", daemon=True).start()
    from lmcache.cli.main import main as cli

    cli(["server", *sys.argv[1:]])


if __name__ == "__main__":
    main()
