"""skorch: an estimator of scikit-learn whose optimizer is an option, also for a search."""

from pathlib import Path

import skorch
import torch
from sklearn.model_selection import GridSearchCV

from acprop_torch import ACProp
from runs import Run, check, data, torch_arrays, torch_net


def classifier() -> skorch.NeuralNetClassifier:
    # begin
    net = skorch.NeuralNetClassifier(
        torch_net,
        criterion=torch.nn.CrossEntropyLoss,
        optimizer=ACProp,
        lr=3e-2,
        optimizer__weight_decay=0.01,
        optimizer__clip_exponent=0.25,
        max_epochs=10,
        batch_size=16,
    )
    # end
    return net.set_params(train_split=None, verbose=0)


def train(steps: int, resume: Path | None, save: Path) -> Run:
    net, epochs = classifier().initialize(), steps // 4
    files = {"f_params": "params.pt", "f_optimizer": "optimizer.pt", "f_history": "history.json"}
    if resume is not None:
        net.load_params(**{key: resume / name for key, name in files.items()})
    net.partial_fit(*data(), epochs=epochs - len(net.history))
    save.mkdir()
    net.save_params(**{key: save / name for key, name in files.items()})
    return Run(net.history[:, "train_loss"], torch_arrays(net.module_, net.optimizer_))


def test_skorch(tmp_path: Path) -> None:
    check("skorch", train, tmp_path)


def test_skorch_in_a_search() -> None:
    # begin search
    grid = {"lr": [1e-4, 3e-2], "optimizer__clip_exponent": [0.0, 0.25]}
    search = GridSearchCV(classifier(), grid, cv=3)
    search.fit(*data())
    # end search
    assert search.best_params_["lr"] == 3e-2
