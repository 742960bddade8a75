"""Draws docs/page.png and docs/page_phone.png: the daemon's page as Chromium shows it. `python docs/draw_page.py [FOLDER]`

A real daemon with real clients of three models, whose load changes like that of a working hour. So that it takes half a
minute, the clock of the page's history runs SPEED times as fast. Needs playwright and Chromium. With a FOLDER it writes four
pictures there, of two widths, light and dark.
"""

from __future__ import annotations

import math
import random
import shutil
import sys
import tempfile
import threading
import time
from itertools import product
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from kvkern.arena.slots import SlotGeometry  # noqa: E402
from kvkern.node.client.cache_client import NodeClient  # noqa: E402
from kvkern.node.daemon.node_config import NodeConfig  # noqa: E402
from kvkern.node.daemon.overview import Overview  # noqa: E402
from kvkern.node.daemon.quotas import Quotas  # noqa: E402
from kvkern.node.web.endpoint import Endpoint  # noqa: E402
from kvkern.tiers.base import ChunkShape  # noqa: E402
from tests.node.conftest import served  # noqa: E402
from tests.support import chain_keys, key  # noqa: E402

SPEED, SECONDS = 150.0, 26.0
COLOURS = 128  # of a picture, so that it stays small
GEOMETRY = SlotGeometry(part_nbytes=256 << 10, max_planes=2, world_size=1)
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
WIDTHS = {"wide": 1280, "phone": 390}
MODELS = [("LlamaForCausalLM", "", 9), ("LlamaForCausalLM", "5c1f09ab77d2e4c3", 5), ("Qwen3MoeForCausalLM", "", 4)]


def engine(socket: Path, number: int, stop: threading.Event) -> None:
    """Store and look up prompts of one model until the pictures are taken."""
    model, salt, chunks = MODELS[number % len(MODELS)]
    rng, root = random.Random(number), key("root", number % len(MODELS))
    client = NodeClient.open(socket, f"vllm-{number}", GEOMETRY, patience_s=5.0)
    fields = {"model": model, "dtype": "bfloat16", "tp_size": "1", **({"salt": salt} if salt else {})}
    client.describe_namespace(root, fields)
    shape = ChunkShape(root, group=0, chunk_tokens=256)
    written = client.arena.headers["written"]
    began_s = time.monotonic()
    while not stop.is_set():
        load = 0.55 + 0.45 * math.sin(5 * (time.monotonic() - began_s) / SECONDS + number)
        topic = min(int(rng.expovariate(0.35)), 40)
        chain = chain_keys((number % len(MODELS), "system", topic), chunks) + chain_keys(
            ("turn", rng.randrange(400)), 12
        )
        lease = client.acquire(chain)
        found = len(lease.keys)
        time.sleep(rng.uniform(0.004, 0.012) / max(0.08, load))
        client.release(lease)
        reservation = client.reserve(chain, chain[found:], shape)
        written[list(reservation.slots), 0] = np.array(reservation.generations, dtype=np.uint64)
        client.commit(reservation)
    client.close()


def main() -> None:
    """Run the load, then take the pictures."""
    docs = ROOT / "docs"
    pictures: dict[tuple[str, Scheme], Path] = {
        ("wide", "light"): docs / "page.png", ("phone", "light"): docs / "page_phone.png",
    }  # fmt: skip
    if len(sys.argv) > 1:
        every = product(WIDTHS, SCHEMES)
        pictures = {(name, scheme): Path(sys.argv[1]) / f"{name}-{scheme}.png" for name, scheme in every}
    folder = Path(tempfile.mkdtemp(prefix="kvkern-page-", dir="/dev/shm"))
    endpoint = Endpoint.parse("127.0.0.1:0", "--metrics")
    config = NodeConfig(
        Path("/tmp") / f"{folder.name}.sock", 640 << 20, arena_dir=folder, metrics=endpoint, drain_s=0.1,
        quotas=Quotas(models={"Qwen3*": 200 << 20}),
    )  # fmt: skip
    began_s = time.monotonic()
    try:
        with served(config) as server:
            server.overview = Overview(server, lambda: began_s + SPEED * (time.monotonic() - began_s))
            stop = threading.Event()
            threads = [threading.Thread(target=engine, args=(config.socket, n, stop)) for n in range(4)]
            for thread in threads:
                thread.start()
            try:
                time.sleep(SECONDS)
                take_pictures(server.endpoints[0].url, pictures)
            finally:
                stop.set()
                for thread in threads:
                    thread.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_pictures(url: str, pictures: dict[tuple[str, Scheme], Path]) -> None:
    """Write pictures of the page, by the name of their width and colour scheme."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for (name, scheme), path in pictures.items():
            page = browser.new_page(viewport={"width": WIDTHS[name], "height": 900}, color_scheme=scheme)
            page.on("console", lambda message: print("console:", message.text))
            page.goto(url)
            page.wait_for_selector("main:not([hidden])")
            page.wait_for_timeout(2500)
            page.screenshot(path=path, full_page=True)
            page.close()
            Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"wrote {path}, {path.stat().st_size >> 10} KiB")
        browser.close()


if __name__ == "__main__":
    main()
