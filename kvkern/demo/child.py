"""The engine process: reads one Job on stdin, writes events on the pipe it was given, ends with the engine.

Started as `python -m kvkern.demo.child FD`. stdout and stderr belong to vLLM.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from . import wire
from .engine import Engine
from .phases import PHASES, Desk
from .prompts import Library


def main() -> None:
    started_s = time.monotonic()
    job = wire.decode_job(sys.stdin.buffer.readline())
    pipe_fd = int(sys.argv[1])
    os.set_inheritable(pipe_fd, False)  # the parent waits for the end of the pipe: vLLM's processes must not hold it
    with os.fdopen(pipe_fd, "wb", buffering=0) as pipe:

        def emit(event: wire.Event) -> None:
            pipe.write(wire.encode(event))

        library = Library.from_model(Path(job.engine.model))
        desk_library = Library(library.tokens, next_token=256)  # [0, 256) is for the warm-up
        engine = Engine(job.engine)
        try:
            start_s = time.monotonic() - started_s
            engine.warm_up(library.tokens)
            emit(wire.Progress(f"engine up after {start_s:.0f} s, warm after {time.monotonic() - started_s:.0f} s"))
            PHASES[job.phase](Desk(engine, desk_library, job.plan, emit))
        finally:
            engine.close()
        emit(wire.Done(start_s=start_s))


if __name__ == "__main__":
    main()
