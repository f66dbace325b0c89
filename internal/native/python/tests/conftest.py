"""What the tests share: the package under its private name, a relay that stands in for the Go side, and small apps."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

import boot  # noqa: E402

boot.import_package()
sys.path.remove(str(HERE.parent))
