"""Runs a workflow for each mode."""

import json

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
)
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

app = ServerApp()


def strategy(mode, n):
    initial = ndarrays_to_parameters([np.zeros(30_000, dtype=np.float32)])
    common = dict(
        min_fit_clients=n,
        min_available_clients=n,
        min_evaluate_clients=n,
        on_fit_config_fn=lambda rnd: {"mode": mode, "round": rnd},
        fit_metrics_aggregation_fn=lambda m: {"partitions": sum(x["partition"] for _, x in m)},
        accept_failures=mode != "refuses",
    )
    if mode == "adam":
        return FedAdam(initial_parameters=initial, eta=0.1, **common)
    if mode == "asks":  # the first parameters come from a client
        return FedAvg(**common)
    s = FedAvg(initial_parameters=initial, **common)
    if mode == "dp":
        return DifferentialPrivacyClientSideFixedClipping(s, noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=n)
    if mode == "central":
        return DifferentialPrivacyServerSideFixedClipping(s, noise_multiplier=0.0, clipping_norm=0.5, num_sampled_clients=n)
    return s


@app.main()
def main(grid, context):
    n = len(list(grid.get_node_ids()))
    for mode in context.run_config["modes"].split(","):
        ctx = LegacyContext(context=context, config=ServerConfig(num_rounds=2), strategy=strategy(mode, n))
        fit = SecAggPlusWorkflow(num_shares=n, reconstruction_threshold=n - 1, timeout=60.0) if mode == "secagg" else None
        DefaultWorkflow(fit_workflow=fit)(grid, ctx)
        h = ctx.history
        print("RESULT", json.dumps({mode: {"loss": h.losses_distributed, "fit": h.metrics_distributed_fit}}), flush=True)
