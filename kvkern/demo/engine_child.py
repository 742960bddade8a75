"""The engine process: reads one Job from stdin, runs its phase, writes events to the pipe FD.

Started as `python -m kvkern.demo.engine_child FD`. stdout and stderr belong to vLLM. The process stops when stdin ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from . import messages, questions
from .engine import Engine
from .engine_process import exit_on_signals
from .phases import PHASES, MeasuredEngine
from .prompts import PromptLibrary


def main() -> None:
    started_s = time.monotonic()
    job = messages.decode_job(sys.stdin.buffer.readline())
    _exit_when_stdin_ends()
    pipe_fd = int(sys.argv[1])
    os.set_inheritable(pipe_fd, False)  # the parent waits for the pipe's end, so vLLM's processes must not hold it
    with os.fdopen(pipe_fd, "wb", buffering=0) as pipe:

        def emit(event: messages.Event) -> None:
            pipe.write(messages.encode(event))

        library = PromptLibrary.from_model(Path(job.engine.model))
        documents = PromptLibrary(library.tokens, next_token=256)  # [0, 256) is for the warm-up
        engine = Engine(job.engine)
        try:
            start_s = time.monotonic() - started_s
            engine.warm_up(library.tokens, job.salt)
            emit(messages.Progress(f"engine up after {start_s:.0f} s, warm after {time.monotonic() - started_s:.0f} s"))
            asked = questions.prompts(Path(job.engine.model)) if job.phase == "float32" else {}
            PHASES[job.phase](
                MeasuredEngine(engine, documents, job.plan, emit, job.engine.kvkern_socket, job.salt, asked)
            )
            if job.until is not None:
                emit(messages.Ready())
                while not Path(job.until).exists():
                    time.sleep(0.1)
        finally:
            engine.close()
        emit(messages.Done(start_s=start_s))


def _exit_when_stdin_ends() -> None:
    """Raise SystemExit in the main thread when stdin ends, whatever the main thread waits for."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    exit_on_signals(signal.SIGTERM)
    threading.Thread(target=watch, name="stdin", daemon=True).start()


if __name__ == "__main__":
    main()
