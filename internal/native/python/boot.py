"""The way in: ``python boot.py server|client|check``.

An app sees no trace of this file: its folder is not on sys.path, its arguments are not in sys.argv, and its modules
are submodules of one package whose name no app has.
"""

import importlib.util
import os
import sys

PACKAGE = "_pergola_native"
PROGRAMS = {"server": "flwr-serverapp", "client": "flwr-clientapp", "check": "flwr-clientapp"}


def import_package() -> None:
    """Import the modules beside this file as a package of their own."""
    if PACKAGE in sys.modules:
        return
    here = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(PACKAGE, os.path.join(here, "__init__.py"), submodule_search_locations=[here])
    if spec is None or spec.loader is None:
        raise ImportError(f"no package in {here}")
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def hide(role: str) -> None:
    """Make sys.path and sys.argv what they are in Flower's own program."""
    programs = os.path.dirname(sys.executable)
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0] or os.getcwd()) == here:
        sys.path[0] = programs
    sys.argv[:] = [os.path.join(programs, PROGRAMS[role])]


def main() -> int:
    """Run as the command line says; the result is the process's exit status."""
    role = sys.argv[1] if len(sys.argv) == 2 else ""
    if role not in PROGRAMS:
        print("usage: boot.py server|client|check", file=sys.stderr)
        return 2
    hide(role)
    import_package()
    module = importlib.import_module(f"{PACKAGE}.{role}")
    status: int = module.main()
    exits = importlib.import_module(f"{PACKAGE}.exits")
    exits.leave(status)
    raise AssertionError("a process that has ended goes on")


if __name__ == "__main__":
    sys.exit(main())
