"""The model and the data: what is the same with and without federation."""

import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

CLASSES = np.arange(10)
FEATURES = 64

# A round is a few steps on purpose; scikit-learn warns of each that it has not converged.
warnings.filterwarnings("ignore", category=ConvergenceWarning)


def zeros() -> list[np.ndarray]:
    """The model before the first round: coefficients and intercepts."""
    return [np.zeros((len(CLASSES), FEATURES)), np.zeros(len(CLASSES))]


def make_model(arrays: list[np.ndarray], penalty: float, epochs: int) -> LogisticRegression:
    """A model that goes on from arrays."""
    model = LogisticRegression(C=penalty, max_iter=epochs, warm_start=True)
    model.classes_ = CLASSES
    model.coef_, model.intercept_ = (np.array(a, dtype=np.float64) for a in arrays)
    return model


def load_partition(partition: int, partitions: int):
    """This site's share: every partitions-th image, a fifth of them kept for evaluation."""
    x, y = load_digits(return_X_y=True)
    x, y = x[partition::partitions] / 16.0, y[partition::partitions]
    return train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)


def score(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Accuracy and cross-entropy of model on x, y."""
    return {
        "accuracy": float(model.score(x, y)),
        "loss": float(log_loss(y, model.predict_proba(x), labels=CLASSES)),
    }
