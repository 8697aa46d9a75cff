"""Textual Inversion and ConES: the card's checkable facts on random weights of both kinds of pipeline, sabotage that makes them fail, diffusers' own loader, protocols, costs, errors, exercises."""
import pytest
import torch
import torch.nn.functional as F

from exercises import folded_solutions
from promptbook import diffusion as cones
from promptbook import experiment as ex
from promptbook.diffusion import (CONCEPTS, ConceptEmbedding, ConceptLoRA, TextualInversion, bench_concepts, concept_costs, concept_layout, draw_concept, kept_rows, located, novel_concept, placed_sentences,
                                  same_length, save_words, steps_to)
from promptbook.experiment import CLAIMS, Experiment
from promptbook.generators import STUDIO, Generator, PromptedPictures, draw, freeze, noise, noise_schedule, random_stable_diffusion, unet_config, with_clip
from promptbook.learn import FitSettings, build, fit, load_method, save_method, trained
from promptbook.measure import tensor_hash
from promptbook.universe import load_data
from promptbook.zoo import load

NOTEBOOK = "40_diffusion"
PICTURES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ADAM = dict(optimizer="adamw", schedule="constant", weight_decay=0.)


def pixels():
    "A small generator of our own kind, random weights."
    from diffusers import UNet2DConditionModel
    torch.manual_seed(3)
    return Generator("random pixels", freeze(with_clip(UNet2DConditionModel(**unet_config(widths=(16, 16, 32))), noise_schedule())))


@pytest.fixture(scope="module")
def generators(): return {"pixels": pixels(), "stable diffusion": random_stable_diffusion()}


@pytest.fixture(scope="module")
def clip(): return load("tiny-clip")


@pytest.fixture(scope="module")
def data(): return load_data("textures")


# facts ---------------------------------------------------------------------------------------------------------------
CHECKS = {"check_cones_trained_numbers": lambda g, c, d: (g, c), "check_cones_start": lambda g, c, d: (g,), "check_cones_nesting": lambda g, c, d: (g,), "check_cones_no_encoder": lambda g, c, d: (g,), "check_cones_repetition": lambda g, c, d: (g,),
          "check_cones_cost": lambda g, c, d: (g, c), "check_cones_decay": lambda g, c, d: (g,)}


@pytest.mark.parametrize("kind", ("pixels", "stable diffusion"))
@pytest.mark.parametrize("check", CHECKS)
def test_facts_hold_on_any_weights(generators, clip, data, check, kind): getattr(cones, check)(*CHECKS[check](generators[kind], clip, data))


def test_fact_6_on_any_weights(backbone): cones.check_cones_cosine(backbone, ["red star", "blue ring", "heart"], PICTURES, torch.tensor([0, 1, 2, 0, 1, 2]))


def leaky(self, sentences, real=ConceptEmbedding.states):
    if self.generator.text_encoder is not None: self.generator.states(["a star."])
    return real(self, sentences)


SABOTAGE = [
    ("check_cones_trained_numbers", "the start row is forgotten", lambda m: m.setattr(cones, "kept_rows", lambda length, tokens: list(range(1, length)))),
    ("check_cones_start", "start from another sentence", lambda m: m.setattr(ConceptEmbedding, "context", lambda self, real=ConceptEmbedding.context: real(self).roll(1, 0))),
    ("check_cones_nesting", "rows are normalised again", lambda m: m.setattr(ConceptEmbedding, "context", lambda self, real=ConceptEmbedding.context: F.layer_norm(real(self), real(self).shape[-1:]))),
    ("check_cones_no_encoder", "the encoder runs in each step", lambda m: m.setattr(ConceptEmbedding, "states", leaky)),
    ("check_cones_no_encoder", "the context is detached", lambda m: m.setattr(ConceptEmbedding, "context", lambda self, real=ConceptEmbedding.context: real(self).detach() + 0 * self.vectors.sum())),
    ("check_cones_repetition", "padded with zeros", lambda m: m.setattr(cones, "same_length", lambda a, b: (F.pad(a, (0, 0, 0, 8)), b))),
    ("check_cones_cost", "the encoder runs in each step", lambda m: m.setattr(ConceptEmbedding, "states", leaky)),
    ("check_cones_decay", "both are residual", lambda m: m.setattr(ConceptEmbedding, "context", lambda self: self.base.index_add(0, self.free, self.vectors)))]


@pytest.mark.parametrize("check, name, sabotage", SABOTAGE, ids=[f"{c}: {n}" for c, n, _ in SABOTAGE])
def test_facts_can_fail(generators, clip, data, monkeypatch, check, name, sabotage):
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)): getattr(cones, check)(*CHECKS[check](generators["pixels"], clip, data))


def test_cosine_can_fail(backbone, monkeypatch):
    monkeypatch.setattr(cones.ConceptClassifier, "text_features", lambda self, prompts=None, texts=None: self.vectors)
    with pytest.raises(AssertionError): cones.check_cones_cosine(backbone, ["red star", "blue ring", "heart"], PICTURES, torch.tensor([0, 1, 2, 0, 1, 2]))


# Textual Inversion ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", (1, 4))
def test_diffusers_reads_our_words(words, tmp_path):
    "The file goes through diffusers' own loader, and the pipeline draws the same picture from the new word."
    g = random_stable_diffusion()
    method = TextualInversion(g, words)
    with torch.no_grad(): method.vectors.normal_()
    ours = draw_concept(method, ["a {} on a navy ground."], steps=2)
    g.pipeline.load_textual_inversion(str(save_words(method, tmp_path / "word.safetensors", "newconcept")))
    embeds = g.pipeline.encode_prompt("a newconcept on a navy ground.", "cpu", 1, False)[0]
    theirs = draw(g, states=embeds, latents=noise(g, 1), steps=2)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, draw(g, ["a thing on a navy ground."], steps=2))


def test_only_the_new_rows_train(generators):
    g = generators["stable diffusion"]
    method, before = TextualInversion(g, 2), tensor_hash(g.text_encoder)
    fit(method, novel_concept(1, size=g.size).train, FitSettings(epochs=2, lr=.1, batch=4, **ADAM))
    assert list(trained(method)) == ["vectors"] and tensor_hash(g.text_encoder) == before and not torch.equal(method.vectors[0], TextualInversion(g, 2).vectors[0])


def test_gradient_reaches_the_words_through_the_encoder(generators):
    g = generators["pixels"]
    method = TextualInversion(g)
    states = method.states(["a {} on a navy ground."])
    slope, = torch.autograd.grad(states[0, 2:5].sum(), method.vectors)
    earlier, = torch.autograd.grad(method.states(["a {} on a navy ground."])[0, :2].sum(), method.vectors)
    assert slope.abs().max() > 0 and earlier.abs().max() == 0                # the mask is causal: words before it do not know of it


def test_words_stand_where_the_braces_are(generators):
    g = generators["pixels"]
    ids, slots = concept_layout(g, ["a {} on a ground.", "a photo of a {}."], [7, 7])
    assert slots.tolist() == [[2, 3], [5, 6]] and (ids.gather(1, slots) == 7).all() and ids.shape[1] == g.tokenizer.model_max_length
    same = concept_layout(g, ["a star on a ground.".replace("star", "{}")], cones.token_ids(g, "star"))[0]
    assert torch.equal(same, g.ids(["a star on a ground."]))


# ConES ---------------------------------------------------------------------------------------------------------------
def test_rows_of_a_short_context():
    assert kept_rows(32, 8) == list(range(32)) and kept_rows(8, 8) == list(range(8)) and kept_rows(4, 8) == [0, 5, 6, 7] and kept_rows(1, 8) == [7]


def test_random_rows_have_the_scale_of_encoded_ones(generators):
    g = generators["stable diffusion"]
    made, real = ConceptEmbedding(g, init="random").context(), g.states(["a photo of a thing."])
    assert abs(made.std() / real.std() - 1) < .1


def test_frozen_rows_stay(generators):
    g = generators["pixels"]
    method = ConceptEmbedding(g, padding="freeze", start=False)
    before = method.context().detach().clone()
    fit(method, novel_concept(1).train, FitSettings(epochs=2, lr=.1, batch=4, **ADAM))
    moved = (method.context() != before).any(1)
    assert moved.tolist() == [False] + [True] * 7 + [False] * 24             # [SOS] a photo of a thing . [EOS], then padding


def test_modes_put_the_concept_where_they_say(generators):
    g = generators["pixels"]
    sentence = "a {} on a navy ground."
    plain = g.states(["a thing on a navy ground."])[0]
    changed = {}
    for mode, length in (("slot", 1), ("append", 3)):
        method = ConceptEmbedding(g, mode=mode, length=length)
        with torch.no_grad(): method.vectors.fill_(5.)
        states = method.written([sentence])[0]
        assert len(states) == len(plain)
        changed[mode] = (states != plain).any(1).nonzero()[:, 0].tolist()
    assert changed == {"slot": [2], "append": [29, 30, 31]}
    full, short = ConceptEmbedding(g), ConceptEmbedding(g, length=4)
    assert torch.equal(full.states([sentence]), full.states(["a star {}."])) and full.written([sentence]).shape[1] == 64 and short.written([sentence]).shape[1] == 32
    residual = ConceptEmbedding(g, mode="slot", init="residual")
    assert torch.equal(residual.written([sentence])[0], plain)               # a shift of 0 leaves every sentence as it is


def test_slot_mode_leaks_the_placeholder(generators):
    "Words behind the slot were encoded with the placeholder noun: another noun gives other neighbours."
    g = generators["pixels"]
    a, b = (ConceptEmbedding(g, mode="slot", word=w).written(["a {} on a navy ground."])[0] for w in ("thing", "star"))
    assert torch.equal(a[:2], b[:2]) and not torch.allclose(a[3:], b[3:], atol=1e-3)


def test_short_contexts_draw_with_a_full_blank_branch(generators):
    g = generators["stable diffusion"]
    method = ConceptEmbedding(g, length=8)
    states, blank = same_length(method.states([""]), g.blank())
    assert states.shape[1] == blank.shape[1] == 32
    x, t = noise(g, 1), torch.tensor([500])
    with torch.no_grad(): assert torch.allclose(g.unet(x, t, encoder_hidden_states=states).sample, g.unet(x, t, encoder_hidden_states=method.states([""])).sample, atol=1e-5)
    assert draw_concept(method, seeds=2, steps=1).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name, settings", [("cones", {"length": 8}), ("cones", {"init": "residual", "mode": "slot"}), ("textual-inversion", {"words": 2}), ("cones-lora", {"rank": 2})])
def test_saved_and_loaded(name, settings, tmp_path):
    make = lambda: pixels()
    method = build(name, make(), ["thing"], "a photo of a {}.", **settings)
    fit(method, novel_concept(1).train, FitSettings(epochs=4, lr=.05, batch=4, **ADAM))
    back = load_method(save_method(method, tmp_path), make())
    assert torch.equal(draw_concept(back, seeds=1, steps=2), draw_concept(method, seeds=1, steps=2))


# stage 2 -------------------------------------------------------------------------------------------------------------
def test_two_stages_train_one_after_the_other():
    method = build("cones-lora", pixels(), ["thing"], "a photo of a {}.", share=.5)
    first, seen = method.concept.context().detach().clone(), []
    class Watch(cones.Hook):
        def after_epoch(self, run): seen.append((method.concept.context().detach().clone(), torch.cat([p.detach().flatten() for p in method.lora]).clone()))
    fit(method, novel_concept(1).train, FitSettings(epochs=4, lr=.05, batch=4, **ADAM), hooks=[Watch()])
    contexts, changes = zip(*seen)
    assert not torch.equal(contexts[1], first) and torch.equal(contexts[3], contexts[1]) and torch.equal(changes[0], changes[1]) and not torch.equal(changes[3], changes[1])
    names = {n.split(".lora_")[0].split(".")[-1] for n, _ in method.generator.unet.named_parameters() if "lora_" in n}
    assert names == {"to_k", "to_v"} and all(".attn2." in n for n, _ in method.generator.unet.named_parameters() if "lora_" in n)


def test_lora_alone_starts_as_the_plain_sentence_and_can_be_removed():
    g = pixels()
    before = draw(g, ["a photo of a thing."], steps=2)
    method = build("cones-lora", g, ["thing"], "a photo of a {}.", share=0.)
    assert torch.equal(draw_concept(method, seeds=1, steps=2), before) and not any(n.startswith("concept.") for n in trained(method))
    fit(method, novel_concept(1).train, FitSettings(epochs=2, lr=.05, batch=4, **ADAM))
    method.remove()
    assert torch.equal(draw(g, ["a photo of a thing."], steps=2), before)


# concepts, protocols -------------------------------------------------------------------------------------------------
def test_concepts_are_unknown_to_the_generator():
    for c in CONCEPTS: assert all(word not in STUDIO[a] for a, word in c.items())
    one = novel_concept(3)
    assert len(one.train) == 4 and len(one.test) == 32 and all(p.count("{}") == 1 for p in one.train.prompts) and torch.equal(one.train.images, novel_concept(3).train.images)
    assert {novel_concept(s).said for s in (1, 2, 3, 4, 5)}.isdisjoint({novel_concept(s).said for s in CLAIMS["cones"].tuning_seeds})
    assert all(tone in STUDIO["tone"] and ground in STUDIO["background"] for tone, ground in one.grounds) and len(placed_sentences(one)) == 16


def test_steps_to_most_of_the_way():
    assert steps_to([0, 10, 20, 30], [0., 50., 90., 100.]) == pytest.approx(25) and steps_to([0, 10], [0., 0.]) == 0
    assert steps_to([0, 10, 20], [-100., 90., 80.]) < 10


def test_judging_reads_the_concept_off_true_pictures():
    concept = novel_concept(1)
    seen = cones.judged(concept, concept.test.images, concept.test.images[:16])
    assert seen["fidelity"] > 60 and cones.judged(novel_concept(2), concept.test.images, concept.test.images[:16])["fidelity"] < seen["fidelity"]


@pytest.mark.parametrize("method, settings", [("hand-prompt", {}), ("textual-inversion", {}), ("cones", {"length": 4}), ("cones-lora", {"share": .5})])
def test_personalise_on_a_stable_diffusion(generators, monkeypatch, method, settings):
    monkeypatch.setattr(cones, "load_generator", lambda *a: random_stable_diffusion())
    row = cones.personalise(Experiment(method, "x", "novel-concepts", "personalise", 1, settings | ({} if method == "hand-prompt" else {"epochs": 2}) | {"steps": 1, "every": 1}))
    assert 0 <= row["fidelity"] <= 100 and (method == "hand-prompt" or row["at"] == [0, 1, 2] and len(row["gains"]) == 3 and row["ms a step"] > 0)


def test_a_concept_is_drawn_by_another_checkpoint(generators, monkeypatch):
    """With a style the concept is learned on the base and drawn by the other checkpoint; the judge gets pictures with the style taken off."""
    base, other, seen = generators["pixels"], pixels(), []
    with torch.no_grad(): other.unet.conv_out.weight.mul_(-1)
    monkeypatch.setattr(cones, "generator_of", lambda *a: base); monkeypatch.setattr(cones, "restyled", lambda *a: other)
    monkeypatch.setattr(cones, "judged", lambda concept, alone, placed: seen.append((alone, placed)) or {"fidelity": 0.})
    short = {"epochs": 2, "steps": 1, "every": 1, "lr": .1}
    home, moved = (cones.personalise(Experiment("cones", "x", "novel-concepts", "personalise", 1, short | {"style": style})) for style in ("photo", "faded"))
    assert home["gains"] == moved["gains"], "the same training"
    method = build("cones", base, ["x"], cones.ConceptMethod.template, 1)
    fit(method, novel_concept(1, 4, size=base.size).train, FitSettings(epochs=2, lr=.1, batch=4, optimizer="adamw", schedule="linear", weight_decay=0.), 1)
    wanted = cones.undone(draw_concept(method.onto(other), None, 16, steps=1), "faded")
    assert (seen[1][0].int() - wanted.int()).abs().max() <= 1 and not torch.equal(seen[0][0], seen[1][0]) and method.generator is base
    with pytest.raises(ValueError, match="can be undone"): ex.run(Experiment("cones", "tiny-diffusion", "novel-concepts", "personalise", 1, {"style": "sketch"}))


def test_step_cost_takes_turns(monkeypatch):
    monkeypatch.setattr(cones, "load_generator", lambda *a: pixels())
    row = cones.step_cost(Experiment("cones", "x", "a step", "step-cost", 1, {"rounds": 1}))
    assert row["operations"] == 1 and row["relative"] > 0
    row = cones.step_cost(Experiment("cones-classifier", "tiny-clip", "a step of 100 classes", "step-cost", 1, {"rounds": 1}))
    assert row["operations"] == 1


def test_costs_are_stored_and_read(tmp_path):
    g = random_stable_diffusion()
    table = bench_concepts(g, "tiny-clip", classes=10, rounds=1, store=tmp_path / "bench.jsonl")
    again = concept_costs(tmp_path / "bench.jsonl")
    assert list(table.index) == list(again.index) and len(table) == 8 and (table["ms a step"] > 0).all()
    assert table.loc[("generation", g.name, "ConES"), "GFLOP"] < table.loc[("generation", g.name, "Textual Inversion"), "GFLOP"]


def test_small_bench_generator_has_the_shape_of_the_large_one():
    g = cones.bench_generator("bf16", small=True)
    assert g.unet.dtype == torch.bfloat16 and cones.concept_steps(g)["ConES"].method.vectors.dtype == torch.float32
    cones.concept_steps(g)["Textual Inversion"]()


# classification and grounding -----------------------------------------------------------------------------------------
def test_class_vectors_exist_for_their_classes_only(clip):
    for name in ("cones-classifier", "linear-probe"):
        with pytest.raises(ValueError, match="only for the classes"): build(name, clip, ["star", "ring"]).for_classes(["heart", "cross"])


def test_no_text_pass_in_a_classification_step(clip, data):
    method, calls = build("cones-classifier", clip, data.classes), []
    handle = clip.model.text_model.register_forward_hook(lambda *a: calls.append(1))
    inner = clip.model.text_model.encoder.layers[0].register_forward_hook(lambda *a: calls.append(1))
    try: method(method.prepare(data.train.images[:8]), data.train.labels[:8])["loss"].backward()
    finally: handle.remove(); inner.remove()
    assert not calls


def test_patches_add_up_to_the_class_token(clip, data):
    "What the tokens add, and the bias, is what the last attention adds to the class token."
    from promptbook.prompts import VisionTower
    images = data.train.images[:2]
    tower, kept = VisionTower(clip.model), []
    handle = tower.blocks[-1].self_attn.register_forward_hook(lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[:, 0]))
    with torch.no_grad():
        hidden = tower.begin(tower.embed(clip.pixels(images)))
        for j in range(len(tower.blocks)): hidden = tower.block(j, hidden)
    handle.remove()
    added = cones.added_to_class_token(clip, images)[0]
    with torch.no_grad(): assert torch.allclose(added.sum(1) + tower.blocks[-1].self_attn.out_proj.bias, kept[0], atol=1e-4)


def test_targets_mark_the_patches_of_a_thing():
    found = located("shape", 20, 3)
    targets = found.targets(4, 16)
    assert targets.shape == (20, 16, 16) and (found.labels[:, 0] != found.labels[:, 1]).all()
    for k in range(20):
        for slot in (0, 1):
            share = F.adaptive_avg_pool2d(found.masks[k, slot][None, None].float(), 4).flatten()
            assert torch.equal(targets[k, :, found.labels[k, slot]].bool(), share >= .25)


def test_grounding_learns(clip):
    row = cones.localise(Experiment("grounder", "tiny-clip", "pairs:colour", "localise", 1, {"source": "concept", "epochs": 20, "tests": 60, "lr": .05}))
    assert set(row) >= {"pointing", "iou", "val_pointing"} and row["trainable"] == 12 * 128 + 2


# errors, exercises ---------------------------------------------------------------------------------------------------
ERRORS = [("1 to 32 rows, not 33", lambda g, c: ConceptEmbedding(g, length=33)), ("1 to 32 rows, not 0", lambda g, c: ConceptEmbedding(g, length=0)), ("Unknown init 'zero'", lambda g, c: ConceptEmbedding(g, init="zero")),
          ("Unknown mode 'front'", lambda g, c: ConceptEmbedding(g, mode="front")), ("Unknown padding", lambda g, c: ConceptEmbedding(g, padding="mask")), ("must have exactly one {}", lambda g, c: ConceptEmbedding(g, "a photo of a star.")),
          ("prompt is empty", lambda g, c: TextualInversion(g).states(["  "])), ("at least 1 picture", lambda g, c: novel_concept(1, 0)), ("at least one new word", lambda g, c: TextualInversion(g, 0)),
          ("There is no picture", lambda g, c: TextualInversion(g).columns(PromptedPictures(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), ()))), ("is empty: use a noun", lambda g, c: ConceptEmbedding(g, word="")),
          ("use fewer places", lambda g, c: TextualInversion(g, 40).states(["a {}."])), ("share lies in", lambda g, c: ConceptLoRA(ConceptEmbedding(g), share=1.)), ("needs the concept's name", lambda g, c: build("hand-prompt", g, [])),
          ("no data set for personalisation", lambda g, c: ex.run(Experiment("cones", "tiny-diffusion", "flowers", "personalise", 1))), ("prompts no image generator", lambda g, c: ex.run(Experiment("coop", "tiny-diffusion", "novel-concepts", "personalise", 1))),
          ("no attribute to be found", lambda g, c: ex.run(Experiment("grounder", "tiny-clip", "pairs:size", "localise", 1))), ("no measurement", lambda g, c: ex.run(Experiment("cones", "tiny-diffusion", "two steps", "step-cost", 1))),
          ("Unknown source 'words'", lambda g, c: build("grounder", c, ["star"], source="words")), ("Unknown precision", lambda g, c: cones.bench_generator("fp8"))]


@pytest.mark.parametrize("text, call", ERRORS, ids=[t for t, _ in ERRORS])
def test_errors_are_one_sentence(generators, clip, text, call):
    with pytest.raises(ValueError) as found: call(generators["pixels"], clip)
    assert text in str(found.value) and "\n" not in str(found.value)


def test_claims_are_complete():
    for name in ("cones", "cones-speed", "cones-speed-classes", "cones-classification", "cones-grounding"):
        claim = CLAIMS[name]
        sizes = {len(a.points()) for a in claim.arms if a.grid}
        assert claim.paper == "cones" and len(sizes) <= 1 and len(claim.seeds) >= 5
        ex.full_scale_claim(claim)


CHECKERS = ["check_same_context", "check_slots", "check_concept_count", "check_fewer_steps"]


PLANTED = [("check_same_context", lambda a, b: (F.pad(a, (0, 0, 0, b.shape[1] - a.shape[1])), b) if a.shape[1] < b.shape[1] else (a, b)), ("check_same_context", lambda a, b: (a.repeat(1, b.shape[1], 1), b)),
           ("check_slots", lambda states, slots, h: torch.cat([states, h])), ("check_slots", lambda states, slots, h: states.index_add(0, slots, h)),
           ("check_concept_count", lambda length, width, tokens, padding, start: length * width), ("check_concept_count", lambda length, width, tokens, padding, start: (tokens if padding == "freeze" else length) * width),
           ("check_fewer_steps", lambda network, encoder, target: target), ("check_fewer_steps", lambda network, encoder, target: target * (network + encoder) / network)]


@pytest.mark.parametrize("checker, answer", PLANTED, ids=[f"{c} {k}" for k, (c, _) in enumerate(PLANTED)])
def test_wrong_answers_are_rejected(checker, answer):
    with pytest.raises(Exception): getattr(cones, checker)(answer)
