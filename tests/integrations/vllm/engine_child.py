"""An engine in a process of its own. argv: model, socket. stdin: one prompt per line, as JSON. stdout: `reply: {...}` lines."""

from __future__ import annotations

import dataclasses
import json
import sys

from tests.integrations.vllm.engine import Engine


def main() -> None:
    model, socket = sys.argv[1:]
    with Engine(model, kvkern_options={"socket": socket}) as engine:
        print("reply: {}", flush=True)
        for line in sys.stdin:
            reply = engine.one(json.loads(line))
            engine.settle()
            print("reply:", json.dumps(dataclasses.asdict(reply)), flush=True)


if __name__ == "__main__":
    main()
