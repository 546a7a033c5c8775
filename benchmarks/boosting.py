"""Focal loss as the objective of LightGBM and XGBoost, beside their own, on real tables.

python -m benchmarks.boosting

Writes results/boosting.json and the tables of docs/boosting.md. The tables are those that
scikit-learn ships: handwritten digits, one against the other nine, and breast cancer, both also
with most of their positives left out. Each run splits anew into half for training, a quarter for
early stopping by the objective's own loss, and a quarter for the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightgbm
import numpy as np
import xgboost
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss
from sklearn.model_selection import train_test_split

import focal
from benchmarks.common import record
from benchmarks.pages import markdown, write_tables
from focal.numpy import sigmoid_focal_loss, sigmoid_focal_loss_grad, sigmoid_focal_loss_hess

PAGE = Path(__file__).resolve().parents[1] / "docs" / "boosting.md"
ROUNDS, PATIENCE = 500, 30
LIGHTGBM = {"learning_rate": 0.1, "num_leaves": 8, "min_data_in_leaf": 5, "num_threads": 1}
XGBOOST = {"learning_rate": 0.1, "max_depth": 3, "nthread": 1}

Array = NDArray[Any]
Derivatives = tuple[Array, Array]
Curvature = Callable[[Array, Array], Array]
CURVATURES: Mapping[str, Curvature] = {
    "as it is": lambda grad, hess: hess,
    "max(h, 1e-6)": lambda grad, hess: np.maximum(hess, 1e-6),
    "max(h, 1e-3)": lambda grad, hess: np.maximum(hess, 1e-3),
    "abs(h)": lambda grad, hess: np.abs(hess),
    "max(h, abs(g))": lambda grad, hess: np.maximum(hess, np.abs(grad)),
}


class Focal(NamedTuple):
    """Focal loss of margins: what both libraries ask of an objective and of a metric."""

    alpha: float | None = None
    gamma: float = 2.0
    curvature: str = "max(h, abs(g))"

    def derivatives(self, margins: Array, data: Any) -> Derivatives:
        """Gradient, and a second derivative that is positive."""
        x, y = margins.astype(np.float64), data.get_label()
        grad = sigmoid_focal_loss_grad(x, y, self.alpha, self.gamma)
        hess = sigmoid_focal_loss_hess(x, y, self.alpha, self.gamma)
        return grad, CURVATURES[self.curvature](grad, hess)

    def metric(self, margins: Array, data: Any) -> tuple[str, float]:
        """Name and mean loss."""
        x, y = margins.astype(np.float64), data.get_label()
        return "focal", float(sigmoid_focal_loss(x, y, self.alpha, self.gamma, "mean"))

    def probabilities(self, margins: Array) -> Array:
        """The class probabilities at which the expected loss is least at these margins.

        Its derivative, P FL'(x; 1) + (1 - P) FL'(x; 0), is 0 there. With gamma 0 and no alpha
        this is the sigmoid.
        """
        x = margins.astype(np.float64)
        up = sigmoid_focal_loss_grad(x, np.zeros_like(x), self.alpha, self.gamma)
        down = -sigmoid_focal_loss_grad(x, np.ones_like(x), self.alpha, self.gamma)
        return up / (up + down)


class Own(NamedTuple):
    """The library's own log loss, with parameters."""

    weigh_positives: bool = False
    max_delta_step: float = 0.0

    def parameters(self, y: Array) -> dict[str, float]:
        """In the words of both libraries."""
        weight = (1 - y.mean()) / y.mean() if self.weigh_positives else 1.0
        return {"scale_pos_weight": weight, "max_delta_step": self.max_delta_step}

    def probabilities(self, margins: Array) -> Array:
        """The sigmoid."""
        return sigmoid(margins)


Objective = Focal | Own
OBJECTIVES: Mapping[str, Objective] = {
    "log loss, the library's own": Own(),
    "... `scale_pos_weight`": Own(weigh_positives=True),
    "... `max_delta_step=1`": Own(max_delta_step=1.0),
    "gamma 0 (cross entropy), max(h, abs(g))": Focal(gamma=0.0),
    "focal, gamma 1": Focal(gamma=1.0),
    "focal, gamma 2": Focal(gamma=2.0),
    "focal, gamma 2, alpha .25": Focal(alpha=0.25),
}


class Split(NamedTuple):
    """Rows and labels."""

    x: Array
    y: Array


class Table(NamedTuple):
    """A source of rows, how many runs, and how many positives are kept."""

    title: str
    load: Callable[[int], tuple[Array, Array]]
    runs: int
    positives: int | None

    def splits(self, run: int) -> tuple[Split, Split, Split]:
        """Half for training, a quarter for early stopping, a quarter for the figures."""
        x, y = self.load(run)
        if self.positives is not None:
            kept = np.random.default_rng(run).permutation(np.flatnonzero(y))[: self.positives]
            rows = np.sort(np.concatenate([np.flatnonzero(y == 0), kept]))
            x, y = x[rows], y[rows]
        x, rest_x, y, rest_y = train_test_split(x, y, test_size=0.5, stratify=y, random_state=run)
        valid_x, test_x, valid_y, test_y = train_test_split(
            rest_x, rest_y, test_size=0.5, stratify=rest_y, random_state=run
        )
        return Split(x, y), Split(valid_x, valid_y), Split(test_x, test_y)


def one_digit(run: int) -> tuple[Array, Array]:
    """Handwritten digits; the positives of run r are the digit r mod 10."""
    x, digits = load_digits(return_X_y=True)
    return x, (digits == run % 10).astype(np.float64)


def malignant(run: int) -> tuple[Array, Array]:
    """Breast cancer; positives are the malignant ones."""
    x, benign = load_breast_cancer(return_X_y=True)
    return x, 1.0 - benign


TABLES = {
    "digits": Table("one digit against nine, 10 % positives", one_digit, 30, None),
    "digits_thinned": Table("the same, thinned to 20 positives, 1.2 %", one_digit, 50, 20),
    "cancer_thinned": Table("breast cancer, thinned to 20 positives, 5.3 %", malignant, 50, 20),
}


def sigmoid(x: Array) -> Array:
    """The probability that a margin stands for under log loss."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


class Fitted(NamedTuple):
    """The margins of the rows to score, initial score included, and the number of splits made."""

    margins: Array
    splits: int


def fit_lightgbm(
    objective: Objective, train: Split, valid: Split, x: Array, rounds: int = ROUNDS
) -> Fitted:
    """Train with early stopping, and score x."""
    settings: dict[str, Any] = {**LIGHTGBM, "verbosity": -1, "seed": 0}
    start, watched = lightgbm.Dataset(train.x, train.y), lightgbm.Dataset(valid.x, valid.y)
    init, metric = 0.0, None
    if isinstance(objective, Focal):
        init = float(focal.prior_bias(train.y.mean()))
        for data, split in ((start, train), (watched, valid)):
            data.set_init_score(np.full(len(split.y), init))
        settings |= {"objective": objective.derivatives}
        metric = lambda margins, data: (*objective.metric(margins, data), False)  # noqa: E731
    else:
        settings |= {"objective": "binary", **objective.parameters(train.y)}
    watched.set_reference(start)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    model = lightgbm.train(settings, start, rounds, [watched], feval=metric, callbacks=[stop])
    trees = model.dump_model()["tree_info"][: model.best_iteration]
    margins = model.predict(x, raw_score=True) + init
    return Fitted(margins, sum(tree["num_leaves"] - 1 for tree in trees))


def fit_xgboost(
    objective: Objective,
    train: Split,
    valid: Split,
    x: Array,
    rounds: int = ROUNDS,
    **changes: float,
) -> Fitted:
    """Train with early stopping, and score x; `changes` are to the settings."""
    settings: dict[str, Any] = {**XGBOOST, "seed": 0, **changes}
    start, watched = (xgboost.DMatrix(split.x, split.y) for split in (train, valid))
    rows = xgboost.DMatrix(x)
    calls: dict[str, Any] = {}
    if isinstance(objective, Focal):
        init = focal.prior_bias(train.y.mean())
        for data in (start, watched, rows):
            data.set_base_margin(np.full(data.num_row(), init))
        settings |= {"disable_default_eval_metric": True}
        calls = {"obj": objective.derivatives, "custom_metric": objective.metric}
    else:
        settings |= {"objective": "binary:logistic", **objective.parameters(train.y)}
    stop = xgboost.callback.EarlyStopping(rounds=PATIENCE, save_best=True)
    calls |= {"evals": [(watched, "valid")], "verbose_eval": False, "callbacks": [stop]}
    model = xgboost.train(settings, start, num_boost_round=rounds, **calls)
    splits = sum(tree.count("yes=") for tree in model.get_dump())  # each names its way for yes
    return Fitted(model.predict(rows, output_margin=True), splits)


Fit = Callable[..., Fitted]
LIBRARIES: Mapping[str, Fit] = {"lightgbm": fit_lightgbm, "xgboost": fit_xgboost}
CURVATURE_FITS: Mapping[str, Fit] = {
    **LIBRARIES,
    "xgboost, min_child_weight=0": partial(fit_xgboost, min_child_weight=0),
}


def scores(objective: Objective, fitted: Fitted, y: Array) -> dict[str, float]:
    """Of one run; log loss and Brier score by the sigmoid, and by the objective's own link."""
    naive, own = sigmoid(fitted.margins), objective.probabilities(fitted.margins)
    return {
        "average_precision": average_precision_score(y, fitted.margins),
        "log_loss_sigmoid": log_loss(y, naive),
        "log_loss": log_loss(y, own),
        "brier_sigmoid": brier_score_loss(y, naive),
        "brier": brier_score_loss(y, own),
        "splits": fitted.splits,
    }


def measure(
    table: Table, fit: Fit, objectives: Mapping[str, Objective], runs: int
) -> dict[str, Any]:
    """Means and standard deviations over the runs, and AP beside that of the first objective."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in objectives}
    for run in range(runs):
        train, valid, test = table.splits(run)
        for name, objective in objectives.items():
            fitted = fit(objective, train, valid, test.x)
            found[name].append(scores(objective, fitted, test.y))
    base = np.array([run["average_precision"] for run in next(iter(found.values()))])
    result = {}
    for name, several in found.items():
        gain = np.array([run["average_precision"] for run in several]) - base
        summary = {
            key: {
                "mean": round(float(np.mean([run[key] for run in several])), 5),
                "sd": round(float(np.std([run[key] for run in several], ddof=1)), 5),
            }
            for key in several[0]
        }
        error = np.std(gain, ddof=1) / np.sqrt(runs)
        result[name] = summary | {
            "gain": {
                "mean": round(float(gain.mean()), 5),
                "standard_error": round(float(error), 5),
                "better": int((gain > 1e-9).sum()),
                "worse": int((gain < -1e-9).sum()),
            }
        }
    return {"runs": runs, "objectives": result}


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the page, in Markdown."""
    head = ("objective", "average precision", "gain", "better, worse", "log loss", "Brier score")
    parts = {}
    for name, libraries in report["tables"].items():
        for library, measured in libraries.items():
            rows = [head]
            for title, found in measured["objectives"].items():
                gain = found["gain"]
                first = len(rows) == 1
                rows.append(
                    (
                        title,
                        f"{found['average_precision']['mean']:.3f} "
                        f"(sd {found['average_precision']['sd']:.3f})",
                        "" if first else f"{gain['mean']:+.3f} ± {gain['standard_error']:.3f}",
                        "" if first else f"{gain['better']}, {gain['worse']}",
                        _pair(found, "log_loss"),
                        _pair(found, "brier"),
                    )
                )
            parts[f"{name}_{library}"] = markdown(rows)
    head = ("LightGBM: AP", "splits", "XGBoost: AP", "splits", "`min_child_weight=0`: AP", "splits")
    rows = [("second derivative", *head)]
    for title in CURVATURES:
        cells = [f"`{title}`" if "(" in title else title]
        for library in CURVATURE_FITS:
            found = report["curvature"][library]["objectives"][title]
            cells += [
                f"{found['average_precision']['mean']:.3f}",
                f"{found['splits']['mean']:.0f}",
            ]
        rows.append(tuple(cells))
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if k != "focal")
    machine = report["machine"]
    where = f"One core of an {machine['processor']}, {report['date'][:10]}; {versions}."
    return {**parts, "curvature": markdown(rows), "provenance": where}


def _pair(found: Mapping[str, Any], key: str) -> str:
    """By the sigmoid, and by the link where that is another number."""
    naive, own = (f"{found[k]['mean']:.4f}" for k in (f"{key}_sigmoid", key))
    return naive if naive == own else f"{naive} / {own}"


def main() -> None:
    """Measure, write, and show in the page."""
    compared = {
        name: {k: measure(table, fit, OBJECTIVES, table.runs) for k, fit in LIBRARIES.items()}
        for name, table in TABLES.items()
    }
    curvatures = {name: Focal(curvature=name) for name in CURVATURES}
    rare = TABLES["digits_thinned"]
    report = record(
        "boosting",
        "python -m benchmarks.boosting",
        setting={"rounds": ROUNDS, "patience": PATIENCE, "lightgbm": LIGHTGBM, "xgboost": XGBOOST},
        tables=compared,
        curvature={k: measure(rare, f, curvatures, rare.runs) for k, f in CURVATURE_FITS.items()},
    )
    write_tables(PAGE, tables(report))


if __name__ == "__main__":
    main()
