"""What client and server app look at in the same way."""

import logging
import os
import signal
import sys
import threading

import flwr

from .recording import record


def typed(values):
    return {k: [type(v).__name__, v] for k, v in values.items()}


def seen(check, who, **values):
    """An observation: test/parity compares those of one name and party with plain Flower's."""
    record("seen", check=check, who=who, **values)


def shape(path):
    """A path in words that do not depend on where things are."""
    path, home = os.path.realpath(path), os.path.realpath(os.environ.get("FLWR_HOME", "/nowhere"))
    if path.startswith(home + "/apps/"):
        parts = path[len(home) + 1 :].split("/")
        return "/".join(["FLWR_HOME", parts[0], parts[1].rpartition(".")[0] + ".HASH", *parts[2:]])
    return "elsewhere/" + "/".join(path.split("/")[-2:])


def process(who):
    app = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    path = [os.path.realpath(p) if p else "" for p in sys.path]
    seen("sys.argv[0]", who, name=os.path.basename(sys.argv[0]))
    seen("arguments", who, some=len(sys.argv) > 1)
    seen("sys.path", who, app=path.index(app) if app in path else None, executable=path.index(os.path.dirname(os.path.realpath(sys.argv[0]))) if os.path.dirname(os.path.realpath(sys.argv[0])) in path else None, empty="" in path)
    seen("sys.path of the site's packages", who, packages=any(p.endswith("site-packages") for p in path), flwr=os.path.dirname(os.path.dirname(os.path.realpath(flwr.__file__))) in path)
    seen("place of the app", who, file=shape(__file__))
    seen("working directory", who, exists=os.path.isdir(os.getcwd()), writable=os.access(os.getcwd(), os.W_OK))
    seen("environment: FLWR_*", who, names=sorted(k for k in os.environ if k.startswith("FLWR_")))
    seen("environment: libraries", who, names=sorted(k for k in os.environ if k.startswith(("OMP_", "MKL_", "OPENBLAS_", "CUDA_", "MALLOC_", "GLIBC_"))))
    seen("environment: of the user", who, HOME=bool(os.environ.get("HOME")), PATH=bool(os.environ.get("PATH")), given="PARITY_OUT" in os.environ)
    seen("main thread", who, main=threading.current_thread() is threading.main_thread())
    seen("signals", who, INT=getattr(signal.getsignal(signal.SIGINT), "__name__", str(signal.getsignal(signal.SIGINT))), USR1=str(signal.getsignal(signal.SIGUSR1)), PIPE=str(signal.getsignal(signal.SIGPIPE)))
    logger = logging.getLogger("flwr")
    seen("logging", who, handlers=[type(h).__name__ for h in logger.handlers], level=logging.getLevelName(logger.level), propagate=logger.propagate, root=len(logging.getLogger().handlers))
    seen("streams", who, stdin=sys.stdin is not None, tty=bool(sys.stdout.isatty()), encoding=sys.stdout.encoding.lower(), numbers=[sys.stdout.fileno(), sys.stderr.fileno()])
    seen("interpreter", who, flags={k: getattr(sys.flags, k) for k in ("isolated", "optimize", "no_site", "utf8_mode", "hash_randomization")}, recursion=sys.getrecursionlimit(), module=__name__)
