"""Schedules, and averages of the weights."""

import pytest
import torch
from captioner_training.optimisation import Average, schedule
from conftest import make_tiny_model
from shape_data import make_config, stage


def test_the_learning_rate_warms_up_and_falls():
    settings = make_config([stage(warmup=0.1, final=0.05)]).stages[0]
    rates = [schedule(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.525)
    assert rates[99] == pytest.approx(0.05, abs=0.001)


def test_the_learning_rate_falls_in_steps_or_not_at_all():
    steps = make_config(
        [stage(warmup=0.0, schedule="step", step_epochs=2, step_factor=0.5, epochs=5)]
    ).stages[0]
    rates = [schedule(steps, step, 50) for step in range(50)]
    assert rates == [1.0] * 20 + [0.5] * 20 + [0.25] * 10
    constant = make_config([stage(warmup=0.1, schedule="constant")]).stages[0]
    assert [schedule(constant, step, 20) for step in range(20)] == pytest.approx([1 / 3, 2 / 3] + [1.0] * 18)


def test_epochs_are_averaged():
    model = make_tiny_model()
    average = Average(model, decay=0.0, epochs=2)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            for p in average.parameters:
                p.fill_(value)
        average.update()
        average.end_epoch()
    again = Average(model, decay=0.0, epochs=2)
    again.load_state_dict(average.state_dict())
    for one in (average, again):
        with one.applied():
            assert all((p == 3.0).all() for p in average.parameters)
        assert all((p == 4.0).all() for p in average.parameters)


def test_without_an_average_the_weights_stay():
    model = make_tiny_model()
    average = Average(model, decay=0.0)
    before = [p.detach().clone() for p in average.parameters]
    average.end_epoch()
    with average.applied():
        assert all(torch.equal(p, b) for p, b in zip(average.parameters, before, strict=True))


def test_the_average_follows_the_weights():
    model = make_tiny_model()
    with torch.random.fork_rng():
        average = Average(model, decay=0.5)
        kept = [p.detach().clone() for p in average.parameters]
        with torch.no_grad():
            for p in average.parameters:
                p.add_(1.0)
        average.update()
        decay = 2 / 11  # grows towards 0.5
        for value, before in zip(average.values, kept, strict=True):
            torch.testing.assert_close(value, before + (1 - decay))
        with average.applied():
            assert all(torch.equal(p, v) for p, v in zip(average.parameters, average.values, strict=True))
        for p, before in zip(average.parameters, kept, strict=True):
            torch.testing.assert_close(p.detach(), before + 1.0)
        with torch.no_grad():
            for p, before in zip(average.parameters, kept, strict=True):
                p.copy_(before)
