"""IP-Adapter: the card's facts on any weights, sabotage that makes them fail, parity with diffusers, files, rivals, clear errors, protocol at both scales, exercises."""
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from safetensors.torch import load_file

from exercises import check_solutions
from test_cones import CHECKERS as CONCEPT_CHECKERS
from promptbook import diffusion as chapter
from promptbook.diffusion import (IP_ADAPTER, Concatenated, DecoupledAttention, FullyTuned, ImagePrompted, ImageTokens, IPAdapter, TextOnly, absent_image, adapter_state, answered, attached, captioned_folder,
                                contrary_texts, cross_attentions, draw_with_images, equal_rank, held_out_loss, image_embeddings, image_following, load_adapter, mask_on_grid, mixed_precision, nearly, own_network, save_adapter,
                                some_features, stirred, studio_pictures)
from promptbook.experiment import Experiment, find_protocol, full_scale_claim, variant
from promptbook.generators import Generator, draw, freeze, load_generator, load_judge, noise_schedule, picture, quiet_diffusers, random_stable_diffusion, right, studio_scenes, truths, unet_config, with_clip
from promptbook.inpainter_training import InpainterTrainer
from promptbook.learn import FitSettings, build, fit, load_method, save_method, trained
from promptbook.measure import count_parameters
from promptbook.universe import STYLES
from promptbook.zoo import ZOO, pretrain, weights_file

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def generator():
    """A pixel generator with random weights; its text and image encoders are the tiny CLIP's."""
    torch.manual_seed(3)
    return Generator("random", freeze(with_clip(UNet2DConditionModel(**unet_config(widths=(16, 24, 32))), noise_schedule())))


@pytest.fixture(scope="module")
def stable(): return random_stable_diffusion()


@pytest.fixture(scope="module")
def pictures(): return studio_pictures(4, 0)


# facts ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pixels", "stable"])
@pytest.mark.parametrize("fact", chapter.IP_FACTS, ids=lambda f: f.__name__)
def test_facts_hold_on_any_weights(generator, stable, fact, kind): fact(stable if kind == "stable" else generator)


def test_plus_has_parity_too(generator, stable):
    chapter.check_ip_adapter_parity(generator, "plus")
    chapter.check_ip_adapter_parity(stable, "plus")


class Stays:
    """`installed` that never takes anything out again."""
    def __init__(self, unet, processors, projection=None): self.inner = real_installed(unet, processors, projection)
    def __enter__(self): return self.inner.__enter__()
    def __exit__(self, *error): kept.append(self.inner)


real_installed, kept = chapter.installed, []


def complete_modules(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, ip_adapter_masks=None):
    text, images = encoder_hidden_states
    q = attn.to_q(hidden_states)
    z = chapter.softmax_attention(q, attn.to_k(text), attn.to_v(text), attn.heads, attention_mask)[0]
    part = self.image_part(attn, q, images, ip_adapter_masks)
    return attn.to_out[0](z) + (attn.to_out[0](part) if torch.is_tensor(part) else 0)


def transposed(q, k, v, heads, mask=None, look=True):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = q @ k.transpose(-1, -2).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def own_softmax_each(self, attn, q, images, masks, real=DecoupledAttention.image_part):
    return sum(real(self, attn, q, [s[:, [k]] for s in images], None) for k in range(images[0].shape[1]))


def three_draws(self, batch):
    off = [torch.rand(len(batch["image"]), generator=self.random) < share for share in self.drops]
    no_image, no_text = off[0] | off[2], off[1] | off[2]
    return torch.where(no_text.view(-1, 1, 1), 0., batch["states"]), torch.where(no_image.view(-1, 1), 0., batch["image"]) * (1 + 0 * no_image.view(-1, 1))


real_branch, real_tokens, real_count = DecoupledAttention.branch, ImageTokens.forward, chapter.adapter_count
SABOTAGE = [
    ("check_ip_adapter_count", "bias of the projection forgotten", lambda m: m.setattr(chapter, "adapter_count", lambda w, c, f, n=4: real_count(w, c, f, n) - n * c)),
    ("check_ip_adapter_off", "strength ignored", lambda m: m.setattr(chapter, "check_strength", lambda s: 1.)),
    ("check_ip_adapter_off", "stays in the network", lambda m: m.setattr(chapter, "installed", Stays)),
    ("check_ip_adapter_copied", "two complete modules: the bias twice", lambda m: m.setattr(DecoupledAttention, "__call__", complete_modules)),
    ("check_ip_adapter_copied", "weights not copied", lambda m: m.setattr(IPAdapter, "__init__", lambda self, g, kind="base", tokens=None, copy_weights=True, real=IPAdapter.__init__: real(self, g, kind, tokens, False))),
    ("check_ip_adapter_tokens", "tokens know their place", lambda m: m.setattr(DecoupledAttention, "branch", lambda self, attn, q, s, a: real_branch(self, attn, q, s * (1 + torch.arange(s.shape[1]).view(1, -1, 1)), a))),
    ("check_ip_adapter_zero_values", "not through the values", lambda m: m.setattr(DecoupledAttention, "branch", lambda self, attn, q, s, a: real_branch(self, attn, q, s, a) + .1 * q)),
    ("check_ip_adapter_trained", "no gradient to the tokens", lambda m: m.setattr(DecoupledAttention, "branch", lambda self, attn, q, s, a: real_branch(self, attn, q, s.detach(), a))),
    ("check_ip_adapter_mass", "softmax of the keys, as in the stored map", lambda m: m.setattr(chapter, "softmax_attention", transposed)),
    ("check_ip_adapter_dropped", "tokens set to zero", lambda m: m.setattr(ImageTokens, "forward", lambda self, v: real_tokens(self, v) * (v.abs().sum(-1) > 0)[..., None, None])),
    ("check_ip_adapter_dropped", "three draws", lambda m: m.setattr(ImagePrompted, "dropped", three_draws)),
    ("check_ip_adapter_several", "a softmax for each image", lambda m: m.setattr(DecoupledAttention, "image_part", own_softmax_each)),
    ("check_ip_adapter_parity", "masks by nearest neighbour", lambda m: m.setattr(chapter, "mask_on_grid", lambda mask, n: F.interpolate(mask[None], size=(round(n ** .5),) * 2, mode="nearest")[0].flatten(1)[..., None])),
    ("check_ip_adapter_parity", "layers numbered without gaps", lambda m: m.setattr(chapter, "adapter_state", lambda a: {"image_proj": adapter_state(a)["image_proj"], "ip_adapter": {f"{int(k.split('.')[0]) // 2}.{k.split('.', 1)[1]}": v for k, v in adapter_state(a)["ip_adapter"].items()}})),
    ("check_ip_adapter_parity", "last adapter forgotten", lambda m: m.setattr(DecoupledAttention, "image_part", lambda self, attn, q, images, masks, real=DecoupledAttention.image_part: real(self, attn, q, images[:1], masks)))]


@pytest.mark.parametrize("check, name, sabotage", SABOTAGE, ids=[f"{c}: {n}" for c, n, _ in SABOTAGE])
def test_facts_can_fail(monkeypatch, check, name, sabotage):
    torch.manual_seed(3)
    fresh = Generator("random", freeze(with_clip(UNet2DConditionModel(**unet_config(widths=(16, 24, 32))), noise_schedule())))
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, KeyError, RuntimeError, TypeError, ValueError)): getattr(chapter, check)(fresh)
    kept.clear()


def test_each_fact_has_a_sabotage(): assert {c for c, _, _ in SABOTAGE} == {f.__name__ for f in chapter.IP_FACTS}


# image side ----------------------------------------------------------------------------------------------------------
def test_embeddings_are_the_encoders(generator, stable, pictures):
    images = pictures[0].images
    for g, given in ((generator, images), (stable, torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))):
        encoder = g.pipeline.image_encoder
        pixels = g.pipeline.feature_extractor(images=[Image.fromarray(i.permute(1, 2, 0).numpy()) for i in given], return_tensors="pt").pixel_values
        out = encoder(pixels, output_hidden_states=True)
        assert torch.allclose(image_embeddings(g, given), out.image_embeds, atol=1e-5) and torch.allclose(image_embeddings(g, given, "plus"), out.hidden_states[-2], atol=1e-5)
        assert torch.allclose(absent_image(g, "plus"), encoder(torch.zeros_like(pixels[:1]), output_hidden_states=True).hidden_states[-2], atol=1e-6)


def test_masks_are_resized_as_diffusers_does():
    mask = (torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0)) > .5).float()
    for queries in (256, 64): assert torch.allclose(mask_on_grid(mask, queries), IPAdapterMaskProcessor.downsample(mask, 1, queries, 1), atol=1e-6)
    wide = torch.ones(1, 16, 32); wide[..., 16:] = 0
    assert torch.allclose(mask_on_grid(wide, 128), IPAdapterMaskProcessor.downsample(wide, 1, 128, 1), atol=1e-6)


# drawing -------------------------------------------------------------------------------------------------------------
def conditions_seen(generator, monkeypatch, call):
    """Image embeddings that reach the network."""
    seen, real = [], generator.unet.forward
    monkeypatch.setattr(generator.unet, "forward", lambda *a, **k: (seen.append(k.get("added_cond_kwargs")), real(*a, **k))[1])
    call()
    return [s and s["image_embeds"] for s in seen]


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("which", ["pixels", "stable"])
def test_unconditional_branch_has_no_image(generator, stable, monkeypatch, kind, which):
    g = stable if which == "stable" else generator
    adapter, images = IPAdapter(g, kind), torch.randint(0, 256, (2, 3, g.size, g.size), dtype=torch.uint8)
    (both,), *_ = conditions_seen(g, monkeypatch, lambda: adapter.draw(images, "a red star.", steps=1, guidance=4.))
    assert len(both) == 4 and torch.allclose(both[:2], absent_image(g, kind)[:, None].expand_as(both[:2]), atol=1e-6) and torch.allclose(both[2:, 0], image_embeddings(g, images, kind), atol=1e-6)
    (one,), *_ = conditions_seen(g, monkeypatch, lambda: adapter.draw(images, steps=1, guidance=1.))
    assert len(one) == 2


def test_strength_zero_draws_what_the_text_says(generator, pictures):
    adapter = stirred(IPAdapter(generator))
    texts = ["a red star.", "a blue ring.", "a thing.", "a pink heart."]
    plain = draw(generator, texts, steps=2).int()
    assert (adapter.draw(pictures[0].images, texts, 0, steps=2).int() - plain).abs().max() <= 1
    assert (adapter.draw(pictures[0].images, texts, 1., steps=2).int() - plain).abs().max() > 5
    assert torch.equal(draw(generator, texts, steps=2).int(), plain)


def test_batches_do_not_change_pictures(generator, pictures):
    adapter = stirred(IPAdapter(generator, "plus"))
    whole, parts = (adapter.draw(pictures[0].images, steps=2, batch=b).int() for b in (4, 3))
    assert (whole - parts).abs().max() <= 1


def test_masks_keep_each_image_on_its_side(generator, pictures):
    """A layer adds nothing outside the mask."""
    adapter = stirred(IPAdapter(generator))
    layer, processor, x, text = chapter.one_layer(adapter, queries=256)
    tokens, masks = adapter.image_tokens(some_features(adapter, 2, images=2)), torch.zeros(1, 2, 32, 32)
    masks[:, 0, :16] = 1
    part = processor.image_part(layer, layer.to_q(x), [tokens], [masks])
    assert part[:, 160:].abs().max() < 1e-6 < part[:, :96].abs().min(-1).values.max()


def test_strength_by_layer(generator):
    adapter = stirred(IPAdapter(generator))
    features, plain = [some_features(adapter, 2)], answered(generator)
    with attached(adapter, {"up_blocks": 1., "nowhere": 2.}):
        scales = {n: generator.unet.attn_processors[n].scale[0] for n in cross_attentions(generator.unet)}
        assert {n.split(".")[0] for n, s in scales.items() if s} == {"up_blocks"} and not nearly(answered(generator, features), plain, 1e-3)
    with attached(adapter, {"up_blocks": 0.}): assert nearly(answered(generator, features), plain)


def test_adapter_leaves_after_an_error(generator):
    before = list(map(id, generator.unet.attn_processors.values()))
    with pytest.raises(KeyError):
        with attached(IPAdapter(generator)): raise KeyError
    assert before == list(map(id, generator.unet.attn_processors.values())) and generator.unet.encoder_hid_proj is None and generator.unet.config.encoder_hid_dim_type is None


def test_moved_adapter_shares_weights(generator):
    other = Generator("copy", own_network(generator).pipeline)
    with torch.no_grad(): other.unet.conv_out.weight.mul_(2)
    adapter = stirred(IPAdapter(generator)); moved = adapter.onto(other)
    features = [some_features(adapter, 2)]
    with attached(moved): there = answered(other, features)
    with attached(adapter): here = answered(generator, features)
    assert moved.keys is adapter.keys and adapter.generator is generator and not nearly(there, here, 1e-2)


# training ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [IPAdapter, Concatenated, lambda g: Concatenated(g, low_rank=True), FullyTuned, lambda g: IPAdapter(g, "plus")], ids=["decoupled", "concatenated", "low rank", "full", "plus"])
def test_methods_learn_and_the_generator_stays(generator, make):
    torch.manual_seed(0)
    method, few = make(generator), studio_pictures(8, 1)[0]
    weights = {n: p.clone() for n, p in generator.unet.named_parameters()}
    before = held_out_loss(method, few, draws=1)
    history = fit(method, few, FitSettings(epochs=6, lr=3e-3, batch=8, optimizer="adamw", schedule="constant"), seed=0)
    assert held_out_loss(method, few, draws=1) < before and len(history) == 6
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in generator.unet.named_parameters())


@pytest.mark.parametrize("how", ["mixed", "half"])
@pytest.mark.parametrize("make", [IPAdapter, lambda g: Concatenated(g, low_rank=True), FullyTuned], ids=["decoupled", "low rank", "full"])
def test_low_precision_learns_as_much(generator, make, how):
    """With products in bfloat16, or a frozen network in bfloat16, training goes about as far as in fp32."""
    few, settings, gains = studio_pictures(8, 1)[0], FitSettings(epochs=6, lr=3e-3, batch=8, optimizer="adamw", schedule="constant"), []
    for low in (False, True):
        used = Generator("half", copy.deepcopy(generator.pipeline).to(torch.bfloat16)) if low and how == "half" and make is not FullyTuned else generator
        torch.manual_seed(0); method = make(used)
        before = held_out_loss(method, few, draws=1)
        with mixed_precision(used, low and how == "mixed"): fit(method, few, settings, seed=0)
        gains.append(before - held_out_loss(method, few, draws=1))
    assert gains[0] > 0 and abs(gains[1] - gains[0]) < .3 * gains[0]


def test_training_is_reproducible(generator):
    def once():
        method = build("ip-adapter", generator, (), "", seed=4)
        fit(method, studio_pictures(8, 1)[0], FitSettings(epochs=1, lr=1e-3, batch=4, optimizer="adamw", schedule="constant"), seed=4)
        return method.keys[0].weight.detach()
    assert torch.equal(once(), once())


def test_rivals_are_as_large_as_they_say(generator):
    low, plain, adapter = Concatenated(generator, low_rank=True), Concatenated(generator), IPAdapter(generator)
    ours, theirs = count_parameters(adapter)["trainable"], count_parameters(low)["trainable"]
    assert abs(ours - theirs) < .05 * ours and count_parameters(plain)["trainable"] == count_parameters(adapter.image_tokens)["trainable"]
    assert equal_rank(generator.unet) >= 1


def test_low_rank_rival_starts_as_the_plain_one(generator, pictures):
    torch.manual_seed(0); low = Concatenated(generator, low_rank=True)
    plain = Concatenated(generator); plain.image_tokens.load_state_dict(low.image_tokens.state_dict())
    assert (low.draw(pictures[0].images, steps=2).int() - plain.draw(pictures[0].images, steps=2).int()).abs().max() <= 1
    assert (stirred(low).draw(pictures[0].images, steps=2).int() - plain.draw(pictures[0].images, steps=2).int()).abs().max() > 5


def test_text_only_ignores_the_image(generator, pictures):
    texts = ["a red star."] * 4
    assert torch.equal(TextOnly(generator).draw(pictures[0].images, texts, steps=2), TextOnly(generator).draw(255 - pictures[0].images, texts, steps=2))


def test_contrary_texts_contradict():
    scenes = studio_pictures(30, 2)[1]
    texts, asked = contrary_texts(scenes)
    for a, wanted in asked.items(): assert ((wanted == -100) | (wanted != getattr(scenes, a)[:, 0])).all() and (wanted == -100).any()
    assert texts[0] == f"a {chapter.words_of(scenes, 1)['colour']} {chapter.words_of(scenes, 1)['shape']}."


# files ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_files_are_read_by_diffusers_and_by_us(stable, tmp_path, kind):
    adapter = stirred(IPAdapter(stable, kind))
    file = save_adapter(adapter, tmp_path / "models" / "mine.safetensors")
    assert {k.split(".")[1] for k in load_file(file) if k.startswith("ip_adapter")} == {str(2 * l + 1) for l in range(len(adapter.keys))}
    again, features = load_adapter(stable, str(tmp_path), "mine.safetensors"), [some_features(adapter, 2)]
    assert not trained(again)
    with attached(again): ours = answered(stable, features)
    with quiet_diffusers(), chapter.installed(stable.unet, {}):
        stable.pipeline.load_ip_adapter(str(tmp_path), "models", "mine.safetensors", image_encoder_folder=None)
        assert nearly(answered(stable, features), ours)
    with attached(load_adapter(stable, str(file))): assert torch.equal(answered(stable, features), ours)


def test_image_encoder_comes_along(tmp_path):
    g = random_stable_diffusion()
    save_adapter(IPAdapter(g), tmp_path / "models" / "mine.safetensors")
    g.pipeline.image_encoder.save_pretrained(tmp_path / "models" / "image_encoder")
    bare = random_stable_diffusion(); bare.pipeline.image_encoder = None
    with pytest.raises(ValueError, match="no image encoder"): IPAdapter(bare)
    found = load_adapter(bare, str(tmp_path), "mine.safetensors")
    assert image_embeddings(bare, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 40) and found.keys[0].weight.shape == IPAdapter(g).keys[0].weight.shape

# the zoo's adapter ---------------------------------------------------------------------------------------------------
def test_the_zoos_adapter_follows_pictures(tmp_path):
    """Read by name, as its card says; the official layout; far above an adapter that was not trained."""
    generator, card = load_generator(), json.loads((ZOO / "tiny-ip-adapter" / "card.json").read_text())
    adapter, file = load_adapter(generator, "tiny-ip-adapter"), weights_file(ZOO / "tiny-ip-adapter")
    assert card["parameters"] == count_parameters(build("ip-adapter", generator, (), ""))["trainable"] and not trained(adapter)
    assert {k.split(".")[0] for k in load_file(file)} == {"image_proj", "ip_adapter"} and weights_file(tmp_path).name == "model.safetensors"
    given, scenes, warmth = studio_pictures(24, 31)
    read = lambda method: right(load_judge(), method.draw(given.images, steps=8), {a: truths(scenes, warmth)[a] for a in ("size", "colour")})
    found, chance = read(adapter), read(build("ip-adapter", generator, (), ""))
    assert found["colour"] > chance["colour"] + 20 and found["size"] > chance["size"] + 10
    damaged = tmp_path / "tiny-ip-adapter"; damaged.mkdir()
    (damaged / "card.json").write_text(json.dumps({**card, "sha256": "0" * 64})); (damaged / "adapter.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="hash is not the one on the card"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "ZOO", tmp_path); load_adapter(generator, "tiny-ip-adapter")


def test_making_it_resumes_and_goes_on_from_a_finished_one(tmp_path, monkeypatch):
    """A run that was stopped ends in the same weights; `start` goes on from a finished model and says so on the card."""
    monkeypatch.setattr(chapter.AdapterTrainer, "abilities", lambda self, output: {})
    make = lambda folder, **more: pretrain("tiny-ip-adapter", tmp_path / folder, device="cpu", progress=False, checkpoint_every=1, settings={"batch": 2}, **{"steps": 3, **more})
    whole, usual = make("whole"), chapter.AdapterTrainer.step
    monkeypatch.setattr(chapter.AdapterTrainer, "step", lambda self, k: usual(self, k) if k < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError): make("stopped")
    monkeypatch.setattr(chapter.AdapterTrainer, "step", usual)
    read = lambda folder: load_file(folder / "adapter.safetensors")
    again = make("stopped")
    assert all(torch.equal(v, read(again)[k]) for k, v in read(whole).items()) and not (again / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="no setting 'rate'; it has steps"): pretrain("tiny-ip-adapter", tmp_path / "x", settings={"rate": 1})


def test_a_pipelines_training_goes_on_from_a_finished_one(tmp_path, monkeypatch):
    monkeypatch.setattr(InpainterTrainer, "abilities", lambda self, output: {})
    monkeypatch.setattr(InpainterTrainer, "step", lambda self, k: {})
    make = lambda folder, start: pretrain("tiny-inpaint", tmp_path / folder, device="cpu", progress=False, steps=1, seed=1, start=start)
    made, shipped = make("on", ZOO / "tiny-inpaint"), json.loads((ZOO / "tiny-inpaint" / "card.json").read_text())
    assert weights_file(made).read_bytes() == weights_file(ZOO / "tiny-inpaint").read_bytes(), "no step was taken: the same weights"
    assert json.loads((made / "card.json").read_text())["start"]["sha256"] == shipped["sha256"]
    with pytest.raises(ValueError, match="no finished model to start from"): make("off", tmp_path)
    with pytest.raises(ValueError, match="do not fit: its card says 'tiny-diffusion'"): make("off", ZOO / "tiny-diffusion")


def test_the_adapter_moves_to_another_checkpoint(monkeypatch):
    """The protocol of transfer: the style is undone before the judge looks, and the probe of the style tells rendered faded pictures from photos."""
    photos, faded = (picture(studio_scenes(30, torch.Generator().manual_seed(77), pairs=0., style=[STYLES.index(s)])[0])[0] for s in ("photo", "faded"))
    assert (chapter.undone(faded, "faded").int() - photos.int()).abs().max() <= 2 and chapter.in_style(faded, "faded") > 95 and chapter.in_style(photos, "faded") < 5
    made = find_protocol("image-transfer")(Experiment("ip-adapter", "tiny-diffusion", "studio", "image-transfer", 0, {"weights": "tiny-ip-adapter", "restyle": 16, "test": 4, "steps": 2}))
    assert {"fidelity", "control", "on size", "in style"} <= made.keys()
    check = find_protocol("image-transfer").check
    for settings, word in (({"style": "sketch"}, "'photo'"), ({"strength": 3.}, "from 0 to 2")):
        with pytest.raises(ValueError, match=word): check(Experiment("ip-adapter", "tiny-diffusion", "studio", "image-transfer", 0, settings))
    with pytest.raises(ValueError, match="ip-adapter"): check(Experiment("image-full", "tiny-diffusion", "studio", "image-transfer", 0))
    with pytest.raises(ValueError, match="photo"): chapter.restyled("tiny-diffusion", "cubist")


def test_methods_are_saved_and_loaded(generator, tmp_path):
    for name, settings in (("ip-adapter", {"kind": "plus"}), ("image-concat", {"low_rank": True})):
        method = stirred(build(name, generator, (), "", **settings))
        again = load_method(save_method(method, tmp_path / name), generator)
        assert all(torch.equal(a, b) for a, b in zip(method.parameters(), again.parameters()))


# errors --------------------------------------------------------------------------------------------------------------
def test_errors_say_what_to_do(generator, stable, pictures, tmp_path):
    adapter, images = IPAdapter(generator), pictures[0].images
    two, mask = images[:2, None].expand(-1, 2, -1, -1, -1), torch.ones(2, 32, 32)
    junk = tmp_path / "junk.safetensors"; junk.write_bytes(b"not a file of tensors")
    foreign = save_adapter(IPAdapter(stable), tmp_path / "foreign.safetensors")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    for call, words in [
            (lambda: adapter.draw(images.float()), "uint8"), (lambda: adapter.draw(images[:, :1]), "three colour channels"), (lambda: adapter.draw(images[..., :16]), "resize"),
            (lambda: adapter.draw(images, scale=2.5), "from 0 to 2"), (lambda: adapter.draw(images, scale=-.1), "from 0 to 2"), (lambda: adapter.draw(images, scale="strong"), "from 0 to 2"),
            (lambda: adapter.draw(images, ""), "empty"), (lambda: adapter.draw(images, ["a red star.", "a ring."]), "do not fit"),
            (lambda: draw_with_images(adapter, [two], masks=[mask[:1]]), "one mask an image"), (lambda: draw_with_images(adapter, [two], masks=[mask * 0]), "covers nothing"), (lambda: draw_with_images(adapter, [two], masks=[mask[0]]), "shape"),
            (lambda: draw_with_images([adapter, adapter], [two]), "2 adapters but pictures for 1"), (lambda: draw_with_images(adapter, [two], scales=[1., 1.]), "1 adapters but 2 strengths"), (lambda: draw_with_images(adapter, [two], masks=[]), "masks for 0"),
            (lambda: IPAdapter(generator, "full"), "base"), (lambda: IPAdapter(generator, tokens=-1), "at least one token"), (lambda: load_adapter(generator, str(junk)), "damaged"), (lambda: load_adapter(generator, str(foreign)), "another generator"),
            (lambda: load_adapter(generator, str(tmp_path)), "holds no adapter"), (lambda: chapter.fill_adapter(generator, {"image_proj": {"perceiver.weight": torch.ones(1)}, "ip_adapter": {}}), "no IP-Adapter"),
            (lambda: captioned_folder(tmp_path / "none", 32), "metadata.jsonl"), (lambda: captioned_folder(tmp_path, 32), "file_name and text"), (lambda: build("ip-adapter", generator, (), "", strength=1), "no setting")]:
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught: call()
        assert "\n" not in str(caught.value)
    with attached(adapter), pytest.raises(ValueError, match="one mask an image"): answered(generator, [some_features(adapter, 2, 2)], [torch.ones(1, 1, 32, 32)])


def test_unreachable_hub_is_one_sentence(generator, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)     # no patient retries
    with pytest.raises(FileNotFoundError, match="could not be fetched.*tiny scale") as caught: load_adapter(generator, "nobody/no-adapter")
    assert "\n" not in str(caught.value)


# protocol ------------------------------------------------------------------------------------------------------------
SMALL = {"train": 8, "test": 2, "val_pictures": 2, "steps": 1, "batch": 8}


@pytest.mark.parametrize("method", ["ip-adapter", "text-only"])
def test_protocol_at_tiny_scale(method):
    made = find_protocol("image-prompt")(Experiment(method, "tiny-diffusion", "studio", "image-prompt", 1, SMALL | {"epochs": int(method != "text-only")}))
    assert set(IP_ADAPTER.metrics()) <= set(made) and all(0 <= made[m] <= 100 for m in IP_ADAPTER.metrics())
    assert (method == "text-only") == ("val" not in made) == (made["trainable"] == 0)


def test_protocol_refuses_what_it_cannot_run():
    check = find_protocol("image-prompt").check
    for experiment, words in [(Experiment("ip-adapter", "tiny-diffusion", "digits", "image-prompt", 0), "studio"), (Experiment("ip-adapter", "tiny-diffusion", "studio", "image-prompt", 0, {"dtype": "int8"}), "dtype"),
                              (Experiment("coop", "tiny-clip", "studio", "image-prompt", 0), "coop"), (Experiment("ip-adapter", "tiny-diffusion", "studio", "image-prompt", 0, {"strength": 1}), "strength")]:
        with pytest.raises(ValueError, match=words): check(experiment)


def test_full_scale_path_on_random_weights(tmp_path):
    g = random_stable_diffusion(tmp_path / "sd")
    save_adapter(IPAdapter(g), tmp_path / "adapter" / "models" / "ip-adapter_sd15.safetensors")
    folder = tmp_path / "photos"; folder.mkdir()
    for k in range(6): Image.new("RGB", (80, 70), (40 * k, 90, 200)).save(folder / f"{k}.png")
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{k}.png", "text": "a red star."}) for k in range(6)))
    small = {"scale": "full", "steps": 1, "test": 2, "judge": "tiny-clip"}
    made = find_protocol("image-prompt")(Experiment("ip-adapter", str(tmp_path / "sd"), f"folder:{folder}", "image-prompt", 0, small | {"weights": str(tmp_path / "adapter")}))
    assert made["trainable"] == 0 and {"fidelity", "clip_t", "control", "kept", "val"} <= set(made)
    made = find_protocol("image-prompt")(Experiment("image-concat", str(tmp_path / "sd"), f"folder:{folder}", "image-prompt", 0, small | {"batch": 2, "low_rank": True}))
    assert made["trainable"] > 0


def test_claim_is_ready_for_both_scales():
    full = full_scale_claim(IP_ADAPTER)
    assert full.backbone.startswith("stable-diffusion-v1-5/") and len({str(a.settings) + a.method for a in full.arms}) == 5
    assert len(variant(IP_ADAPTER, quick=True).experiments()) == 6 and len({len(a.points()) for a in IP_ADAPTER.arms if a.grid}) == 1


def test_judged_numbers_follow_the_pictures(pictures):
    """A method that copies the reference is perfect in fidelity and never follows a text."""
    class Copies(TextOnly):
        def draw(self, images, prompts=None, scale=1., **options): return images
    many = studio_pictures(40, 5)
    found = image_following(Copies(None), many)
    assert found["fidelity"] > 70 and found["control"] < 30 and found["image_wins"] > 70


# exercises -----------------------------------------------------------------------------------------------------------
CHECKERS = ["check_decoupled", "check_size", "check_dropping", "check_lost_mass"]


def test_every_folded_solution_passes_its_checker(): check_solutions(chapter, CHECKERS + CONCEPT_CHECKERS, "40_diffusion")


def one_softmax(q, tk, tv, ik, iv, scale): return (q @ torch.cat([tk, ik]).T / q.shape[1] ** .5).softmax(1) @ torch.cat([tv, scale * iv])
def unscaled(q, tk, tv, ik, iv, scale): return (q @ tk.T).softmax(1) @ tv + scale * (q @ ik.T).softmax(1) @ iv
def blended(q, tk, tv, ik, iv, scale): return (1 - scale) * (q @ tk.T / 8 ** .5).softmax(1) @ tv + scale * (q @ ik.T / 8 ** .5).softmax(1) @ iv


WRONG = [("check_decoupled", one_softmax), ("check_decoupled", unscaled), ("check_decoupled", blended),
         ("check_size", lambda w, c, f, n: 2 * c * sum(w) + f * n * c + 2 * c), ("check_size", lambda w, c, f, n: 2 * c * sum(w) + (f + 1) * n * c + 2 * n * c), ("check_size", lambda w, c, f, n: 2 * (c + 1) * sum(w) + (f + 1) * n * c + 2 * c),
         ("check_dropping", lambda u, a, b, c: (u < a, u < b)), ("check_dropping", lambda u, a, b, c: (u < a, (u >= a) & (u < a + b))), ("check_dropping", lambda u, a, b, c: ((u < a) | (u > 1 - c), ((u >= a) & (u < a + b)) | (u > 1 - c))),
         ("check_lost_mass", lambda t, i: torch.ones(len(t))), ("check_lost_mass", lambda t, i: t.exp().sum(1) / i.exp().sum(1)), ("check_lost_mass", lambda t, i: torch.cat([t, i], 1).softmax(0)[:, :t.shape[1]].sum(1))]


@pytest.mark.parametrize("checker, wrong", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_wrong_answers(checker, wrong):
    with pytest.raises(AssertionError): getattr(chapter, checker)(wrong)
