"""Soft prompts, DePT and EPT: the cards' checkable facts on random weights, data sources, the protocol, costs, full scale without a network, clear errors, and the exercises' checkers."""
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exercises import check_solutions
from promptbook import experiment as ex
from promptbook import cli, soft, zoo
from promptbook.experiment import CLAIMS, Experiment, Store, run
from promptbook.learn import METHODS, FitSettings, Hook, build, fit, load_method, save_method, trained
from promptbook.lm import LMPrompts, PromptedLM, SoftPrompt, fold, random_backbone
from promptbook.measure import count_flops, count_parameters, tensor_hash
from promptbook.soft import TextExamples, dept_rank, text_problem

TEXTS, ANSWERS = ("what colour is the star ?", "copy : red"), ("blue", "red")
TRAINED = ("prompt-tuning", "p-tuning", "residual-prompt", "deep-prompts", "prefix-tuning", "lora", "full-tuning", "dept", "ept")


@pytest.fixture(scope="module")
def models():
    return {"t5": random_backbone("t5", width=24), "llama": random_backbone("llama", width=48, layers=2)}


@pytest.fixture
def tiny(models, monkeypatch):
    """The random T5 under a name that experiments can use."""
    monkeypatch.setattr(soft, "load", lambda name: models["t5"])
    return {"train": 16, "val": 6, "test": 6, "batch": 8, "steps": 2}


# facts -------------------------------------------------------------------------------------------------------------
CHECKS = ("check_baselines", "check_dept", "check_dept_gradients", "check_dept_positions", "check_ept", "check_ept_gradients")


@pytest.mark.parametrize("kind", ("t5", "llama"))
@pytest.mark.parametrize("check", CHECKS)
def test_facts_hold_on_any_weights(models, check, kind):
    torch.manual_seed(5)
    getattr(soft, check)(models[kind])


def patched(name, new): return lambda m: m.setattr(soft, name, new)
def method_of(cls, name, change): return lambda m: m.setattr(getattr(soft, cls), name, change(getattr(getattr(soft, cls), name)))


def start_b_too(self, *args, start=soft.DecomposedPrompt.__init__, **options):
    start(self, *args, **options)
    if self.B is not None: nn.init.normal_(self.B, std=.1)


def open_spaces(self, *args, start=soft.FusedPrompt.__init__, **options):
    start(self, *args, **options)
    if self.up is not None: nn.init.normal_(self.up)


def touch_the_shared_model(self, backbone, change, start=soft.TunedLM.__init__, **options):
    start(self, backbone, change, **options)
    next(iter(backbone.model.parameters())).data.add_(.01)


SABOTAGE = [
    ("check_baselines", "merging twice", patched("merged", lambda method: (lambda m: [x.scale_layer(2.) for x in m.lm.modules() if hasattr(x, "lora_A")] and m)(soft.copy.deepcopy(method)))),
    ("check_baselines", "low rank that starts elsewhere", patched("low_rank", (lambda make: lambda *a: {n: p.data.add_(.1) and p if False else nn.init.normal_(p) for n, p in make(*a).items()})(soft.low_rank))),
    ("check_baselines", "the shared model is changed", lambda m: m.setattr(soft.TunedLM, "__init__", touch_the_shared_model)),
    ("check_dept", "B starts away from zero", lambda m: m.setattr(soft.DecomposedPrompt, "__init__", start_b_too)),
    ("check_dept", "a table for each text", method_of("DecomposedPrompt", "forward", lambda f: lambda self, batch=None, embeddings=None: replace(f(self), offset=None if self.A is None else self.table() * (1 if embeddings is None else embeddings.mean())))),
    ("check_dept", "one more rank", patched("dept_count", lambda m, r, s, D: m * D + (r + 1) * (s + D))),
    ("check_dept_gradients", "both factors start at random", lambda m: m.setattr(soft.DecomposedPrompt, "__init__", start_b_too)),
    ("check_dept_gradients", "the prompt is cut off", method_of("DecomposedPrompt", "forward", lambda f: lambda self, batch=None, embeddings=None: replace(f(self), prepend=self.prompt.vectors.detach()) if self.prompt else f(self))),
    ("check_dept_positions", "one row for all positions", method_of("DecomposedPrompt", "table", lambda f: lambda self: None if self.A is None else f(self).mean(0, keepdim=True).expand(len(self.A), -1))),
    ("check_dept_positions", "linear attention", patched("cost_ratio", lambda l, m, s: ((m + s) / (l + s),) * 2)),
    ("check_ept", "fusion with a bias", method_of("EPTPrompt", "fused", lambda f: lambda self, P: f(self, P) + 1)),
    ("check_ept", "gate of one sigmoid each", method_of("EPTPrompt", "gates", lambda f: lambda self, P: torch.sigmoid(f(self, P)))),
    ("check_ept", "a prompt that reads the text", method_of("EPTPrompt", "forward", lambda f: lambda self, batch=None, embeddings=None: (lambda made: made if embeddings is None else replace(made, prepend=made.prepend + embeddings.mean()))(f(self)))),
    ("check_ept", "factors that keep nothing", patched("svd_start", lambda source, rows, share=1.: None)),
    ("check_ept_gradients", "spaces start open", lambda m: m.setattr(soft.FusedPrompt, "__init__", open_spaces)),
    ("check_ept_gradients", "fusion cut off from the table", method_of("EPTPrompt", "fused", lambda f: lambda self, P: f(self, P).detach()))]


@pytest.mark.parametrize("check, name, sabotage", SABOTAGE, ids=[f"{c}: {n}" for c, n, _ in SABOTAGE])
def test_facts_can_fail(models, monkeypatch, check, name, sabotage):
    sabotage(monkeypatch)
    torch.manual_seed(5)
    with pytest.raises((AssertionError, ValueError, RuntimeError)): getattr(soft, check)(random_backbone("t5", width=24))


def test_each_check_has_a_sabotage(): assert {c for c, _, _ in SABOTAGE} == set(CHECKS)


def test_p_tuning_is_pefts(models):
    """With copied weights our encoder writes the same rows as PEFT's, LSTM and MLP."""
    from peft import PromptEncoder, PromptEncoderConfig
    for encoder in ("lstm", "mlp"):
        config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=12, num_transformer_submodules=1, num_attention_heads=2, num_layers=2, encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=7,
                                     encoder_num_layers=2, encoder_dropout=0.)
        theirs, ours = PromptEncoder(config).eval(), soft.EncodedPrompt(torch.randn(5, 12), 7, encoder)
        with torch.no_grad():
            ours.vectors.copy_(theirs.embedding.weight)
            ours.mlp.load_state_dict(theirs.mlp_head.state_dict())
            if encoder == "lstm": ours.lstm.load_state_dict(theirs.lstm_head.state_dict())
            assert torch.allclose(ours().prepend, theirs(torch.arange(5)), atol=1e-6)


# training ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_exactly_what_is_declared_and_saves_it(models, name, tmp_path):
    backbone, examples = models["t5"], TextExamples(TEXTS * 4, ANSWERS * 4)
    before, fresh, method = tensor_hash(backbone.model), *(build(name, backbone, ANSWERS, "copy the words", 3) for _ in range(2))
    fit(method, examples, replace(METHODS[name].tiny, epochs=3, batch=4), 0)
    assert tensor_hash(backbone.model) == before and not any(p.requires_grad for p in backbone.model.parameters())
    start = dict(fresh.named_parameters())
    unmoved = {n for n, p in trained(method).items() if torch.equal(p, start[n])}
    assert not {n for n in unmoved if "relative_attention_bias" not in n and "adapter" not in n}, unmoved
    if name != "full-tuning": assert all(torch.equal(p, start[n]) for n, p in method.named_parameters() if n not in trained(method))
    said = lambda m: m.score(list(TEXTS), list(ANSWERS)).total
    assert torch.equal(said(load_method(save_method(method, tmp_path), backbone)), said(method))


def test_two_learning_rates_reach_the_optimiser(models):
    class Look(Hook):
        def __init__(self): self.rates = []
        def after_backward(self, run): self.rates.append([g["lr"] for g in run.optimizer.param_groups])
    for offset_lr, wanted in ((.02, [.3, .02]), (None, [.3, .3])):
        method, look = build("dept", models["t5"], (), short=2, rank=2, offset_lr=offset_lr), Look()
        fit(method, TextExamples(TEXTS, ANSWERS), FitSettings(epochs=2, lr=.3, optimizer="adamw", schedule="constant", weight_decay=0., batch=2), hooks=[look])
        assert look.rates[0] == pytest.approx(wanted)


def test_starts(models):
    b = models["t5"]
    table = b.model.get_input_embeddings().weight
    rows = soft.start_rows(b, 5, "answers", answers=("red", "the star"))
    ids = b.tokenizer("red", add_special_tokens=False).input_ids
    assert torch.equal(rows[0], table[ids].mean(0)) and all((table == r).all(1).any() for r in rows[2:])
    assert torch.equal(soft.start_rows(b, 3, "words", "red"), table[ids].expand(3, -1)) and not soft.start_rows(b, 2, "zeros").any()
    assert soft.start_rows(b, 400, "normal", std=.5).std() == pytest.approx(.5, rel=.1)


# data --------------------------------------------------------------------------------------------------------------
def test_parts_share_no_text_and_depend_on_the_seed_only():
    a, b, c = (text_problem("task:where", s, 40, 20, 30) for s in (1, 1, 2))
    assert a == b != c and (len(a.train), len(a.val), len(a.test)) == (40, 20, 30)
    assert not set(a.train.sources) & set(a.val.sources) and not (set(a.train.sources) | set(a.val.sources)) & set(a.test.sources)
    assert set(a.answers) == {"above", "below", "left of", "right of"} and "Task:" not in a.train.sources[0]
    assert text_problem("task:where", 1, 4, 2, 2, instruct=True).train.sources[0].startswith("Task: where is")
    assert text_problem("task:reverse", 0, 4, 2, 2).answers == ()


def test_filler_moves_texts():
    plain, moved = (text_problem("task:count", 0, 20, 2, 2, filler=f) for f in (0, 4))
    words = [len(t.split()) for t in moved.train.sources]
    assert plain.train.sources != moved.train.sources and len(set(words)) > 1


def test_text_sets_and_files(tmp_path):
    p = text_problem("notes:fever", 0, 30, 10, 10)
    assert len(p.train) == 30 and set(p.train.targets) <= set(p.answers)
    everything = text_problem("tickets", 0, 0, 0, 0)
    assert len(everything.answers) == 20 and len(everything.train) > 100
    path = tmp_path / "mine.csv"
    pd.DataFrame({"message": ["late again", "thank you"] * 10, "mood": ["cross", "glad"] * 10}).to_csv(path, index=False)
    own = text_problem(str(path), columns=("message", "mood"))
    assert own.answers == ("cross", "glad") and own.train.sources[0].startswith("Input: ")
    for name, columns, message in ((str(path), ("text", None), "no column 'text'"), ("sectors", ("text", None), "several labels"), ("task:kind of word", ("text", None), "too few different inputs"), ("task:wher", ("text", None), "Did you mean 'where'"),
                                   ("glue:stsb", ("text", None), "no set named 'glue:stsb'")):
        with pytest.raises(ValueError, match=message): text_problem(name, columns=columns)
    with pytest.raises(FileNotFoundError, match="no texts named 'mine.csv'"): text_problem("mine.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"): text_problem(str(tmp_path / "latin.csv"))


# protocol ----------------------------------------------------------------------------------------------------------
def test_protocol_reports_scores_and_costs(tiny):
    e = Experiment("dept", "random", "task:where", "text-task", 0, {**tiny, "short": 2, "rank": 2, "positions": 140, "pad": 140})
    row = run(e)["metrics"]
    assert {"accuracy", "macro_f1", "val", "trainable", "steps", "step_ms", "step_memory_mb", "step_gflop", "tokens", "loss"} <= set(row)
    assert row["tokens"] == 142 and row["trainable"] == 2 * 24 + 2 * (140 + 24) and row["steps"] == 2 and 0 <= row["accuracy"] <= 100
    again = run(e)["metrics"]
    assert {k: v for k, v in row.items() if k != "step_ms"} == {k: v for k, v in again.items() if k != "step_ms"}


def test_suite_reports_mean_worst_and_spread(tiny, monkeypatch):
    scores = {"task:a": 90., "task:b": 60.}
    monkeypatch.setitem(soft.SUITES, "suite:toy", tuple(scores))
    monkeypatch.setattr(soft, "text_task_protocol", lambda e, progress=None: {"accuracy": scores[e.data], "val": scores[e.data] + 1, "trainable": 7, "tokens": 9})
    found = soft.text_suite_protocol(Experiment("ept", "random", "suite:toy", "text-suite", 0))
    assert found == {"accuracy": 75., "val": 76., "trainable": 7, "tokens": 9, "worst": 60., "spread": 15., **scores}


def test_free_answers_and_the_frozen_model(tiny):
    for method in ("frozen", "prompt-tuning"):
        row = run(Experiment(method, "random", "task:copy", "text-task", 0, {**tiny, "cost": False}))["metrics"]
        assert "macro_f1" not in row and row["accuracy"] >= 0 and (row["trainable"] == 0) == (method == "frozen")


def test_validation_chooses_the_epoch(tiny, monkeypatch):
    seen = []
    def scores(method, problem, part="test"):
        seen.append(part); return {"accuracy": float(-len(seen))}
    monkeypatch.setattr(soft, "text_scores", scores)
    e = Experiment("prompt-tuning", "random", "task:where", "text-task", 0, {**tiny, "steps": 6, "select": "val"})
    method, _ = soft.train_text(e, soft.problem_of(e)[0])
    assert seen == ["val"] * 3                                      # three epochs of two steps
    first, _ = soft.train_text(replace(e, settings={**e.settings, "steps": 6, "select": "last"}), soft.problem_of(e)[0])
    assert not torch.equal(first.source.vectors, method.source.vectors)


@pytest.mark.parametrize("method, settings, message", [
    ("dept", {"shrot": 3}, "no setting 'shrot'"), ("dept", {"select": "test"}, "never the test set"), ("dept", {"scale": "huge"}, "scale is 'tiny' or 'full'"), ("depth", {}, "Did you mean dept")])
def test_bad_experiments_are_refused_before_anything_runs(method, settings, message):
    with pytest.raises(ValueError, match=message): soft.check_text_experiment(Experiment(method, "tiny-t5", "task:where", "text-task", 0, settings))


@pytest.mark.parametrize("name, settings, message", [
    ("dept", {"short": 30}, "short prompt has 0 to 20 rows"), ("dept", {"short": 0, "rank": 0}, "nothing to train"), ("dept", {"positions": 0, "rank": 2}, "at least one position"), ("prompt-tuning", {"length": 0}, "at least one row"),
    ("prompt-tuning", {"start": "lucky"}, "Unknown start 'lucky'"), ("prompt-tuning", {"start": "answers"}, "answer is free text"), ("ept", {"gate": "open"}, "Unknown gate"), ("ept", {"combine": "max"}, "Unknown combine"),
    ("ept", {"factors": "qr"}, "factors start as"), ("ept", {"rank": 0}, "at least rank 1"), ("ept", {"factors": "svd", "rank": 100}, "lower the rank"), ("p-tuning", {"encoder": "gru"}, "encoder is 'lstm' or 'mlp'"), ("lora", {"targets": "o"}, "targets is")])
def test_bad_settings_are_one_clear_error(models, name, settings, message):
    with pytest.raises(ValueError, match=message): build(name, models["t5"], (), **settings)


def test_texts_that_do_not_fit(models, monkeypatch):
    method = build("dept", models["t5"], (), positions=4, rank=2)
    with pytest.raises(ValueError, match="offset table has 4 rows"): method(method.encode(["one two three four one two"], ["red"]))
    with pytest.raises(ValueError, match="do not fit into the 96 positions"): (lambda m: m.encode(["star " * 90], ["red"]))(build("prompt-tuning", models["llama"], ()))
    monkeypatch.setattr(soft, "load", lambda name: zoo.load("tiny-clip"))
    with pytest.raises(ValueError, match="writes no text: use a language model"): soft.problem_of(Experiment("dept", "tiny-clip", "task:where", "text-task", 0))


def test_shorten_keeps_the_beginning(models):
    b = models["t5"]
    text = "what colour is the small red star left of the large blue circle ?"
    short = soft.shorten(b, text, 6)
    assert len(b.tokenizer(short).input_ids) <= 6 and text.startswith(short) and soft.shorten(b, "red", 6) == "red"


# claims ------------------------------------------------------------------------------------------------------------
def test_claims_hold_their_controls_and_equal_budgets():
    dept, ept = CLAIMS["dept"], CLAIMS["ept"]
    assert {"prompt tuning (20)", "prompt tuning (8)", "DePT (8, 10), one rate", "DePT (8, 10), A frozen", "LoRA", "full fine-tuning"} <= {a.name for a in dept.arms}
    assert {"DePT (6, 16), wider rank", "one residual MLP and a table", "EPT, uniform gate", "EPT, no fusion", "EPT, no spaces", "residual prompt tuning", "prompt tuning (6)"} <= {a.name for a in ept.arms}
    assert {len(a.points()) for c in (dept, ept) for a in c.arms} == {6}
    wide = random_backbone("t5", width=160, layers=1)               # tiny-t5's width
    count = lambda a: count_parameters(build(a.method, wide, (), **{k: v for k, v in a.settings.items() if k not in {*soft.OPTIONS, *soft.FIT_FIELDS}}))["trainable"]
    assert all(3000 <= count(a) <= 3200 for a in dept.arms if a.method in ("dept", "prompt-tuning") and a.name not in ("prompt tuning (8)", "DePT (8, 10), A frozen"))
    assert all(3500 <= count(a) <= 4000 for a in ept.arms if a.name not in ("prompt tuning (6)", "DePT (6, 2)", "EPT, no fusion", "EPT, uniform gate", "LoRA"))
    for c in (dept, ept):
        for _, e in ex.variant(c, quick=True).experiments(): soft.check_text_experiment(e)
        for _, e in c.experiments()[:len(c.arms)]: soft.check_text_experiment(e)


@pytest.mark.parametrize("claim", ("dept", "ept"))
def test_claims_at_full_scale_keep_their_arms_apart(claim):
    large = ex.variant(CLAIMS[claim], scale="full")
    assert large.backbone == soft.FULL_BACKBONE
    assert large.data == (["suite:hub"] if claim == "ept" else list(soft.SUITES["suite:hub"])) and all(a.settings["scale"] == "full" for a in large.arms)
    for _, e in large.experiments()[:len(large.arms)]:
        settings, training, options = soft.resolve_text(e)
        assert (options["steps"], options["pad"], training.batch) == (30_000, 256, 32) and settings.get("positions", 256) == 256


def test_published_settings_follow_the_cards():
    e = lambda data: Experiment("dept", "google-t5/t5-base", data, "text-task", 0, {"scale": "full"})
    settings, training, options = soft.resolve_text(e("glue:rte"))
    assert (settings["short"], settings["rank"], settings["positions"], settings["offset_lr"]) == (60, 30, 256, 5e-4) and (training.lr, training.batch, options["steps"], options["pad"], options["select"]) == (.3, 32, 30_000, 256, "val")
    settings, training, options = soft.resolve_text(e("superglue:multirc"))
    assert settings["positions"] == options["pad"] == 348


# costs -------------------------------------------------------------------------------------------------------------
def test_flops_by_hand(models):
    b = models["t5"]
    for p in (1, 12):
        method = build("prompt-tuning", b, (), length=p)
        batch = method.encode([[45] * 20] * 3, [[46, 47]] * 3, end=False)
        assert count_flops(lambda: method(batch)["loss"].backward()) == pytest.approx(soft.t5_flops(b, p, 20, 2, 3)["training"], rel=.1)
        phases = soft.soft_phases(method, batch, 2)
        for phase in ("reading", "writing"): assert count_flops(phases[phase]) == pytest.approx(soft.t5_flops(b, p, 20, 2, 3)[phase], rel=.1)


def test_bench_takes_turns_and_keeps_rows(models, tmp_path):
    b, store = models["t5"], tmp_path / "bench-t5.jsonl"
    arms = soft.soft_arms(10, 16, b.width, (.6, 0))
    assert list(arms)[0] == "prompt tuning (10)" and {m for m, _ in arms.values()} == {"prompt-tuning", "dept", "ept", "lora", "full-tuning", "frozen"}
    table = soft.bench_soft(b, arms, length=10, positions=16, batch=2, answer=2, new_tokens=2, rounds=1, device="cpu", store=store)
    assert list(table.index) == list(arms) and (table.loc["prompt tuning (10)", ["training ratio", "reading ratio", "writing ratio", "training memory"]] == 1).all()
    assert table.loc["DePT (0, 6)", "rows"] == 16 and table.loc["DePT (0, 6)", "reading GFLOP"] == pytest.approx(table.loc["frozen", "reading GFLOP"]) and math.isnan(table.loc["frozen", "training ms"])
    assert table.loc["EPT (6, 2)", "reading GFLOP"] == pytest.approx(table.loc["DePT (6, 2)", "reading GFLOP"])      # folded: the modules cost nothing
    assert table.loc["DePT (0, 6)", "training GFLOP"] < table.loc["prompt tuning (10)", "training GFLOP"] and len(Store(store)) == 3 * len(arms) - 1
    again = soft.soft_table(store)
    pd.testing.assert_frame_equal(again, table)
    assert "DePT (0, 6)" in soft.soft_text(table) and "no measurements" in soft.soft_text(soft.soft_table([]))
    for wrong, message in (({"backbone": "t5-huge"}, "No backbone|No T5"), ({"backbone": models["llama"]}, "no encoder–decoder"), ({"precision": "fp8"}, "precision is"), ({"phases": ("thinking",)}, "phases are")):
        with pytest.raises(ValueError, match=message): soft.bench_soft(**{"backbone": b, "device": "cpu", **wrong})


def test_published_sizes():
    assert {size: round(sum(math.prod(s) for s in shapes) / 1e6) for size, shapes in {s: t5_shapes(s) for s in soft.T5_SIZES}.items()} == {"t5-small": 61, "t5-base": 223, "t5-large": 738}


def t5_shapes(size):
    with torch.device("meta"): return [p.shape for p in soft.T5ForConditionalGeneration(soft.t5_config_of(size)).parameters()]


# full scale without a network --------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """T5-small with random weights as a checkpoint, and a small RTE with the hub's columns."""
    import datasets
    datasets.disable_progress_bars()
    kinds = datasets.Features({"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"), "label": datasets.ClassLabel(names=["entailment", "not_entailment"]), "idx": datasets.Value("int32")})
    def table(n): return datasets.Dataset.from_dict({"sentence1": [f"the star {k} is red and " + "very " * (30 if k == 1 else 2) + "small" for k in range(n)], "sentence2": [f"thing {k} is red" for k in range(n)],
                                                     "label": [k % 2 for k in range(n)], "idx": list(range(n))}, features=kinds)
    datasets.DatasetDict({"train": table(20), "validation": table(6), "test": table(2)}).save_to_disk(str(tmp_path / "data" / "glue-rte"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTBOOK_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("PROMPTBOOK_RESULTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    soft.hub_parts.cache_clear(); zoo.load.cache_clear()
    yield tmp_path
    soft.hub_parts.cache_clear(); zoo.load.cache_clear()


def test_t5_checkpoint_on_rte(hub):
    folder = soft.write_random_t5("t5-small", hub / "t5-small")
    assert {f.name for f in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    e = Experiment("dept", str(folder), "glue:rte", "text-task", 0, {"scale": "full", "steps": 1, "batch": 4, "pad": 96, "positions": 96, "short": 6, "rank": 3, "cost": False})
    row = run(e, hub / "results" / "runs.jsonl")
    assert row["metrics"]["cut"] == 2 and row["metrics"]["trainable"] == 6 * 512 + 3 * (96 + 512) and row["metrics"]["selected"] == "val" and row["metrics"]["steps"] == 4
    assert list((hub / "results" / "checkpoints").glob("*.pt")) and {"accuracy", "macro_f1", "matthews", "val"} <= set(row["metrics"])
    assert run(e, hub / "results" / "runs.jsonl") == row


def test_hub_parts_and_their_errors(hub):
    p = text_problem("glue:rte", 0, 0, 0, 0)
    assert (len(p.train), len(p.val), len(p.test)) == (18, 2, 6) and p.answers == ("entailment", "not_entailment") and p.test.sources[0].startswith("sentence1: the star 0") and p.test.targets[1] == "not_entailment"
    with pytest.raises(FileNotFoundError, match="nyu-mll/glue, configuration sst2.*HF_HUB_OFFLINE.*glue-sst2"): text_problem("glue:sst2")
    (hub / "data" / "glue-rte").rename(hub / "data" / "glue-mrpc"); soft.hub_parts.cache_clear()
    assert len(text_problem("glue:mrpc", 0, 0, 0, 0).test) == 6
    (hub / "data" / "glue-mrpc").rename(hub / "data" / "glue-qqp"); soft.hub_parts.cache_clear()
    with pytest.raises(ValueError, match="should have a column 'question1'"): text_problem("glue:qqp")
    (hub / "data" / "glue-qqp").rename(hub / "data" / "glue-mnli"); soft.hub_parts.cache_clear()
    with pytest.raises(ValueError, match="column 'premise'"): text_problem("glue:mnli")


# exercises ---------------------------------------------------------------------------------------------------------
CHECKERS = ["check_budget_rank", "check_add_table", "check_memory_share", "check_fusion", "check_fold_spaces"]


def test_every_folded_solution_passes_its_checker(): check_solutions(soft, CHECKERS, "15_soft")


def table_for_all(E, mask, A, B, side): return E + (A @ B)[:E.shape[1]]
def first_rows_always(E, mask, A, B, side): return E + (A @ B)[(mask.cumsum(1) - 1).clamp(min=0)] * mask[..., None]


WRONG = [
    ("check_budget_rank", lambda l, m, s, D: round((l - m) * D / (s + D))), ("check_budget_rank", lambda l, m, s, D: (l - m) * D // s),
    ("check_add_table", table_for_all), ("check_add_table", first_rows_always), ("check_add_table", lambda E, mask, A, B, side: E.add_(0)),
    ("check_memory_share", lambda l, m, n: (m / l, (m / l) ** 2)), ("check_memory_share", lambda l, m, n: ((m + n) / (l + n),) * 2),
    ("check_fusion", lambda P, C, Wq, Wk: ((P @ Wq) @ (C @ Wk).T).softmax(-1) @ C), ("check_fusion", lambda P, C, Wq, Wk: ((P @ Wq) @ (C @ Wk).T / 2).softmax(0) @ C),
    ("check_fold_spaces", lambda P, down, up, g: (g[:, None, None] * (torch.relu(P @ down) @ up)).sum(0)), ("check_fold_spaces", lambda P, down, up, g: (torch.relu(P @ down) @ up + P).mean(0))]


@pytest.mark.parametrize("checker, answer", WRONG, ids=[f"{c}-{k}" for k, (c, _) in enumerate(WRONG)])
def test_checkers_reject_planted_wrong_answers(checker, answer):
    with pytest.raises(AssertionError): getattr(soft, checker)(answer)


def test_each_checker_has_two_planted_wrong_answers():
    assert all(sum(c == name for c, _ in WRONG) >= 2 for name in CHECKERS)


@pytest.mark.parametrize("words, message", [(["--backbone", "vit-b-16", "--random-weights"], "closest: t5|t5-base"), (["--backbone", "t5-small", "--random-weights", "--methods", "dpt"], "dept"), (["--backbone", "t5-smal", "--random-weights"], "t5-small")])
def test_command_line_bench_refuses_what_it_cannot_measure(words, message, capsys):
    assert cli.main(["bench", *words, "--store", "nowhere.jsonl"]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and re.search(message, said)


def test_command_line_bench_on_random_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(soft.T5_SIZES, "t5-small", dict(d_model=32, d_ff=64, num_layers=1, num_heads=2))
    words = ["bench", "--backbone", "t5-small", "--random-weights", "--methods", "prompt-tuning", "dept", "--length", "10", "--text", "12", "--batch", "2", "--rounds", "1", "--device", "cpu", "--store", str(tmp_path / "b.jsonl")]
    assert cli.main(words) == 0 and "DePT (0, " in capsys.readouterr().out
    assert {r["kind"] for r in Store(tmp_path / "b.jsonl").rows()} == {"bench-soft"}
