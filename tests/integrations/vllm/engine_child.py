"""An engine in a process of its own. argv: model, and a daemon's socket or `Engine`'s options as JSON.

stdin: one prompt per line, as JSON. stdout: `reply: {...}` lines.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from tests.integrations.vllm.engine import Engine


def main() -> None:
    model, second = sys.argv[1:]
    options = json.loads(second) if second.startswith("{") else {"kvkern_options": {"socket": second}}
    with Engine(model, **options) as engine:
        print("reply: {}", flush=True)
        for line in sys.stdin:
            reply = engine.one(json.loads(line))
            engine.settle()
            print("reply:", json.dumps(dataclasses.asdict(reply)), flush=True)


if __name__ == "__main__":
    main()
