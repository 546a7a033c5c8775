"""Focal loss as an objective of LightGBM and XGBoost, and the page that shows how."""

import json
import re

import pytest

pytest.importorskip("lightgbm")
pytest.importorskip("xgboost")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import mpmath
import numpy as np
import xgboost
from numpy.testing import assert_allclose

import focal
from benchmarks import boosting, pages
from benchmarks.boosting import CURVATURES, Focal, Own
from benchmarks.common import RESULTS

# Margins where boosters begin (the prior), where they end, and where exp overflows.
MARGINS = np.array(
    [-800.0, -120.0, -40.0, -17.5, -6.9, -4.595, -2.79, -0.5, 0.0, 0.3, 2.2, 6.9, 17.5, 40.0, 800.0]
)


class Labels:
    """All of a Dataset or DMatrix that an objective reads."""

    def __init__(self, y):
        self.y = np.asarray(y, np.float32)

    def get_label(self):
        return self.y


def exact(x, y, alpha, gamma):
    """First and second derivative by mpmath, from the loss alone."""

    def loss(t):
        z = t if y else -t
        weight = 1 if alpha is None else (alpha if y else 1 - mpmath.mpf(alpha))
        return weight * (1 / (1 + mpmath.exp(z))) ** gamma * mpmath.log1p(mpmath.exp(-z))

    with mpmath.workdps(900):  # the loss has e^-800 in it
        t = mpmath.mpf(float(x))
        return float(mpmath.diff(loss, t)), float(mpmath.diff(loss, t, 2))


@pytest.mark.parametrize(("alpha", "gamma"), [(None, 0.0), (None, 2.0), (0.25, 0.5)])
@pytest.mark.parametrize("y", [0, 1])
def test_the_derivatives_are_those_of_the_loss(alpha, gamma, y):
    grad, hess = np.array([exact(x, y, alpha, gamma) for x in MARGINS]).T
    data = Labels(np.full(len(MARGINS), y))
    got, true_hess = Focal(alpha, gamma, "as it is").derivatives(MARGINS, data)
    tiny = 1e-300
    assert_allclose(got, grad, rtol=1e-12, atol=tiny)
    assert_allclose(true_hess, hess, rtol=1e-11, atol=tiny)
    _, kept = Focal(alpha, gamma).derivatives(MARGINS, data)
    assert_allclose(kept, np.maximum(hess, np.abs(grad)), rtol=1e-11, atol=tiny)
    # XGBoost's margins are float32.
    for a, b in zip(
        Focal(alpha, gamma).derivatives(MARGINS.astype("f"), data), (grad, kept), strict=True
    ):
        assert_allclose(a, b, rtol=2e-4, atol=tiny)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_a_rare_positive_starts_where_the_loss_bends_down(gamma):
    start = np.array([focal.prior_bias(0.01)])
    _, hess = Focal(None, gamma, "as it is").derivatives(start, Labels([1]))
    assert hess[0] < 0
    x = np.random.default_rng(0).normal(0, 6, 1000)
    grad, kept = Focal(None, gamma).derivatives(x, Labels(x > 1))
    assert (kept > 0).all() and abs(grad.sum()) <= kept.sum()


def test_the_probability_is_where_the_expected_loss_is_least():
    for alpha, gamma in ((None, 0.0), (None, 2.0), (0.25, 2.0), (0.75, 0.5)):
        x = np.linspace(-8, 8, 33)
        p = Focal(alpha, gamma).probabilities(x)
        assert (np.diff(p) > 0).all()

        def expected(t, p=p, alpha=alpha, gamma=gamma):
            options = {"alpha": alpha, "gamma": gamma}
            positive = focal.numpy.sigmoid_focal_loss(t, np.ones_like(t), **options)
            return p * positive + (1 - p) * focal.numpy.sigmoid_focal_loss(t, 0 * t, **options)

        for step in (0.05, -0.05, 1.0, -1.0):
            assert (expected(x + step) > expected(x)).all()
    assert_allclose(Focal(None, 0.0).probabilities(x), boosting.sigmoid(x), rtol=1e-12)
    extremes = Focal().probabilities(np.array([-800.0, -100.0, 100.0, 800.0]))
    assert_allclose(extremes, [0, 0, 1, 1], atol=1e-40)


@pytest.fixture(scope="module")
def digits():
    return boosting.TABLES["digits"].splits(8)


NEWTON = Focal(None, 0.0, "as it is")  # log loss


@pytest.mark.parametrize("library", boosting.LIBRARIES)
def test_without_focusing_it_is_the_librarys_own_objective(library, digits):
    train, valid, test = digits
    fit = boosting.LIBRARIES[library]
    ours = fit(NEWTON, train, valid, test.x, 40)
    own = fit(Own(), train, valid, test.x, 40)
    # The derivatives are float32 on both sides; a tie between two splits may fall otherwise.
    assert_allclose(ours.margins, own.margins, rtol=0, atol=2e-3)
    assert own.splits > 100
    focused = fit(Focal(), train, valid, test.x, 40)
    assert np.abs(focused.margins - own.margins).max() > 0.5


@pytest.mark.parametrize("library", boosting.LIBRARIES)
def test_the_initial_score_is_in_the_prediction(library, digits, monkeypatch):
    """With steps of no length, ours and the library's own stay at the share of positives."""
    for settings in (boosting.LIGHTGBM, boosting.XGBOOST):
        monkeypatch.setitem(settings, "learning_rate", 1e-9)
    train, valid, test = digits
    start = focal.prior_bias(train.y.mean())
    for objective in (Focal(), Own()):
        margins = boosting.LIBRARIES[library](objective, train, valid, test.x, 2).margins
        assert_allclose(margins, start, atol=1e-4)


def test_xgboost_adds_its_base_score_where_the_margin_is_forgotten(digits):
    train, _, test = digits
    start = float(focal.prior_bias(train.y.mean()))
    margin = xgboost.DMatrix(train.x, train.y, base_margin=np.full(len(train.y), start))
    plain = xgboost.DMatrix(train.x, train.y)
    settings = boosting.XGBOOST
    call = {"num_boost_round": 5, "obj": Focal().derivatives}
    model = xgboost.train(settings, margin, **call)
    right = model.predict(xgboost.DMatrix(test.x, base_margin=np.full(len(test.y), start)))
    wrong = model.predict(xgboost.DMatrix(test.x))
    assert_allclose(right - wrong, start - 0.5, atol=1e-5)
    carried = xgboost.train({**settings, "base_score": start}, plain, **call)
    assert_allclose(carried.predict(xgboost.DMatrix(test.x)), right, atol=1e-6)


@pytest.mark.parametrize("library", boosting.LIBRARIES)
def test_a_second_derivative_as_it_is_grows_no_tree_for_a_rare_class(library):
    train, valid, test = boosting.TABLES["digits_thinned"].splits(8)
    fit = boosting.LIBRARIES[library]
    assert fit(Focal(curvature="as it is"), train, valid, test.x, 20).splits == 0
    assert fit(Focal(), train, train, test.x, 100).splits > 100


def test_the_thinned_table_has_the_positives_it_says():
    for name, count in (("digits_thinned", 20), ("cancer_thinned", 20)):
        parts = boosting.TABLES[name].splits(3)
        assert [int(part.y.sum()) for part in parts] == [count // 2, count // 4, count // 4]


def test_the_objective_of_the_page_is_the_one_that_was_measured():
    block = re.findall(r"```python\n(.*?)```", boosting.PAGE.read_text(), re.S)[0]
    page = {}
    exec(block.split("x, digits =")[0], page)
    data = Labels(MARGINS > 1)
    for a, b in zip(
        page["objective"](MARGINS, data), Focal().derivatives(MARGINS, data), strict=True
    ):
        assert_allclose(a, b, rtol=1e-12)
    assert_allclose(page["probability"](MARGINS), Focal().probabilities(MARGINS))
    assert page["metric"](MARGINS, data)[1] == pytest.approx(Focal().metric(MARGINS, data)[1])


def test_the_page_shows_the_committed_results():
    report = json.loads((RESULTS / "boosting.json").read_text())
    page = boosting.PAGE.read_text()
    assert pages.fill(page, boosting.tables(report)) == page
    assert set(report["curvature"]["xgboost"]["objectives"]) == set(CURVATURES)


def test_a_measurement_has_spread_and_a_first_row_to_compare_with():
    table = boosting.TABLES["cancer_thinned"]
    some = {"own": Own(), "focal": Focal()}
    found = boosting.measure(table, boosting.fit_lightgbm, some, 2)["objectives"]
    assert found["own"]["gain"] == {"mean": 0, "standard_error": 0, "better": 0, "worse": 0}
    ap = [found[name]["average_precision"] for name in some]
    assert found["focal"]["gain"]["mean"] == pytest.approx(ap[1]["mean"] - ap[0]["mean"], abs=2e-5)
    assert 0 < ap[1]["mean"] <= 1 and ap[1]["sd"] >= 0


def test_a_page_without_the_place_is_an_error():
    with pytest.raises(ValueError, match="one place for the table 'a'; got 0"):
        pages.fill("nothing", {"a": "table"})
