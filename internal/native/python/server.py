"""The server's process: runs the user's ServerApp with a Grid that speaks to the runner."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from typing import Any

from . import grid
from .client import begin
from .exits import flush
from .frames import Frame, Link
from .generations import Generation

LONGEST = 64 << 10  # letters of a traceback; what is cut stands in the log too
GRACE = 5.0  # seconds that an app has to end once its runner has gone


def main() -> int:
    """Run one ServerApp."""
    return begin("server", serve)


def serve(link: Link, gen: Generation, start: dict[str, Any]) -> int:
    """Load the app, call it, and tell the runner how that ended."""
    run_id: int = start["run"]
    gen.set_identity(run_id, gen.server_id, start.get("task", 0))
    exchange = grid.Exchange(gen, link, run_id, start["nodes"])
    over = threading.Event()
    reader = threading.Thread(target=_read, args=(exchange, over), name="pergola", daemon=True)
    reader.start()
    begun = time.perf_counter()
    done: dict[str, Any] = {"t": "done", "ok": True}
    status = 0
    try:
        _run(gen, exchange, start)
    except SystemExit as e:
        if e.code not in (None, 0):
            done.update(ok=False, error=f"SystemExit: {e.code}")
            status = e.code if isinstance(e.code, int) else 1
            if not isinstance(e.code, int):
                print(e.code, file=sys.stderr)
    except BaseException as e:
        logging.getLogger("flwr").error("%s raised an exception", "ServerApp", exc_info=e)
        text = "".join(traceback.format_exception(type(e), e, e.__traceback__))
        done.update(ok=False, error=f"{type(e).__name__}: {e}"[:LONGEST], exception=text[-LONGEST:])
        status = 1
    done["seconds"] = time.perf_counter() - begun
    flush()
    try:
        link.send(Frame(done))
    except OSError:
        status = status or 1  # nobody is there to be told
    over.set()
    return status


def _run(gen: Generation, exchange: grid.Exchange, start: dict[str, Any]) -> None:
    app_dir: str = start["app"]
    override, run_config = gen.settings(app_dir, start.get("config") or [])
    project = gen.project(app_dir)
    app = gen.load(app_dir, "serverapp")
    run = gen.run(
        start["run"],
        f"{project['tool']['flwr']['app'].get('publisher', '')}/{project['project']['name']}",
        project["project"]["version"],
        start.get("fab_hash", ""),
        override,
    )
    context = gen.context(start["run"], gen.server_id, {}, gen.RecordDict(), run_config)
    app(grid.make(exchange, run), context)


def _read(exchange: grid.Exchange, over: threading.Event) -> None:
    exchange.receive()
    if not over.wait(GRACE):
        # Whatever the app waits for or works on, there is nobody to have it.
        os._exit(70)
