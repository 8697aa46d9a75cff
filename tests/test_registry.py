"""What must hold for every registered method, now and later: a new method is tested by being registered."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from promptbook.experiment import load_chapters
from promptbook.lm import random_backbone
from promptbook.learn import METHODS, build, fit, load_method, save_method, trained
from promptbook.measure import tensor_hash
from promptbook.universe import few_shot, load_data
from promptbook.zoo import load

load_chapters()
MASKED = ["grounder"]                                                # trained on masks, not on labels: tests/test_cones.py
NAMES = sorted(n for n in METHODS if METHODS[n].host == "clip" and n not in MASKED)
LANGUAGE, GENERATOR = (sorted(n for n in METHODS if METHODS[n].host == host) for host in ("language", "generator"))
DATA = load_data("textures")
SHOTS = few_shot(DATA.train, 2, seed=0)
IMAGES = DATA.test.images[::16]


def trained_method(name, seed=0, epochs=2):
    method = build(name, load("tiny-clip"), DATA.classes, DATA.template, seed)
    if hasattr(method, "observe"): method.observe(SHOTS)
    if trained(method): fit(method, SHOTS, replace(METHODS[name].tiny, epochs=epochs, batch=8, views=2), seed)
    if hasattr(method, "finish"): method.finish(few_shot(DATA.val, 1, seed=0))
    return method


@pytest.mark.parametrize("name", LANGUAGE)
def test_methods_for_texts_need_a_language_model(name):
    with pytest.raises(ValueError, match=f"'{name}' prompts a language model, such as tiny-t5 or tiny-gpt, and 'tiny-clip' is none"): build(name, load("tiny-clip"), ("a", "b"))
    assert build(name, random_backbone("llama"), ("a", "b"), "").identity["method"] == name


@pytest.mark.parametrize("name", GENERATOR)
def test_methods_for_generators_need_a_generator(name):
    with pytest.raises(ValueError, match=f"'{name}' prompts an image generator, such as tiny-diffusion, and 'tiny-clip' is none"): build(name, load("tiny-clip"), ())


def test_every_method_has_a_host_that_is_tested(): assert sorted([*NAMES, *MASKED, *LANGUAGE, *GENERATOR]) == sorted(METHODS)


def test_methods_for_pictures_need_a_clip():
    with pytest.raises(ValueError, match="'coop' prompts a CLIP, such as tiny-clip, and 'random llama' is none"): build("coop", random_backbone("llama"), ("a", "b"))


@pytest.fixture(scope="module")
def methods():
    backbone = load("tiny-clip")
    before = tensor_hash(backbone.model)
    made = {}
    for name in NAMES:
        made[name] = trained_method(name)
        assert tensor_hash(backbone.model) == before, f"{name} changed the backbone"
        assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters()), f"{name} left gradients on the backbone"
    return made


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_exactly_what_is_declared(name, methods):
    fresh = build(name, load("tiny-clip"), DATA.classes, DATA.template, 0)
    if hasattr(fresh, "observe"): fresh.observe(SHOTS)
    moved = {n for n, p in methods[name].named_parameters() if not n.startswith("clip.") and not torch.equal(p, dict(fresh.named_parameters())[n])}
    assert moved == set(trained(methods[name])), "some declared parameter never moved, or an undeclared one did"
    assert (METHODS[name].tiny.epochs == 0) == (not trained(methods[name]))


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits(name, methods):
    again = trained_method(name)
    assert torch.equal(again.predict(IMAGES), methods[name].predict(IMAGES))


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].tiny.epochs])
def test_another_seed_another_result(name, methods):
    assert not torch.equal(trained_method(name, seed=1).predict(IMAGES), methods[name].predict(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_predictions_do_not_depend_on_batches(name, methods):
    whole, order = methods[name].predict(IMAGES), torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(methods[name].predict(IMAGES, batch=4), whole, atol=1e-3)
    assert torch.allclose(methods[name].predict(IMAGES[order], batch=5), whole[order], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_features_first_is_exact(name, methods):
    """Loss and gradients of the cached path equal those of the plain path to 1e-5 (relative to their size)."""
    results = []
    for first in (True, False):
        method = build(name, load("tiny-clip"), DATA.classes, DATA.template, 0)
        if hasattr(method, "observe"): method.observe(SHOTS)
        if not first: method.use_plain_path()
        loss = method(method.prepare(SHOTS.images), SHOTS.labels)["loss"]
        if trained(method): loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in trained(method).items()}))
    (a, grads_a), (b, grads_b) = results
    assert abs(a - b) < 1e-5 * max(1, abs(a))
    for n in grads_a: assert torch.allclose(grads_a[n], grads_b[n], atol=1e-5 * max(1.0, grads_a[n].abs().max().item())), n


@pytest.mark.parametrize("name", [n for n in NAMES if METHODS[n].new_classes])
def test_other_classes_are_a_view(name, methods):
    """Asking for other classes changes nothing for the first ones, and one class at a time gives the same column."""
    before = methods[name].predict(IMAGES)
    other = methods[name].for_classes(["crimson star", "wavy ground"]).predict(IMAGES)
    assert other.shape == (len(IMAGES), 2) and torch.equal(methods[name].predict(IMAGES), before)
    single = methods[name].for_classes(["wavy ground"]).predict(IMAGES)
    assert torch.allclose(single[:, 0], other[:, 1], atol=1e-3)


def test_saved_methods_predict_the_same_in_a_new_process(methods, tmp_path):
    for name in NAMES: save_method(methods[name], tmp_path / name)
    code = ("import json, sys, torch; from promptbook.experiment import load_chapters; from promptbook.learn import load_method; from promptbook.universe import load_data\n"
            "load_chapters(); images = load_data('textures').test.images[::16]\n"
            "torch.save({n: load_method(sys.argv[1] + '/' + n).predict(images) for n in json.loads(sys.argv[2])}, sys.argv[1] + '/predictions.pt')")
    subprocess.run([sys.executable, "-c", code, str(tmp_path), json.dumps(NAMES)], check=True)
    elsewhere = torch.load(tmp_path / "predictions.pt", weights_only=True)
    for name in NAMES: assert torch.allclose(elsewhere[name], methods[name].predict(IMAGES), atol=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_one_clear_error(name, methods, tmp_path):
    weights = save_method(methods[name], tmp_path / name) / "prompts.safetensors"
    if weights.stat().st_size < 40: return                                     # nothing was trained, nothing to damage
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"): load_method(tmp_path / name)
