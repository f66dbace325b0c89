"""Stands in for NVIDIA FLARE where an app uses its client tracking only: metrics go to the Pergola job's results.

Put here by `pergola shim nvflare`; remove the folder to undo it. Where the real nvflare is installed, that one is loaded
in place of this module, whatever comes first on the path.
"""

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Optional

PERGOLA_SHIM = True


def _real() -> Optional[ModuleType]:
    """Load the real nvflare if there is one."""
    for place in sys.path:
        spec = importlib.machinery.PathFinder.find_spec("nvflare", [place])
        if spec is None or spec.loader is None or spec.origin is None:
            continue
        if os.path.exists(os.path.join(os.path.dirname(spec.origin), "_pergola_shim.py")):
            continue  # this one, or a copy
        module = importlib.util.module_from_spec(spec)
        sys.modules["nvflare"] = module
        spec.loader.exec_module(module)
        print(
            f"pergola: the nvflare that is installed ({os.path.dirname(spec.origin)}) is used, not the one of `pergola shim nvflare`: "
            "take nvflare out of the app's dependencies if it is to log to Pergola",
            file=sys.stderr,
        )
        return module
    return None


_real()
