"""scikit-learn: an estimator of NumPy alone, in its cross-validation and its search."""

import pickle
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score

from acprop_core import ACProp
from runs import REPORT, assert_same

# begin
USUAL = ACProp(1e-2, clip_exponent=0.25)


class Softmax(ClassifierMixin, BaseEstimator):
    def __init__(self, optimizer: ACProp = USUAL, epochs: int = 100) -> None:
        self.optimizer, self.epochs = optimizer, epochs

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Softmax":
        self.classes_, labels = np.unique(y, return_inverse=True)
        k = len(self.classes_)
        self.params_ = {"w": np.zeros((x.shape[1], k)), "b": np.zeros(k)}
        self.state_ = self.optimizer.init(self.params_)
        return self.more(x, labels, self.epochs)

    def more(self, x: np.ndarray, labels: np.ndarray, epochs: int) -> "Softmax":
        for _ in range(epochs):
            error = self.predict_proba(x)
            error[np.arange(len(x)), labels] -= 1.0
            grads = {"w": x.T @ error / len(x), "b": error.mean(0)}
            found = self.optimizer.update(grads, self.state_, self.params_)
            updates, self.state_ = found
            self.params_ = self.optimizer.apply(self.params_, updates)
        return self

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        logits = x @ self.params_["w"] + self.params_["b"]
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.classes_[self.predict_proba(x).argmax(1)]


# end


def digits() -> tuple[Any, Any]:
    x, y = load_digits(return_X_y=True)
    return x / 16.0, y


def test_cross_validation() -> None:
    x, y = digits()
    # begin use
    ours = cross_val_score(Softmax(), x, y, cv=3)
    optimizers = [ACProp(rate, clip_exponent=0.25) for rate in (1e-4, 1e-2)]
    search = GridSearchCV(Softmax(), {"optimizer": optimizers}, cv=3)
    # end use
    parallel = cross_val_score(Softmax(), x, y, cv=3, n_jobs=2)
    theirs = cross_val_score(LogisticRegression(max_iter=1000), x, y, cv=3)
    REPORT.append(f"scikit-learn: accuracy {ours.mean():.4f}; LogisticRegression {theirs.mean():.4f}")
    assert (ours == parallel).all()
    assert ours.mean() > theirs.mean() - 0.02
    assert search.fit(x, y).best_params_ == {"optimizer": ACProp(1e-2, clip_exponent=0.25)}


def test_an_estimator_is_cloned_pickled_and_resumed() -> None:
    x, y = digits()
    whole = clone(Softmax()).set_params(epochs=40).fit(x, y)
    half = pickle.loads(pickle.dumps(Softmax(epochs=20).fit(x, y)))
    half.more(x, y, 20)
    assert_same([*whole.params_.values(), whole.state_.nu["w"]], [*half.params_.values(), half.state_.nu["w"]])
