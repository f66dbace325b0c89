"""NVIDIA FLARE's tracking writers, which log to the Pergola job's results (PERGOLA_METRICS)."""

import json
import os
import urllib.error
import urllib.request
import warnings
from typing import Any, Dict, List, Optional

# The address is on this machine: a proxy that the environment names must not see it.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def init(rank: Any = None, config_file: Any = None) -> None:
    """Do nothing: the writers find their address in the environment."""


def shutdown(ctx: Any = None) -> None:
    """Do nothing: what was logged is kept already."""


def _post(objects: List[Dict[str, Any]]) -> None:
    url = os.environ.get("PERGOLA_METRICS")
    if not objects:
        return
    if not url:
        warnings.warn("PERGOLA_METRICS is not set, so nothing is logged: the app does not run in a Pergola job", stacklevel=3)
        return
    try:
        _opener.open(urllib.request.Request(url, data=json.dumps(objects).encode()), timeout=60).close()
    except urllib.error.HTTPError as e:
        with e:
            text = e.read().decode(errors="replace")
        raise ValueError(f"Pergola did not take what was logged: {text.strip()}") from None


def _metrics(values: Dict[str, Any], step: Optional[int]) -> None:
    _post([{"name": k, "value": float(v), "step": int(step or 0)} for k, v in values.items()])


def _texts(kind: str, values: Dict[str, Any]) -> None:
    _post([{"kind": kind, "name": k, "value": str(v)} for k, v in values.items()])


class SummaryWriter:
    """TensorBoard's way to log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_scalar(self, tag: str, scalar: float, global_step: Optional[int] = None, **kwargs: Any) -> None:
        """Log a value; without a step at step 0, as the original."""
        _metrics({tag: scalar}, global_step)

    def add_scalars(self, tag: str, scalars: Dict[str, float], global_step: Optional[int] = None, **kwargs: Any) -> None:
        """Log several values, as TAG/NAME."""
        _metrics({f"{tag}/{k}": v for k, v in scalars.items()}, global_step)

    def flush(self) -> None:
        """Do nothing: what was logged is kept already."""

    def close(self) -> None:
        """Do nothing: what was logged is kept already."""

    def __enter__(self) -> "SummaryWriter":
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()


class WandBWriter:
    """The way of Weights and Biases to log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, metrics: Dict[str, float], step: Optional[int] = None) -> None:
        """Log several values."""
        _metrics(metrics, step)


class MLflowWriter:
    """MLflow's way to log. The real mlflow works, too, and does more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_param(self, key: str, value: Any) -> None:
        """Log a parameter."""
        _texts("param", {key: value})

    def log_params(self, values: Dict[str, Any]) -> None:
        """Log several parameters."""
        _texts("param", values)

    def log_metric(self, key: str, value: float, step: Optional[int] = None) -> None:
        """Log a value."""
        _metrics({key: value}, step)

    def log_metrics(self, metrics: Dict[str, float], step: Optional[int] = None) -> None:
        """Log several values."""
        _metrics(metrics, step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Log a text of at most 8000 characters, as a tag."""
        _texts("tag", {artifact_file_path: text})

    def set_tag(self, key: str, tag: Any) -> None:
        """Set a tag."""
        _texts("tag", {key: tag})

    def set_tags(self, tags: Dict[str, Any]) -> None:
        """Set several tags."""
        _texts("tag", tags)
