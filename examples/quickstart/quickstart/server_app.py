"""What the hub runs: federated averaging."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.task import zeros

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for num-server-rounds; keep the model where model-path says, if it says."""
    config = context.run_config
    sites = int(config["min-sites"])
    strategy = FedAvg(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(zeros()), num_rounds=int(config["num-server-rounds"])
    )
    if path := str(config["model-path"]):
        coef, intercept = result.arrays.to_numpy_ndarrays()
        np.savez(path, coef=coef, intercept=intercept)
        print(f"model saved: {path}", flush=True)
