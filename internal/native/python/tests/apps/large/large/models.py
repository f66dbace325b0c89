"""A model whose numbers tell whose it is."""

import numpy as np
from flwr.common import ArrayRecord


def model(seed):
    """Give arrays: large ones of each order, and a small one among them."""
    rng = np.random.default_rng(seed)
    return [
        rng.random(300_000, dtype=np.float32),
        rng.random(7, dtype=np.float32),
        np.asfortranarray(rng.random((300, 200))),
        rng.integers(0, 9, 90_000, dtype=np.int8),
    ]


def is_model(arrays, seed):
    """Tell whether that is the model, whatever the arrays are in."""
    if isinstance(arrays, ArrayRecord):
        arrays = list(arrays.values())
    found = [a if isinstance(a, np.ndarray) else a.numpy() for a in arrays]
    want = model(seed)
    return len(found) == len(want) and all(np.array_equal(f, w) and f.dtype == w.dtype for f, w in zip(found, want))
