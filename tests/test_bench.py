"""Costs: two paths that compute the same, counted operations, the memory formula, stored rows, one clear error for each mistake."""
import math

import pytest
import torch
from transformers import CLIPModel

from promptbook import bench, cli, zoo
from promptbook.experiment import Store, load_chapters
from promptbook.measure import count_flops

load_chapters()
METHODS = ["coop", "maple", "promptsrc"]


@pytest.fixture(scope="module")
def tiny(): return zoo.load("tiny-clip")


@pytest.fixture(scope="module")
def fused():
    "The tiny CLIP with fused attention, as real ones run."
    backbone = zoo.load("tiny-clip")
    model = CLIPModel.from_pretrained(zoo.ZOO / "tiny-clip", dtype=torch.float32, attn_implementation="sdpa").eval().requires_grad_(False)
    return zoo.Backbone("tiny, fused", model, backbone.tokenizer, backbone.mean, backbone.std)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("rows") / "bench.jsonl")
    return bench.bench(tiny, METHODS, classes=8, batch=2, device="cpu", rounds=1, store=store), store


def test_both_paths_compute_the_same(measured):
    table, _ = measured
    assert list(table.index) == METHODS and not table.note.any()
    assert (table["loss gap"] < 1e-5).all() and (table["gradient gap"] < 1e-5).all()


def test_the_table_says_what_it_costs(measured):
    table, _ = measured
    assert {"trained", "tokens", "GFLOP, plain", "GFLOP, features first", "FLOP ratio", "ms, plain", "ms, features first", "speed-up", "speed-up, preparing every step",
            "prepare ms/image", "images/s, features first", "peak MB, plain", "peak MB, features first"} <= set(table)
    assert table.drop(columns=["compile s", "note"]).map(math.isfinite).all(axis=None)
    assert table.trained["coop"] == 4 * 128 and table["FLOP ratio"]["coop"] > 2 and (table["FLOP ratio"] > 1).all()
    assert table["peak MB, features first"]["coop"] < table["peak MB, plain"]["coop"]
    text = bench.bench_text(table)
    assert all(name in text for name in METHODS)


def test_rows_are_stored_and_read_again(measured, tiny):
    table, store = measured
    assert len(Store(store.path)) == 2 * len(METHODS)
    assert bench.bench_table(store.path).equals(table) and list(bench.bench_table(store, method="coop").index) == ["coop"]
    row = store.rows()[0]
    assert row["device"] == "cpu" and row["threads"] and row["versions"]["torch"] == torch.__version__ and row["metrics"]["rounds_ms"]
    later = bench.bench(tiny, ["coop"], classes=8, batch=2, device="cpu", rounds=1, store=store, paths=["plain"], count=False)
    assert len(bench.bench_rows(store)) == 2 * len(METHODS) - 1 and math.isnan(later["speed-up"].iloc[0])      # the later run of CoOp counts


@pytest.mark.parametrize("name, path", [("coop", "plain"), ("promptsrc", "features first")])
def test_operations_of_fake_tensors_are_those_of_real_ones(tiny, name, path):
    step = bench.bench_steps(name, tiny, classes=6, batch=2)[path]
    step()                                                            # what is computed only once is computed now
    before = [p.detach().clone() for p in step.parameters]
    counted = bench.count_step(step)
    assert counted.flops == count_flops(step) and counted.saved > 0
    assert all(p.grad is None or type(p.grad) is torch.Tensor for p in step.parameters)
    assert all(torch.equal(p, q) for p, q in zip(step.parameters, before))                                                # learning rate 0
    step()


def test_operations_by_hand(fused):
    config = fused.model.config.text_config
    steps = bench.bench_steps("coop", fused, classes=10, batch=3)
    first = bench.count_step(steps["features first"]).flops
    assert abs(first / bench.tower_flops(config.hidden_size, config.num_hidden_layers, steps["features first"].length, 10, backward=True) - 1) < .03
    vision = fused.model.config.vision_config
    plain = bench.tower_flops(config.hidden_size, config.num_hidden_layers, 32, 10, backward=True) + bench.tower_flops(vision.hidden_size, vision.num_hidden_layers, 17, 3)
    assert abs(bench.count_step(steps["plain"]).flops / plain - 1) < .03


@pytest.mark.parametrize("classes, path, precision", [(4, "plain", "bf16"), (20, "features first", "fp32"), (20, "plain", "fp32")])
def test_memory_formula(fused, classes, path, precision):
    step = bench.bench_steps("deep-language", fused, classes=classes, batch=1, precision=precision)[path]
    formula = bench.text_memory(fused, classes, step.length, precision)
    assert abs(bench.count_step(step).saved / formula - 1) < .05


def test_what_autograd_really_keeps(fused):
    "The same number without fake tensors."
    step, kept = bench.bench_steps("deep-language", fused, classes=20, batch=1)["plain"], {}
    own = {p.untyped_storage()._cdata for p in step.method.parameters()}
    def keep(t):
        kept[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t); return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): step.loss()
    real = sum(n for key, (n, _) in kept.items() if key not in own)
    assert abs(bench.count_step(step).saved / real - 1) < .01 and abs(bench.text_memory(fused, 20, 32) / real - 1) < .05


def test_chunks_save_memory(fused):
    whole, part = (bench.bench_memory("maple", fused, 40, 2, "fp32", chunk, device="cpu") for chunk in (0, 8))
    assert not whole["metrics"]["note"] and part["metrics"]["step_mb"] < .7 * whole["metrics"]["step_mb"]
    assert bench.text_memory(fused, 40, 13, chunk=40) == bench.text_memory(fused, 40, 13) > 2 * bench.text_memory(fused, 40, 13, chunk=8)


def test_a_thousand_classes_fit():
    assert bench.text_memory("vit-b-16", 1000, 77, "bf16") < 14e9 < 24e9 < bench.text_memory("vit-b-16", 1000, 77, "fp32")


def test_too_little_memory_is_a_note(tiny, monkeypatch):
    monkeypatch.setattr(bench, "_free_memory", lambda device: 1000)
    table = bench.bench(tiny, ["coop"], classes=6, batch=2, device="cpu", rounds=1, paths=["features first"])
    assert "not timed" in table.note["coop"] and table["GFLOP, features first"]["coop"] > 0 and math.isnan(table["ms, features first"]["coop"])


def test_counting_runs_nothing(tiny, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", None)
    table = bench.bench(tiny, ["coop"], classes=6, batch=2, device="cpu", rounds=0)
    assert table.note["coop"] == "counted only" and table["FLOP ratio"]["coop"] > 2 and math.isnan(table["ms, plain"]["coop"])


def test_slow_steps_are_timed_less_often(tiny):
    table = bench.bench(tiny, ["coop"], classes=6, batch=2, device="cpu", rounds=2, seconds=0., count=False)
    assert "one run, not warmed up" in table.note["coop"] and table["ms, plain"]["coop"] > 0


def test_class_names():
    names = bench.class_names(1500)
    assert len(set(names)) == 1500 and all(1 <= len(n.split()) <= 3 for n in names)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(methods=["cop"]), "Did you mean coop"), (dict(batch=0), "at least one image"), (dict(classes=1), "number of classes"), (dict(precision="fp8"), "fp32"),
    (dict(paths=["fast"]), "features first"), (dict(backbone="vit-b-17"), "vit-b-16"), (dict(device="tpu"), "cpu"), (dict(settings={"coop": {"lenth": 3}}), "no setting")])
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence): bench.bench(**{"backbone": "tiny-clip", "methods": ["coop"], "device": "cpu", "rounds": 0, **arguments})


@pytest.mark.parametrize("words", [["--backbone", "vit-b-17"], ["--classes", "0"], ["--precision", "fp8"], ["--methods", "cop", "--backbone", "tiny-clip"]])
def test_command_line_errors(words, capsys):
    assert cli.main(["bench", *words]) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_command_line(tmp_path, capsys):
    words = ["bench", "--backbone", "tiny-clip", "--methods", "coop", "--classes", "6", "--batch", "2", "--rounds", "1", "--device", "cpu", "--quiet", "--store", str(tmp_path / "b.jsonl")]
    assert cli.main(words) == 0 and "coop" in capsys.readouterr().out and len(Store(tmp_path / "b.jsonl")) == 2
