"""In its first fit each client does what `fault` says.

ignore-term  ignores SIGTERM, as does a child in a session of its own, and never returns
lines        prints `rate` numbered lines a second for `seconds` seconds
mebibytes    prints `mebibytes` MiB at one site, as fast as it can
memory       at one site, takes more memory than it may have (RLIMIT_AS) in round 1, and is killed as the kernel does it in round 2
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

SIG_IGN = 1


def ignore_term():
    # By the C library: Python's own way works in the main thread alone.
    ctypes.CDLL(None).signal(int(signal.SIGTERM), SIG_IGN)
    subprocess.Popen(["sleep", "100000"], start_new_session=True)  # it inherits what is ignored
    print("ignores SIGTERM", flush=True)
    threading.Event().wait()


def lines(rnd, rate, seconds):
    begin = time.monotonic()
    for second in range(seconds):
        first = second * rate
        for at in range(first, first + rate, 1000):
            sys.stdout.write("".join(f"line {rnd} {n}\n" for n in range(at, at + 1000)))
        sys.stdout.flush()
        time.sleep(max(0.0, begin + second + 1 - time.monotonic()))


def mebibytes(n):
    block = ("x" * 1023 + "\n") * 1024
    for _ in range(n):
        sys.stdout.write(block)
    sys.stdout.flush()


def memory(rnd):
    if rnd == 1:
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), resource.RLIM_INFINITY))
        print(len(bytearray(1 << 30)))
    elif rnd == 2:
        os.kill(os.getpid(), signal.SIGKILL)


class Client(NumPyClient):
    def __init__(self, context: Context):
        self.context = context
        self.partition = int(context.node_config["partition-id"])

    def fit(self, parameters, config):
        run = self.context.run_config
        if run["fault"] == "memory" and self.partition == 0:
            memory(int(config["round"]))
        if int(config["round"]) == 1:
            if run["fault"] == "ignore-term":
                ignore_term()
            elif run["fault"] == "lines":
                lines(1, int(run["rate"]), int(run["seconds"]))
            elif run["fault"] == "mebibytes" and self.partition == 0:
                mebibytes(int(run["mebibytes"]))
        return [parameters[0] + 1 + self.partition], 10, {"sum": float(parameters[0].sum())}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"accuracy": 1.0 / (1.0 + float(parameters[0].sum()))}


def client_fn(context: Context):
    return Client(context).to_client()


def mean(results):
    total = sum(n for n, _ in results)
    return {k: sum(n * m[k] for n, m in results) / total for k in results[0][1]}


def server_fn(context: Context):
    clients = int(context.run_config.get("clients", 2))
    strategy = FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.zeros(4, dtype=np.float32)]),
        on_fit_config_fn=lambda rnd: {"round": rnd},
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
    )
    rounds = int(context.run_config.get("num-server-rounds", 2))
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
