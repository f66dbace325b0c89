"""Clients that use subprocesses, threads and an event loop, and leave a thread and a process behind. No pool of forked processes: in Flower's
client processes that fails now and then, since gRPC has threads in them."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record


def square(x):
    return x * x


async def later(x):
    await asyncio.sleep(0.01)
    return x + 0.5


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        found = subprocess.run([sys.executable, "-c", f"import json; print(json.dumps(0.1 * {self.partition + 1}))"], capture_output=True, text=True, check=True)
        child = json.loads(found.stdout)
        with ThreadPoolExecutor(4) as pool:
            threads = list(pool.map(square, [0.1, 0.2, 0.3]))
        looped = asyncio.run(later(0.25))
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        weights = parameters[0] + child + sum(threads) + looped
        record("client", at="fit", partition=self.partition, child=child, threads=threads, looped=looped, left=left.poll(), status=os.WEXITSTATUS(os.system("exit 5")), weights=weights.tolist())
        return [weights], 1 + self.partition, {}

    def evaluate(self, parameters, config):
        loss = float(parameters[0].sum())
        record("client", at="evaluate", partition=self.partition, loss=loss)
        return loss, 1 + self.partition, {}


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        found = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True).stdout.strip()
        record("server", at="fit", round=server_round, results=len(results), failures=len(failures), child=found)
        return super().aggregate_fit(server_round, results, failures)

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, results=len(results), failures=len(failures), loss=loss)
        return loss, metrics


def server_fn(context):
    strategy = Recorded(min_fit_clients=2, min_evaluate_clients=2, min_available_clients=2, initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]))
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp(server_fn=server_fn)
