"""Loading, damaged checkpoints, the hub out of reach, and pretraining that resumes exactly."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

from promptbook import zoo
from promptbook.measure import tensor_hash
from promptbook.prompts import Independent, PromptedCLIP, FreePrompts, Teacher, TextConsistency, context_layout, template_layout, run_tower, VisionTower
from promptbook.universe import ELEVEN, load_data


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(zoo.ZOO / "tiny-clip", tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_tiny_clip_is_an_ordinary_checkpoint(copy):
    model = transformers.CLIPModel.from_pretrained(copy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast) and model.config.vision_config.image_size == 32
    assert tokenizer("a photo of a platypus.").input_ids[-1] == max(tokenizer.get_vocab().values()) == model.config.text_config.eos_token_id
    assert (copy / "model.safetensors").stat().st_size <= 8 * 2 ** 20


def test_the_card_says_what_the_weights_reach():
    card = json.loads((zoo.ZOO / "tiny-clip" / "card.json").read_text())
    backbone = zoo.load("tiny-clip")
    measured = {n: zoo.zero_shot_accuracy(backbone, load_data(n)) for n in ELEVEN}
    for name, value in measured.items(): assert abs(card["zero_shot"][name] - value) < .6, name
    assert 50 <= sum(measured.values()) / 11 <= 75


def test_frozen_and_in_evaluation_mode():
    model = zoo.load("tiny-clip").model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_truncated_or_edited_checkpoint_is_one_clear_error(copy, damage):
    weights = copy / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ValueError, match="damaged"): zoo.load.__wrapped__(str(copy))


def test_a_damaged_checkpoint_without_a_card(copy):
    (copy / "card.json").unlink()
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"): zoo.load.__wrapped__(str(copy))


def test_an_incomplete_folder(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="complete checkpoint"): zoo.load.__wrapped__(str(copy))


def test_unknown_name_and_unreachable_hub(monkeypatch):
    with pytest.raises(ValueError, match="Zoo models: tiny-clip"): zoo.load("tiny-clop")
    code = ("import socket, sys\n"
            "def refuse(*a, **k): raise OSError('network is unreachable')\n"
            "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
            "from promptbook import zoo\n"
            "try: zoo.load('openai/clip-vit-base-patch16')\n"
            "except FileNotFoundError as e: print(e)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HOME": "/nonexistent"}, timeout=300)
    assert "openai/clip-vit-base-patch16" in said.stdout and "model.safetensors" in said.stdout and "tiny-clip" in said.stdout, said.stderr[-500:]


def test_bad_images_and_names():
    backbone = zoo.load("tiny-clip")
    with pytest.raises(ValueError, match="sees 32×32 pixels, these images have 64×64"): backbone.pixels(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"): backbone.pixels(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="list of class names is empty"): context_layout(backbone, [], 4)
    with pytest.raises(ValueError, match="not the one string"): context_layout(backbone, "star", 4)
    with pytest.raises(ValueError, match="needs .* tokens.* reads 32"): context_layout(backbone, ["star", "a " * 40], 4)
    with pytest.raises(ValueError, match="at least one class name"): load_data("shapes").__class__("x", (), "{}", *[load_data("shapes").train] * 3)
    with pytest.raises(ValueError, match="do not fit before the class name"): template_layout(backbone, ["star"], "a {}.", 3)
    with pytest.raises(ValueError, match="do not fit into"): run_tower(VisionTower(backbone.model), torch.zeros(1, 17, 160), [torch.zeros(1, 160)] * 9)


def test_a_teacher_with_other_classes_is_refused():
    backbone = zoo.load("tiny-clip")
    student = PromptedCLIP(backbone, ["star", "ring"], lambda names: context_layout(backbone, names, 2), Independent(text=FreePrompts(2, 128)))
    penalty = TextConsistency(1.0, Teacher(backbone, ["star"], "a photo of a {}."))
    student.regularisers.append(penalty)
    with pytest.raises(ValueError, match="built for other class names"): student(student.prepare(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), torch.tensor([0]))


PRETRAIN = "from promptbook import zoo; import sys; zoo.pretrain('tiny-clip', sys.argv[1], steps=6, device='cpu', checkpoint_every=2)"


def test_pretraining_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PRETRAIN, str(tmp_path / "straight")], check=True, env=env, capture_output=True)
    process = subprocess.Popen([sys.executable, "-c", PRETRAIN, str(tmp_path / "killed")], env=env, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if (tmp_path / "killed" / "checkpoint.pt").exists() or process.poll() is not None: break
        time.sleep(.05)
    process.send_signal(signal.SIGKILL); process.wait()
    interrupted = not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run([sys.executable, "-c", PRETRAIN, str(tmp_path / "killed")], check=True, env=env, capture_output=True)
    a, b = ((tmp_path / k / "model.safetensors").read_bytes() for k in ("straight", "killed"))
    assert interrupted and a == b


def test_only_known_models_are_remade():
    with pytest.raises(ValueError, match="known: tiny-clip"): zoo.pretrain("big-clip")


def test_training_leaves_the_shared_backbone_in_evaluation_mode():
    backbone = zoo.load("tiny-clip")
    student = PromptedCLIP(backbone, ["star", "ring"], lambda names: context_layout(backbone, names, 2), Independent(text=FreePrompts(2, 128)))
    assert student.train().training and student.source.training and not backbone.model.training and not any(m.training for m in backbone.model.modules())
