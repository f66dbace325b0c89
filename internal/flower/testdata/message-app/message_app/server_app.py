"""The message API (flwr 1.21 and on); ends in the way that run config "end" asks for."""

import os
import sys

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def central(rnd, arrays):
    return MetricRecord({"central-sum": float(arrays.to_numpy_ndarrays()[0].sum()), "n": 3})


@app.main()
def main(grid: Grid, context: Context) -> None:
    cfg = context.run_config
    match cfg["end"]:
        case "raise":
            raise ZeroDivisionError("asked to, in the server app")
        case "exit":
            sys.exit(0)
        case "kill":
            os._exit(7)
    print("the config is", sorted(cfg.items()), flush=True)
    strategy = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(4, dtype=np.float32)]),
        num_rounds=int(cfg["num-server-rounds"]),
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_fn=central,
    )
    print("FINAL", result.arrays.to_numpy_ndarrays()[0], flush=True)
