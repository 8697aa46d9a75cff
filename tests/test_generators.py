"""The studio's scenes and captions, the pipeline, one handle for two scales, the judge, the shared loss, the trainers."""
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from promptbook import generators as G
from promptbook import zoo
from promptbook.generator_training import DiffusionTrainer, GeneratorSettings, JudgeSettings, JudgeTrainer
from promptbook.learn import FitSettings, build, fit
from promptbook.universe import VOCABULARY


@pytest.fixture(scope="module")
def tiny():
    """Our pipeline around a random network with few channels."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**G.unet_config(widths=(16, 16, 16)))
    return G.Generator("random", G.freeze(G.with_clip(unet, G.noise_schedule())))


@pytest.fixture(scope="module")
def stable(): return G.random_stable_diffusion()


# -- studio -----------------------------------------------------------------------------------------------------------

def test_captions_are_true_and_never_name_size_or_warmth():
    scenes, warmth = G.studio_scenes(300, torch.Generator().manual_seed(1))
    for k, text in enumerate(G.captions(scenes, seed=4)):
        allowed = set("a photo picture of beside over on ground thing".split())
        for slot in range(int(scenes.count[k])): allowed |= set(G.words_of(scenes, k, slot).values())
        allowed -= {"small", "medium", "large"}
        assert not set(text.rstrip(".").split()) - allowed, text
    everything = G.captions(scenes)
    assert all(len(t.split()) > 5 for t in everything) and everything == G.captions(scenes)


def test_scenes_are_fixed_by_the_generator_and_use_taught_words_only():
    one, two = (G.studio_scenes(200, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0].shape, two[0].shape) and torch.equal(one[1], two[1])
    for name in G.STUDIO: assert set(getattr(one[0], name).flatten().tolist()) <= set(G.taught(name)), name
    novel, _ = G.studio_scenes(50, torch.Generator().manual_seed(3), pairs=0., shape=[VOCABULARY["shape"].index("gear")])
    assert {G.words_of(novel, k)["shape"] for k in range(50)} == {"gear"}
    assert (G.studio_scenes(50, torch.Generator().manual_seed(3), pairs=1.)[0].count == 2).all()


def test_warmth_changes_the_thing_and_nothing_else():
    scenes, _ = G.studio_scenes(40, torch.Generator().manual_seed(2), pairs=0., colour=[8])      # pink: neither black nor saturated
    plain, masks = G.picture(scenes)
    warm, _ = G.picture(scenes, torch.ones(40))
    inside = (masks > 0)[:, None].expand_as(plain)
    assert torch.equal(plain[~inside], warm[~inside])
    assert (warm[:, 0].int() >= plain[:, 0].int()).all() and (warm[:, 2].int() <= plain[:, 2].int()).all() and not torch.equal(warm, plain)


# -- handle and pipeline ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tiny", "stable"])
def test_a_picture_depends_on_its_own_seed_and_prompt_only(name, request):
    g = request.getfixturevalue(name)
    prompts = ["a red star.", "a blue ring.", "a green heart."]
    all_three = G.draw(g, prompts, seeds=[5, 6, 7], steps=3)
    alone = G.draw(g, prompts[1], seeds=[6], steps=3)
    assert (alone[0].int() - all_three[1].int()).abs().max() <= 1
    assert not torch.equal(G.draw(g, prompts[1], seeds=[7], steps=3), alone)
    assert (G.draw(g, prompts, seeds=[5, 6, 7], steps=3, batch=2).int() - all_three.int()).abs().max() <= 1


def test_guidance_one_asks_once_and_larger_weights_extrapolate(tiny):
    asked = []
    handle = tiny.unet.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    try:
        G.draw(tiny, "a red star.", seeds=[0], steps=2, guidance=1.)
        assert asked == [1, 1]
        asked.clear(); G.draw(tiny, "a red star.", seeds=[0], steps=2, guidance=3.)
        assert asked == [2, 2]
    finally: handle.remove()
    same = [G.draw(tiny, "a red star.", seeds=[0], steps=1, guidance=w, blank=tiny.states("a red star."), output="latents") for w in (1., 7.)]
    assert torch.allclose(*same, atol=1e-4), "where both branches are asked the same, guidance does nothing"


def test_our_loop_is_stable_diffusions_loop(stable):
    """The pixel pipeline's sampling, run on Stable Diffusion's parts, gives Stable Diffusion's latents."""
    ours = G.PixelDiffusionPipeline(stable.text_encoder, stable.tokenizer, stable.unet, stable.scheduler)
    ours.set_progress_bar_config(disable=True)
    states, start = stable.states(["a red star.", "a blue ring."]), G.noise(stable, 2)
    arguments = dict(prompt_embeds=states, negative_prompt_embeds=stable.blank(2), latents=start, num_inference_steps=4, guidance_scale=5., output_type="latent")
    assert torch.allclose(ours(**arguments).images, stable.pipeline(**arguments).images, atol=1e-5)
    assert torch.equal(ours.encode_prompt(["a red star."])[0], stable.states(["a red star."]))


def test_callbacks_change_latents_and_states_between_steps(tiny):
    seen = []
    def change(pipeline, i, t, tensors):
        seen.append((i, int(t), tuple(tensors["prompt_embeds"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}
    out = G.draw(tiny, "a red star.", seeds=[0], steps=3, output="latents", callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert len(seen) == 3 and seen[0][2][0] == 2 and (out == 0).all() and seen[0][1] > seen[2][1]


@pytest.mark.parametrize("name", ["tiny", "stable"])
def test_saved_and_loaded_it_draws_the_same(name, request, tmp_path):
    g = request.getfixturevalue(name)
    with G.quiet_diffusers(): g.pipeline.save_pretrained(tmp_path / "pipeline")
    again = G.load_generator(str(tmp_path / "pipeline"))
    assert type(again.pipeline) is type(g.pipeline)
    assert (G.draw(again, "a red star.", seeds=[1], steps=2).int() - G.draw(g, "a red star.", seeds=[1], steps=2).int()).abs().max() <= 1
    assert not [p for p in again.unet.parameters() if p.requires_grad] and not again.unet.training


def test_the_zoo_loads_generators_by_name():
    assert isinstance(zoo.load("tiny-diffusion"), G.Generator) and zoo.load("tiny-diffusion").shape == (3, 32, 32)


def test_pixels_to_latents_and_back(tiny, stable):
    images = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(tiny.to_images(tiny.to_latents(images)), images)
    assert stable.to_latents(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("call, message", [
    (lambda g: G.draw(g, ""), "is empty: say what to draw"),
    (lambda g: G.draw(g, ["a star.", "  "]), "Prompt 2 of 2 is empty"),
    (lambda g: G.draw(g, []), "list of prompts is empty"),
    (lambda g: G.draw(g, ["a star.", "a ring."], seeds=[1, 2, 3]), "2 prompts do not fit 3 seeds"),
    (lambda g: G.draw(g, "star " * 60), "tokens, 'random' reads 32"),
    (lambda g: g.to_latents(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "works on 32×32 pixels, these pictures have 16×16"),
    (lambda g: g.to_latents(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)), "three colour channels"),
    (lambda g: g.to_latents(torch.zeros(1, 3, 32, 32)), "must be uint8"),
    (lambda g: g.to_latents(np.zeros((1, 3, 32, 32))), "read files with `read_pictures`"),
    (lambda g: G.PromptedPictures(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ("a star.",)), "2 pictures but 1 prompts"),
    (lambda g: build("no such method", g, []), "No method"),
])
def test_bad_input_gets_one_clear_sentence(tiny, call, message):
    with pytest.raises(ValueError, match=message): call(tiny)


def test_bad_places_get_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="No generator 'nothing'"): G.load_generator("nothing")
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub"): G.load_generator("nobody/nothing")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixelDiffusionPipeline"}))
    with pytest.raises(FileNotFoundError, match="does not hold a complete diffusers pipeline"): G.load_generator(str(tmp_path))
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as an image"): G.read_pictures([tmp_path / "x.png"], 32)


def test_picture_files_are_scaled_cropped_and_made_rgb(tmp_path):
    Image.fromarray(np.full((20, 40), 200, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((64, 32, 4), 128, np.uint8)).save(tmp_path / "transparent.png")
    pictures = G.read_pictures([tmp_path / "grey.png", tmp_path / "transparent.png"], 32)
    assert pictures.shape == (2, 3, 32, 32) and pictures.dtype == torch.uint8 and (pictures[0] == 200).all()


# -- loss and methods -------------------------------------------------------------------------------------------------

class Free(G.DiffusionMethod):
    def __init__(self, generator):
        super().__init__(generator)
        self.states = torch.nn.Parameter(generator.states(["a thing."]).clone())
    def conditions(self, batch): return self.states.expand(len(batch["latents"]), -1, -1), {}


@pytest.mark.parametrize("name", ["tiny", "stable"])
def test_one_method_trains_on_both_scales_and_touches_nothing_frozen(name, request):
    g = request.getfixturevalue(name)
    pictures = G.PromptedPictures(torch.randint(256, (4, 3, g.size, g.size), generator=torch.Generator().manual_seed(0)).to(torch.uint8), ("a thing.",) * 4)
    before = {n: p.clone() for n, p in g.unet.named_parameters()}
    runs = []
    for _ in range(2):
        method = Free(g)
        runs.append(fit(method, pictures, FitSettings(epochs=3, batch=2, lr=.05, optimizer="adamw", schedule="constant"), seed=4).loss.tolist())
        assert [n for n, p in method.named_parameters()] == ["states"]
    assert runs[0] == runs[1], "the seed fixes noise, steps and order"
    assert not torch.equal(method.states, g.states(["a thing."])) and all(torch.equal(before[n], p) for n, p in g.unet.named_parameters())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_answer_only(kind):
    x, e, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    schedule = DDIMScheduler(prediction_type=kind)
    answer = lambda y: G.Generator(kind, type("P", (), {"unet": staticmethod(lambda *a, **k: type("O", (), {"sample": y})), "scheduler": schedule})())
    good, other = (schedule.get_velocity(x, e, t), e) if kind == "v_prediction" else (e, schedule.get_velocity(x, e, t))
    assert G.denoising_loss(answer(good), x, None, e, t) == 0 < G.denoising_loss(answer(other), x, None, e, t)
    assert G.denoising_loss(answer(x), x, None, e, t, each=True).shape == (4,)


# -- judge ------------------------------------------------------------------------------------------------------------

def test_the_judge_reads_rendered_scenes():
    scenes, warmth = G.studio_scenes(400, torch.Generator().manual_seed(11), pairs=0.)
    images = G.picture(scenes, warmth)[0]
    score = G.right(G.load_judge(), images, G.truths(scenes, warmth))
    assert min(score[k] for k in ("shape", "colour", "texture", "background", "tone", "relation")) > 90 and score["size"] > 80
    shuffled = G.right(G.load_judge(), images, {k: v.roll(1) for k, v in G.truths(scenes, warmth).items()})
    assert shuffled["shape"] < 30, "wrong answers are noticed"
    p = G.load_judge().probability(images[:5], "shape", scenes.shape[:5, 0])
    assert p.shape == (5,) and (p > .5).float().mean() > .7


def test_unasked_attributes_do_not_count():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    assert "shape" not in G.right(G.load_judge(), images, {"shape": torch.tensor([-100] * 3)})


def test_the_distance_between_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 4, generator=g)
    assert abs(G.frechet_distance(a, a)) < 1e-6
    assert G.frechet_distance(a, a + 2) == pytest.approx(16, rel=.01)                                # |mean|² = 4 · 2²
    assert G.frechet_distance(a, 3 * torch.randn(20000, 4, generator=g)) == pytest.approx(16, rel=.05)   # 4 · (3 − 1)²


# -- trainers ---------------------------------------------------------------------------------------------------------

def test_killed_and_resumed_the_generator_is_the_same(tmp_path, monkeypatch):
    import promptbook.generator_training as T
    monkeypatch.setattr(T, "unet_config", lambda: G.unet_config(widths=(8, 8, 8)))
    settings = GeneratorSettings(steps=4, batch=4)
    def run(name, stops):
        path = tmp_path / name
        path.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            trainer = DiffusionTrainer(settings, "cpu", path / "checkpoint.pt")
            for step in range(trainer.restore(), stop): trainer.step(step)
            trainer.save(stop, 1.)
        trainer.save_model(path)
        return load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
    one, two = run("straight", [4]), run("killed", [2, 4])
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_average_follows_the_weights(monkeypatch):
    import promptbook.generator_training as T
    monkeypatch.setattr(T, "unet_config", lambda: G.unet_config(widths=(8, 8, 8)))
    torch.manual_seed(0)
    trainer = DiffusionTrainer(GeneratorSettings(steps=10, batch=4, ema=.5), "cpu", None)
    old, start = [p.clone() for p in trainer.average.parameters()], 20
    trainer.step(start)
    new, keep = list(trainer.model.parameters()), min(.5, (start + 1) / (start + 10))
    assert all(torch.allclose(a, keep * o + (1 - keep) * n, atol=1e-6) for a, o, n in zip(trainer.average.parameters(), old, new))


def test_the_judges_trainer_learns():
    torch.manual_seed(0)
    trainer = JudgeTrainer(JudgeSettings(steps=40, batch=32), "cpu", None)
    losses = [float(trainer.step(k)["loss"]) for k in range(12)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["tiny-diffusion", "tiny-judge"])
def test_shipped_models_are_small_and_have_cards(name):
    folder = zoo.ZOO / name
    card = json.loads((folder / "card.json").read_text())
    assert zoo.weights_file(folder).stat().st_size <= 8e6 and card["sha256"] and card["settings"]["steps"] and card["seconds"] > 0
    assert sum(zoo.weights_file(f).stat().st_size for f in zoo.ZOO.iterdir() if f.is_dir()) <= 40e6
