"""Measures, by hand: python tests/bench.py ISOLATION [SMALL MESSAGES [LARGE MESSAGES [NODES [WORKERS]]]]."""

from __future__ import annotations

import json
import os
import resource
import sys
import time

import conftest  # noqa: F401
from relay import Relay
from test_run import LOOP


def main() -> None:
    isolation = sys.argv[1]
    small, large, nodes, workers = (int(a) for a in [*sys.argv[2:], *["100", "0", "1", "1"][len(sys.argv) - 2 :]])
    os.environ["LARGE"] = str(large)
    begun = time.perf_counter()
    relay = Relay(LOOP, nodes, workers, isolation, [f"scenarios='speed' number={small}"])
    own = resource.getrusage(resource.RUSAGE_SELF)
    done = relay.go()
    took = time.perf_counter() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    now = resource.getrusage(resource.RUSAGE_SELF)
    if not done.get("ok"):
        print(relay.text())
    for line in relay.printed("RESULT"):
        print(json.loads(line))
    print(
        f"all {took:.2f} s; processes {used.ru_utime + used.ru_stime:.2f} s of CPU, at most {used.ru_maxrss >> 10} MiB; "
        f"relay {now.ru_utime + now.ru_stime - own.ru_utime - own.ru_stime:.2f} s of CPU; "
        f"of {len(relay.replies)} messages in the app {sum(h['seconds'] for h in relay.replies if 'seconds' in h):.3f} s"
    )


if __name__ == "__main__":
    main()
