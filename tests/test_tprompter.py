"""T-Prompter: the world of themes and its inpainter, the card's checkable facts on any weights, sabotage, the judge, errors, protocols, full scale without a network, the exercises' checkers."""
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from promptbook import editing as T
from promptbook import experiment as ex
from promptbook import generators as G
from promptbook import inpainter_training as W
from promptbook.experiment import CLAIMS, Experiment
from promptbook.universe import BACKGROUNDS, SHAPES
from promptbook.zoo import load, vocabulary, word_tokenizer

NOTEBOOK = "41_editing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An inpainter with random weights and few channels, as the trainer writes it."""
    torch.manual_seed(0)
    out, sizes = tmp_path_factory.mktemp("inpaint"), W.inpainter_config() | dict(block_out_channels=(16, 16, 16))
    UNet2DConditionModel(**sizes).save_pretrained(out / "unet")
    G.noise_schedule().save_pretrained(out / "scheduler")
    return out


@pytest.fixture(scope="module")
def tiny(folder): return T.load_inpainter(str(folder))


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    out = tmp_path_factory.mktemp("stable")
    G.random_stable_diffusion(out, in_channels=9)
    return T.load_inpainter(str(out))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """FLUX Fill with random weights, written to a folder and read from it."""
    torch.manual_seed(0)
    out, t5, tokenizer = tmp_path_factory.mktemp("flux"), load("tiny-t5").tokenizer, word_tokenizer(vocabulary(), 77)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=77, projection_dim=32, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=0)
    with G.quiet_diffusers():
        FluxFillPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, tokenizer_2=t5, text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(t5), d_model=32, d_ff=37, d_kv=8, num_layers=1, num_heads=4)),
                         vae=AutoencoderKL(block_out_channels=(4,), latent_channels=2, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=.06, scaling_factor=1.5),
                         transformer=FluxTransformer2DModel(in_channels=20, out_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True)).save_pretrained(out)
    return T.load_inpainter(str(out))


def staged(inpainter, **settings):
    size = {"PixelInpaintPipeline": 16, "StableDiffusionInpaintPipeline": 24, "FluxFillPipeline": 16}[type(inpainter.pipeline).__name__]
    return T.DynamicVisualPrompting(inpainter, load("tiny-clip"), size=size, steps=2, **settings)


@pytest.fixture(scope="module")
def told(): return T.studio_theme(3)


# -- the world and its inpainter ----------------------------------------------------------------------------------------

def test_pictures_of_a_theme_share_characters_places_and_nothing_else_between_themes():
    themes = W.held_out([0, 1])
    for column in (themes.shape, themes.pattern): assert all(len(set(row.tolist())) == len(row) for row in column)
    zero = torch.zeros(2, dtype=torch.long)
    a, b = W.paint(themes, zero, zero, torch.tensor([0, 1])), W.paint(themes, zero + 1, zero, torch.tensor([0, 1]))
    same = W.strokes(themes.shape[:1, 0], themes.texture[:1, 0], themes.pattern[:1, 0], torch.full((3, 1), .5))[0]
    inside = same[1:3].sum(0) == 1
    assert torch.equal(a[0][:, inside], a[1][:, inside]) and not torch.equal(a[0], a[1]) and not torch.equal(a, b)
    assert torch.allclose(same[1:].sum(0)[same[0] == 0], torch.ones(())) and same.min() >= 0     # layers share a pixel


def test_the_layers_are_the_picture():
    themes, one = W.held_out([4]), torch.zeros(1, dtype=torch.long)
    layers = W.strokes(themes.shape[:, 2], themes.texture[:, 2], themes.pattern[:, 1], torch.full((3, 1), .5))
    colours = torch.stack([themes.tone[:, 1], themes.colour[:, 2], themes.second[:, 2], themes.ink], 1)
    assert torch.equal(W.paint(themes, one, one + 2, one + 1), (torch.einsum("mlhw,mlc->mchw", layers, colours) * 255).round().to(torch.uint8))


def test_held_out_themes_are_not_those_of_training_and_captions_say_shape_and_pattern_only():
    data, again = W.canvases(40, 5), W.canvases(40, 5)
    assert torch.equal(data.tiles, again.tiles) and data.texts == again.texts
    seen = W.draw_themes(40, torch.Generator().manual_seed(5))
    assert not any(torch.equal(seen.colour[k], c) for k in range(40) for c in W.held_out(range(3)).colour)
    allowed = {"a", "photo", "picture", "of", "on", "ground", "thing", *SHAPES, *BACKGROUNDS}
    assert {w for t in data.texts for w in t.rstrip(".").split()} <= allowed


def test_hidden_tiles_show_what_the_text_says_and_masks_come_in_three_kinds():
    data = W.canvases(300, 1)
    counts = data.hole.sum(1)
    assert set(counts.tolist()) == {1, 2, 3, 4, 9} and .5 < (counts == 1).float().mean() < .7
    for k in range(300):
        hidden = data.hole[k]
        assert len(set(data.shape[k][hidden].tolist())) == 1 and len(set(data.pattern[k][hidden].tolist())) == 1
        for words, column in ((SHAPES, data.shape), (BACKGROUNDS, data.pattern)):
            said = set(data.texts[k].rstrip(".").split()) & set(words)
            assert said <= {words[column[k][hidden][0]]}
    colours = lambda mixed: W.canvases(60, 2, mixed=mixed).tiles.mean((3, 4)).std(1).mean()
    assert colours(True) > colours(False)                                                    # the control mixes themes


def test_training_resumes_exactly_and_the_loss_looks_into_the_hole(tmp_path):
    settings = replace(W.InpainterSettings(), batch=2, steps=4)
    def trainer(seed): torch.manual_seed(seed); return W.InpainterTrainer(settings, "cpu", tmp_path / "checkpoint.pt")
    one = trainer(0)
    one.step(0); one.save(1, 0.); one.step(1)
    two = trainer(1)
    assert two.restore() == 1
    two.step(1)
    for a, b in zip(one.modules, two.modules): assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    one.save_model(tmp_path)
    assert W.pixel_inpainter(tmp_path).unet.config.in_channels == 7 and (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 8e6


def test_the_loss_is_that_of_hidden_pixels(monkeypatch):
    torch.manual_seed(0)
    trainer, given = W.InpainterTrainer(replace(W.InpainterSettings(), batch=3, elsewhere=0., inside=0., heads=0., palette=0.), "cpu", None), {}
    original = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda x, t, **k: given.update(x=x.detach().clone(), t=t) or original(x, t, **k))
    monkeypatch.setattr(trainer, "update", lambda step, loss, warmup: given.update(loss=loss.item()))
    trainer.step(7)
    data = W.canvases(3, 7)
    images = W.to_canvas(data.tiles) / 127.5 - 1
    hidden = given["x"][:, 3:4] > .5
    assert torch.equal(hidden[:, 0, 8::16, 8::16].reshape(3, 9), data.hole) and torch.allclose(given["x"][:, 4:], images * ~hidden, atol=1e-6)      # masked pixels are blanked
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7 + 10 ** 8))
    with torch.autocast("cpu", dtype=torch.bfloat16): out = original(given["x"], given["t"], encoder_hidden_states=trainer.states(data.texts)).sample.float()
    target = trainer.scheduler.get_velocity(images, noise, given["t"])
    assert abs((out - target).square()[hidden.expand_as(out)].mean().item() - given["loss"]) < 1e-2 * given["loss"]


# -- facts --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tiny", "stable", "flux"])
def test_facts_on_every_pipeline(name, request, told):
    inpainter, (theme, asks) = request.getfixturevalue(name), told
    method = staged(inpainter)
    frame = T.check_t_prompter_nothing_is_trained(method, theme, asks[0])
    T.check_t_prompter_hidden_sixth(method, theme, asks[0])
    T.check_t_prompter_constant_theme(method, asks[1], theme.pictures[0])
    T.check_t_prompter_mask_everything(inpainter, frame.canvases[0], frame.canvases[1], asks[0].prompt, steps=2)
    assert inpainter.usual["prefix"] == ("" if name == "tiny" else T.PREFIX)


def test_what_the_hidden_sixth_is_checked_against(tiny, told, monkeypatch):
    theme, asks = told
    leaky = W.PixelInpaintPipeline.__call__
    def with_leak(self, *args, image=None, mask_image=None, **kw): return leaky(self, *args, image=image, mask_image=mask_image * (torch.arange(mask_image.shape[-1]) != 20), **kw)
    monkeypatch.setattr(W.PixelInpaintPipeline, "__call__", with_leak)                        # one column of the hole is not blanked
    with pytest.raises(AssertionError): T.check_t_prompter_hidden_sixth(staged(tiny), theme, asks[0])


def test_matching_facts_on_random_and_equal_similarities():
    for seed in range(3): T.check_t_prompter_matching_is_greedy(torch.randn(3, 14, generator=torch.Generator().manual_seed(seed)))
    found = T.match(torch.randn(3, 7))                                                       # seven pictures: the last element has one, three times
    assert len(set(found[2])) == 1 and len({k for f in found for k in f}) == 7
    with pytest.raises(ValueError, match="element 3 has none"): T.match(torch.randn(3, 6))
    independent = lambda s, count=3: s.topk(3, 1).indices.tolist()
    original, T.match = T.match, independent
    try:
        with pytest.raises(AssertionError): T.check_t_prompter_matching_is_greedy(torch.randn(3, 14))
    finally: T.match = original


def test_cost_is_counted(tiny, stable):
    T.check_t_prompter_cost(tiny, 16); T.check_t_prompter_cost(stable, 64)
    assert T.canvas_cost(tiny, 48)[1] == 4 * 144 ** 2                                        # four layers of attention at quarter size


@pytest.mark.parametrize("select", ["text", "image", "both"])
def test_selection_takes_the_highest_score(tiny, told, select):
    frame = staged(tiny, select=select)(told[0], told[1][0])
    score = {"text": frame.text, "image": frame.image, "both": frame.text + frame.image}[select]
    assert frame.chosen == score.argmax() and torch.equal(frame.picture, frame.tiles[frame.chosen])


def test_arrangements_share_the_noise_and_draws_do_not(tiny, told, monkeypatch):
    asked = []
    original = W.PixelInpaintPipeline.__call__
    monkeypatch.setattr(W.PixelInpaintPipeline, "__call__", lambda self, *a, **k: asked.extend(g.initial_seed() for g in k["generator"]) or original(self, *a, **k))
    six = staged(tiny)(told[0], told[1][0], seed=4)
    assert len(set(asked)) == 1 and len(asked) == 6 and len({tuple(r) for r in six.references}) == 6
    asked.clear()
    draws = staged(tiny, arrangements=1, draws=6)(told[0], told[1][0], seed=4)
    assert len(set(asked)) == 6 and len({tuple(r) for r in draws.references}) == 1
    assert (draws.tiles[0].int() - six.tiles[0].int()).abs().max() <= 1                       # both begin with the same candidate


# -- canvas -------------------------------------------------------------------------------------------------------------

def cells_of(canvas): return {s: int(canvas[0, 4 * (T.PLACES_OF[s] // 3), 4 * (T.PLACES_OF[s] % 3)]) for s in T.SLOTS}


def test_slots_as_published_and_corrected():
    tiles = torch.arange(1, 10, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 4, 4)
    published = cells_of(T.lay_out(tiles))
    assert [published[s] for s in ("TM", "TL", "TR", "ML", "MR", "centre", "BM", "BL", "BR")] == list(range(1, 10))
    right = cells_of(T.lay_out(tiles, corrected=True))
    assert right["centre"] == 0 and [right[s] for s in T.SLOTS if s != "centre"] == list(range(1, 9))
    own = [torch.full((3, 4, 4), v, dtype=torch.uint8) for v in (50, 60, 70, 80)]
    mine = cells_of(T.lay_out(tiles, user=own))
    assert (mine["TM"], mine["BM"], mine["ML"], mine["MR"]) == (50, 60, 70, 80) and mine["TL"] == 2
    assert torch.equal(T.centre(T.lay_out(tiles)), T.centre(T.lay_out(tiles, user=own)))


def test_tiles_cover_and_keep_the_middle():
    wide = torch.zeros(3, 20, 60, dtype=torch.uint8); wide[:, :, 20:40] = 200
    assert (T.tile(wide, 10) == 200).all() and T.tile(wide.transpose(1, 2), 32).shape == (3, 32, 32)
    picture = torch.randint(256, (3, 32, 32)).to(torch.uint8)
    assert torch.equal(T.tile(picture, 16), W.shrink(picture[None])[0].round().to(torch.uint8)) and torch.equal(T.tile(picture, 32), picture)


def test_own_pictures_of_any_size_are_cut_to_the_tile(tiny, told):
    frame = staged(tiny, arrangements=1)(told[0], told[1][0], user=[torch.full((3, 40, 90), 77, dtype=torch.uint8)])
    assert (frame.canvases[0][:, :16, 16:32] == 77).all()


def test_text_only_does_not_see_the_theme_and_black_tiles_do_not_either(tiny, told):
    other = T.studio_theme(5)[0]
    for references in ("none", "black"):
        method = staged(tiny, references=references, arrangements=1)
        assert torch.equal(method(told[0], told[1][0]).picture, method(other, told[1][0]).picture)
    assert not torch.equal(staged(tiny, references="none")(told[0], told[1][0]).picture, staged(tiny, references="black")(told[0], told[1][0]).picture)
    assert sorted(len(set(r)) for r in staged(tiny, references="random")(told[0], told[1][0]).references) == [9] * 6


# -- judge --------------------------------------------------------------------------------------------------------------

def test_the_judge_reads_true_tiles_in_any_palette_and_measures_colours():
    generator, look = torch.Generator().manual_seed(0), W.held_out(range(20))
    own, who, where = torch.randint(20, (200,), generator=generator), torch.randint(8, (200,), generator=generator), torch.randint(5, (200,), generator=generator)
    tiles = W.shrink(W.paint(look, own, who, where, generator))
    for picture in (tiles, (tiles + 12 * torch.randn(tiles.shape, generator=generator)).clamp(0, 255), 255 - tiles):   # true, noisy, inverted
        read = T.read_tiles(picture)
        assert (read["shape"] == look.shape[own, who]).float().mean() > .98 and (read["pattern"] == look.pattern[own, where]).float().mean() > .98
        assert (read["texture"] == look.texture[own, who]).float().mean() > .85


def test_scores_are_perfect_for_the_truth_and_notice_wrong_colours_and_shapes(told):
    asks = [a for k in range(4) for a in T.studio_theme(k)[1]]
    truth = torch.stack([T.tile(a.truth["picture"], 16) for a in asks])
    perfect, shifted, swapped = T.studio_scores(truth, asks), T.studio_scores((truth.int() + 40).clamp(0, 255).to(torch.uint8), asks), T.studio_scores(truth.roll(1, 0), asks)
    assert perfect["caption"] == 100 and perfect["identity_error"] < .5 and perfect["pixel_error"] < .5
    assert shifted["identity_error"] > 20 and shifted["shape"] == 100 and swapped["caption"] < 30 and swapped["identity_error"] > 20


def test_slot_influence_finds_what_the_middle_depends_on(told, monkeypatch):
    class Fake:
        def __call__(self, canvas, mask, prompt, seeds, **more):
            out = canvas.clone(); T.centre(out)[:] = canvas[..., 16:32, :16]                 # copies what stands in ML
            return out
    own, other = (T.mixed_canvases(T.studio_theme(k)[0], 2, 16, 0) for k in (0, 1))
    found = T.slot_influence(Fake(), own, other, ["a", "b"], [0, 1])
    names = [s for s in T.SLOTS if s != "centre"]
    assert found.shape == (2, 8) and (found[:, names.index("ML")] > 5).all() and found.sum(0).count_nonzero() == 1


# -- folders, errors, protocols -----------------------------------------------------------------------------------------

def write_theme(folder, count=10, size=(30, 24), lines="a star on a tiled ground. | a star. | a star on a tiled ground. | a tiled ground.\n"):
    folder.mkdir(parents=True)
    for k in range(count): Image.new("RGB", size, (20 * k % 256, 90, 200)).save(folder / f"{k}.png")
    (folder / "story.txt").write_text(lines)
    return folder


def test_a_folder_of_your_own_becomes_a_theme(tmp_path, tiny):
    theme, asks = T.read_theme(write_theme(tmp_path / "mine")), T.read_story(tmp_path / "mine" / "story.txt")
    frames = T.story(staged(tiny, arrangements=2), theme, asks)
    assert len(theme) == 10 and theme.pictures[0].shape == (3, 24, 30) and len(frames) == 1 and frames[0].picture.shape == (3, 16, 16)


def test_errors_are_one_sentence(tmp_path, tiny, told, folder):
    theme, asks = told
    canvas, mask = torch.zeros(3, 48, 48, dtype=torch.uint8), T.hole(48)
    for message, call in [("has 8 pictures.*at least nine", lambda: T.read_theme(write_theme(tmp_path / "few", 8))), ("No folder", lambda: T.read_theme(tmp_path / "nowhere")),
                          ("three elements", lambda: T.Ask("a star.", ("a star.", "a ground."))), ("is empty", lambda: T.Ask(" ", ("a", "b", "c"))), ("Prompt 2 of 3 is empty", lambda: T.Ask("a star.", ("a", "", "c"))),
                          ("cannot be divided into three", lambda: T.hole(50)), ("covers nothing", lambda: tiny(canvas, torch.zeros(48, 48, dtype=torch.bool), "a star.", [0])), ("The mask has", lambda: tiny(canvas, T.hole(24), "a star.", [0])),
                          ("do not fit.*multiple of 4", lambda: tiny(torch.zeros(3, 45, 45, dtype=torch.uint8), T.hole(45), "a star.", [0])), ("uint8", lambda: tiny(canvas.float(), mask, "a star.", [0])), ("is empty", lambda: tiny(canvas, mask, "", [0])),
                          ("2 prompts do not fit", lambda: tiny(canvas, mask, ["a", "b"], [0, 1, 2])), ("At most four", lambda: T.lay_out(torch.zeros(9, 3, 4, 4), user=[torch.zeros(3, 4, 4)] * 5)),
                          ("references is one of", lambda: staged(tiny, references="best")), ("1 to 6 arrangements", lambda: staged(tiny, arrangements=7)), ("select is one of", lambda: staged(tiny, select="both of them")),
                          ("No inpainter 'tiny-painter'", lambda: T.load_inpainter("tiny-painter")), ("does not hold a complete", lambda: T.load_inpainter(str(tmp_path))), ("1 to 5 pictures", lambda: T.studio_theme(0, 6))]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as raised: call()
        assert "\n" not in str(raised.value) and str(raised.value).endswith(".")
    bad = write_theme(tmp_path / "bad"); (bad / "3.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"): T.read_theme(bad)
    G.random_stable_diffusion(tmp_path / "drawer")
    with pytest.raises(ValueError, match="StableDiffusionPipeline, which fills no hole"): T.load_inpainter(str(tmp_path / "drawer"))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub.*tiny-inpaint"): T.load_inpainter("nobody/no-inpainter")


def test_protocols_run_and_say_what_is_wrong(folder, monkeypatch):
    monkeypatch.setitem(T.KINDS, "PixelInpaintPipeline", T.KINDS["PixelInpaintPipeline"] | {"steps": 1})
    for arm in (CLAIMS["t-prompter"].arms[0], CLAIMS["t-prompter"].arms[2], CLAIMS["t-prompter"].arms[5]):
        row = ex.run(Experiment(arm.method, str(folder), "themes:held-out", "story", 1, arm.settings | {"themes": 2, "asks": 1}))
        assert {"identity_error", "caption", "texture", "text_score", "pixel_error"} <= set(row["metrics"]) and row["metrics"]["canvases"] == arm.settings.get("arrangements", 6)
    row = ex.run(Experiment("t-prompter", str(folder), "themes:held-out", "slots", 1, {"slots": "beside", "themes": 2, "asks": 1}))
    assert row["metrics"]["influence"] > 0 and {"influence_TM", "influence_BM", "influence_ML", "influence_MR"} <= set(row["metrics"])
    for message, settings, data, protocol in (("stage is", {"stage": "none"}, "themes:held-out", "story"), ("no setting 'arangements'", {"arangements": 2}, "themes:held-out", "story"), ("Stories are told", {}, "digits", "story"), ("slots is one of", {"slots": "TM"}, "themes:held-out", "slots")):
        with pytest.raises(ValueError, match=message): ex.run(Experiment("t-prompter", str(folder), data, protocol, 1, settings))


def test_tuning_on_a_theme(folder, stable, tmp_path):
    """LoRA learns from pictures that are masked completely, one theme at a time; the network itself stays, and is as before when the change is taken out."""
    inpainter, (theme, asks) = T.load_inpainter(str(folder)), T.studio_theme(3)
    own = {n: p.clone() for n, p in inpainter.unet.named_parameters()}
    untuned = T.DynamicVisualPrompting(inpainter, load("tiny-clip"), "none", 1, steps=2)(theme, asks[0]).picture
    method = T.ThemeTuning(inpainter, load("tiny-clip"), rate=.05, epochs=1, steps=2)
    tuned = method(theme, asks[0]).picture
    first = method.lora
    assert not torch.equal(tuned, untuned) and method(theme, asks[1]) and method.lora is first, "the same theme is not tuned twice"
    assert method(T.studio_theme(4)[0], asks[0]) and method.lora is not first
    large = T.ThemeTuning(stable, load("tiny-clip"), epochs=1, steps=1, size=24)
    assert large(T.Theme("few", theme.pictures[:9], theme.captions[:9]), asks[0]).canvases.shape == (1, 3, 72, 72)
    large.lora.remove()
    method.lora.remove()
    left = {n.replace(".base_layer", ""): p for n, p in inpainter.unet.named_parameters()}
    assert left.keys() == own.keys() and all(torch.equal(p, own[n]) for n, p in left.items())
    assert torch.equal(T.DynamicVisualPrompting(inpainter, load("tiny-clip"), "none", 1, steps=2)(theme, asks[0]).picture, untuned)
    with pytest.raises(ValueError, match="has no captions: tuning needs one"): method(T.Theme("bare", theme.pictures), asks[0])
    write_theme(tmp_path / "own")
    names = sorted(f.name for f in (tmp_path / "own").iterdir() if f.suffix == ".png")
    (tmp_path / "own" / "metadata.jsonl").write_text("\n".join('{"file_name": "%s", "text": "picture %d"}' % (n, k) for k, n in enumerate(names)))
    assert T.read_theme(tmp_path / "own").captions == tuple(f"picture {k}" for k in range(len(names)))
    with pytest.raises(ValueError, match="give one for each, or none"): T.Theme("x", theme.pictures, ("one",))


def test_everything_masked_is_what_the_pipeline_shows(folder, stable, monkeypatch):
    """The channels behind the noise are those that the pipeline itself gives the network when all is masked."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)   # the pipeline draws a latent, we take the mean
    for inpainter in (T.load_inpainter(str(folder)), stable):
        lora = T.ThemeLoRA(inpainter, side={"PixelInpaintPipeline": 48}.get(type(inpainter.pipeline).__name__, 72)); side, seen = lora.generator.size, []
        hook = inpainter.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
        try: inpainter.pipeline(prompt=["a star."], image=torch.full((1, 3, side, side), .5), mask_image=torch.ones(1, 1, side, side), num_inference_steps=1, output_type="latent", **({} if inpainter.pipeline.__class__.__name__.startswith("Pixel") else dict(height=side, width=side)))
        finally: hook.remove(); lora.remove()
        channels = lora.generator.shape[0]
        assert torch.allclose(seen[0][:1, channels:], lora.known, atol=1e-4)


def test_the_effect_of_the_surroundings_is_measured_on_any_inpainter(folder, monkeypatch):
    """`inpainter` takes the backbone's place; the effect is the difference of two stories; one that is missing is named with the way to make it."""
    monkeypatch.setitem(T.KINDS, "PixelInpaintPipeline", T.KINDS["PixelInpaintPipeline"] | {"steps": 1})
    few = {"references": "random", "arrangements": 1, "themes": 2, "asks": 1}
    made = [ex.run(Experiment("t-prompter", backbone, "themes:held-out", "surroundings", 1, few | more))["metrics"] for backbone, more in ((str(folder), {}), ("tiny-inpaint", {"inpainter": str(folder)}), ("tiny-inpaint", {}))]
    assert made[0]["effect"] == made[1]["effect"] != made[2]["effect"] and made[0]["inpainter"] == made[1]["inpainter"] != made[2]["inpainter"]
    assert abs(made[2]["effect"] - made[2]["identity_error another"] + made[2]["identity_error own"]) < 1e-6
    with pytest.raises(FileNotFoundError, match="'nowhere' is not there: make it with"): ex.run(Experiment("t-prompter", "tiny-inpaint", "themes:held-out", "surroundings", 1, few | {"inpainter": "nowhere"}))


def test_themes_of_seeds_do_not_overlap():
    names = [theme.name for seed in range(1, 6) for theme, _ in T.themes_of("themes:held-out", seed)]
    assert len(names) == len(set(names)) == W.HELD_OUT
    for theme, asks in T.themes_of("themes:held-out", 2):
        assert len(theme) == 38 and all(not torch.equal(p, a.truth["picture"]) for p in theme.pictures for a in asks)


def test_full_scale_on_folders_with_another_clip_as_judge(tmp_path, stable, monkeypatch):
    for name in ("one", "two"): write_theme(tmp_path / "themes" / name)
    monkeypatch.setitem(T.KINDS, "StableDiffusionInpaintPipeline", T.KINDS["StableDiffusionInpaintPipeline"] | {"steps": 1, "tile": 24})
    monkeypatch.setattr(T, "load", lambda name: {"openai/clip-vit-base-patch32": load("tiny-clip"), "openai/clip-vit-large-patch14": load("tiny-clip")}[name])
    large = ex.variant(CLAIMS["t-prompter"], scale="full")
    assert large.backbone == "black-forest-labs/FLUX.1-Fill-dev" and large.data == ["folder:themes"] and len(large.arms) == 11
    arm = next(a for a in large.arms if a.name == "another theme")
    row = ex.run(Experiment(arm.method, stable.name, f"folder:{tmp_path / 'themes'}", "story", 1, arm.settings | {"dtype": "float32", "device": "cpu"}))
    assert {"identity_error", "caption", "text_score"} <= set(row["metrics"])
    assert row["metrics"]["canvases"] == 1
    with pytest.raises(ValueError, match="at least two sub-folders"): T.themes_of(f"folder:{tmp_path}", 1)


# -- exercises ----------------------------------------------------------------------------------------------------------
CHECKERS = ["check_greedy", "check_visible", "check_influence"]


def swap(canvas, other, slot):
    out, (r, c) = canvas.clone(), divmod(T.PLACES_OF[slot], 3)
    h = canvas.shape[-1] // 3
    out[:, r * h:(r + 1) * h, c * h:(c + 1) * h] = other[:, r * h:(r + 1) * h, c * h:(c + 1) * h]
    return out


def cumulative(fill, canvas, other):
    found, now = {}, canvas
    for s in T.PLACES_OF:
        if s == "centre": continue
        now = swap(now, other, s); found[s] = (fill(now) - fill(canvas)).abs().mean()
    return found


WRONG = [("check_greedy", lambda s: s.topk(3, 1).indices.tolist()), ("check_greedy", lambda s: s.flatten().argsort(descending=True)[:9].remainder(s.shape[1]).view(3, 3).tolist()),
         ("check_visible", lambda order, corrected: [3, 3, 3]), ("check_visible", lambda order, corrected: [2 if e == order[1] else 3 for e in range(3)]), ("check_visible", lambda order, corrected: [2 if e == (2 if corrected else 1) else 3 for e in range(3)]),
         ("check_influence", cumulative), ("check_influence", lambda fill, canvas, other: {s: (fill(swap(canvas, other, s)) - fill(canvas)).abs().mean() for s in T.PLACES_OF}), ("check_influence", lambda fill, canvas, other: {s: (fill(swap(canvas, other, s)) - fill(canvas)).abs().sum() for s in T.PLACES_OF if s != "centre"})]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(T, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)
