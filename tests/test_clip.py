"""The card's checkable facts on other weights and widths, the protocols, and the exercises' checkers."""

import pytest
import torch
import torch.nn.functional as F

from exercises import check_solutions
from promptbook import clip
from promptbook.experiment import Experiment, Store, run
from promptbook.learn import build
from promptbook.measure import harmonic_mean
from promptbook.prompts import FreePrompts
from promptbook.universe import base_and_new, few_shot, load_data

DATA = load_data("textures")


def test_facts_hold_on_any_weights(backbone):
    images, labels = DATA.test.images[::30], DATA.test.labels[::30]
    clip.check_coop(backbone, DATA.classes, images)
    clip.check_cocoop(backbone, DATA.classes, images)
    clip.check_kgcoop(backbone, DATA.classes, images, labels)
    clip.check_proda(backbone, DATA.classes, images, labels)
    clip.check_deep_prompts(backbone, DATA.classes, images)
    clip.check_tip_adapter(backbone, DATA.classes, few_shot(DATA.train, 2, 0))


@pytest.mark.parametrize("check, sabotage", [
    ("check_coop", lambda monkeypatch: monkeypatch.setattr(clip, "word_embeddings", lambda b, w: torch.randn(4, 48))),
    ("check_kgcoop", lambda monkeypatch: monkeypatch.setattr(clip, "word_embeddings", lambda b, w: torch.randn(4, 48))),
    ("check_deep_prompts", lambda monkeypatch: monkeypatch.setattr(clip, "FreePrompts", lambda length, width, depth=1, *a: FreePrompts(length, width, depth + 1, *a)))])
def test_facts_can_fail(backbone, monkeypatch, check, sabotage):
    sabotage(monkeypatch)
    arguments = [backbone, DATA.classes, DATA.test.images[::30]] + ([DATA.test.labels[::30]] if check == "check_kgcoop" else [])
    with pytest.raises((AssertionError, ValueError)): getattr(clip, check)(*arguments)


def test_papers_harmonic_mean():
    assert round(harmonic_mean(69.34, 74.22), 1) == 71.7
    assert harmonic_mean(60, 60) == pytest.approx(60) and harmonic_mean(50, 70) < 60


def test_base_to_new_never_sees_new_classes_in_training(monkeypatch):
    seen = []
    monkeypatch.setattr(clip, "fit", lambda method, split, *a, **k: seen.append((method.texts.names, len(split))))
    run(Experiment("coop", "tiny-clip", "textures", "base-to-new", 3, {"shots": 4}), None)
    base, new = base_and_new(DATA)
    assert seen == [(base.classes, 4 * len(base.classes))] and not set(seen[0][0]) & set(new.classes)


def test_sampling_seed_draws_images_and_seed_initialises(tmp_path):
    store, made = Store(tmp_path / "rows.jsonl"), []
    for seed, sampling in ((1, 1), (1, 2), (2, 1)):
        made.append(run(Experiment("coop-csc", "tiny-clip", "textures", "few-shot", seed, {"epochs": 2, "shots": 2}, sampling_seed=sampling), store)["key"])
    assert len(set(made)) == 3


@pytest.mark.parametrize("experiment, message", [
    (("nothing", "textures", "base-to-new", {}), "No method 'nothing'"), (("coop", "textyres", "base-to-new", {}), "did you mean textures"),
    (("coop", "textures", "base-to-new", {"lenght": 3}), "no setting 'lenght'"), (("tip-adapter", "textures", "base-to-new", {}), "few-shot protocol"),
    (("coop", "textures", "base-to-new", {"scale": "huge"}), "scale is"), (("vpt-deep", "textures", "base-to-new", {"depth": 99}), "does not fit")])
def test_bad_experiments_are_one_clear_error(experiment, message):
    method, data, protocol, settings = experiment
    with pytest.raises(ValueError, match=message): run(Experiment(method, "tiny-clip", data, protocol, 0, settings), None)


def test_random_context_with_words_is_refused():
    with pytest.raises(ValueError, match="words=None"): clip.context_vectors(__import__("promptbook.zoo").zoo.load("tiny-clip"), 4, "a photo of a", 5)


# exercises ---------------------------------------------------------------------------------------------------------
CHECKERS = ["check_harmonic", "check_context_slots", "check_penalty", "check_cache", "check_counts"]


def test_every_folded_solution_passes_its_checker(): check_solutions(clip, CHECKERS, "20_clip")


unit = lambda x: x / x.norm(dim=-1, keepdim=True)
counts = lambda **change: lambda text, vision, joint, classes: {"coop": 4 * text, "coop-csc": classes * 4 * text, "cocoop": 35_360, "vpt-deep": 12 * 8 * vision, "ivlp": 9 * 4 * (text + vision)} | change
WRONG = [
    ("check_harmonic", lambda t: sum(2 * b * n / (b + n) for b, n in t) / len(t)), ("check_harmonic", lambda t: sum(b + n for b, n in t) / 2 / len(t)),
    ("check_context_slots", lambda length, words, place: list(range(1, 1 + length))), ("check_context_slots", lambda length, words, place: list(range(length))),
    ("check_penalty", lambda s, t: 1 - (s * t).sum(-1).mean()), ("check_penalty", lambda s, t: 1 - (unit(s) * unit(t)).sum(-1)),
    ("check_cache", lambda f, w, k, y, a, b: 100 * f @ w.T + a * torch.exp(b * (1 - f @ k.T)) @ F.one_hot(y, len(w)).float()),
    ("check_cache", lambda f, w, k, y, a, b: 100 * f @ w.T + torch.exp(-b * (1 - f @ k.T)) @ F.one_hot(y, len(w)).float()),
    ("check_counts", counts(cocoop=35_360 - 32 - 512)), ("check_counts", counts(ivlp=9 * 2 * (512 + 768)))]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(clip, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)
