"""How a process ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from typing import NoReturn


def flush() -> None:
    """Have out what was printed."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def leave(status: int) -> NoReturn:
    """End as a Python process does: threads are waited for, what was to run at exit runs, and what was printed is out.

    Only the taking apart of all modules is left out, which costs a third of what importing them did, and which a forked
    child would do with its template's objects.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public name for either
        atexit._run_exitfuncs()  # noqa: SLF001
        flush()
    except BaseException:  # noqa: BLE001 - whatever it was for is done
        traceback.print_exc()
    finally:
        os._exit(status)
