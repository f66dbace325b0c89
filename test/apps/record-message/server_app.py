"""The server app in the message API."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from recording import record

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    record("server-config", values=dict(context.run_config.items()))
    strategy = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
    rounds = int(context.run_config["num-server-rounds"])
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord([np.linspace(0.0, 0.3, 5)]), num_rounds=rounds)
    for at, found in (("train", result.train_metrics_clientapp), ("evaluate", result.evaluate_metrics_clientapp)):
        for rnd, metrics in found.items():
            record("server", at=at, round=rnd, **dict(metrics.items()))
    record("server", at="end", round=rounds, weights=result.arrays.to_numpy_ndarrays()[0].tolist())
