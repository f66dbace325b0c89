"""Flower's own simulation engine on the app in argv[1]: argv[2] clients, as many actors as the machine has cores."""

import os
import sys

sys.path.insert(0, sys.argv[1])
os.environ["PYTHONPATH"] = sys.argv[1]  # for Ray's workers

from flwr.simulation import run_simulation  # noqa: E402

import app  # noqa: E402

run_simulation(
    app.server,
    app.client,
    int(sys.argv[2]),
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False}},
)
