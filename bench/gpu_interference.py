"""Measures what transfers cost an engine that decodes: the times of its steps with and without transfers, by method.

    step        the matrix products of a few decoder layers for a small batch, bound by HBM as decode is, and one attention
                over a KV cache; enqueued on the engine's stream and timed by events, one step after the other
    background  stores and loads of 32 MiB, back to back, by a separate thread through GpuCopier
    uncapped    the staged path with a grid as large as the GPU: it shows what caps on thread blocks avoid

`p50_us` and `p99_us` are of a step. `ratio_p50` and `ratio_p99` compare with the steps without transfers that were measured
before and after; a ratio below 1 means that steps were slowed. `background_gb_s` is the rate of the transfers meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from _gpu import Rig, Row, arguments, gb_s, open_rig, print_row, quantile, write_json
from gpu_paths import CTAS, Copies, calibration
from torch.nn.functional import scaled_dot_product_attention

from kvkern.transfer.gpu.link_table import Direction
from kvkern.transfer.gpu.planner import Method

UNCAPPED_CTAS = 1024
RUN_NBYTES, CHUNKS = 32 << 10, 16
CASES: tuple[tuple[str, Method, int], ...] = (
    *((method.value, method, CTAS[method]) for method in Method),
    ("uncapped", Method.STAGED, UNCAPPED_CTAS),
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step, and the number of steps of a measurement."""

    batch: int
    width: int
    layers: int
    kv_tokens: int
    steps: int


FULL, QUICK, DRY = Sizes(32, 4096, 8, 4096, 400), Sizes(32, 4096, 4, 1024, 50), Sizes(2, 64, 1, 16, 4)


class Decode:
    """Steps like an engine's: few rows through large weights, then attention of one query a sequence."""

    def __init__(self, rig: Rig, sizes: Sizes) -> None:
        def made(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=rig.name).to(torch.bfloat16)

        heads, dim = max(1, sizes.width // 128), min(128, sizes.width)
        self._x = made(sizes.batch, sizes.width)
        self._up = [made(sizes.width, 3 * sizes.width) for _ in range(sizes.layers)]
        self._down = [made(3 * sizes.width, sizes.width) for _ in range(sizes.layers)]
        self._q = made(sizes.batch, heads, 1, dim)
        self._kv = made(2, sizes.batch, max(1, heads // 4), sizes.kv_tokens, dim)

    def step(self) -> None:
        x = self._x
        for up, down in zip(self._up, self._down, strict=True):
            x = (x @ up) @ down * 1e-4
        scaled_dot_product_attention(self._q, self._kv[0], self._kv[1], enable_gqa=True)


class Background:
    """A thread that stores or loads without a pause while it runs."""

    def __init__(self, copies: Copies, direction: Direction, method: Method, ctas: int) -> None:
        self._copies, self._direction, self._method, self._ctas = copies, direction, method, ctas
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.nbytes = 0
        self.seconds = 0.0
        self.error: BaseException | None = None

    def _run(self) -> None:
        copies, submit = self._copies, self._copies.copier
        start = time.perf_counter()
        try:
            while not self._stop.is_set():
                batch = copies.batch(CHUNKS)
                job = submit.store([batch]) if self._direction is Direction.D2H else submit.load([batch])
                if not job.wait().ok.all():
                    raise RuntimeError(f"{int((~job.ok).sum())} of {len(job.ok)} chunks did not verify: {job.error}")
                self.nbytes += job.nbytes
        except RuntimeError as error:
            self.error = error
        self.seconds = time.perf_counter() - start

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the thread until the context ends. Raises the thread's error."""
        self._copies.how, self._copies.ctas = self._method, self._ctas
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()
        if self.error is not None:
            raise self.error


def times_us(rig: Rig, step: Callable[[], None], steps: int) -> list[float]:
    """Time steps one after the other. Three steps before them warm up and do not count."""
    for _ in range(3):
        rig.time(step)
    return [rig.time(step) * 1e6 for _ in range(steps)]


def row(case: str, op: str, ctas: int, steps_us: list[float], alone_us: list[float], gb: float | None) -> Row:
    """Make a row of step times. `alone_us` are steps without transfers, from before and after."""
    p50, p99 = quantile(steps_us, 0.5), quantile(steps_us, 0.99)
    return {
        "case": case, "op": op, "ctas": ctas, "steps": len(steps_us), "p50_us": p50, "p99_us": p99,
        "ratio_p50": quantile(alone_us, 0.5) / p50, "ratio_p99": quantile(alone_us, 0.99) / p99, "background_gb_s": gb,
    }  # fmt: skip


def main() -> None:
    args = arguments(__doc__).parse_args()
    rig = open_rig(args.device)
    sizes = DRY if rig.dry else QUICK if args.quick else FULL
    device = rig.device()
    decode = Decode(rig, sizes)
    rows: list[Row] = []
    with closing(Copies(rig, device, RUN_NBYTES, CHUNKS, calibration(rig, device))) as copies:
        copies.run(
            Direction.D2H, CHUNKS, Method.STAGED
        )  # so that loads have something to read, and kernels are compiled
        for method in Method:
            for direction in Direction:
                copies.run(direction, CHUNKS, method)
        before = times_us(rig, decode.step, sizes.steps)
        for name, method, ctas in CASES:
            for direction, op in ((Direction.D2H, "store"), (Direction.H2D, "load")):
                background = Background(copies, direction, method, ctas)
                with background.running():
                    during = times_us(rig, decode.step, sizes.steps)
                after = times_us(rig, decode.step, sizes.steps)
                moved = gb_s(background.nbytes, background.seconds)
                rows.append(row(name, op, ctas, during, [*before, *after], moved))
                print_row(rig, rows[-1])
                before = after
    write_json(rig, args.json, rows)


if __name__ == "__main__":
    main()
