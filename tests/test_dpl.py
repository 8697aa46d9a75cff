"""DPL: the card's checkable facts on random weights, sabotage that makes them fail, clear errors, the protocol, Stable Diffusion's classes and the exercises' checkers."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from exercises import check_solutions
from test_tprompter import CHECKERS as THEME_CHECKERS

from promptbook import editing as dpl
from promptbook.attention import Store, null_text
from promptbook.experiment import CLAIMS, Experiment, canonical, full_scale_claim
from promptbook.generators import Generator, freeze, load_judge, noise_schedule, random_stable_diffusion, unet_config, with_clip
from promptbook.learn import METHODS, build

NOTEBOOK = "41_editing"
SHORT = dpl.DPLSettings(steps=3, token_steps=2, null_steps=2)


@pytest.fixture(scope="module")
def generator():
    """A pixel generator with random weights and few channels; its maps are those of 16×16 places, too."""
    torch.manual_seed(0)
    return Generator("random", freeze(with_clip(UNet2DConditionModel(**unet_config(widths=(8, 16, 16))), noise_schedule())))


@pytest.fixture(scope="module")
def pairs(): return dpl.studio_pairs(3, seed=1)


@pytest.fixture(scope="module")
def given(pairs): return dict(images=pairs.images, captions=pairs.captions, nouns=pairs.nouns)


@pytest.fixture(scope="module")
def found(generator, given): return dpl.dynamic_prompt_learning(generator, **given, settings=SHORT)


# the card's facts -----------------------------------------------------------------------------------------------------
def test_facts_about_losses_thresholds_and_cost():
    for check in (dpl.check_dpl_losses_lie_between_0_and_1, dpl.check_dpl_the_background_loss_asks_for_peaks, dpl.check_dpl_thresholds_decrease, dpl.check_dpl_most_of_the_cost_is_null_text_inversion, dpl.check_dpl_clusters_find_the_ground): check()


def test_facts_about_a_run(generator, given, found, pairs):
    dpl.check_dpl_trained_numbers(found)
    dpl.check_dpl_own_vectors_change_nothing(generator, pairs.captions[0], pairs.nouns[0])
    dpl.check_dpl_no_word_steps_is_null_text_inversion(generator, **given, settings=SHORT)
    dpl.check_dpl_only_the_nouns_learn(generator, **given, settings=SHORT)
    dpl.check_dpl_pictures_are_tuned_as_if_alone(generator, **given, settings=SHORT)
    dpl.check_dpl_editing_into_itself(found)


def test_own_vectors_leave_the_maps_as_they_are(generator, pairs):
    ids, places = generator.ids(pairs.captions), dpl.noun_positions(generator, pairs.captions, pairs.nouns)
    latents, seen = generator.to_latents(pairs.images), []
    for states in (generator.states(pairs.captions), dpl.encode_with(generator, ids, places, dpl.word_vectors(generator, ids, places))):
        with torch.no_grad(), dpl.controlled(generator, Store(half="all")) as (store,): dpl.predict(generator, latents, 500, states)
        seen.append(store.maps(16))
    assert torch.equal(*seen)


def test_words_are_handed_on_and_recorded(found):
    assert len(found.tokens) == SHORT.steps and not torch.equal(found.tokens[0], found.tokens[-1])
    assert set(found.log.columns) >= {"step", "picture", "updates", *dpl.LOSSES, *(f"first {k}" for k in dpl.LOSSES)} and len(found.log) == 3 * SHORT.steps
    assert found.log["updates"].between(0, SHORT.token_steps).all()


def test_sabotage_a_carried_blank_is_noticed(generator, given, monkeypatch):
    monkeypatch.setattr(dpl, "null_text", lambda *a, carry, **k: null_text(*a, carry=True, **k))
    with pytest.raises(AssertionError): dpl.check_dpl_no_word_steps_is_null_text_inversion(generator, **given, settings=SHORT)


def test_sabotage_momentum_in_a_stopped_picture_is_noticed(generator, given, monkeypatch):
    """Were vectors of pictures that stopped not put back, Adam's momentum would go on moving them."""
    real, calls = dpl.token_losses, []
    def losses(generator, latents, t, states, nouns, background):                     # the first picture passes its test from the second look on
        calls.append(len(latents)); out = real(generator, latents, t, states, nouns, background)
        hard = torch.ones(len(latents)); hard[0] = 0. if len(calls) % 9 == 2 else 1.
        return {name: value * 0 + hard + value * 1e-3 for name, value in out.items()}
    monkeypatch.setattr(dpl, "token_losses", losses)
    ids, places = generator.ids(given["captions"]), dpl.noun_positions(generator, given["captions"], given["nouns"])
    vectors, ground = dpl.word_vectors(generator, ids, places), torch.ones(3, 16, 16)
    after, log = dpl.tune_words(generator, generator.to_latents(given["images"]), 0, ids, places, vectors, ground, replace(SHORT, token_steps=3))
    assert [row["updates"] for row in log] == [1, 3, 3]
    calls.clear()
    once, _ = dpl.tune_words(generator, generator.to_latents(given["images"]), 0, ids, places, vectors, ground, replace(SHORT, token_steps=1))
    assert torch.equal(after[0], once[0]) and not torch.equal(after[1], once[1])


def test_a_removed_loss_neither_pulls_nor_keeps_a_picture_open(generator, given):
    ids, places = generator.ids(given["captions"]), dpl.noun_positions(generator, given["captions"], given["nouns"])
    vectors, latents = dpl.word_vectors(generator, ids, places), generator.to_latents(given["images"])
    run = lambda **changes: dpl.tune_words(generator, latents, 0, ids, places, vectors, torch.zeros(3, 16, 16), replace(SHORT, **changes))
    assert all(row["updates"] == 0 for row in run(weights=(0., .05, 0.))[1])           # no ground: the background loss is met at once
    assert all(row["updates"] == 2 for row in run(weights=(0., .05, 0.), thresholds=False)[1])
    assert any(row["updates"] for row in run(weights=(1., .05, 0.))[1])                # maps of a random network are flat: the balance loss is not


def test_the_gaussian_reflects_and_keeps_what_it_is_given():
    maps = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(dpl.blur(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5)) and dpl.blur(maps).shape == maps.shape
    point = torch.zeros(1, 1, 5, 5); point[..., 2, 2] = 1
    assert [round(dpl.blur(point)[0, 0, 2, 2 + k].item(), 3) for k in (0, 1)] == [.332, .122] and round(dpl.blur(point)[0, 0, 1, 1].item(), 3) == .045


def test_the_balance_loss_leaves_out_the_first_and_the_last_position():
    attention = torch.zeros(1, 6, 6, 8); attention[..., 0] = attention[..., 7] = .9; attention[0, 2:5, 2:5, 3] = .5
    nouns = torch.tensor([[3]])
    assert dpl.balance_loss(attention, nouns).item() < 1e-3, "start token and last position would have won the softmax"
    attention[..., 5] = .9
    assert dpl.balance_loss(attention, nouns).item() > .99, "another token does win it"


# places of words ------------------------------------------------------------------------------------------------------
def test_positions_of_a_noun_named_twice_and_of_a_noun_of_several_pieces(generator):
    caption = "a red circle beside a pink circle."
    assert dpl.noun_positions(generator, [caption], [["circle", "circle"]]).tolist() == [[3, 7]]
    pieces = generator.tokenizer("zebra", add_special_tokens=False).input_ids
    if len(pieces) > 1: assert dpl.noun_positions(generator, ["a zebra over a ring."], [["zebra", "ring"]]).tolist() == [[1 + len(pieces), 4 + len(pieces)]]


def test_targets_keep_tuned_words_where_they_stand_and_the_table_elsewhere(generator, found, pairs):
    prompts = [c.replace(f" {n[0]} ", " heart ", 1) for c, n in zip(pairs.captions, pairs.nouns)]
    ids, places, kept = found.target_places(prompts)
    assert torch.equal(places, found.nouns) and kept.tolist() == [[n[0] == "heart", True] for n in pairs.nouns]
    longer = [c.replace("a ", "a striped ", 1) for c in pairs.captions]
    _, places, kept = found.target_places(longer, "refine")
    assert torch.equal(places, found.nouns + 1) and kept.all()
    states, plain = found.states(prompts)[-1], generator.states(prompts)
    second = int(found.nouns[0, 1])
    assert torch.equal(states[0, :second], plain[0, :second]) and not torch.allclose(states[0, second], plain[0, second])


# errors ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, message", [
    (dict(captions=("a red star.",) * 2), "3 pictures but 2 captions"), (dict(nouns=[["unicorn"]] * 3), "'unicorn' does not stand in the prompt"), (dict(nouns=[["thing"], [], ["thing"]]), "same number of nouns"),
    (dict(nouns=[["a"]] * 2), "3 captions but 2 lists of nouns"), (dict(nouns=[["ground", "ground"]] * 3), "named 2 times but stands 1 times")])
def test_inputs_that_do_not_fit(generator, given, change, message):
    with pytest.raises(ValueError, match=message): dpl.dynamic_prompt_learning(generator, **{**given, **change}, settings=SHORT)


def test_one_noun_is_no_error(generator, given):
    one = dpl.dynamic_prompt_learning(generator, given["images"], given["captions"], [n[:1] for n in given["nouns"]], replace(SHORT, steps=1))
    assert one.tokens[0].shape[1] == 1 and (one.log["disjoint"] == 0).all()


def test_a_mask_that_covers_nothing(pairs):
    masks = pairs.masks.clone(); masks[1, 0] = False
    with pytest.raises(ValueError, match="The mask of thing 1 in picture 2 covers nothing"): dpl.true_background(masks)


def test_an_edit_of_another_number_of_pictures_and_an_unknown_control(found, generator):
    with pytest.raises(ValueError, match="3 pictures but 1 target prompts"): dpl.edit_pictures(found, ["a heart."])
    with pytest.raises(ValueError, match="Unknown mask 'guess'"): build("dpl", generator, (), "", mask="guess")


# masks, measures, edits -----------------------------------------------------------------------------------------------
def test_pairs_are_what_their_captions_say(pairs):
    read = load_judge().read(dpl.studio_pairs(32, seed=5).images); many = dpl.studio_pairs(32, seed=5)
    for slot, prefix in enumerate(("", "second_")):
        for name in ("shape", "colour"): assert (read[prefix + name] == torch.tensor([dpl.JUDGED[name].index(w[slot][name]) for w in many.words])).float().mean() > .9
    assert all(n in c for n, c in zip([n for row in pairs.nouns for n in row], [c for c in pairs.captions for _ in (0, 1)])) and pairs.masks.flatten(2).any(-1).all()
    assert many.alike.tolist() == [k % 2 == 1 for k in range(32)] and torch.equal(many.images, dpl.studio_pairs(32, seed=5).images)


def test_true_background_knows_the_ground_and_the_own_thing(pairs):
    ground, own = dpl.true_background(pairs.masks, grow=False), dpl.true_background(pairs.masks, grow=False, own=True)
    assert ground.shape == (3, 16, 16) and own.shape == (3, 2, 16, 16) and (own >= ground[:, None]).all() and (dpl.true_background(pairs.masks) >= ground).all()
    assert dpl.background_loss(F.avg_pool2d(pairs.masks.float(), 2), ground).max() < dpl.background_loss(F.avg_pool2d(pairs.masks.flip(1).float(), 2), own).min()


def test_scores_of_perfect_flat_and_swapped_maps(pairs):
    perfect, flat, swapped = (dpl.map_scores(m, pairs.masks) for m in (pairs.masks.float(), torch.ones(3, 2, 16, 16), pairs.masks.flip(1).float()))
    assert (perfect["iou"] == 100).all() and torch.allclose(perfect["own"], torch.ones(3, 2)) and (swapped["iou"] == 0).all() and torch.allclose(swapped["other"], torch.ones(3, 2))
    assert torch.allclose(flat["own"], pairs.masks.float().mean((2, 3))) and torch.allclose(sum(flat[k] for k in ("own", "other", "ground")), torch.ones(3, 2))


def test_scores_of_edits_that_are_right_wrong_and_spilled():
    pairs, judge = dpl.studio_pairs(6, seed=2), load_judge()
    change = dpl.pair_edits(pairs, 0)[1]
    kept = dpl.edit_scores(judge, pairs, change, pairs.images)
    assert kept["success"].sum() == 0 and kept["kept"].mean() > .8 and kept["inside"].sum() == kept["spill"].sum() == 0
    white = torch.where(pairs.masks[torch.arange(6), change.thing][:, None], torch.tensor(255, dtype=torch.uint8), pairs.images)
    inside = dpl.edit_scores(judge, pairs, change, white)
    assert inside["spill"].sum() == 0 and (inside["inside"] > 0).any()
    outside = dpl.edit_scores(judge, pairs, change, torch.where(pairs.masks[torch.arange(6), change.thing][:, None], pairs.images, 255 - pairs.images))
    assert (outside["spill"] > 0).all()


def test_edits_ask_for_something_new_and_for_nothing_else():
    pairs = dpl.studio_pairs(6, seed=2)
    for change in dpl.pair_edits(pairs, 3):
        for k, (caption, prompt) in enumerate(zip(pairs.captions, change.prompts)):
            a, b = caption.split(), prompt.split()
            assert caption != prompt and (len(b) - len(a) == (change.kind == "texture")) and len([w for w in b if w not in a]) == 1
    assert change.thing.tolist() == [0, 0, 1, 1, 0, 0]


def test_true_maps_keep_each_heads_total_and_touch_targets_only(pairs):
    probs, places = torch.rand(6, 2, 64, 10).softmax(-1), torch.tensor([[3, 7]] * 3)
    controller = dpl.TrueMaps(places, pairs.masks); controller.guided = False
    new = controller(probs, "layer", True)
    assert torch.equal(new[:3], probs[:3]) and torch.equal(new[3:, ..., [0, 1, 2, 4, 5, 6, 8, 9]], probs[3:, ..., [0, 1, 2, 4, 5, 6, 8, 9]])
    assert torch.allclose(new[3:, ..., 3].sum(2), probs[3:, ..., 3].sum(2), atol=1e-5)
    assert (new[3:, ..., 3][:, 0][F.adaptive_avg_pool2d(pairs.masks[:, 0].float(), 8).flatten(1) == 0] == 0).all()


def test_weights_and_blend_change_targets(found, pairs):
    usual = dpl.edit_pictures(found, pairs.captions)[1]
    heavy = dpl.edit_pictures(found, pairs.captions, weights=([n[0] for n in pairs.nouns], 5.))
    assert not torch.equal(heavy[1], usual) and torch.equal(heavy[0], dpl.edit_pictures(found, pairs.captions)[0])
    same = ([n[0] for n in pairs.nouns],) * 2
    assert dpl.edit_pictures(found, pairs.captions, blend=same)[1].shape == usual.shape


# claim and protocol ---------------------------------------------------------------------------------------------------
def test_the_protocol_measures_every_metric_of_the_claim(generator, monkeypatch):
    monkeypatch.setattr(dpl, "load_generator", lambda name: generator)
    claim = CLAIMS["dpl"]
    found = dpl.edit_pairs_protocol(Experiment("dpl", "tiny-diffusion", "pairs", "edit-pairs", 1, {"pictures": 2, "steps": 2, "token_steps": 1, "null_steps": 1}))
    assert set(claim.metrics()) | {claim.tuning_metric, "trainable", "psnr"} <= set(found) and found["trainable"] == dpl.trained_numbers(2, 2, 128, 32)
    assert found == dpl.edit_pairs_protocol(Experiment("dpl", "tiny-diffusion", "pairs", "edit-pairs", 1, {"pictures": 2, "steps": 2, "token_steps": 1, "null_steps": 1}))
    true = dpl.edit_pairs_protocol(Experiment("null-text-edit", "tiny-diffusion", "pairs", "edit-pairs", 1, {"pictures": 2, "steps": 2, "null_steps": 1, "maps": "true"}))
    assert true["iou"] > 50 > found["iou"] and true["trainable"] == dpl.trained_numbers(2, 0, 128, 32)


def test_the_protocol_runs_on_a_generator_of_another_size(monkeypatch):
    monkeypatch.setattr(dpl, "load_generator", lambda name: random_stable_diffusion())
    settings = {"scale": "full", "pictures": 2, "steps": 1, "token_steps": 1, "null_steps": 1, "size": 8, "self_size": 8, "mask": "true"}
    found = dpl.edit_pairs_protocol(Experiment("dpl", "stable-diffusion", "pairs", "edit-pairs", 1, settings))
    assert found["trainable"] == dpl.trained_numbers(1, 2, 32, 32) and found["spill"] > 0


def test_the_claim_is_fair_and_complete():
    claim = CLAIMS["dpl"]
    assert len({len(a.points()) for a in claim.arms if a.grid}) == 1 and len(claim.seeds) >= 5
    assert len({(a.method, canonical(a.settings)) for a in full_scale_claim(claim).arms}) == len(claim.arms)
    with pytest.raises(ValueError, match="no data set of edit-pairs named 'cats'"): dpl.check_edit_pairs(Experiment("dpl", "tiny-diffusion", "cats", "edit-pairs", 1))
    assert {"dpl", "null-text-edit", "ddim-edit"} <= set(METHODS)


# full scale without a network -----------------------------------------------------------------------------------------
def test_stable_diffusions_classes_run_the_same_lines(pairs):
    big = random_stable_diffusion()
    photos = dpl.enlarge(pairs, big.size).images[:2]
    settings = replace(dpl.PUBLISHED, steps=2, token_steps=2, null_steps=1, size=8, self_size=8)
    given = dict(images=photos, captions=pairs.captions[:2], nouns=pairs.nouns[:2])
    found = dpl.dynamic_prompt_learning(big, **given, settings=settings)
    dpl.check_dpl_trained_numbers(found); dpl.check_dpl_own_vectors_change_nothing(big, pairs.captions[0], pairs.nouns[0])
    dpl.check_dpl_no_word_steps_is_null_text_inversion(big, **given, settings=settings)
    assert dpl.edit_pictures(found, [c.replace(n[0], "heart") for c, n in zip(*(given[k] for k in ("captions", "nouns")))])[1].shape == photos.shape


# exercises ------------------------------------------------------------------------------------------------------------
CHECKERS = ["check_disjoint", "check_gaussian", "check_spill"]


def test_every_folded_solution_passes_its_checker(): check_solutions(dpl, CHECKERS + THEME_CHECKERS, NOTEBOOK)


def cosines(maps): a = F.normalize(maps.flatten(2), dim=-1); return a @ a.transpose(1, 2)
def weights(s, two): line = torch.exp(-torch.tensor([1., 0., 1.]) / (two * s ** 2)); return torch.outer(line, line)
def moved(a, b): return ((a.float() - b.float()) / 255).square().mean(1)
def away(m, window): return 1 - F.max_pool2d(m.float()[:, None], window, 1, window // 2)[:, 0]
WRONG = [
    ("check_disjoint", lambda m: cosines(m).mean((1, 2))), ("check_disjoint", lambda m: cosines(m).triu(1).sum((1, 2))), ("check_disjoint", lambda m: (m.flatten(2) @ m.flatten(2).transpose(1, 2)).triu(1).sum((1, 2)) / max(1, m.shape[1] * (m.shape[1] - 1) / 2)),
    ("check_gaussian", lambda s: weights(s, 2) / weights(s, 2).sum()), ("check_gaussian", lambda s: weights(s, 4)),
    ("check_spill", lambda a, b, m: 1000 * (moved(a, b) * ~m).sum((1, 2)) / (~m).sum((1, 2))), ("check_spill", lambda a, b, m: 1000 * (moved(a, b) * away(m, 5)).mean((1, 2))),
    ("check_spill", lambda a, b, m: 1000 * (((b - a).float() / 255).square().mean(1) * away(m, 5)).sum((1, 2)) / away(m, 5).sum((1, 2)))]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(dpl, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)
