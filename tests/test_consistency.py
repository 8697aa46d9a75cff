"""The cards' checkable facts on other weights and widths, both versions of every penalty, clear errors, and the exercises' checkers."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exercises import check_solutions
from promptbook import consistency
from promptbook.consistency import BottleneckAdapter, DescriptionTeacher, FeatureShift, GrowRatio, PromptShift, SurgeryAdapter, find_descriptions, gram_norm
from promptbook.experiment import find_claim
from promptbook.learn import METHODS, FitSettings, build, fit, load_method, save_method
from promptbook.prompts import Outputs, Teacher
from promptbook.universe import base_and_new, few_shot, load_data
from promptbook.zoo import load

DATA = load_data("textures")
SHOTS = few_shot(DATA.train, 3, 0)


IMAGES, LABELS = DATA.test.images[::30], DATA.test.labels[::30]
FACTS = {"check_coprompt_parts": lambda b: (b, DATA.classes), "check_coprompt_gradients": lambda b: (b, DATA.classes, IMAGES, LABELS),
         "check_prompt_shift": lambda b: (b, DATA.classes), "check_restore": lambda b: (b, DATA.classes, SHOTS)}


@pytest.mark.parametrize("check", FACTS)
def test_facts_hold_on_any_weights(backbone, check):
    getattr(consistency, check)(*FACTS[check](backbone))


def test_counts_at_the_published_size():
    assert consistency.coprompt_count(4, 12, 512, 768, 512) == 5_014_528 and consistency.coprompt_count(2, 12, 512, 768, 512) == 4_740_096 + 262_144
    assert consistency.restore_count(2, 9, 512, 768, 512) == 7_756_544
    consistency.check_partial_correlation()


class Leaky(BottleneckAdapter):
    """An adapter without its last ReLU."""
    def __init__(self, width, mix, reduction=4):
        super().__init__(width, mix, reduction)
        self.network = self.network[:3]


class Blended(SurgeryAdapter):
    """Surgery whose skip connection is attenuated."""
    def forward(self, features): return super().forward(features) - self.ratio * features


class EveryEpoch(GrowRatio):
    def after_epoch(self, run):
        for adapter in run.method.adapters.values(): adapter.ratio += .01


class OwnDraws(consistency.DescriptionConsistency):
    """Every class draws an index of its own."""
    def forward(self, outputs):
        own = torch.randint(len(self.teacher.sentences), (len(outputs.text),))
        return self.weight * self.distance(outputs.text, self.teacher.sentences[own, torch.arange(len(own))])


class AllBlocks(PromptShift):
    """The first block is compared, too."""
    def __init__(self, weight, source):
        super().__init__(weight, source)
        start = source()
        for tower in ("text", "vision"): setattr(self, f"{tower}_start", torch.stack([gram_norm(p) for p in getattr(start, tower)]).detach())

    def relative(self, prompts):
        return [torch.stack([gram_norm(p) for p in getattr(prompts, tower)]) / getattr(self, f"{tower}_start") for tower in ("text", "vision")]


@pytest.mark.parametrize("check, name, broken", [
    ("check_coprompt_parts", "BottleneckAdapter", Leaky), ("check_coprompt_parts", "DescriptionConsistency", OwnDraws),
    ("check_coprompt_parts", "DISTANCES", {"cosine": lambda a, b: 2 - (a * b).sum(-1).mean(), "mse": F.mse_loss}),
    ("check_coprompt_gradients", "DISTANCES", {"cosine": lambda a, b: 1 - (a.detach() * b).sum(-1).mean() + 0 * a.sum(), "mse": F.mse_loss}),
    ("check_coprompt_gradients", "WORDS", "a sketch of a"),
    ("check_prompt_shift", "PromptShift", AllBlocks), ("check_prompt_shift", "gram_norm", lambda p: p.norm()),
    ("check_restore", "SurgeryAdapter", Blended), ("check_restore", "GrowRatio", EveryEpoch)])
def test_facts_can_fail(backbone, monkeypatch, check, name, broken):
    monkeypatch.setattr(consistency, name, broken)
    with pytest.raises(AssertionError): getattr(consistency, check)(*FACTS[check](backbone))


# both versions ------------------------------------------------------------------------------------------------------
def one_step(method, teacher=None):
    return method(method.prepare(SHOTS.images), SHOTS.labels, teacher)


def test_squared_error_is_the_cosine_scaled(backbone):
    values = {d: one_step(build("coprompt", backbone, DATA.classes, weight=1., descriptions="template", distance=d)) for d in ("cosine", "mse")}
    for term in ("text consistency", "image consistency"):
        assert values["mse"][term].item() == pytest.approx(values["cosine"][term].item() * 2 / backbone.model.config.projection_dim, rel=1e-3)


def test_each_penalty_is_what_it_says(backbone):
    losses = {p: one_step(build("restore", backbone, DATA.classes, penalty=p, surgery=False)) for p in consistency.PENALTIES}
    assert losses["prompts"]["prompt shift"] == 0
    method = build("restore", backbone, DATA.classes, penalty="features", surgery=False)
    out = method.outputs(method.prepare(SHOTS.images))
    text = (out.text - Teacher(backbone, DATA.classes, "a photo of a {}.").text).norm(dim=-1).mean()
    vision = (out.image - method.frozen_features(method.prepare(SHOTS.images))).norm(dim=-1).mean()
    assert losses["features"]["feature shift"].item() == pytest.approx(((text - vision) ** 2).item(), rel=1e-3)
    assert losses["total"]["feature shift"].item() == pytest.approx((text + vision).item(), rel=1e-3)


def test_the_other_view_reaches_the_teacher(backbone):
    """The penalty on images differs between the same and another view in training, and in nothing else."""
    first = {}
    for other in (True, False):
        method = build("coprompt", backbone, DATA.classes, other_view=other, weight=1.)
        history = fit(method, SHOTS, FitSettings(epochs=1, batch=5, augmentation="strong", views=2))
        first[other] = history.iloc[0]
    assert first[True]["image consistency"] > first[False]["image consistency"] and first[True]["text consistency"] == pytest.approx(first[False]["text consistency"], abs=1e-3)


def test_saved_restore_keeps_ratios_and_starting_norms(tmp_path):
    method = build("restore", load("tiny-clip"), DATA.classes, DATA.template, seed=3)
    fit(method, SHOTS, FitSettings(epochs=3, lr=.005, batch=5, views=1))
    again = load_method(save_method(method, tmp_path / "restore"))
    assert again.adapters["text"].ratio == method.adapters["text"].ratio > .1
    assert torch.equal(again.regularisers[0].text_start, method.regularisers[0].text_start)
    assert torch.allclose(again.predict(IMAGES), method.predict(IMAGES), atol=1e-5)


def test_published_settings_differ_from_data_set_to_data_set():
    settings = METHODS["coprompt"].published
    assert settings("base-to-new", "oxford_flowers") == {"depth": 9, "length": 4, "weight": 8} and settings("base-to-new", "eurosat")["weight"] == .1
    assert settings("base-to-new", "food101")["epochs"] == 5 and settings("base-to-new", "unheard of") == {"depth": 9, "length": 2, "weight": 1}
    assert METHODS["restore"].published("cross-dataset", "imagenet")["epochs"] == 2 and METHODS["restore"].published("base-to-new", "dtd")["shift_weight"] == .5


def test_claims_name_their_controls():
    arms = {a.name for a in find_claim("coprompt").arms}
    assert {"strong views", "adapters", "adapters alone", "no adapters", "same view", "template teacher", "MaPLe", "KgCoOp", "zero-shot"} <= arms
    arms = {a.name for a in find_claim("restore").arms}
    assert {"language only", "vision only", "IVLP", "MaPLe", "prompt shift", "surgery", "feature shift", "total shift", "zero-shot"} <= arms


# errors -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, settings, message", [
    ("coprompt", {"depth": 99}, "does not fit"), ("restore", {"depth": 99}, "does not fit"), ("coprompt", {"length": 99}, "leave no room"), ("restore", {"length": 99}, "leave no room"),
    ("coprompt", {"text_mix": 1.2}, "between 0 and 1"), ("coprompt", {"image_mix": -.1}, "between 0 and 1"), ("restore", {"text_ratio": 2.}, "between 0 and 1"), ("restore", {"vision_ratio": -1.}, "between 0 and 1"),
    ("coprompt", {"distance": "euclid"}, "Unknown distance 'euclid': use cosine or mse"), ("restore", {"penalty": "shift"}, "Unknown penalty 'shift': use prompts, features, total"),
    ("restore", {"depth": 1}, "depth of at least 2"), ("coprompt", {"weight": -1.}, "cannot be negative"), ("restore", {"shift_weight": -1.}, "cannot be negative")])
def test_bad_settings_are_one_clear_error(backbone, name, settings, message):
    with pytest.raises(ValueError, match=message): build(name, backbone, DATA.classes, **settings)


def test_missing_or_unequal_descriptions(backbone, tmp_path):
    with pytest.raises(ValueError, match="no description of the class 'teapot'"): build("coprompt", backbone, ["plain", "teapot"])
    with pytest.raises(FileNotFoundError, match="nowhere.json"): find_descriptions(["plain"], str(tmp_path / "nowhere.json"))
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"cat": ["a pet.", "it purrs."], "dog": ["a pet that barks."], "cow": []}))
    with pytest.raises(ValueError, match="same number of descriptions, at least one; these have 1 to 2"): build("coprompt", backbone, ["cat", "dog"], descriptions=str(mine))
    with pytest.raises(ValueError, match="at least one"): find_descriptions(["cow"], str(mine))
    assert build("coprompt", backbone, ["cat"], descriptions=str(mine)).regularisers[0].teacher.sentences.shape[:2] == (2, 1)


def test_descriptions_belong_to_the_right_class():
    described = consistency.universe_descriptions()
    for name in ("flowers", "digits"):
        classes = load_data(name).classes
        assert find_descriptions(classes) == [described[name][c] for c in classes]
        assert find_descriptions(classes[::-1]) == [described[name][c] for c in classes[::-1]]


@pytest.mark.parametrize("name, make", [
    ("coprompt", lambda b, names: consistency.DescriptionConsistency(1., DescriptionTeacher(b, names, [["a thing."]] * len(names)))),
    ("restore", lambda b, names: FeatureShift(1., Teacher(b, names, "a photo of a {}.")))])
def test_teacher_of_other_classes(backbone, name, make):
    names = list(DATA.classes)
    for wrong in (names[::-1], names[:-1], [*names[:-1], "teapot"]):
        method = build(name, backbone, names, **({"weight": 0.} if name == "coprompt" else {"shift_weight": 0.}))
        method.regularisers.append(make(backbone, wrong))
        with pytest.raises(ValueError, match="built for other class names"): one_step(method)


def test_partial_correlation_refuses_a_constant():
    with pytest.raises(ValueError, match="does not vary"): consistency.partial_correlation([1., 2, 3], [3., 1, 2], given=[5., 5, 5])


# exercises ---------------------------------------------------------------------------------------------------------
CHECKERS = ["check_consistency", "check_adapter", "check_expected_penalty", "check_gram", "check_ratio_schedule"]


def test_every_folded_solution_passes_its_checker(): check_solutions(consistency, CHECKERS, "22_consistency")


def late(epochs, start, rate, norms):
    """The jump comes one epoch early; an update in every epoch is the other mistake."""
    after = start + rate * sum(norms) / len(norms)
    return [start if e < epochs // 3 else after for e in range(epochs)] + [after]


mix = lambda z, a, m: m * a + (1 - m) * z
WRONG = [
    ("check_consistency", lambda t, a, u, b: 2 - (t * a).sum(-1).mean() - (u * b).sum(-1).mean()),
    ("check_consistency", lambda t, a, u, b: 1 - F.cosine_similarity(torch.cat([t, u]), torch.cat([a, b])).mean()),
    ("check_adapter", lambda z, d, u, m: mix(z, torch.relu(z @ d.T) @ u.T, m)), ("check_adapter", lambda z, d, u, m: z + m * torch.relu(torch.relu(z @ d.T) @ u.T)),
    ("check_expected_penalty", lambda s, k: 1 - (s * F.normalize(k.mean(0), dim=-1)).sum(-1).mean()), ("check_expected_penalty", lambda s, k: 1 - (s * k).sum(-1).max(0).values.mean()),
    ("check_gram", lambda v: v.pow(2).sum().sqrt()), ("check_gram", lambda v: v.pow(4).sum()),
    ("check_ratio_schedule", late), ("check_ratio_schedule", lambda E, s, r, n: [s + r * sum(n) / len(n) * e / E for e in range(E + 1)]),
    ("check_ratio_schedule", lambda E, s, r, n: [s if e <= E // 3 else s + r * sum(n) for e in range(E)] + [s + r * sum(n)])]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(consistency, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)
