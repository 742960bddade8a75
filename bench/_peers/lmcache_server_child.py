"""An LMCache server that ends with its parent: `lmcache server ARGUMENTS`, stopped by the end of stdin. Knows nothing else."""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> None:
    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # the server's own way out removes its shared memory

    os.dup2(2, 1)  # stdout is for rows, and there are none
    threading.Thread(target=watch, name="stdin", daemon=True).start()
    from lmcache.cli.main import main as cli

    cli(["server", *sys.argv[1:]])


if __name__ == "__main__":
    main()
