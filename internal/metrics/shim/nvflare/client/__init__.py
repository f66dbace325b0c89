"""The part of NVIDIA FLARE's client API that an app needs around its tracking writers."""

import os
from typing import Any


def init(rank: Any = None, config_file: Any = None) -> None:
    """Do nothing: the writers find their address in the environment."""


def shutdown(ctx: Any = None) -> None:
    """Do nothing: what was logged is kept already."""


def get_site_name(ctx: Any = None) -> str:
    """Give the site's name, "" outside of a job."""
    return os.environ.get("PERGOLA_SITE", "")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"nvflare.client.{name} is not there: this is the stand-in of `pergola shim nvflare`, which has tracking writers only; "
        "models and tasks go by way of Flower"
    )
