"""Attention with a door, stores, inversion, null-text inversion and Prompt-to-Prompt: parity with diffusers, definitions by hand, sabotage, clear errors, exercises."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from exercises import check_solutions
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from promptbook import attention
from promptbook.attention import (
    ControlledProcessor, Controller, LocalBlend, Refine, Replace, Reweight, Store, align_words, attention_layers, controlled, cross_layers, ddim_invert, ddim_step, ddim_unstep, edit, null_text, null_text_step, predict, psnr,
    replay, step_pairs, word_columns, word_positions)
from promptbook.generators import Generator, draw, freeze, noise, noise_schedule, random_stable_diffusion, unet_config, with_clip

A, B, C = "a red star on a navy ground.", "a blue star on a navy ground.", "a striped red star on a navy ground."


def caring(unet):
    """Initial weights hardly read the prompt; these do, without making the network chaotic."""
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim > 1 and ".to_" in name: p.mul_(2)
    return unet


@pytest.fixture(scope="module")
def pixels(backbone):
    """The zoo's kind of pipeline, small, with random weights: predicts the velocity of pixels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**unet_config(widths=(16, 16, 24), context=48))
    return Generator("random pixels", freeze(with_clip(caring(unet), noise_schedule(), backbone)))


@pytest.fixture(scope="module")
def diffusion():
    """Stable Diffusion's classes, small, with random weights: predicts the noise of latents."""
    made = random_stable_diffusion()
    caring(made.unet)
    return made


@pytest.fixture(params=["pixels", "diffusion"])
def generator(request): return request.getfixturevalue(request.param)


def latents_of(generator, n, seed=0): return torch.randn(n, *generator.shape, generator=torch.Generator().manual_seed(seed)) * .5
def keep(probs, layer, cross): return probs


# the processor ---------------------------------------------------------------------------------------------------------
LAYERS = {"self": (dict(), None), "cross": (dict(cross_attention_dim=12), (3, 7, 12)), "group norm": (dict(norm_num_groups=4), None), "residual": (dict(residual_connection=True, rescale_output_factor=1.7), None),
          "norm cross": (dict(cross_attention_dim=12, cross_attention_norm="layer_norm"), (3, 7, 12)), "upcast": (dict(upcast_attention=True, upcast_softmax=True), None), "bias": (dict(bias=True, out_bias=False), None)}


@pytest.mark.parametrize("former", [AttnProcessor(), AttnProcessor2_0()])
@pytest.mark.parametrize("shape", [(3, 20, 16), (3, 16, 4, 5)])
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_processor_computes_what_diffusers_computes(case, shape, masked, former):
    torch.manual_seed(1)
    arguments, context = LAYERS[case]
    layer = Attention(query_dim=16, heads=4, dim_head=4, **arguments)
    context = None if context is None else torch.randn(context)
    mask = None
    if masked:
        mask = torch.zeros(3, 1, 20 if context is None else 7)
        mask[..., 4:] = -1e4
    results = []
    for processor in (former, ControlledProcessor("x.attn2.processor", [keep], former)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
        out = processor(layer, x, context, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*results): assert torch.allclose(a, b, atol=1e-5), (a - b).abs().max()
    half = ControlledProcessor("x.attn2.processor", [lambda p, *_: p * .5], former)
    assert not torch.allclose(half(layer, x, context, mask), results[0][0], atol=1e-3)      # what a controller returns is used


def test_all_layers_are_seen_and_nothing_changes(generator):
    x, states, seen = latents_of(generator, 2), generator.states([A, B]), {}
    def look(probs, layer, cross):
        assert torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-5)
        seen[layer] = (tuple(probs.shape), cross)
        return probs
    with torch.no_grad():
        plain = predict(generator, x, 500, states)
        with controlled(generator, look): same = predict(generator, x, 500, states)
    assert torch.allclose(plain, same, atol=1e-5)
    assert list(seen) and set(seen) == set(generator.unet.attn_processors) == set(cross_layers(generator.unet)) | set(attention_layers(generator.unet, "self"))
    for layer, (shape, cross) in seen.items():
        assert cross == (layer in cross_layers(generator.unet)) and shape[:2] == (2, 2) and shape[3] == (generator.tokenizer.model_max_length if cross else shape[2])


def test_gradients_pass_the_door(pixels):
    x, found = latents_of(pixels, 2), []
    for team in ([], [keep]):
        states = pixels.states([A, B]).requires_grad_()
        with controlled(pixels, team): loss = predict(pixels, x, 500, states).square().sum()
        found.append(torch.autograd.grad(loss, states)[0])
    assert found[0].abs().max() > 0 and torch.allclose(*found, atol=1e-5 * found[0].abs().max())


def test_former_processors_return(pixels):
    before = dict(pixels.unet.attn_processors)
    with pytest.raises(KeyError):
        with controlled(pixels, keep): raise KeyError
    assert pixels.unet.attn_processors == before
    with controlled(pixels, keep):
        assert all(isinstance(p, ControlledProcessor) for p in pixels.unet.attn_processors.values())
    assert pixels.unet.attn_processors == before


def test_controllers_nest_and_follow_each_other(pixels):
    order, x, states = [], latents_of(pixels, 1), pixels.states([A])
    def named(name, factor): return lambda probs, layer, cross: (order.append(name), probs * factor)[1]
    with torch.no_grad():
        with controlled(pixels, [named("a", 2.), named("b", .25)]): listed = predict(pixels, x, 500, states)
        with controlled(pixels, named("a", 2.)), controlled(pixels, named("b", .25)): nested = predict(pixels, x, 500, states)
        with controlled(pixels, lambda p, *_: p * .5): once = predict(pixels, x, 500, states)
    assert order == ["a", "b"] * (len(order) // 2) and torch.allclose(listed, nested, atol=1e-6) and torch.allclose(listed, once, atol=1e-5)


def test_maps_that_nobody_wants_are_not_computed():
    layer, calls = Attention(query_dim=16, heads=4, dim_head=4), []
    def former(*args): return calls.append(1) or AttnProcessor()(*args)
    small = Store("all", kinds=("self",), largest=4)
    processor = ControlledProcessor("x.attn1.processor", [small], former)
    processor(layer, torch.randn(1, 25, 16)); assert calls == [1] and not small.sums
    processor(layer, torch.randn(1, 16, 4, 4)); assert calls == [1] and list(small.counts.values()) == [1]


def test_a_processor_of_another_kind_is_not_pushed_aside(pixels):
    name = cross_layers(pixels.unet)[0]
    before = dict(pixels.unet.attn_processors)
    pixels.unet.set_attn_processor({**before, name: type("Adapter", (), {"__call__": lambda self, *a, **k: None})()})
    try:
        with pytest.raises(ValueError, match=r"^The layer .* \(Adapter\), which a controller would push aside: take it out first\.$"), controlled(pixels, keep): pass
    finally: pixels.unet.set_attn_processor(before)


# stores ---------------------------------------------------------------------------------------------------------------
def test_store_averages_by_hand(pixels):
    x, states, kept = latents_of(pixels, 3), pixels.states([A, B, C]), {16: [], 8: []}
    store = Store("all", kinds=("cross", "self"))
    def keep_all(probs, layer, cross):
        if cross: kept[math.isqrt(probs.shape[2])].append(probs)
        return probs
    with torch.no_grad(), controlled(pixels, [store, keep_all]):
        for t in (900, 500, 100): predict(pixels, x, t, states)
    for size, maps in kept.items():
        by_hand = torch.cat(maps, 1).mean(1).reshape(3, size, size, -1)
        assert len(maps) >= 6 and torch.allclose(store.maps(size), by_hand, atol=1e-6)
        last = torch.cat(maps[-len(maps) // 3:], 1).mean(1).reshape(3, size, size, -1)
        assert torch.allclose(store.latest(size), last, atol=1e-6) and not torch.allclose(last, by_hand, atol=1e-4)
    assert store.maps(8, "self").shape == (3, 8, 8, 64)
    assert torch.allclose(store.maps(16).sum(-1), torch.ones(()), atol=1e-5)
    store.reset()
    with pytest.raises(ValueError, match="No cross-attention maps of 16×16 were stored; there are none"): store.maps(16)


def test_store_takes_the_conditional_half(pixels):
    x, states = latents_of(pixels, 2), pixels.states([A, B])
    halves, whole, alone = Store(), Store("all"), Store("all")
    with torch.no_grad():
        with controlled(pixels, [halves, whole]): predict(pixels, x, 500, states, guidance=3.)
        with controlled(pixels, alone): predict(pixels, x, 500, states)
    assert torch.allclose(halves.maps(16), alone.maps(16), atol=1e-6) and torch.allclose(whole.maps(16)[2:], alone.maps(16), atol=1e-6)
    assert not torch.allclose(whole.maps(16)[:2], alone.maps(16), atol=1e-3)
    told = Store()
    replay(pixels, x, states, 2, guidance=1., controller=told)
    assert len(told.maps(16)) == 2                                         # replay says that there are no halves
    with pytest.raises(ValueError, match=r"A batch of 3 has no conditional half: for a pass without guidance say half='all'\."), controlled(pixels, Store()): predict(pixels, latents_of(pixels, 3), 500, states[:1])


def test_latest_maps_have_gradients(generator):
    states, store = generator.states([A]).requires_grad_(), Store("all")
    size = generator.shape[1] // 2 if generator.vae is None else generator.shape[1]
    with controlled(generator, store): predict(generator, latents_of(generator, 1), 500, states)
    target = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
    gradient, = torch.autograd.grad((store.latest(size)[0, ..., 3] * target).sum(), states)
    assert gradient[0, 3].abs().max() > 0 and not store.maps(size).requires_grad
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad(), controlled(generator, moved := Store("all")): predict(generator, latents_of(generator, 1), 500, states + step)
    change = ((moved.maps(size) - store.maps(size))[0, ..., 3] * target).sum().item()
    assert change == pytest.approx(1e-2 * gradient.norm().item(), rel=.1)


# words ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pieces():
    """A generator whose tokenizer splits words, as CLIP's does."""
    vocabulary = ["[PAD]", "[SOS]", "[EOS]", "[UNK]", "a", "cat", "leo", "##pard", "red", "vermi", "##li", "##on", "on", "grass", ".", ",", "and", "star", "##fish"]
    tokenizer = Tokenizer(models.WordPiece({w: k for k, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[SOS] $A [EOS]", special_tokens=[("[SOS]", 1), ("[EOS]", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[SOS]", eos_token="[EOS]", model_max_length=16)
    return Generator("pieces", SimpleNamespace(tokenizer=fast, unet=SimpleNamespace(device="cpu", dtype=torch.float32)))


@pytest.mark.parametrize("prompt, word, wanted", [
    ("a red cat, on grass.", "cat", [3]), ("a red cat, on grass.", "on", [5]), ("a leopard on grass.", "leopard", [2, 3]), ("A Red Leopard.", "red leopard", [2, 3, 4]), ("a cat and a red cat.", "cat", [2, 6]),
    ("a cat and a red cat.", "red cat", [5, 6]), ("a starfish and a star.", "star", [6]), ("a  red   cat.", "cat", [3]), ("vermilion, a cat.", "cat", [6]), ("vermilion, a cat.", ",", [4])])
def test_words_are_found_by_offsets(pieces, prompt, word, wanted):
    assert word_positions(pieces, prompt, word) == wanted
    assert word_columns(pieces, [prompt], word)[0].nonzero().flatten().tolist() == wanted


def test_word_columns_for_several_prompts_and_words(pieces):
    columns = word_columns(pieces, ["a red cat.", "a leopard on grass."], [("red", "cat"), "leopard"])
    assert [row.nonzero().flatten().tolist() for row in columns] == [[2, 3], [2, 3]]
    with pytest.raises(ValueError, match="2 words for 1 prompts"): word_columns(pieces, ["a cat."], ["a", "cat"])


# steps, guidance, loops -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", [dict(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2"), dict(timestep_spacing="leading", beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, steps_offset=1, set_alpha_to_one=False)])
@pytest.mark.parametrize("steps", [1, 7, 20, 30])
def test_steps_are_the_schedulers(prediction, schedule, steps):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, **schedule)
    owner = SimpleNamespace(scheduler=scheduler)
    scheduler.set_timesteps(steps)
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(steps)
    z, output = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.randn(2, 3, 4, 4, dtype=torch.double)
    pairs = step_pairs(owner, steps)
    assert [t for t, _ in pairs] == scheduler.timesteps.tolist() and scheduler.num_inference_steps == steps
    for pair in pairs:
        there = ddim_step(owner, output, pair, z)
        assert torch.allclose(there, scheduler.step(output, pair[0], z).prev_sample, rtol=1e-3, atol=1e-4 / scheduler.alphas_cumprod[pair[0]].sqrt().item())
        assert torch.allclose(ddim_unstep(owner, output, pair, there), z, atol=1e-6 if pair[0] < 990 else 1e-3)
        if prediction == "epsilon": assert torch.allclose(ddim_unstep(owner, output, pair, z), inverse.step(output, pair[0], z).prev_sample, rtol=1e-3, atol=1e-3)


def test_schedules_that_cannot_be_inverted():
    for scheduler in (DDIMScheduler(), DDIMScheduler(clip_sample=False, thresholding=True), DDIMScheduler(clip_sample=False, prediction_type="sample")):
        with pytest.raises(ValueError, match="Inversion needs a DDIMScheduler without clipping"): step_pairs(SimpleNamespace(scheduler=scheduler), 5)
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"The number of steps must lie between 1 and 1000, not {steps}."): step_pairs(SimpleNamespace(scheduler=DDIMScheduler(clip_sample=False)), steps)


def test_guidance_is_written_down_once(generator):
    x, states, blank = latents_of(generator, 2), generator.states([A, B]), generator.states([C])
    with torch.no_grad():
        asked, without, empty = (predict(generator, x, 300, s) for s in (states, blank, generator.blank()))
        assert torch.allclose(predict(generator, x, 300, states, blank, 4.), without + 4 * (asked - without), atol=1e-4)
        assert torch.allclose(predict(generator, x, 300, states, guidance=4.), empty + 4 * (asked - empty), atol=1e-4)
        assert torch.equal(predict(generator, x, 300, states, blank, 1.), asked)
        assert not torch.allclose(asked, without, atol=1e-3)


def test_replay_draws_what_the_pipeline_draws(generator):
    for guidance, steps in ((1., 3), (3., 4)):
        mine = replay(generator, noise(generator, [3, 4]), generator.states([A, B]), steps, guidance)
        assert torch.allclose(mine, draw(generator, [A, B], [3, 4], steps, guidance, output="latents"), atol=1e-3)
    states, blank = generator.states([A, B]), generator.blank(2)
    whole = replay(generator, noise(generator, [3, 4]), states, 3, 3., blank, record=True)
    listed = replay(generator, noise(generator, [3, 4]), [states] * 3, 3, 3., [blank] * 3, record=True)
    assert len(whole) == 4 and all(torch.equal(a, b) for a, b in zip(whole, listed))
    other = replay(generator, noise(generator, [3, 4]), [states, states, states.flip(0)], 3, 3., [blank] * 3, record=True)
    assert torch.equal(other[2], whole[2]) and not torch.allclose(other[3], whole[3], atol=1e-4)


def test_inversion_comes_back_and_better_with_more_steps(generator):
    z, states = latents_of(generator, 2), generator.states([A, B])
    error = {w: [(replay(generator, ddim_invert(generator, z, states, s)[-1], states, s, w) - z).square().mean().sqrt().item() for s in (4, 8, 24)] for w in (1., 6.)}
    assert error[1.][2] < error[1.][1] < error[1.][0] and error[1.][2] < .5 * error[1.][0]
    assert all(b > 3 * a for a, b in zip(error[1.][1:], error[6.][1:]))             # guidance leaves the path, and more steps do not help
    for trajectory in [ddim_invert(generator, z, states, 4)]:
        assert len(trajectory) == 5 and torch.equal(trajectory[0], z)
        listed, one = ddim_invert(generator, z, [states] * 4, 4), ddim_invert(generator, z[1:], states[1:], 4)
        assert torch.equal(listed[-1], trajectory[-1]) and torch.allclose(one[-1], trajectory[-1][1:], atol=1e-4)
        pair = step_pairs(generator, 4)[-1]
        with torch.no_grad(): assert torch.allclose(trajectory[1], ddim_unstep(generator, predict(generator, z, pair[0], states), pair, z), atol=1e-5)
        with torch.no_grad(): assert torch.allclose(ddim_invert(generator, z, states, 4, guidance=3.)[1], ddim_unstep(generator, predict(generator, z, pair[0], states, guidance=3.), pair, z), atol=1e-5)


def test_states_of_other_numbers_of_steps(pixels):
    z, states = latents_of(pixels, 1), pixels.states([A])
    with pytest.raises(ValueError, match=r"^There are 2 prompt states for 3 steps: give one tensor for all steps, or one for each\.$"): ddim_invert(pixels, z, [states] * 2, 3)
    with pytest.raises(ValueError, match="4 blank states for 3 steps"): replay(pixels, z, states, 3, 3., [states] * 4)
    with pytest.raises(ValueError, match="A trajectory of 3 steps has 4 latents, not 3: invert with the same number of steps."): null_text(pixels, [z] * 3, states, 3)


# null-text inversion --------------------------------------------------------------------------------------------------
def published_null_text(generator, trajectory, states, steps, guidance, iterations, stop):
    """The published loop for one picture, with diffusers' scheduler."""
    generator.scheduler.set_timesteps(steps)
    blank, latents, out = generator.blank(), trajectory[-1], []
    for i, t in enumerate(generator.scheduler.timesteps):
        blank = blank.clone().detach().requires_grad_()
        optimizer = torch.optim.Adam([blank], lr=1e-2 * (1 - i / (2 * steps)))
        run = lambda s: generator.unet(latents, t, encoder_hidden_states=s).sample
        with torch.no_grad(): asked = run(states)
        for _ in range(iterations):
            without = run(blank)
            loss = F.mse_loss(generator.scheduler.step(without + guidance * (asked - without), t, latents).prev_sample, trajectory[-2 - i])
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            if loss.item() < stop + i * 2 * stop: break
        out.append(blank.detach())
        with torch.no_grad():
            without = run(blank)
            latents = generator.scheduler.step(without + guidance * (asked - without), t, latents).prev_sample
    return out


def test_null_text_is_the_published_loop_for_each_picture_of_a_batch(generator):
    z, states, steps = latents_of(generator, 2) * torch.tensor([1., .3]).reshape(2, 1, 1, 1), generator.states([A, B]), 3
    trajectory = ddim_invert(generator, z, states, steps)
    stop = 2e-4 if generator.vae is None else 1e-4
    mine = null_text(generator, trajectory, states, steps, 5., iterations=4, stop=stop)
    assert len(mine) == steps and mine[0].shape == (2, *states.shape[1:])
    for k in range(2):
        alone = published_null_text(generator, [x[k:k + 1] for x in trajectory], states[k:k + 1], steps, 5., 4, stop)
        for a, b in zip(mine, alone): assert (a[k] - b[0]).abs().max() < 5e-3 and (a[k] - b[0]).abs().mean() < 1e-4


def test_null_text_brings_the_picture_back(generator):
    z, states, steps = latents_of(generator, 2), generator.states([A, B]), 4
    trajectory = ddim_invert(generator, z, states, steps)
    error = lambda blanks: (replay(generator, trajectory[-1], states, steps, 6., blanks) - z).square().mean().item()
    carried, fresh = (null_text(generator, trajectory, states, steps, 6., iterations=12, carry=c, stop=0.) for c in (True, False))
    assert error(carried) < .6 * error(None) and error(fresh) < .9 * error(None)
    assert torch.allclose(carried[0], fresh[0]) and not torch.allclose(carried[1], fresh[1], atol=1e-3)
    empty = null_text(generator, trajectory, states, steps, 6., iterations=0)
    assert all(torch.equal(b, generator.blank(2)) for b in empty) and error(empty) == pytest.approx(error(None), rel=1e-4)
    listed = null_text(generator, trajectory, [states] * steps, steps, 6., iterations=2)
    assert all(torch.equal(a, b) for a, b in zip(listed, null_text(generator, trajectory, states, steps, 6., iterations=2)))
    assert all(p.grad is None and not p.requires_grad for p in generator.unet.parameters())


def test_a_picture_that_is_done_is_left_alone(pixels):
    z, states, pair = latents_of(pixels, 2), pixels.states([A, B]), step_pairs(pixels, 4)[1]
    with torch.no_grad(): pivot = ddim_step(pixels, predict(pixels, z, pair[0], states, guidance=6.), pair, z)
    pivot[1] += 1.                                                       # the first picture is there from the start
    both = null_text_step(pixels, z, pair, states, pixels.blank(), pivot, 6., iterations=5, stop=1e-4)
    once, five = (null_text_step(pixels, z, pair, states, pixels.blank(), pivot, 6., iterations=n) for n in (1, 5))
    assert torch.allclose(both[0], once[0], atol=1e-6) and torch.allclose(both[1], five[1], atol=1e-6) and not torch.allclose(once[1], five[1], atol=1e-3)


# alignment ------------------------------------------------------------------------------------------------------------
def test_swap_shares_attention_among_pieces_and_shifts_the_rest(pieces):
    matrix, takes = align_words(pieces, "a red cat, on grass.", "a red leopard, on grass.")
    assert takes.all() and matrix.shape == (16, 16) and torch.allclose(matrix.sum(1), torch.ones(16))      # the attention of a row is preserved
    wanted = {(0, 0): 1, (1, 1): 1, (2, 2): 1, (3, 3): .5, (3, 4): .5, (4, 5): 1, (5, 6): 1, (6, 7): 1, (7, 8): 1, (8, 9): 1, (9, 10): 1}
    for (i, j), value in wanted.items(): assert matrix[i, j] == value, (i, j)
    assert (matrix[:9] > 0).sum() == 10 and matrix[15, 15] == 1
    back, _ = align_words(pieces, "a red leopard, on grass.", "a red cat, on grass.")
    assert back[3, 3] == back[4, 3] == 1 and back[9, 8] == 1 and torch.allclose(back.sum(1), torch.ones(16))
    three, _ = align_words(pieces, "a leopard.", "a vermilion.")
    assert torch.allclose(three[2:4, 2:5], torch.full((2, 3), 1 / 3)) and three[4, 5] == 1


def test_refinement_aligns_what_is_shared(pieces):
    matrix, takes = align_words(pieces, "a cat on grass.", "a red leopard and a cat on grass.", "refine")
    assert takes[:12].tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1] or takes[:12].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert all(matrix[i, i + 5] == 1 for i in range(2, 7)) and ((matrix[:, 1:].sum(0) > 0) >= 0).all() and (matrix.sum(0)[takes == 0] == 0).all()
    assert torch.equal(align_words(pieces, "a cat.", "a cat.", "refine")[0], torch.eye(16)) and torch.equal(align_words(pieces, "a cat.", "a cat.")[0], torch.eye(16))


@pytest.mark.parametrize("seed", range(20))
def test_alignment_has_the_score_of_needleman_wunsch(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(5, (int(torch.randint(1, 9, (), generator=g)),), generator=g).tolist() for _ in range(2))
    score = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]                  # match 1, mismatch -1, gap 0
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1): score[i][j] = max(score[i - 1][j - 1] + (1 if a[i - 1] == b[j - 1] else -1), score[i - 1][j], score[i][j - 1])
    pairs = attention._common(a, b)
    assert len(pairs) == score[-1][-1] and all(a[i] == b[j] for i, j in pairs) and all(p[0] < q[0] and p[1] < q[1] for p, q in zip(pairs, pairs[1:]))


# prompt-to-prompt -----------------------------------------------------------------------------------------------------
def random_maps(n, queries=16, keys=32, seed=0): return torch.randn(n, 2, queries, keys, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_injection_by_hand(pixels):
    controller, probs = Replace(pixels, A, B), random_maps(4)
    out = controller(probs, "x", True)
    assert torch.equal(out[:2], probs[:2]) and torch.equal(out[2], probs[2])          # the unconditional half and the source stay
    assert torch.allclose(out[3], probs[2] @ align_words(pixels, A, B)[0], atol=1e-6)
    refine, (matrix, takes) = Refine(pixels, A, C), align_words(pixels, A, C, "refine")
    out = refine(probs, "x", True)
    assert takes.min() == 0 and torch.allclose(out[3], takes * (probs[2] @ matrix) + (1 - takes) * probs[3], atol=1e-6)
    maps = random_maps(4, keys=16)
    assert torch.equal(controller(maps, "x", False)[3], maps[2])
    several = Replace(pixels, A, [B, A.replace("star", "ring")], half="all")(random_maps(3), "x", True)
    assert torch.allclose(several[1:], random_maps(3)[:1].expand(2, -1, -1, -1), atol=1e-6)
    pairs = Replace(pixels, [A, C], [B, C.replace("red", "blue")], half="all")(random_maps(4), "x", True)
    assert torch.allclose(pairs[2:], random_maps(4)[:2], atol=1e-6)


def test_injection_has_its_windows(pixels):
    controller = Replace(pixels, A, B, cross=.5, self_=.3, largest=8)
    def window(cross, queries): return [s for s in range(10) if (controller.begin(s, 10, True), controller.wants("x", cross, queries))[1]]
    assert window(True, 256) == [0, 1, 2, 3, 4] and window(False, 64) == [0, 1, 2] and window(False, 256) == []


def test_target_equal_to_source_reproduces_it_exactly(generator):
    for kind in ("swap", "refine"):
        one, two = edit(generator, [0, 1], A, A, 3, 4., kind, weights={"star": 1.})
        assert torch.equal(one, two)
    states = generator.states([A, A])
    made = replay(generator, noise(generator, [0, 0]), states, 3, 4., controller=Replace(generator, A, A))
    assert torch.equal(*made) and torch.allclose(made[:1], replay(generator, noise(generator, [0]), states[:1], 3, 4.), atol=1e-4)


def test_edits_without_injection_are_drawn_alone_and_with_it_are_not(generator):
    alone = replay(generator, noise(generator, [2, 3]), generator.states([B, B]), 3, 4.)
    def target(**how):
        team = Replace(generator, [A, A], [B, B], **how)
        return replay(generator, noise(generator, [2, 3, 2, 3]), generator.states([A, A, B, B]), 3, 4., controller=team)[2:]
    assert torch.allclose(target(cross=0., self_=0.), alone, atol=1e-4)
    full = target(cross=1., self_=0.)
    assert (full - alone).abs().max() > 1e-3 and (full - target(cross=1., self_=1.)).abs().max() > 1e-3


def test_pairs_of_a_batch_do_not_mix(pixels):
    sources, targets = [A, C], [B, C.replace("navy", "sandy")]
    kwargs = dict(steps=3, guidance=4., weights={"star": 2.}, blend="star")
    both = edit(pixels, [4, 5], sources, targets, **kwargs)
    for k in range(2):
        alone = edit(pixels, [4 + k], sources[k], targets[k], **kwargs)
        for x, y in zip(both, alone): assert psnr(x[k:k + 1], y).item() > 50
    blanks = [pixels.blank(2) + .1 * s for s in range(3)]
    with_blanks, listed = edit(pixels, [4, 5], sources, targets, blanks=blanks, **kwargs), edit(pixels, [4, 5], sources, targets, blanks=blanks, states=([pixels.states(sources)] * 3, [pixels.states(targets)] * 3), **kwargs)
    assert torch.equal(with_blanks[1], listed[1]) and not torch.equal(with_blanks[0], both[0])


def test_reweighting_multiplies_columns_of_targets(pixels):
    probs, word = random_maps(4), word_positions(pixels, B, "blue star")
    out = Reweight(pixels, B, {"blue star": 3., "navy": 0.})(probs, "x", True)
    factor = torch.ones(32); factor[word] = 3; factor[word_positions(pixels, B, "navy")] = 0
    assert torch.equal(out[:3], probs[:3]) and torch.allclose(out[3], probs[3] * factor)
    controller = Reweight(pixels, B, {"blue": 3.}, cross=.5)
    assert [bool(controller.begin(s, 4, True) or controller.wants("x", True, 9)) for s in range(4)] == [True, True, False, False] and not controller.wants("x", False, 9)
    one, two = edit(pixels, [0], A, A, 3, 4., weights={"star": 8.}, cross=1.)
    assert not torch.equal(one, two)


def blended(generator, maps, latents, **how):
    """The latents after one step in which these maps were seen."""
    blend = LocalBlend(generator, A, B, "red", "blue", size=4, half="all", **how)
    blend.begin(0, 1, False)
    blend(maps, "x", True)
    return blend.after(latents), blend


def test_local_blend_by_hand(pixels):
    maps = torch.full((2, 2, 16, 32), .01)
    maps[0, :, 0, 2], maps[1, :, 15, 2], maps[:, :, 3, 5] = .5, .4, .9           # corners for "red" and "blue"; another word elsewhere
    latents = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    out, blend = blended(pixels, maps, latents, start=0.)
    wanted = torch.zeros(8, 8); wanted[:4, :4] = 1; wanted[4:, 4:] = 1              # 3 × 3 pooled, enlarged, the union of both
    assert torch.equal(blend.mask[0, 0].float(), wanted) and torch.equal(out[1], wanted.expand(3, 8, 8)) and torch.equal(out[0], latents[0])
    assert blended(pixels, maps, latents, start=0., threshold=.01)[1].mask.all() and not blended(pixels, maps, latents, start=0., threshold=1.)[1].mask.any()
    assert torch.equal(blended(pixels, maps, latents, start=1.)[0], latents)          # not yet
    blend.begin(0, 1, False)
    assert not blend.store.sums                                                          # a new picture forgets the old one's maps


def test_local_blend_keeps_the_source_outside(pixels):
    blend = LocalBlend(pixels, A, B, "star", start=0., threshold=.9)
    made = replay(pixels, noise(pixels, [0, 0]), pixels.states([A, B]), 3, 4., controller=[Replace(pixels, A, B), blend])
    outside = ~blend.mask[0].expand(3, -1, -1)
    assert outside.any() and not outside.all() and torch.equal(made[0][outside], made[1][outside]) and not torch.equal(made[0], made[1])


# errors ---------------------------------------------------------------------------------------------------------------
ERRORS = {
    "word absent": (lambda g: word_positions(g, A, "heart"), "The word 'heart' does not stand in the prompt"), "empty word": (lambda g: word_positions(g, A, " "), "does not stand in the prompt"),
    "weight of an absent word": (lambda g: edit(g, [0], A, B, 2, weights={"red": 2.}), "The word 'red' does not stand"), "blend of an absent word": (lambda g: edit(g, [0], A, B, 2, blend="red"), "The word 'red' does not stand"),
    "unequal swap": (lambda g: align_words(g, A, C), "use kind='refine'"), "unequal edit": (lambda g: edit(g, [0], A, C, 2), "use kind='refine'"), "kind of alignment": (lambda g: align_words(g, A, B, "grow"), "not for 'grow'"),
    "kind of edit": (lambda g: edit(g, [0], A, B, 2, kind="grow"), "not 'grow'"), "kind of layer": (lambda g: attention_layers(g.unet, "mid"), "not 'mid'"), "half": (lambda g: Store("left"), "not 'left'"),
    "no steps": (lambda g: edit(g, [0], A, B, 0), "between 1 and 1000, not 0"), "no steps back": (lambda g: ddim_invert(g, noise(g, 1), g.states([A]), 0), "between 1 and 1000"),
    "cross share": (lambda g: Replace(g, A, B, cross=1.2), "'cross' is a share of the steps, between 0 and 1, not 1.2"), "self share": (lambda g: Refine(g, A, B, self_=-.1), "'self_' is a share"),
    "reweight share": (lambda g: Reweight(g, A, {"red": 1.}, cross=2.), "'cross' is a share"), "start": (lambda g: LocalBlend(g, A, B, "star", start=3.), "'start' is a share"), "threshold": (lambda g: LocalBlend(g, A, B, "star", threshold=3.), "The threshold lies between 0 and 1"),
    "empty prompt": (lambda g: edit(g, [0], A, "", 2), "Prompt 1 of 1 is empty"), "empty source": (lambda g: Replace(g, " ", B), "is empty"), "empty in word_positions": (lambda g: word_positions(g, "", "a"), "is empty"),
    "sources and targets": (lambda g: Replace(g, [A, A], [B, B, B]), "2 sources do not fit 3 targets"), "pictures and prompts": (lambda g: edit(g, [0, 1], [A], [B, B], 2), "2 pictures, but 1 sources"),
    "batch of one": (lambda g: replay(g, noise(g, 1), g.states([A]), 2, controller=Replace(g, A, B)), "lay the batch out that way"), "batch of three": (lambda g: replay(g, noise(g, 3), g.states([A]), 2, controller=Replace(g, A, B)), "there are 3 pictures"),
    "reweight alone": (lambda g: replay(g, noise(g, 1), g.states([A]), 2, controller=Reweight(g, A, {"red": 2.})), "lay the batch out that way"),
    "blend of another batch": (lambda g: replay(g, noise(g, 3), g.states([A]), 2, controller=LocalBlend(g, A, B, "star")), "there are 3 pictures"),
    "maps of another size": (lambda g: replay(g, noise(g, 2), g.states([A, B]), 2, controller=LocalBlend(g, A, B, "star", size=32)), "No cross-attention maps of 32×32"),
    "long prompt": (lambda g: align_words(g, "a red star " * 20, A), "shorten it")}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence(pixels, case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught: call(pixels)
    text = str(caught.value)
    assert "\n" not in text and text[0].isupper() | text[0].isdigit() | text.startswith(("half", "'")) and (text.endswith((".", "none", "]")) or "stored" in text)
    assert not any(isinstance(p, ControlledProcessor) for p in pixels.unet.attn_processors.values())


def test_a_controller_can_be_any_object_with_a_call(pixels):
    class Mute(Controller):
        def wants(self, layer, cross, queries): return cross
        def change(self, probs, layer, cross): return probs * 0
    quiet = replay(pixels, noise(pixels, [0]), pixels.states([A]), 2, 3., controller=Mute())
    assert not torch.allclose(quiet, replay(pixels, noise(pixels, [0]), pixels.states([A]), 2, 3.), atol=1e-3)


# sabotage: each mistake makes its test fail ---------------------------------------------------------------------------
VELOCITY = dict(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2")
SABOTAGE = {
    "velocity turned at the level of the latents": (lambda m: m.setattr(attention, "_coefficients", lambda g, pair, real=attention._coefficients: real(g, (pair[1], pair[0]))), lambda p, t: test_steps_are_the_schedulers("v_prediction", VELOCITY, 7)),
    "guidance without the unconditional answer": (lambda m: m.setitem(globals(), "predict", lambda g, x, k, s, blank=None, guidance=1.: guidance * attention.predict(g, x, k, s)), lambda p, t: test_guidance_is_written_down_once(p)),
    "the store adds layers": (lambda m: m.setattr(Store, "_mean", lambda self, found, size, kind: torch.stack([v for (k, s, _), v in found.items() if (k, s) == (kind, size)]).sum(0).unflatten(1, (size, size))), lambda p, t: test_store_averages_by_hand(p)),
    "the store takes the first half": (lambda m: m.setattr(Store, "__call__", lambda self, probs, layer, cross: (self.change(probs[:len(probs) // 2] if self.half != "all" else probs, layer, cross), probs)[1]), lambda p, t: test_store_takes_the_conditional_half(p)),
    "maps without gradients": (lambda m: m.setattr(Store, "change", lambda self, probs, layer, cross, real=Store.change: (real(self, probs.detach(), layer, cross), probs)[1]), lambda p, t: test_latest_maps_have_gradients(p)),
    "words counted by spaces": (lambda m: m.setitem(globals(), "word_positions", lambda g, prompt, word: [k + 1 for k, w in enumerate(prompt.split()) if w.strip(".,") == word]), lambda p, t: test_words_are_found_by_offsets(t, "a red cat, on grass.", "on", [5])),
    "nobody is ever done": (lambda m: m.setitem(globals(), "null_text_step", lambda *a, stop=0., **k: attention.null_text_step(*a, **k)), lambda p, t: test_a_picture_that_is_done_is_left_alone(p)),
    "plain gradient descent": (lambda m: m.setattr(torch.optim, "Adam", torch.optim.SGD), lambda p, t: test_null_text_brings_the_picture_back(p)),
    "the tail position by position": (lambda m: m.setitem(globals(), "align_words", lambda g, a, b, kind="swap": (torch.eye(16).index_put((torch.tensor([3, 3, 4]), torch.tensor([3, 4, 4])), torch.tensor([.5, .5, 0.])), torch.ones(16))), lambda p, t: test_swap_shares_attention_among_pieces_and_shifts_the_rest(t)),
    "greedy alignment": (lambda m: m.setattr(attention, "_common", lambda a, b: [(i, i) for i in range(min(len(a), len(b))) if a[i] == b[i]]), lambda p, t: [test_alignment_has_the_score_of_needleman_wunsch(k) for k in range(20)]),
    "the source changes too": (lambda m: m.setattr(attention.Injection, "change", lambda self, probs, layer, cross: probs.flip(0)), lambda p, t: test_injection_by_hand(p)),
    "every token takes the source's map": (lambda m: m.setattr(Refine, "__init__", lambda self, *a, real=Refine.__init__, **k: (real(self, *a, **k), self.takes.fill_(1))[0]), lambda p, t: test_injection_by_hand(p)),
    "rows made to sum to one": (lambda m: m.setattr(Reweight, "change", lambda self, probs, layer, cross, real=Reweight.change: F.normalize(real(self, probs, layer, cross), p=1, dim=-1)), lambda p, t: test_reweighting_multiplies_columns_of_targets(p)),
    "no pooling": (lambda m: m.setattr(F, "max_pool2d", lambda x, *_: x), lambda p, t: test_local_blend_by_hand(p)),
    "latents of the target outside": (lambda m: m.setattr(LocalBlend, "after", lambda self, x, real=LocalBlend.after: (real(self, x), x)[1]), lambda p, t: test_local_blend_keeps_the_source_outside(p))}


@pytest.mark.parametrize("mistake", SABOTAGE)
def test_mistakes_are_noticed(pixels, pieces, monkeypatch, mistake):
    plant, test = SABOTAGE[mistake]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)): test(pixels, pieces)


# exercises ------------------------------------------------------------------------------------------------------------
CHECKERS = ["check_fixed_point", "check_hidden_word", "check_word_tokens"]


def test_every_folded_solution_passes_its_checker(): check_solutions(attention, CHECKERS, "08_attention")


def from_the_guess(network, unstep, z, rounds):
    guess = unstep(network(z), z)
    for _ in range(rounds): guess = unstep(network(guess), guess)
    return guess


def old_output(network, unstep, z, rounds):
    for _ in range(rounds + 1): guess = unstep(network(z), z)
    return guess


WRONG = [("check_fixed_point", from_the_guess), ("check_fixed_point", old_output), ("check_hidden_word", lambda p, c: p.index_fill(-1, torch.tensor(c), 0.)), ("check_hidden_word", lambda p, c: F.normalize(p.index_fill(-1, torch.tensor(c), 0.), dim=-1)),
         ("check_hidden_word", lambda p, c: p.index_fill(-1, torch.tensor(c), 0.).softmax(-1)), ("check_word_tokens", lambda offsets, prompt, word: [k + 1 for k, w in enumerate(prompt.split()) if w.strip(".,") == word]),
         ("check_word_tokens", lambda offsets, prompt, word: [k for k, (a, b) in enumerate(offsets) if prompt[a:b] == word]), ("check_word_tokens", lambda offsets, prompt, word: [k for k, (a, b) in enumerate(offsets) if a <= prompt.index(word) < b])]


@pytest.mark.parametrize("name, wrong", WRONG)
def test_checkers_reject_wrong_answers(name, wrong):
    with pytest.raises(AssertionError): getattr(attention, name)(wrong)
