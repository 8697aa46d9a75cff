"""The training loop: schedule, hooks, what it refuses."""
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from promptbook.learn import Averager, FitSettings, Hook, KeepBest, Track, TrainingSet, augment, fit, trained, training_views
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


@pytest.mark.parametrize("wrong", [dict(epochs=-1), dict(batch=0), dict(lr=0), dict(optimizer="adam"), dict(schedule="cubic")])
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
    with pytest.raises(ValueError, match="nothing to train on"): fit(m, Split(SHOTS.images[:0], SHOTS.labels[:0]), FitSettings(epochs=1))
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
    sets = [TrainingSet(method(), SHOTS, FitSettings(views=3), seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(sets[0].views, sets[1].views)) and not torch.equal(sets[0].views[0], sets[2].views[0])
    assert not torch.equal(sets[0].views[0], sets[0].views[1])
    assert len(TrainingSet(method(), SHOTS, FitSettings(views=None, epochs=5), 0).views) == 5


def test_inputs_too_large_to_cache_are_prepared_batch_by_batch():
    kept, made = (TrainingSet(method(), SHOTS, FitSettings(views=2), 0, limit=limit) for limit in (2 ** 31, 0))
    assert kept.cached and not made.cached
    assert torch.allclose(kept.complete(kept.__getitems__([3, 7]))[0], made.complete(made.__getitems__([3, 7]))[0], atol=1e-5)


@pytest.mark.parametrize("augmentation", ["crop", "strong"])
def test_pictures_keep_shape_and_type(augmentation):
    for view in training_views(SHOTS.images, augmentation, 2, 0):
        assert view.shape == SHOTS.images.shape and view.dtype == torch.uint8 and not torch.equal(view, SHOTS.images)


def ends(settings, **arguments):
    m = method()
    history = fit(m, SHOTS, settings, seed=3, **arguments)
    return m.source.text.vectors[0].detach().clone(), history


def test_accumulating_small_batches_is_one_large_batch():
    large, small = FitSettings(epochs=2, lr=.02, batch=20, schedule="constant", views=1), FitSettings(epochs=2, lr=.02, batch=5, accumulate=4, schedule="constant", views=1)
    assert torch.allclose(ends(large)[0], ends(small)[0], atol=1e-6)
    assert not torch.allclose(ends(large)[0], ends(FitSettings(epochs=2, lr=.02, batch=5, schedule="constant", views=1))[0], atol=1e-6)


def test_encoding_classes_in_chunks_changes_nothing():
    whole, chunks = (ends(FitSettings(epochs=2, lr=.02, batch=10, text_chunk=n))[0] for n in (0, 3))
    assert torch.allclose(whole, chunks, atol=1e-6)


class Stop(Hook):
    def __init__(self, epoch): self.epoch = epoch
    def after_epoch(self, run):
        if run.epoch == self.epoch: raise KeyboardInterrupt


@pytest.mark.parametrize("hook", [lambda: Averager([1, 2, 3, 4, 5]), lambda: KeepBest(lambda m: -m.source.text.vectors[0].norm().item())])
def test_a_killed_training_goes_on_with_the_same_bits(tmp_path, hook):
    settings, file = FitSettings(epochs=5, lr=.02, batch=10, views=2), tmp_path / "fit.pt"
    whole, history = ends(settings, hooks=[hook()])
    with pytest.raises(KeyboardInterrupt): ends(settings, hooks=[hook(), Stop(2)], checkpoint=file)
    resumed, again = ends(settings, hooks=[hook()], checkpoint=file)       # the third epoch was lost with the kill, the first two were not
    assert torch.equal(whole, resumed) and again["loss"].tolist() == history["loss"].tolist()
    with pytest.raises(ValueError, match="other settings"): ends(FitSettings(epochs=6, lr=.02, batch=10, views=2), checkpoint=file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"): ends(settings, checkpoint=file)


DISTRIBUTED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_learn import SHOTS, method
from promptbook.learn import FitSettings, fit, process_state
state = process_state()
m = method()
history = fit(m, SHOTS, FitSettings(epochs=3, lr=.02, batch=10, views=2), seed=3)
if state.is_main_process: json.dump([state.num_processes, history.loss.tolist(), m.source.text.vectors[0].flatten().tolist()], open(sys.argv[2], "w"))
state.destroy_process_group()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_like_one(tmp_path):
    """Launched with accelerate on two CPU processes: same losses and prompts as one process at the same global batch."""
    (tmp_path / "train.py").write_text(DISTRIBUTED)
    found = []
    for processes, launcher in ((1, []), (2, ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                                              "--num_processes", "2", "--main_process_port", str(free_port())])):
        result = tmp_path / f"{processes}.json"
        subprocess.run([sys.executable, *launcher, str(tmp_path / "train.py"), str(Path(__file__).parent), str(result)], check=True, capture_output=True, timeout=240,
                       env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
        found.append(json.loads(result.read_text()))
    assert [f[0] for f in found] == [1, 2]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5) and found[0][2] == pytest.approx(found[1][2], abs=1e-5)


def test_crops_keep_shape_and_type():
    out = augment(SHOTS.images, torch.Generator().manual_seed(0), flip=True)
    assert out.shape == SHOTS.images.shape and out.dtype == torch.uint8 and not torch.equal(out, SHOTS.images)
    assert (augment(SHOTS.images, torch.Generator().manual_seed(0), scale=(1., 1.)).int() - SHOTS.images.int()).abs().max() <= 1
