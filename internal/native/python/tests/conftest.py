"""What the tests share: the package under its private name, a relay that stands in for the Go side, and small apps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

import boot  # noqa: E402

boot.import_package()

from _pergola_native import generations  # noqa: E402
from _pergola_native.generations import Generation  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marks mean."""
    config.addinivalue_line("markers", "once: has nothing to do with the version of Flower, so that one of them is enough")


@pytest.fixture(scope="session")
def gen() -> Generation:
    """Give the generation that is installed: one, as in each process, for it changes Flower's classes."""
    g = generations.installed("server", "client")
    g.set_identity(7, g.server_id, 1)
    return g


@pytest.fixture(scope="session")
def alone() -> Callable[[str], str]:
    """Give what runs code in a process that has imported nothing yet; it gives what that printed, errors too."""

    def run(code: str) -> str:
        start = f"import sys; sys.path[:] = [{str(HERE.parent)!r}, *{sys.path!r}]; import boot; boot.import_package()\n"
        done = subprocess.run(
            [sys.executable, "-c", start + code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


sys.path.remove(str(HERE.parent))
