"""IAPT, CPT and PTEC: the cards' checkable facts on any weights, sabotage that makes them fail, parity with PEFT, clear errors, protocols and the exercises' checkers."""
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from exercises import check_solutions
from promptbook import adaptive, cli, learn, soft, zoo
from promptbook import experiment as ex
from promptbook.adaptive import (FORMS, ROLES, Asked, BestEpoch, Branches, ContextPrompt, Decisions, InstructionPrompts, LabelledTexts, Tenants, average_precision, calibration_error, choice_accuracy, compiled,
                                 demonstration_tokens, few_shot_task, label_rows, label_scores, label_tokens, macro_f1, merged_user, micro_f1, mix_tasks, peft_cpt, peft_inputs, positive_weights, question_tokens,
                                 rational_fit, reliability, serving_costs, spelled, task_mix, train_few_shot, unweighted)
from promptbook.experiment import CLAIMS, PROTOCOLS, Experiment, canonical
from promptbook.language import TASKS, UNSEEN
from promptbook.learn import METHODS, FitSettings, build, fit, load_method, save_method, trained
from promptbook.lm import PromptedLM, SoftPrompt, TextPairs, encode, random_backbone
from promptbook.measure import tensor_hash

CAUSAL = ("llama", "gpt2", "bloom")
SOURCES = ["what colour is the star ?", "copy : red"]
DEMONSTRATIONS = [("red star", "left"), ("small circle", "right"), ("blue square", "left"), ("large star", "right")]


@pytest.fixture(scope="module")
def models():
    return {name: random_backbone(name) for name in (*CAUSAL, "t5", "bert")}


# facts ---------------------------------------------------------------------------------------------------------------
CHECKS = {"check_rational": ([None], lambda b: ()), "check_iapt": (CAUSAL, lambda b: (b, SOURCES)), "check_iapt_reads_the_instruction": (CAUSAL, lambda b: (b, SOURCES)),
          "check_iapt_gradients": (CAUSAL, lambda b: (b, SOURCES)), "check_serving": (("llama",), lambda b: (b, [*SOURCES, "name the shape of it"])), "check_cpt": (CAUSAL, lambda b: (b, FORMS[3])),
          "check_cpt_loss": (CAUSAL, lambda b: (b,)), "check_cpt_parity": (CAUSAL, lambda b: (b,)), "check_ptec": ((*CAUSAL, "bert"), lambda b: (b,)), "check_ptec_writing": (CAUSAL, lambda b: (b,)),
          "check_ptec_parts": (("llama", "bert"), lambda b: (b,))}
CASES = [(check, name) for check, (names, _) in CHECKS.items() for name in names]


def run_check(check, models, name):
    torch.manual_seed(5)
    return getattr(adaptive, check)(*CHECKS[check][1](models.get(name)))


@pytest.mark.parametrize("check, name", CASES, ids=[f"{c}-{n}" for c, n in CASES])
def test_facts_hold_on_any_weights(models, check, name):
    run_check(check, models, name)


def rows_from(change):
    """generate_rows with its arguments changed first."""
    real = adaptive.generate_rows
    return lambda states, instruction, *rest: real(*change(states, instruction), *rest)


def forward_of(change):
    """ContextPrompt.forward with its prompts changed afterwards."""
    real = ContextPrompt.forward
    return lambda self, batch=None, embeddings=None: change(self, real(self, batch, embeddings))


def unmasked_projection(self):
    with torch.no_grad(): self.delta.mul_((self.radius.clamp(min=.01) / self.delta.norm(dim=1).clamp(min=1e-30))[:, None])


SABOTAGE = [
    ("check_rational", "denominator may vanish", lambda m: m.setattr(adaptive, "rational", lambda x, a, b: sum(a[..., j, None, None] * x ** j if a.ndim > 1 else a[j] * x ** j for j in range(a.shape[-1])) / (sum(b[j] * x ** (j + 1) for j in range(len(b))) if b.ndim == 1 else 1))),
    ("check_iapt", "pooler forgotten in the count", lambda m: m.setattr(adaptive, "iapt_count", lambda layers, d, m, length=4, orders=(6, 5), shared=False: layers * (2 * d * m + m + d))),
    ("check_iapt", "the mean counts padding", lambda m: m.setattr(adaptive, "generate_rows", rows_from(lambda s, i: (s, torch.ones_like(i))))),
    ("check_iapt_reads_the_instruction", "the pooler sees the answer", lambda m: m.setattr(adaptive, "generate_rows", rows_from(lambda s, i: (s, torch.ones_like(i))))),
    ("check_iapt_reads_the_instruction", "reads nothing", lambda m: m.setattr(adaptive, "generate_rows", rows_from(lambda s, i: (torch.ones_like(s), i)))),
    ("check_iapt_gradients", "states detached into nothing", lambda m: m.setattr(adaptive, "generate_rows", lambda s, i, w, *rest, real=adaptive.generate_rows: real(s, i, {**w, "pool": w["pool"].detach()}, *rest))),
    ("check_serving", "everybody is user 0", lambda m: m.setattr(Tenants, "rows", lambda self, *a, real=Tenants.rows: (setattr(self, "users", [0] * len(self.users)), real(self, *a))[1])),
    ("check_cpt", "labels move", lambda m: m.setattr(ContextPrompt, "forward", forward_of(lambda self, p: replace(p, prepend=p.prepend + .1 * self.delta.norm())))),
    ("check_cpt", "every row on the surface", lambda m: m.setattr(ContextPrompt, "project", unmasked_projection)),
    ("check_cpt_loss", "decay counted from the first", lambda m: m.setattr(ContextPrompt, "forward", forward_of(lambda self, p: p if p.weights is None else replace(p, weights=p.weights.flip(0))))),
    ("check_cpt_parity", "loss without the context", lambda m: m.setattr(ContextPrompt, "forward", forward_of(lambda self, p: replace(p, labels=None, weights=None)))),
    ("check_cpt_parity", "no projection", lambda m: m.setattr(ContextPrompt, "project", lambda self: None)),
    ("check_cpt_parity", "nothing moves", lambda m: m.setattr(ContextPrompt, "forward", forward_of(lambda self, p: replace(p, prepend=self.base + 0 * self.delta)))),
    ("check_ptec", "weights of the negatives", lambda m: m.setattr(adaptive.PTEC, "objective", lambda self, z, y: (self.positive * F.binary_cross_entropy_with_logits(z, y.float(), reduction="none")).mean())),
    ("check_ptec", "last column instead of last token", lambda m: m.setattr(adaptive.PTEC, "_read", lambda self, states, mask: states[:, 0])),
    ("check_ptec_writing", "the order is lost", lambda m: m.setattr(adaptive.LabelWriter, "written", lambda self, row: " " + "; ".join(c for c, on in zip(self.classes, row) if on))),
    ("check_ptec_writing", "trie switched off", lambda m: m.setattr(adaptive.Trie, "allowed", lambda self, row, tokens: list(range(3, 60)))),
    ("check_ptec_parts", "the prompt never trains", lambda m: m.setattr(adaptive.PTEC, "__init__", lambda self, b, c, i="", n=16, s="labels", w=True, train="both", r=None, real=adaptive.PTEC.__init__: real(self, b, c, i, n, s, w, "head" if train == "both" else train, r)))]


@pytest.mark.parametrize("check, name, sabotage", SABOTAGE, ids=[f"{c}: {n}" for c, n, _ in SABOTAGE])
def test_facts_can_fail(models, monkeypatch, check, name, sabotage):
    sabotage(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)): run_check(check, models, "bert" if name.startswith("last column") else CHECKS[check][0][0])


def test_each_check_has_a_sabotage():
    assert {c for c, _, _ in SABOTAGE} == set(CHECKS)


# IAPT ----------------------------------------------------------------------------------------------------------------
def test_the_controls_of_iapt_change_one_thing(models):
    b = models["llama"]
    plain, blind = (build("iapt", b, (), "", width=6, reads=r) for r in ("instruction", "constant"))
    adaptive._stirred(plain.source), adaptive._stirred(blind.source)
    rows = adaptive.written_rows(blind, blind.encode(SOURCES))
    assert torch.equal(rows[0], rows[1]) and sum(p.numel() for p in blind.source.generators.parameters()) == sum(p.numel() for p in plain.source.parameters())
    alike = adaptive._stirred(build("iapt", b, (), "", width=6, pooling="mean").source).generators(0, torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool))
    assert torch.allclose(alike, alike[:, :1].expand(-1, 4, -1), atol=1e-5)
    one = build("iapt", b, (), "", activations="shared").source.generators
    assert len(one.activations) == 1 and len(build("iapt", b, (), "").source.generators.activations) == 3


def test_rows_of_another_text_can_be_handed_out(models):
    method = build("iapt", models["llama"], (), "", width=6)
    adaptive._stirred(method.source)
    batch = method.encode(SOURCES)
    with torch.no_grad():
        own = method(batch)["logits"]
        method.source.order = torch.tensor([1, 0])
        assert not torch.allclose(method(batch)["logits"], own, atol=1e-3)


def test_iapt_is_saved_and_loaded(models, tmp_path):
    method = build("iapt", models["llama"], (), "", width=6)
    adaptive._stirred(method.source)
    back = load_method(save_method(method, tmp_path), models["llama"])
    with torch.no_grad(): assert torch.equal(back(back.encode(SOURCES))["logits"], method(method.encode(SOURCES))["logits"])


def test_generation_with_generated_prompts_is_the_same_with_and_without_cache(models):
    for name in CAUSAL:
        method = build("iapt", models[name], (), "", width=6)
        adaptive._stirred(method.source)
        fast, slow = (method.generate(SOURCES, 5, use_cache=u).ids for u in (True, False))
        assert torch.equal(fast, slow)


def test_users_need_generators_of_one_shape(models):
    b = models["llama"]
    with pytest.raises(ValueError, match="same shape"): Tenants([InstructionPrompts(b, width=4), InstructionPrompts(b, width=5)])
    with pytest.raises(ValueError, match="same shape"): Tenants([InstructionPrompts(b, reads="constant")])


def test_merging_leaves_the_weights_bit_for_bit(models):
    b = models["llama"]
    branches, before = Branches(b, 2, users=2), tensor_hash(b.model)
    with torch.no_grad(): branches.second[0].normal_()
    with merged_user(branches, 1): assert tensor_hash(b.model) != before
    assert tensor_hash(b.model) == before
    with pytest.raises(RuntimeError):
        with merged_user(branches, 0): raise RuntimeError("stop")
    assert tensor_hash(b.model) == before


def test_serving_takes_turns(models):
    table = serving_costs(models["llama"], users=2, length=6, new=3, rounds=1, rank=2)
    assert list(table.index) == list(adaptive.SERVING) and (table.loc["frozen model", ["slowdown_read", "slowdown_write", "slowdown_all"]] == 1).all() and (table[["read", "write"]] > 0).all().all()


def test_task_mix_keeps_parts_and_wordings_apart():
    mix = task_mix("mix:new tasks", 3, 20, 6)
    texts = {part: {s.split("Input: ")[1] for s in asked.sources} for part, asked in mix.items()}
    wordings = {part: {s.split("\n")[0][6:] for s in asked.sources} for part, asked in mix.items()}
    assert not wordings["new wording"] & (wordings["train"] | wordings["test"]) and wordings["new wording"] == {TASKS[t].instructions[-1] for t in mix_tasks("mix:new tasks")}
    assert not texts["test"] & texts["new wording"] and set(mix["test"].tasks) == set(mix_tasks("mix:new tasks")) and mix == task_mix("mix:new tasks", 3, 20, 6)
    assert all(t.startswith(" ") and t.endswith("\n") for t in mix["train"].targets) and mix_tasks("mix:second+swap") == ("second", "swap")


# CPT -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CAUSAL)
def test_roles_follow_the_form(models, name, form):
    if ":" not in form and "=" not in form: form = form.replace("; ", ". ")
    ids, types = demonstration_tokens(models[name], DEMONSTRATIONS, form)
    tok, groups = models[name].tokenizer, {}
    for i, t in zip(ids, types):
        if t: groups.setdefault(t, []).append(i)
    read = lambda text: tok(text, add_special_tokens=False).input_ids
    for k, (item, label) in enumerate(DEMONSTRATIONS): assert groups[4 * k + 2] == read(item) and groups[4 * k + 4] == read(label) == label_tokens(models[name], label, form)
    assert ids[0] == tok.bos_token_id and types[0] == 0 and max(types) == 4 * len(DEMONSTRATIONS) and len(ROLES) == 5


def test_question_and_demonstrations_are_one_text(models):
    b = models["llama"]
    for form in FORMS:
        ids, _ = demonstration_tokens(b, DEMONSTRATIONS, form)
        joined = [b.tokenizer.bos_token_id, *b.tokenizer("".join(form.format(item=i, label=l) for i, l in DEMONSTRATIONS) + form.split("{label}")[0].format(item="blue star").rstrip(), add_special_tokens=False).input_ids]
        assert ids + question_tokens(b, "blue star", form, DEMONSTRATIONS[-1]) == joined
    assert question_tokens(b, "blue star")[0] == b.tokenizer.bos_token_id


def test_left_padding_changes_nothing_here_and_something_in_peft(models):
    b = models["gpt2"]
    method = build("cpt", b, (), FORMS[1], demonstrations=DEMONSTRATIONS)
    questions, labels = method.questions(["blue star", "small red circle ."]), [label_tokens(b, x) for x in ("left", "right")]
    batches = {side: encode(b, questions, labels, side=side, end=False) for side in ("right", "left")}
    with torch.no_grad():
        ours, theirs = ({side: f(batch) for side, batch in batches.items()} for f in (lambda x: method(x)["loss"], lambda x, p=peft_cpt(method): p(**peft_inputs(method, x)).loss))
    assert torch.allclose(ours["left"], ours["right"], atol=1e-4) and torch.allclose(ours["right"], theirs["right"], atol=1e-4) and not torch.allclose(theirs["left"], theirs["right"], atol=1e-3)


def test_peft_shifts_the_types_of_its_caller(models):
    method = build("cpt", models["llama"], (), FORMS[1], demonstrations=DEMONSTRATIONS)
    inputs = peft_inputs(method, encode(models["llama"], method.questions(["blue star"]), [label_tokens(models["llama"], "left")], end=False))
    before = inputs["input_type_mask"].clone()
    peft_cpt(method)(**inputs)
    assert torch.equal(inputs["input_type_mask"] - before, 4 * len(DEMONSTRATIONS) * (before > 0))


def test_ascending_goes_the_other_way(models):
    b, batch, loss = models["llama"], None, {}
    for direction in ("descend", "ascend"):
        method = build("cpt", b, (), FORMS[1], demonstrations=DEMONSTRATIONS, direction=direction, radius=2.)
        batch = adaptive._example(method)
        before = method(batch)["loss"].item()
        adaptive._few_steps(method, batch, 5, .02, 0.)
        with torch.no_grad(): loss[direction] = method(batch)["loss"].item() - before
    assert loss["descend"] < 0 < loss["ascend"]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_compiled_prompt_gives_the_same_answers(models, name):
    b, task = models[name], replace(few_shot_task("episode:word", 0, 2, test=4), demonstrations=tuple(DEMONSTRATIONS), labels=("left", "right"), test=(("blue star", "left"), ("small red circle", "right")))
    method = build("cpt", b, (), task.form, demonstrations=DEMONSTRATIONS)
    with torch.no_grad(): method.source.delta.normal_(0, .01)
    fast = adaptive.label_choice(method, task, task.test)
    slow = method.score(encode(b, method.questions([i for i, _ in task.test])), [label_tokens(b, l) for l in task.labels]).total
    assert fast.shape == (2, 2) and torch.allclose(fast, slow, atol=1e-3) and compiled(method).source.prompts.memory is not None
    for other in (PromptedLM(b), build("iapt", b, (), "")): assert compiled(other) is other


def test_in_context_learning_trains_nothing(models):
    assert not trained(build("in-context", models["llama"], (), FORMS[1], demonstrations=DEMONSTRATIONS))
    ipt = build("ipt", models["llama"], (), FORMS[1], demonstrations=DEMONSTRATIONS, length=3)
    assert {n.split(".")[2] for n in trained(ipt)} == {"prompt"} and ipt.prompt_rows == 3 + len(ipt.source.sources["context"].ids)
    with torch.no_grad(): assert torch.equal(ipt.source().prepend[3:], ipt.source.sources["context"].base)


def test_cpt_is_saved_with_its_demonstrations(models, tmp_path):
    method = build("cpt", models["llama"], (), FORMS[1])
    method.observe(DEMONSTRATIONS)
    with torch.no_grad(): method.source.delta.normal_(0, .01)
    back = load_method(save_method(method, tmp_path), models["llama"])
    assert torch.equal(back.source.delta, method.source.delta) and back.questions(["blue star"]) == method.questions(["blue star"])


def test_few_shot_tasks_have_new_names_and_separate_parts():
    task = few_shot_task("episode:group", 4, shots=3, more=2, test=20)
    assert len(task.demonstrations) == 9 and len(task.more) == 6 and len(task.val) == 10 and len(task.test) == 20 and set(task.labels) <= set(UNSEEN)
    assert all(sum(l == label for _, l in task.demonstrations) == 3 for label in task.labels) and few_shot_task("episode:group", 4, shots=3, more=2, test=20) == task
    assert sorted(task.with_order(1).demonstrations) == sorted(task.demonstrations) and task.with_order(1).demonstrations != task.demonstrations
    real = few_shot_task("tickets", 0, shots=2)
    assert len(real.demonstrations) == 6 and not {t for t, _ in real.demonstrations} & {t for t, _ in real.test}


# PTEC ----------------------------------------------------------------------------------------------------------------
def test_scores_agree_with_scikit_learn():
    from sklearn.metrics import average_precision_score, f1_score
    generator = torch.Generator().manual_seed(0)
    truth, confidence = torch.rand(60, 5, generator=generator) < .3, (torch.rand(60, 5, generator=generator) * 10).round() / 10
    chosen = confidence > .5
    assert macro_f1(chosen, truth) == pytest.approx(100 * f1_score(truth, chosen, average="macro"), abs=1e-3) and micro_f1(chosen, truth) == pytest.approx(100 * f1_score(truth, chosen, average="micro"), abs=1e-3)
    assert average_precision(confidence, truth) == pytest.approx(100 * average_precision_score(truth, confidence), abs=1e-3)


def test_calibration():
    truth = (torch.rand(20_000, 2, generator=torch.Generator().manual_seed(1)) < torch.tensor([.2, .8])).float()
    assert calibration_error(torch.tensor([.2, .8]).expand_as(truth), truth) < 1.5 < 15 < calibration_error(torch.tensor([.5, .4]).expand_as(truth), truth)
    assert sum(n for _, _, n in reliability(truth, truth)) == truth.numel() and calibration_error(truth, truth) == 0


def test_weights_can_be_taken_out_of_a_confidence():
    p, weight = torch.rand(50, 4).clamp(.01, .99), torch.tensor([1., 3., 10., 40.])
    assert torch.allclose(unweighted(weight * p / (weight * p + 1 - p), weight), p, atol=1e-4)
    x = torch.zeros(2, requires_grad=True)                       # and it is where the weighted loss is smallest
    for _ in range(400):
        loss = F.binary_cross_entropy_with_logits(x.expand(10, 2), torch.tensor([[1., 1.]] * 2 + [[0., 0.]] * 8), pos_weight=torch.tensor([1., 5.]))
        x = (x - 2 * torch.autograd.grad(loss, x)[0]).detach().requires_grad_()
    assert torch.allclose(unweighted(x.sigmoid().detach(), torch.tensor([1., 5.])), torch.tensor([.2, .2]), atol=1e-2)


def test_label_rows_follow_the_card(models):
    b = models["llama"]
    table, read = b.model.get_input_embeddings().weight, lambda t: b.tokenizer(t, add_special_tokens=False).input_ids
    ids = read("red star small circle")
    assert torch.equal(label_rows(b, ("red", "star", "small circle"), 4), table[ids])
    longer = label_rows(b, ("red", "star", "small circle"), 6)
    assert torch.equal(longer[:4], table[ids]) and torch.equal(longer[4:], table[[1000 % len(table), 1001 % len(table)]])
    short = label_rows(b, ("red", "star", "small circle"), 2)
    assert all((row == table[ids]).all(1).any() for row in short)
    assert torch.equal(label_rows(b, ("red",), 2, "random"), table[[1000 % len(table), 1001 % len(table)]])


def test_ptec_trains_at_two_rates(models):
    classes, split = adaptive._some_labels()
    method = build("ptec", models["llama"], classes, "", length=4, prompt_lr=1e-6)
    method.observe(split)
    before = {n: p.detach().clone() for n, p in trained(method).items()}
    fit(method, split, FitSettings(epochs=1, lr=.1, batch=6, optimizer="adamw", schedule="constant", weight_decay=0.))
    moved = {n: (p - before[n]).abs().max().item() for n, p in trained(method).items()}
    assert moved["head.weight"] > .05 and 0 < moved["source.vectors"] < 1e-4 and build("ptec", models["llama"], classes, "", prompt_lr=0).rates == {}


def test_the_writers_weights_mean_over_tokens_first(models):
    classes, split = adaptive._some_labels()
    writer = build("label-writing", models["llama"], classes, "", length=4)
    writer.observe(split)
    batch = writer.training_set(split).__getitems__(range(6))
    with torch.no_grad(): loss, logits = writer(batch)["loss"], writer(batch)["logits"]
    weight = split.labels @ positive_weights(split.labels)
    counts = batch.labels[:, 1:] != -100
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], reduction="none") * counts
    assert torch.allclose(loss, ((each.sum(1) / counts.sum(1)) * weight / weight.mean()).mean(), rtol=1e-3)


def test_labels_are_spelled_as_they_are_written(models):
    labels, middle = spelled(models["llama"], ("red", "small circle"))
    assert labels[1] == models["llama"].tokenizer(" small circle", add_special_tokens=False).input_ids and len(middle) == 1


@pytest.mark.parametrize("name, settings", [("linear-head", {}), ("linear-head", {"weighted": True}), ("neighbours", {}), ("neighbours", {"by": "radius"}), ("gzip", {})])
def test_rivals_on_frozen_embeddings(models, name, settings):
    classes, split = adaptive._some_labels()
    method = build(name, models["bert"], classes, "", **settings)
    method.observe(split)
    if hasattr(method, "finish"): method.finish(split)
    if trained(method): fit(method, split, FitSettings(epochs=200, lr=.05, batch=6, optimizer="adamw", schedule="constant", weight_decay=0.))
    found = label_scores(method, split, {"all": torch.ones(6, dtype=torch.bool)})
    assert found["macro_f1"] > 90 and found["invalid"] == 0 and found["macro_f1_all"] == found["macro_f1"]
    assert all("lm." not in n for n in trained(method))


def test_stopping_early_forgets_later_epochs():
    class Run: epoch, method = 0, torch.nn.Linear(1, 1)
    scores = [10., 10.4, 20., 20.1, 20.2, 90.]
    hook = BestEpoch(lambda m: scores[Run.epoch])
    for Run.epoch in range(6): hook.after_epoch(Run)
    assert hook.best["epoch"] == 2 and hook.best["value"] == 20.


# claims and protocols -------------------------------------------------------------------------------------------------
def test_decisive_controls_are_arms_of_the_claims():
    arms = {c: {a.name for a in CLAIMS[c].arms} for c in ("iapt", "iapt-serving", "cpt", "ptec", "ptec-minilm")}
    assert {"deep prompts, equal size", "LoRA, equal size", "reads nothing", "GELU", "one activation"} <= arms["iapt"] and {"LoRA, unmerged", "LoRA, switched", "LoRA, merged copies"} <= arms["iapt-serving"]
    assert {"in-context learning", "no projection", "no context loss", "labels free", "ascending"} <= arms["cpt"]
    assert {"text-to-text", "text-to-text, trie", "linear head, weighted", "PTEC, head only", "kNN", "gzip-kNN"} <= arms["ptec"] and {"linear head, weighted", "kNN"} <= arms["ptec-minilm"]
    for name in arms:
        claim = CLAIMS[name]
        assert len(claim.seeds) >= 5 and len({len(a.points()) for a in claim.arms if a.grid}) <= 1 and len({(a.method, canonical(a.settings)) for a in claim.arms}) == len(claim.arms)
        for arm in claim.arms:
            for point in arm.points():
                if (check := PROTOCOLS[claim.protocol].check) and claim.backbone == "tiny-gpt": check(Experiment(arm.method, claim.backbone, claim.data[0], claim.protocol, 1, arm.settings | point))


def test_arms_of_equal_size_are(models):
    from promptbook.zoo import load
    gpt, size = load("tiny-gpt"), lambda name, **s: sum(p.numel() for p in trained(build(name, gpt, (), "", **s)).values())
    wanted = size("iapt")
    for other in (size("deep-prompts", length=21), size("lora", rank=5, alpha=10, targets="qv"), size("iapt", sharing=5, width=49)): assert abs(other / wanted - 1) < .07


@pytest.mark.parametrize("protocol, data, method, settings", [
    ("task-mix", "mix:two tasks", "iapt", {"train": 8, "test": 2, "epochs": 1, "batch": 8}), ("in-context", "episode:word", "cpt", {"shots": 1, "draws": 1, "test": 4, "epochs": 1}),
    ("in-context", "episode:word", "prompt-tuning", {"shots": 1, "draws": 1, "test": 4, "epochs": 1, "length": 3}), ("serving", "users:2", "iapt", {"length": 6, "new": 3, "rounds": 1})])
def test_protocols_run(protocol, data, method, settings):
    found = PROTOCOLS[protocol](Experiment(method, "tiny-gpt", data, protocol, 1, settings))
    assert all(isinstance(v, (int, float)) for v in found.values()) and ("accuracy" in found or "slowdown_all" in found)


def test_the_multi_label_protocol_reads_a_table_of_your_own(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "\n".join(f"{a} thing {k},{l}" for k in range(10) for a, l in (("red", "red"), ("blue", "blue; cold"), ("green", "green"), ("icy", "cold"))))
    found = PROTOCOLS["multi-label"](Experiment("gzip", "tiny-gpt", str(path), "multi-label", 0))
    assert found["macro_f1"] > 50 and "gap" not in found
    with pytest.raises(ValueError, match="which is not among the 2 classes"): adaptive.load_text(str(path), classes=["red", "blue"])


# errors --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, settings, message", [
    ("iapt", {"length": 0}, "at least one row"), ("iapt", {"sharing": 9}, "shared by 1 to 3 layers"), ("iapt", {"pooling": "max"}, "Unknown pooling 'max'"), ("iapt", {"activation": "swish"}, "Unknown activation 'swish'"),
    ("iapt", {"reads": "all"}, "Unknown reads"), ("cpt", {"radius": -1.}, "cannot be negative"), ("cpt", {"decay": 1.5}, "between 0 and 1"), ("cpt", {"direction": "up"}, "Unknown direction 'up'"),
    ("ptec", {"train": "all"}, "Unknown train"), ("ptec", {"start": "words"}, "Unknown start 'words'"), ("label-writing", {"decoding": "beam"}, "Unknown decoding"), ("label-writing", {"order": "random"}, "Unknown order"),
    ("neighbours", {"by": "vote"}, "Unknown by")])
def test_bad_settings_are_one_clear_error(models, name, settings, message):
    demonstrations = {"demonstrations": DEMONSTRATIONS} if name == "cpt" else {}
    with pytest.raises(ValueError, match=message): build(name, models["llama"], ("red", "star"), FORMS[1], **settings, **demonstrations)


def test_bad_input_is_one_clear_error(models):
    llama, bert = models["llama"], models["bert"]
    classes, split = adaptive._some_labels()
    with pytest.raises(ValueError, match="encoder and writes no labels"): build("label-writing", bert, classes, "")
    with pytest.raises(ValueError, match="need a causal language model"): build("cpt", bert, (), FORMS[1])
    with pytest.raises(ValueError, match="text to label is empty"): build("ptec", llama, classes, "").decide(["a star", "  "])
    with pytest.raises(ValueError, match="do not fit into the 96 positions"): build("ptec", llama, classes, "", length=90).decide(["a red star left of the small blue circle"])
    with pytest.raises(ValueError, match="do not fit into the 96 positions"): train_few_shot("cpt", llama, replace(few_shot_task("episode:attribute", 0, 20), labels=("left", "right", "above")), FitSettings(epochs=1, batch=4, optimizer="adamw"))
    with pytest.raises(ValueError, match="item to classify is empty"): question_tokens(llama, " ")
    with pytest.raises(ValueError, match="needs one {item}"): build("cpt", llama, (), "{label}: {item}; ")
    with pytest.raises(ValueError, match="no token belongs to the text alone"): demonstration_tokens(llama, [("", "left")])
    with pytest.raises(ValueError, match="several labels"): few_shot_task("sectors", 0)
    with pytest.raises(ValueError, match="every text has one label"): adaptive.check_labels(Experiment("ptec", "tiny-gpt", "tickets", "multi-label", 0))
    with pytest.raises(ValueError, match="no task named 'secnd'"): mix_tasks("mix:secnd")
    with pytest.raises(ValueError, match="no setting 'lenght'"): adaptive.check_mix(Experiment("iapt", "tiny-gpt", "mix:two tasks", "task-mix", 0, {"lenght": 3}))
    with pytest.raises(ValueError, match="number of users"): adaptive.check_serving_experiment(Experiment("iapt", "tiny-gpt", "users", "serving", 0))
    with pytest.raises(ValueError, match="at least one demonstration"): few_shot_task("episode:word", 0, shots=0)
    with pytest.raises(ValueError, match="no linear layers"): Branches(llama, matrices=("nothing",))


# exercises ------------------------------------------------------------------------------------------------------------
CHECKERS = ["check_pooling", "check_inner_width", "check_projection", "check_label_weights", "check_weighted_loss", "check_macro_f1"]


def test_every_folded_solution_passes_its_checker(): check_solutions(adaptive, CHECKERS, "16_adaptive")


def weights_of(types, gamma, distance):
    label = (types > 0) & (types % 4 == 0)
    return label * gamma ** distance(types).float()


def f1_of(chosen, truth, kept):
    hit, wrong = (chosen & truth).sum(0), (chosen ^ truth).sum(0)
    return (2 * hit / (2 * hit + wrong).clamp(min=1))[kept(truth)].mean()


WRONG = [
    ("check_pooling", lambda u, s, m: s.softmax(1).transpose(1, 2) @ u), ("check_pooling", lambda u, s, m: s.masked_fill(~m[..., None], -1e9).softmax(2).transpose(1, 2) @ u), ("check_pooling", lambda u, s, m: u.mean(1)),
    ("check_inner_width", lambda layers, d, length, budget: budget // layers // (2 * d)), ("check_inner_width", lambda layers, d, length, budget: (budget // layers - d - 12) // (2 * d + 1)),
    ("check_projection", lambda delta, r: delta / delta.norm(dim=1, keepdim=True) * r[:, None]), ("check_projection", lambda delta, r: delta.clamp(-r[:, None], r[:, None])),
    ("check_label_weights", lambda t, g: weights_of(t, g, lambda t: t // 4 - 1)), ("check_label_weights", lambda t, g: weights_of(t, g, lambda t: t.max() // 4 - t // 4 + 1)), ("check_label_weights", lambda t, g: g ** (t.max() // 4 - t // 4).float()),
    ("check_weighted_loss", lambda z, y, w: (w * F.binary_cross_entropy_with_logits(z, y, reduction="none")).mean()), ("check_weighted_loss", lambda z, y, w: F.binary_cross_entropy_with_logits(z, y, pos_weight=w, reduction="sum") / len(z)),
    ("check_macro_f1", lambda c, t: 2 * (c & t).sum() / (c.sum() + t.sum())), ("check_macro_f1", lambda c, t: f1_of(c, t, lambda t: torch.ones(t.shape[1], dtype=torch.bool)))]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(adaptive, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)


# full scale without a network -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A causal model with random weights in bf16 as an ordinary checkpoint, with a tokenizer that spells any English."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    folder, tok = tmp_path_factory.mktemp("llama") / "llama", AutoTokenizer.from_pretrained(zoo.ZOO / "tiny-gpt")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    model.to(torch.bfloat16).save_pretrained(folder); tok.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Small sets with the hub's columns, and no network."""
    import datasets
    datasets.disable_progress_bars()
    def save(name, **parts): datasets.DatasetDict({part: datasets.Dataset.from_dict(table) for part, table in parts.items()}).save_to_disk(str(tmp_path / "data" / name))
    reviews = lambda n: {"sentence": [f"the film number {k} was {'good' if k % 2 else 'bad'}" for k in range(n)], "label": [k % 2 for k in range(n)]}
    save("glue-sst2", train=reviews(60), validation=reviews(12))
    questions = lambda n: {"question": [f"is star {k} red" for k in range(n)], "passage": [f"star {k} is {'red' if k % 2 else 'blue'}" for k in range(n)], "label": [k % 2 for k in range(n)]}
    save("superglue-boolq", train=questions(40), validation=questions(12))
    save("topics-ag_news", train={"text": [f"news {k}" for k in range(80)], "label": [k % 4 for k in range(80)]}, test={"text": [f"late news {k}" for k in range(12)], "label": [k % 4 for k in range(12)]})
    comments = lambda n: {"text": [f"comment {k} on the game" for k in range(n)], "labels": [[k % 28, 27] if k % 2 else [k % 27] for k in range(n)]}
    save("go_emotions", train=comments(24), validation=comments(8), test=comments(8))
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("PROMPTBOOK_DATA", str(tmp_path / "data")); monkeypatch.delenv("PROMPTBOOK_RESULTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    soft.hub_parts.cache_clear(); zoo.load.cache_clear()
    yield tmp_path
    soft.hub_parts.cache_clear(); zoo.load.cache_clear()


@pytest.mark.parametrize("claim", ["iapt", "iapt-serving", "cpt", "ptec", "ptec-sectors", "ptec-minilm"])
def test_claims_at_full_scale_name_real_data_and_models(claim):
    large = ex.variant(CLAIMS[claim], scale="full")
    assert "/" in large.backbone and large.data == CLAIMS[claim].full_data and all(a.settings["scale"] == "full" for a in large.arms)


@pytest.mark.parametrize("protocol, data, method, settings", [("task-mix", "mix:superglue:boolq+glue:sst2", "iapt", {"train": 8, "test": 2}), ("in-context", "glue:sst2", "cpt", {"shots": 1, "more": 1, "draws": 1, "test": 4, "classes": 2}),
                                                              ("in-context", "topics:ag_news", "lora", {"shots": 1, "more": 1, "draws": 1, "test": 4}), ("multi-label", "go_emotions", "ptec", {"length": 8}), ("multi-label", "go_emotions", "label-writing", {"length": 8, "most": 4})])
def test_a_causal_checkpoint_in_bf16_on_sets_from_the_hub(hub, checkpoint, protocol, data, method, settings, monkeypatch):
    used, load = [], soft.load
    monkeypatch.setattr(soft, "load", lambda name, **o: used.append((o, load(name, **o))) or used[-1][1])
    row = ex.run(Experiment(method, str(checkpoint), data, protocol, 0, {"scale": "full", "epochs": 1, "batch": 4, **({"accumulate": 1} if "multi" in protocol else {}), **settings}), hub / "rows.jsonl")
    assert used and all(o == {"dtype": "bfloat16", "device_map": "auto"} and b.model.dtype == torch.bfloat16 for o, b in used) and row["metrics"]["trainable"] > 0


def test_hub_sets_and_their_errors(hub):
    asked = task_mix("mix:superglue:boolq+glue:sst2", 0, 8, 2)
    assert len(asked["test"]) == len(asked["new wording"]) == 4 and "answer the question from the passage" in asked["test"].sources[0] and {t.strip() for t in asked["train"].targets} == {"True", "False", "negative", "positive"}
    assert len(few_shot_task("topics:ag_news", 0, shots=2, more=1, classes=4).demonstrations) == 8
    emotions = adaptive.label_data(Experiment("ptec", "tiny-gpt", "go_emotions", "multi-label", 0))
    assert len(emotions.classes) == 28 and emotions.train.labels.sum(1).tolist()[:2] == [1, 2] and len(emotions.test) == 8
    import datasets
    datasets.DatasetDict({p: datasets.Dataset.from_dict({"text": ["a"], "label": [1]}) for p in ("train", "validation", "test")}).save_to_disk(str(hub / "data" / "other"))
    (hub / "data" / "go_emotions").rename(hub / "data" / "old"); (hub / "data" / "other").rename(hub / "data" / "go_emotions")
    with pytest.raises(ValueError, match="should have a column 'labels'"): adaptive.label_data(Experiment("ptec", "tiny-gpt", "go_emotions", "multi-label", 0))
    with pytest.raises(FileNotFoundError, match="fancyzhx/dbpedia_14.*HF_HUB_OFFLINE"): few_shot_task("topics:dbpedia", 0)
    with pytest.raises(ValueError, match="dtype is"): soft.backbone_of(Experiment("ptec", "tiny-gpt", "sectors", "multi-label", 0), {"dtype": "fp8", "device_map": None})


def test_a_backbone_on_several_devices_stays_where_it_is(models, monkeypatch):
    method = build("iapt", models["llama"], (), "", width=4)
    moved = []
    monkeypatch.setattr(PromptedLM, "to", lambda self, *a, **k: moved.append(a) or self)
    assert learn._place(method, torch.device("cpu")) is False and moved
    monkeypatch.setattr(models["llama"].model, "hf_device_map", {"model.layers.0": 0, "model.layers.1": 1}, raising=False)
    moved.clear()
    assert learn._place(method, torch.device("meta")) is True and not moved and {p.device.type for p in method.parameters()} == {"cpu"}


def test_two_processes_train_what_one_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "ptec", "--set", "epochs=1", "--set", "batch=32", "--set", "length=4", "--quiet", "--store"]
    assert cli.main([*words, "1.jsonl"]) == 0
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = str(s.getsockname()[1])
    launcher = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "promptbook.cli", *words, "2.jsonl"], capture_output=True, text=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(f"{k}.jsonl").read_text()) for k in (1, 2))
    assert (one["processes"], two["processes"], one["protocol"], one["backbone"], one["data"]) == (1, 2, "multi-label", "tiny-gpt", "scenes") and one["key"] == two["key"]
    assert all(two["metrics"][k] == pytest.approx(one["metrics"][k], abs=.5) for k in ("macro_f1", "ap", "ece"))
