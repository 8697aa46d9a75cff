"""The training loop: schedule, hooks, what it refuses."""
import math

import pytest
import torch

from promptbook.learn import Averager, FitSettings, Hook, Track, TrainingSet, augment, fit, trained
from promptbook.prompts import FreePrompts, Independent, PromptedCLIP, context_layout
from promptbook.universe import Split, few_shot, load_data
from promptbook.zoo import load

DATA = load_data("textures")
SHOTS = few_shot(DATA.train, 2, seed=0)


def method(seed=0):
    torch.manual_seed(seed)
    backbone = load("tiny-clip")
    return PromptedCLIP(backbone, DATA.classes, lambda names: context_layout(backbone, names, 2), Independent(text=FreePrompts(2, 128)))


def test_the_inherited_schedule():
    s = FitSettings(epochs=50, lr=.002)
    assert s.rate(0) == 1e-5 and s.rate(1) == .002
    assert s.rate(26) == pytest.approx(.001) and all(s.rate(e) > s.rate(e + 1) for e in range(1, 49))
    assert FitSettings(schedule="constant").rate(0) == FitSettings().lr


@pytest.mark.parametrize("wrong", [dict(epochs=-1), dict(batch=0), dict(lr=0), dict(optimizer="adam"), dict(schedule="linear")])
def test_impossible_settings(wrong):
    with pytest.raises(ValueError): FitSettings(**wrong)


def test_order_of_batches_depends_on_the_seed():
    ends = []
    for seed in (0, 0, 1):
        m = method(); fit(m, SHOTS, FitSettings(epochs=3, batch=4, lr=.02), seed)
        ends.append(m.source.text.vectors[0].detach().clone())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_loss_falls_and_history_is_complete():
    history = fit(method(), SHOTS, FitSettings(epochs=15, lr=.05, batch=10, views=0), hooks=[Track(lambda m: {"seen": 1}, every=5)])
    assert len(history) == 15 and history.loss.iloc[-1] < history.loss.iloc[0] and history.seen.notna().tolist() == [e in (0, 5, 10, 14) for e in range(15)]


def test_a_thawed_backbone_is_refused():
    m = method()
    parameter = m.clip.logit_scale
    parameter.requires_grad_(True)
    try:
        with pytest.raises(ValueError, match="must stay frozen.*logit_scale"): fit(m, SHOTS, FitSettings(epochs=1))
    finally: parameter.requires_grad_(False)


def test_nothing_to_train_and_nothing_to_train_on():
    m = method()
    with pytest.raises(ValueError, match="no training images"): fit(m, Split(SHOTS.images[:0], SHOTS.labels[:0]), FitSettings(epochs=1))
    m.source.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"): fit(m, SHOTS, FitSettings(epochs=1))
    assert not trained(m)


def test_a_loss_that_explodes_is_named():
    m = method()
    class Explode(Hook):
        def after_backward(self, run): m.source.text.vectors[0].grad.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower the learning rate"): fit(m, SHOTS, FitSettings(epochs=3), hooks=[Explode()])


def test_averager_refuses_wrong_weights():
    for weights in ([1, 2], [0, 0, 0], [1, -1, 3]):
        with pytest.raises(ValueError, match="averager needs 3 weights"): fit(method(), SHOTS, FitSettings(epochs=3), hooks=[Averager(weights)])


def test_reduced_precision_runs_and_stays_near():
    ends = [fit(method(), SHOTS, FitSettings(epochs=4, lr=.02, batch=10, precision=p)).loss.iloc[-1] for p in ("no", "bf16")]
    assert ends[1] == pytest.approx(ends[0], rel=.1)


def test_views_are_fixed_by_the_seed_and_differ():
    sets = [TrainingSet(method(), SHOTS, 3, seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(sets[0].inputs, sets[1].inputs)) and not torch.equal(sets[0].inputs[0], sets[2].inputs[0])
    assert not torch.equal(sets[0].inputs[0], sets[0].inputs[1])


def test_inputs_too_large_to_cache_are_prepared_batch_by_batch():
    kept, made = TrainingSet(method(), SHOTS, 2, 0), TrainingSet(method(), SHOTS, 2, 0, limit=0)
    assert kept.cached and not made.cached
    assert torch.allclose(kept.__getitems__([3, 7])[0], made.__getitems__([3, 7])[0], atol=1e-5)


def test_crops_keep_shape_and_type():
    out = augment(SHOTS.images, torch.Generator().manual_seed(0), flip=True)
    assert out.shape == SHOTS.images.shape and out.dtype == torch.uint8 and not torch.equal(out, SHOTS.images)
    assert (augment(SHOTS.images, torch.Generator().manual_seed(0), scale=(1., 1.)).int() - SHOTS.images.int()).abs().max() <= 1
