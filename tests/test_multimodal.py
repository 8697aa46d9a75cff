"""MaPLe and PromptSRC: the cards' checkable facts on other weights and widths, settings per protocol, clear errors, and the exercises' checkers."""

import pytest
import torch
import torch.nn.functional as F

from exercises import check_solutions
from promptbook import multimodal
from promptbook.experiment import CLAIMS
from promptbook.learn import METHODS, build, fit
from promptbook.prompts import Teacher, run_tower
from promptbook.universe import few_shot, load_data
from promptbook.zoo import load

DATA = load_data("textures")
IMAGES, LABELS = DATA.test.images[::30], DATA.test.labels[::30]


CHECKS = {"check_maple": lambda b: (b, DATA.classes, IMAGES), "check_maple_insertion": lambda b: (b, DATA.classes, IMAGES), "check_maple_gradients": lambda b: (b, DATA.classes, IMAGES, LABELS),
          "check_promptsrc": lambda b: (b, DATA.classes, few_shot(DATA.train, 1, 0)), "check_promptsrc_terms": lambda b: (b, DATA.classes, IMAGES, LABELS), "check_gaussian": lambda b: ()}


@pytest.mark.parametrize("check", CHECKS)
def test_facts_hold_on_any_weights(backbone, check):
    torch.manual_seed(5)
    getattr(multimodal, check)(*CHECKS[check](backbone))


def append_before_the_patches(tower, tokens, prompts, slots=None, at=0, start=0):
    """A re-implementation's mistake: cut the front of the sequence, where nothing was appended."""
    hidden, n = tokens, prompts[0].shape[-2] if prompts else 0
    put = lambda h, p: torch.cat([h, p.expand(len(h), -1, -1)], 1) if slots is None else h.scatter(1, slots[:, :, None].expand(len(h), -1, h.shape[-1]), p.expand(len(h), -1, -1))
    for j in range(len(tower.blocks)):
        if j == 0: hidden = tower.begin(put(hidden, prompts[0]) if prompts else hidden)
        elif j < len(prompts): hidden = put(hidden if slots is not None else torch.cat([hidden[:, :1], hidden[:, 1 + n:]], 1), prompts[j])
        hidden = tower.block(j, hidden)
    return tower.end(hidden, at)


def one_block_too_many(tower, tokens, prompts, slots=None, at=0, start=0):
    """Another one: the depth counts deep prompts, not prompted blocks."""
    return run_tower(tower, tokens, [*prompts, prompts[-1]] if prompts and len(prompts) < len(tower.blocks) else prompts, slots, at, start)


def with_gradient_to_the_images_only(self, image_features=None):
    read = self.text()
    return multimodal.Prompts([p.detach() for p in read], [c(p) for c, p in zip(self.couplers, read)])


SABOTAGE = [
    ("check_maple", "only deeper words", lambda m: m.setattr(multimodal, "text_prompts", lambda b, n, depth: multimodal.FreePrompts(n, 48, depth))),
    ("check_maple", "counter", lambda m: m.setattr("promptbook.prompts.run_tower", one_block_too_many)),
    ("check_maple_insertion", "wrong end", lambda m: m.setattr("promptbook.prompts.run_tower", append_before_the_patches)),
    ("check_maple_insertion", "counter", lambda m: m.setattr("promptbook.prompts.run_tower", one_block_too_many)),
    ("check_maple_gradients", "text prompts never hear the text", lambda m: m.setattr(multimodal.Coupled, "forward", with_gradient_to_the_images_only)),
    ("check_maple_gradients", "couplers frozen", lambda m: m.setattr(multimodal.Coupled, "__init__", (lambda start: lambda self, text, width, coupling="text": start(self, text, width, "frozen"))(multimodal.Coupled.__init__))),
    ("check_promptsrc", "average moved to the middle", lambda m: m.setattr(multimodal, "gaussian_weights", lambda E, mean=.75, std=.05: torch.full((E,), 1 / E, dtype=torch.float64))),
    ("check_promptsrc", "teacher always asked", lambda m: m.setattr(multimodal.PromptedCLIP, "image_teacher", property(lambda self: True))),
    ("check_promptsrc_terms", "batchmean", lambda m: m.setattr(multimodal.LogitDistance, "forward", (lambda forward: lambda self, o: forward(self, o) * o.logits.shape[1])(multimodal.LogitDistance.forward))),
    ("check_promptsrc_terms", "sum over features", lambda m: m.setattr(multimodal.ImageDistance, "forward", lambda self, o: (o.image - o.teacher).abs().sum(-1).mean())),
    ("check_promptsrc_terms", "teacher trained along", lambda m: m.setattr(multimodal.ImageDistance, "forward", lambda self, o: (o.image - o.text.mean()).abs().mean())),
    ("check_gaussian", "epochs from 0", lambda m: m.setattr(multimodal, "gaussian_weights", lambda E, mean=.75, std=.05: F.softmax(-.5 * ((torch.arange(E, dtype=torch.float64) - mean * E) / (std * E)) ** 2, 0))),
    ("check_gaussian", "not normalised", lambda m: m.setattr(multimodal, "gaussian_weights", lambda E, mean=.75, std=.05: torch.exp(-.5 * ((torch.arange(1, E + 1, dtype=torch.float64) - mean * E) / (std * E)) ** 2)))]


@pytest.mark.parametrize("check, name, sabotage", SABOTAGE, ids=[f"{c}: {n}" for c, n, _ in SABOTAGE])
def test_facts_can_fail(backbone, monkeypatch, check, name, sabotage):
    sabotage(monkeypatch)
    torch.manual_seed(5)
    with pytest.raises((AssertionError, ValueError, RuntimeError)): getattr(multimodal, check)(*CHECKS[check](backbone))


def test_each_check_has_a_sabotage():
    assert {c for c, _, _ in SABOTAGE} == set(CHECKS)


# controls and settings ---------------------------------------------------------------------------------------------
def test_the_controls_change_exactly_one_thing(backbone):
    made = {c: build("maple", backbone, DATA.classes, coupling=c) for c in multimodal.COUPLINGS}
    count = {c: sum(p.numel() for p in m.source.parameters() if p.requires_grad) for c, m in made.items()}
    text, maps = 3 * 2 * 48, 3 * (48 * 64 + 64)
    assert count == {"text": text + maps, "own": 2 * text + maps, "frozen": text, "shared": text + maps // 3}
    start = {c: m.source() for c, m in made.items()}
    for c in ("own", "frozen"):                                  # all start from the same prompts
        for tower in ("text", "vision"): assert all(torch.equal(a, b) for a, b in zip(getattr(start[c], tower), getattr(start["text"], tower)))
    own = made["own"]
    sum(v.sum() for v in own.source().vision).backward()
    assert all(p.grad is None for p in own.source.text.parameters()) and all(p.grad is not None for p in own.source.own.parameters())
    couplers = made["text"].source.couplers
    assert torch.equal(couplers[1].weight, couplers[2].weight) and couplers[1].weight is not couplers[2].weight and not torch.equal(couplers[0].weight, couplers[1].weight)


def test_published_settings_follow_the_cards():
    maple, src = METHODS["maple"].published, METHODS["promptsrc"].published
    assert maple("base-to-new", "dtd") == {"depth": 9} and maple("cross-dataset", "imagenet") == {"depth": 3, "lr": .0026, "epochs": 2}
    for data, mean, std in (("imagenet", 30, 30), ("caltech101", 30, 30), ("oxford_flowers", 45, 5), ("eurosat", 45, 5)):
        got = src("few-shot", data)
        assert (round(got["average_mean"] * 50), round(got["average_std"] * 50), got["depth"], got["epochs"]) == (mean, std, 9, 50)
    got = src("domain-generalisation", "imagenet")
    assert (round(got["average_mean"] * 20), round(got["average_std"] * 20), got["depth"]) == (6, 10, 3)
    assert METHODS["promptsrc"].full.epochs == 20 and len(set(multimodal.TEACHER_TEMPLATES["broad"])) == 60


def test_decisive_controls_are_arms_of_the_claims():
    assert {"IVLP", "couplers frozen", "no coupling, equal size", "language only", "vision only"} <= {a.name for a in CLAIMS["maple"].arms}
    assert {"IVLP, early stopping", "uniform averaging", "exponential averaging", "single template", "all three"} <= {a.name for a in CLAIMS["promptsrc"].arms}


# errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, settings, message", [
    ("maple", {"depth": 5}, "depth of 5 does not fit the text tower's 4 blocks"), ("maple", {"depth": 0}, "does not fit"), ("promptsrc", {"depth": 7, "text_length": 0}, "does not fit the vision tower"),
    ("maple", {"length": 40}, "leave no room for a class name"), ("promptsrc", {"text_length": 29}, "leave no room"), ("maple", {"coupling": "vision"}, "Unknown coupling 'vision': use text, own"),
    ("promptsrc", {"average": "median"}, "Unknown average 'median': use none, gaussian"), ("promptsrc", {"templates": "imagenet"}, "Unknown templates 'imagenet': use universe"),
    ("promptsrc", {"templates": []}, "at least one template"), ("promptsrc", {"logit_weight": -1.}, "cannot be negative"), ("maple", {"lenght": 2}, "no setting 'lenght'")])
def test_bad_settings_are_one_clear_error(name, settings, message):
    with pytest.raises(ValueError, match=message): build(name, load("tiny-clip"), DATA.classes, **settings)


def test_a_teacher_with_other_class_names_is_refused():
    backbone = load("tiny-clip")
    method = build("promptsrc", backbone, DATA.classes[:4])
    method.regularisers[0].teacher = Teacher(backbone, DATA.classes[3::-1], "a photo of a {}.")
    with pytest.raises(ValueError, match="teacher of 'text distance' was built for other class names"): method(method.prepare(IMAGES), LABELS.clamp(max=3))


def test_averages_need_as_many_weights_as_epochs():
    method = build("promptsrc", load("tiny-clip"), DATA.classes)
    method.trajectory[0].weights = [.5, .5]
    with pytest.raises(ValueError, match="needs 1 weights"): fit(method, few_shot(DATA.train, 1, 0), multimodal.FitSettings(epochs=1, views=1))


# exercises ---------------------------------------------------------------------------------------------------------
CHECKERS = ["check_replacement", "check_coupling_gradient", "check_epoch_weights", "check_logit_distance", "check_teacher"]


def test_every_folded_solution_passes_its_checker(): check_solutions(multimodal, CHECKERS, "21_multimodal")


def gaussian(E, mean, std, first=1, normal=True):
    w = torch.exp(-.5 * ((torch.arange(first, E + first, dtype=torch.float64) - mean) / std) ** 2)
    return w / w.sum() if normal else w


WRONG = [
    ("check_replacement", lambda hidden, prompt: torch.cat([hidden, prompt.expand(len(hidden), -1, -1)], 1)),                              # old prompts stay
    ("check_replacement", lambda hidden, prompt: torch.cat([hidden[:, len(prompt):], prompt.expand(len(hidden), -1, -1)], 1)),              # cuts the class token
    ("check_replacement", lambda hidden, prompt: torch.cat([hidden[:, :1], prompt.expand(len(hidden), -1, -1), hidden[:, 1 + len(prompt):]], 1)),
    ("check_coupling_gradient", lambda P, W, b, G: (G @ W, P.T @ G, G.sum(0))), ("check_coupling_gradient", lambda P, W, b, G: (G @ W, G.T @ P, G.mean(0))),
    ("check_epoch_weights", lambda E, mean, std: gaussian(E, mean, std, first=0)), ("check_epoch_weights", lambda E, mean, std: gaussian(E, mean, std, normal=False)),
    ("check_logit_distance", lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")), ("check_logit_distance", lambda s, t: (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).mean()),
    ("check_teacher", lambda raw: F.normalize(F.normalize(raw, dim=-1).mean(0), dim=-1)), ("check_teacher", lambda raw: raw.mean(0))]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(multimodal, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)
