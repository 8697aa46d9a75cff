"""The tokenizer, the starts that copy, span corruption, the trainers, and what the shipped language models can do."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from promptbook import zoo
from promptbook.language import FORMS, KIND_OF, NOUNS, TASKS, UNSEEN, episode
from promptbook.pretraining import (EPISODES, GPTTrainer, HEAD, LanguageSettings, SENTINELS, T5Trainer, answers, copying_start, english_tokenizer, gpt_config, hide_spans, induction_start,
                                    shots_curve, t5_config, task_accuracy)

TOKENIZER = english_tokenizer()


@pytest.mark.parametrize("text", ["red: walrus; blue: fig;", "Ünïcödé 北京 🙂", "tabs\tand\nlines", "https://example.org/?a=1&b=2", "  two  spaces "])
def test_any_text_is_spelled_and_read_back(text):
    ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(ids).lstrip(" ") == text.lstrip(" ") and TOKENIZER.unk_token_id not in ids


def test_marks_are_put_where_they_belong():
    for marks, ids in (("start", lambda r: [1, *r]), ("end", lambda r: [*r, 2])):
        marked = english_tokenizer(marks)
        assert marked("copy: fig").input_ids == ids(TOKENIZER("copy: fig").input_ids) and marked("copy: fig", add_special_tokens=False).input_ids == TOKENIZER("copy: fig").input_ids
        assert marked.get_vocab() == TOKENIZER.get_vocab()


def test_words_of_the_universe_are_one_piece_each():
    assert not [w for w in (*NOUNS, *KIND_OF) if len(TOKENIZER(w).input_ids) != 1 or TOKENIZER("x " + w).input_ids[-1] != TOKENIZER(w).input_ids[0]]
    assert len(TOKENIZER) == 2048 and len({TOKENIZER.convert_tokens_to_ids(f"<extra_id_{k}>") for k in range(SENTINELS)}) == SENTINELS


# -- starts -----------------------------------------------------------------------------------------------------------

def started(induction=True):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(gpt_config(), attn_implementation="eager").eval()
    if induction: induction_start(model, torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def matching(model, form, head):
    """Share of attention that a second-layer head gives to the right labels, from the last token of an episode."""
    shares = []
    for k in range(10):
        e = episode(random.Random(k), 8, "word", 3, UNSEEN, form)
        ids = TOKENIZER(e.prompt()).input_ids
        row = model(torch.tensor([ids]), output_attentions=True).attentions[1][0, head, -1]
        shares.append(row[torch.tensor(ids) == TOKENIZER(e.label).input_ids[0]].sum().item())
    return sum(shares) / len(shares)


def test_the_first_layer_looks_back_and_the_second_finds_the_label():
    plain, start = started(False), started()
    ids = torch.randint(40, 2048, (1, 60), generator=torch.Generator().manual_seed(1))
    for model, low, high in ((start, .95, 1.01), (plain, 0, .2)):
        looks = model(ids, output_attentions=True).attentions[0][0]
        assert all(low <= looks[head].diagonal(-(head + 1)).mean() <= high for head in range(4))
    for form, head in ((FORMS[0], 0), (FORMS[1], 1), (FORMS[3], 2)):
        assert matching(start, form, head) > 1.8 * matching(plain, form, head), form


def test_a_start_that_looks_the_wrong_way_is_noticed():
    wrong = started()
    with torch.no_grad(): wrong.model.layers[0].self_attn.q_proj.bias.mul_(-1)
    looks = wrong(torch.randint(40, 2048, (1, 60)), output_attentions=True).attentions[0][0]
    assert looks[0].diagonal(-1).mean() < .5


@torch.no_grad()
def test_t5_starts_with_neighbours_and_a_decoder_that_reads_on():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration._from_config(t5_config(), attn_implementation="eager").eval()
    copying_start(model, torch.Generator().manual_seed(0))
    ids = torch.tensor([TOKENIZER("apple badge basket beacon bell bench berry").input_ids])
    out = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, ids[0, 3].item()]]), output_attentions=True)
    looks = out.encoder_attentions[0][0]
    assert looks[0].diagonal(-1).mean() > .8 and looks[1].diagonal(1).mean() > .8
    cross = out.cross_attentions[0][0, :, -1]
    assert cross[0].argmax() == 4 and cross[1].argmax() == 2                 # what follows the word just written, and what precedes it


# -- span corruption --------------------------------------------------------------------------------------------------

def test_hidden_spans_put_back_give_the_text():
    sentinels = TOKENIZER.convert_tokens_to_ids([f"<extra_id_{k}>" for k in range(SENTINELS)])
    for k in range(200):
        ids = list(range(100, 100 + random.Random(k).randint(1, 90)))
        source, target = hide_spans(ids, random.Random(k), sentinels)
        spans, current = {}, None
        for i in target:
            if i in sentinels: spans[current := i] = []
            else: spans[current].append(i)
        assert [j for i in source for j in (spans[i] if i in spans else [i])] == ids and spans and all(spans.values())


# -- trainers ---------------------------------------------------------------------------------------------------------

SMALL = {"tiny-gpt": (GPTTrainer, dict(batch=2, length=64)), "tiny-t5": (T5Trainer, dict(batch=4, length=64))}


@pytest.mark.parametrize("name", SMALL)
def test_batches_are_fixed_by_seed_and_step(name):
    kind, small = SMALL[name]
    a, b, c = (kind(LanguageSettings(**small, seed=seed), "cpu", None) for seed in (0, 0, 1))
    make = (lambda t, k: (t.rows(k),)) if name == "tiny-gpt" else (lambda t, k: t.pairs(k))
    same = lambda x, y: all(u.shape == v.shape and torch.equal(u, v) for u, v in zip(x, y))
    assert same(make(a, 3), make(b, 3)) and not same(make(a, 3), make(a, 4)) and not same(make(a, 3), make(c, 3))


RUN = """
import sys
from dataclasses import replace
from promptbook import pretraining, zoo
kind = zoo._trainer(sys.argv[1])
kind.settings = replace(kind.settings, batch=2, length=48)
kind.abilities = lambda self, output: {}
zoo.pretrain(sys.argv[1], sys.argv[2], steps=8, device='cpu', checkpoint_every=2, progress=False)
"""


@pytest.mark.parametrize("name", SMALL)
def test_killed_and_resumed_ends_in_the_same_weights(name, tmp_path):
    command, env = lambda folder: [sys.executable, "-c", RUN, name, str(tmp_path / folder)], {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("straight"), check=True, env=env, capture_output=True)
    process = subprocess.Popen(command("killed"), env=env, stderr=subprocess.DEVNULL)
    for _ in range(2400):
        if (tmp_path / "killed" / "checkpoint.pt").exists() or process.poll() is not None: break
        time.sleep(.02)
    process.send_signal(signal.SIGKILL); process.wait()
    subprocess.run(command("killed"), check=True, env=env, capture_output=True)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("straight", "killed"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    backbone = zoo.load.__wrapped__(str(tmp_path / "straight"))
    assert backbone.kind == ("causal" if name == "tiny-gpt" else "seq2seq") and not (tmp_path / "killed" / "checkpoint.pt").exists()


# -- the shipped models -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["tiny-gpt", "tiny-t5"])
def shipped(request):
    return zoo.load(request.param)


def test_a_shipped_model_is_small_and_its_card_is_true(shipped):
    folder = zoo.ZOO / shipped.name
    card = json.loads((folder / "card.json").read_text())
    assert (folder / "model.safetensors").stat().st_size <= 8e6 and card["sha256"] and card["tasks"].keys() == TASKS.keys()
    assert shipped.tokenizer.get_vocab() == TOKENIZER.get_vocab(), "the shipped tokenizer is the one that the texts of today make"
    names = ["first", "kind of word", "describe", "larger"]
    again = task_accuracy(shipped, names)
    assert all(abs(again[n] - card["tasks"][n]) <= 4 for n in names), (again, {n: card["tasks"][n] for n in names})


def test_tiny_gpt_learns_in_context():
    backbone = zoo.load("tiny-gpt")
    for kind in EPISODES:
        curve = shots_curve(backbone, kind, shots=(0, 4, 16), count=80)
        assert curve["0"] < 50 and curve["16"] > curve["0"] + 25 and curve["16"] >= curve["4"] - 5, (kind, curve)


def test_answers_stop_at_the_line(shipped):
    said = answers(shipped, ["Task: copy the words\nInput: fig\nOutput:", "Task: write the last word\nInput: heron walrus badge basket beacon\nOutput:"])
    assert len(said) == 2 and all("\n" not in s for s in said)
    assert answers(shipped, ["Task: copy the words\nInput: fig\nOutput:"])[0] == said[0], "padding changes nothing"
