from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from urbanclip_ray.evaluate.regression import MlpProbe, ProbeData, RidgeProbe

ALPHAS = (0.01, 1.0, 30.0, 1000.0)
MLP = MlpProbe(hidden=64, dropout=0.01, lr=3e-3, weight_decay=0.01, max_epochs=60, patience=20)


def make_rows(num_rows: int = 300, width: int = 20, seed: int = 0) -> ProbeData:
    """Train, val and test of a noisy linear relation, x in float32 and far from standardised."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(num_rows, width)) * rng.uniform(0.01, 50, width) + 7).astype(np.float32)
    y = (x - 7) / x.std(0) @ rng.normal(size=width) + rng.normal(size=num_rows) * 8 + 100
    third = num_rows // 3
    return ProbeData(x[:third], y[:third], x[third : 2 * third], y[third : 2 * third], x[2 * third :])


def sklearn_ridge(alpha: float, data: ProbeData, x: np.ndarray) -> np.ndarray:
    train_x, train_y = data.train_x, data.train_y
    scaler = StandardScaler().fit(train_x.astype(np.float64))
    mean, std = train_y.mean(), train_y.std()
    model = Ridge(alpha=alpha).fit(scaler.transform(train_x.astype(np.float64)), (train_y - mean) / std)
    return model.predict(scaler.transform(x.astype(np.float64))) * std + mean


@pytest.mark.parametrize("width", [20, 250])  # fewer and more features than training rows
def test_ridge_is_sklearns_with_the_penalty_of_the_best_validation_r2(width: int) -> None:
    data = make_rows(width=width)
    scores = {alpha: r2_score(data.val_y, sklearn_ridge(alpha, data, data.val_x)) for alpha in ALPHAS}
    best = max(scores, key=scores.__getitem__)
    alpha, predicted = RidgeProbe(ALPHAS).select(data)
    assert alpha == best
    np.testing.assert_allclose(predicted, sklearn_ridge(best, data, data.test_x), rtol=1e-7)


def test_ridge_takes_the_penalty_that_validation_asks_for() -> None:
    data = make_rows()
    flat = np.full_like(data.val_y, data.train_y.mean())  # nothing to explain: the strongest penalty is the best
    assert RidgeProbe(ALPHAS).select(data._replace(val_y=flat))[0] == 1000.0
    exact = sklearn_ridge(0.01, data, data.val_x)
    assert RidgeProbe(ALPHAS).select(data._replace(val_y=exact))[0] == 0.01


def test_ridge_uses_validation_to_choose_and_for_nothing_else() -> None:
    """With one penalty there is nothing to choose, so nothing of validation may show: no scaling, no refit."""
    data = make_rows()
    expected = RidgeProbe((1.0,)).fit_predict(data, 0)
    changed = RidgeProbe((1.0,)).fit_predict(data._replace(val_x=data.val_x * 100 - 3, val_y=data.val_y * -5), 1)
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("probe", [RidgeProbe(ALPHAS), MLP])
def test_a_test_row_is_predicted_without_regard_to_the_other_test_rows(probe: RidgeProbe | MlpProbe) -> None:
    data = make_rows()
    together = probe.fit_predict(data, 0)
    alone = probe.fit_predict(data._replace(test_x=data.test_x[:3]), 0)
    np.testing.assert_allclose(together[:3], alone, rtol=1e-5)


@pytest.mark.parametrize("probe", [RidgeProbe(ALPHAS), MLP])
def test_a_constant_feature_does_no_harm(probe: RidgeProbe | MlpProbe) -> None:
    data = make_rows()
    data.train_x[:, 3] = 2.5
    assert np.isfinite(probe.fit_predict(data, 0)).all()


def test_ridge_predicts_a_constant_target_exactly() -> None:
    data = make_rows()
    constant = data._replace(train_y=np.full_like(data.train_y, 4), val_y=np.full_like(data.val_y, 4))
    flat = RidgeProbe(ALPHAS).fit_predict(constant, 0)
    np.testing.assert_allclose(flat, 4.0)


@pytest.mark.parametrize("alphas", [(), (0.0, 1.0), (-1.0,)])
def test_penalties_must_be_positive(alphas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ridge_alphas"):
        RidgeProbe(alphas)


def absolute_value(seed: int = 0) -> tuple[ProbeData, np.ndarray]:
    """What no line fits, and the targets of test."""
    rng = np.random.default_rng(seed)
    parts = []
    for num_rows in (600, 200, 200):
        x = rng.normal(size=(num_rows, 2))
        parts += [x, np.abs(x[:, 0]) * 30 + 5]
    *known, test_y = parts
    return ProbeData(*known), test_y


def test_the_mlp_learns_what_ridge_cannot() -> None:
    data, test_y = absolute_value()
    assert r2_score(test_y, MLP.fit_predict(data, 0)) > 0.95
    assert r2_score(test_y, RidgeProbe(ALPHAS).fit_predict(data, 0)) < 0.1


def test_the_mlp_repeats_itself_with_a_seed_and_leaves_torch_as_it_was() -> None:
    import torch

    data, _ = absolute_value()
    quick = MlpProbe(hidden=16, dropout=0.1, lr=3e-3, weight_decay=0.01, max_epochs=3, patience=3)
    torch.manual_seed(5)
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    first = quick.fit_predict(data, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads
    np.testing.assert_array_equal(quick.fit_predict(data, 1), first)
    assert not np.array_equal(quick.fit_predict(data, 2), first)


def test_the_mlp_keeps_its_best_epoch_and_stops_when_patience_ends() -> None:
    """Validation that contradicts training is best early: longer training must not change what is returned."""
    data, test_y = absolute_value()
    contrary = data._replace(val_y=-data.val_y)

    def trained(max_epochs: int, patience: int) -> np.ndarray:
        probe = MlpProbe(hidden=16, dropout=0.0, lr=3e-3, weight_decay=0.01, max_epochs=max_epochs, patience=patience)
        return probe.fit_predict(contrary, 0)

    long = trained(max_epochs=40, patience=40)
    np.testing.assert_array_equal(long, trained(max_epochs=40, patience=2))
    assert r2_score(test_y, long) < 0.9  # not the last epoch, which fits


def test_a_diverging_mlp_says_what_to_lower() -> None:
    data, _ = absolute_value()
    with pytest.raises(FloatingPointError, match="mlp_lr"), np.errstate(all="ignore"):
        MlpProbe(hidden=8, dropout=0, lr=1e30, weight_decay=0, max_epochs=2, patience=1).fit_predict(data, 0)


@pytest.mark.parametrize(
    "probe", [RidgeProbe(ALPHAS), MLP, MlpProbe(64, dropout=0.5, lr=3e-3, weight_decay=0.01, max_epochs=25, patience=3)]
)
def test_several_targets_at_once_are_each_predicted_as_if_alone(probe: RidgeProbe | MlpProbe) -> None:
    """With patience that runs out at another epoch for each of them."""
    data = make_rows()
    rng = np.random.default_rng(5)
    others = [lambda y: rng.normal(size=len(y)), np.sqrt]
    train_y, val_y = (np.stack([y, *(other(y) for other in others)], axis=1) for y in (data.train_y, data.val_y))
    together = probe.fit_predict(data._replace(train_y=train_y, val_y=val_y), 3)
    assert together.shape == (len(data.test_x), 3)
    for column in range(3):
        alone = probe.fit_predict(data._replace(train_y=train_y[:, column], val_y=val_y[:, column]), 3)
        np.testing.assert_allclose(together[:, column], alone, rtol=1e-3, atol=1e-3 * np.ptp(alone))
