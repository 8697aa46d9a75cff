"""Metrics, intervals, verdicts and costs: see nbs/05_measure.ipynb."""
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from promptbook import measure as m


# ---- metrics

def test_accuracy_counts_the_highest_score():
    logits = torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 5], [4, 0, 1]])
    assert m.accuracy(logits, torch.tensor([0, 1, 2, 2])) == 75
    assert m.accuracy(logits.bfloat16(), torch.tensor([1, 0, 0, 1])) == 0


@pytest.mark.parametrize("logits, labels", [(torch.zeros(2, 3), torch.zeros(3).long()), (torch.zeros(2), torch.zeros(2).long()), (torch.zeros(0, 3), torch.zeros(0).long()),
                                            (torch.zeros(2, 3), torch.tensor([0, 3])), (torch.zeros(2, 3), torch.tensor([0, -1]))])
def test_accuracy_refuses_wrong_shapes_and_labels(logits, labels):
    with pytest.raises(ValueError):
        m.accuracy(logits, labels)


def test_harmonic_mean_of_the_clip_row():
    assert round(m.harmonic_mean(69.34, 74.22), 2) == 71.70


@pytest.mark.parametrize("base, new, hm", [(82.63, 67.99, 74.60), (80.47, 71.69, 75.83), (80.73, 73.60, 77.00), (82.15, 74.07, 77.90)])
def test_harmonic_mean_of_other_published_rows(base, new, hm):
    assert abs(m.harmonic_mean(base, new) - hm) < 0.0151         # they average before rounding


def test_harmonic_mean_is_at_most_the_plain_mean_with_equality_iff_equal():
    for base, new in np.random.default_rng(0).uniform(0.01, 100, (500, 2)):
        assert m.harmonic_mean(base, new) < (base + new) / 2
        assert m.harmonic_mean(base, base) == pytest.approx(base)
    assert m.harmonic_mean(0, 0) == 0 and m.harmonic_mean(0, 80) == 0


def test_calibration_error_by_hand():
    sure = torch.tensor([[50.0, 0.0]]).repeat(10, 1)
    assert m.expected_calibration_error(sure, torch.tensor([0] * 7 + [1] * 3)) == pytest.approx(30, abs=1e-3)
    p = torch.tensor([[0.8, 0.2]] * 5 + [[0.4, 0.6]] * 5)          # bins: 5 at 0.8 with 3 right, 5 at 0.6 with 5 right
    labels = torch.tensor([0, 0, 0, 1, 1] + [1] * 5)
    assert m.expected_calibration_error(p.log(), labels) == pytest.approx(100 * (5 * .2 + 5 * .4) / 10, abs=1e-3)


def test_masks_and_maps():
    a, b = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    a[0, :, :2] = 1
    b[0, :2] = 1                                                  # second image: both empty
    assert m.mask_iou(a, b, average=False).tolist() == pytest.approx([100 / 3, 100])
    heat = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    heat[0, 3, 1] = 2
    assert m.pointing_game(heat[:1], a[:1]) == 100 and m.pointing_game(heat[:1], b[:1]) == 0
    with pytest.raises(ValueError):
        m.mask_iou(a, b[:1])


# ---- intervals

def test_t_quantiles_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 9, 29, 500):
        for level in (0.5, 0.9, 0.95, 0.99):
            assert m.t_quantile(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-6)


def test_interval_by_hand():
    i = m.interval([70.0, 72.0, 74.0])
    half = 4.302653 * 2 / math.sqrt(3)
    assert (i.mean, i.n) == (72, 3) and i.low == pytest.approx(72 - half, abs=1e-4) and i.half_width == pytest.approx(half, abs=1e-4)
    copied = m.interval([70.0, 72.0, 74.0], method="copied")
    assert i.half_width / copied.half_width == pytest.approx(2.69, abs=.01)      # the factor known from the literature's code at n = 3


@pytest.mark.parametrize("n", [3, 5, 10])
def test_students_interval_covers_what_it_promises(n):
    assert abs(m.coverage("t", n, seed=7) - 95) < 0.7              # 4.5 standard errors of the simulation
    assert abs(m.coverage("t", n, seed=7, level=0.8) - 80) < 1.3


@pytest.mark.parametrize("method, n, low, high", [("copied", 3, 73.5, 76.5), ("copied", 5, 82.5, 86.5), ("copied", 10, 89, 92), ("bootstrap", 3, 73, 77), ("bootstrap", 5, 81.5, 86), ("bootstrap", 10, 88.5, 92)])
def test_the_other_two_do_not(method, n, low, high):
    assert low < m.coverage(method, n, trials=10_000, seed=7) < high


def test_an_interval_is_reproducible_and_refuses_nonsense():
    values = [1.0, 2.2, 4.1, 9.3, 5.7, 3.3, 8.9]
    assert m.interval(values, method="bootstrap", seed=3) == m.interval(values, method="bootstrap", seed=3) != m.interval(values, method="bootstrap", seed=4)
    assert math.isnan(m.interval([5.0]).low)
    for wrong in ([], [1.0, math.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError):
            m.interval(wrong)
    with pytest.raises(ValueError, match="bayes"):
        m.interval(values, method="bayes")


def test_pairing_removes_the_luck_that_both_share():
    luck = np.random.default_rng(0).normal(0, 5, 6)
    d = m.paired_difference(70 + luck, 69 + luck)
    assert d.mean == pytest.approx(1) and d.half_width < 1e-9
    assert m.paired_difference({2: 5.0, 1: 3.0}, {1: 1.0, 2: 2.0}).mean == 2.5


def test_arms_that_cannot_be_paired_are_refused():
    for a, b in (([1.0, 2.0], [1.0]), ({1: 1.0}, {2: 1.0}), ({1: 1.0}, [1.0])):
        with pytest.raises(ValueError):
            m.paired_difference(a, b)


@pytest.mark.parametrize("low, high, expected, margin, says", [
    (0.1, 2, "greater", 0, "holds"), (-2, -.1, "greater", 0, "reversed"), (-1, 1, "greater", 0, "undecided"), (0, 1, "greater", 0, "undecided"),
    (-2, -.1, "less", 0, "holds"), (.1, 2, "less", 0, "reversed"), (.1, 2, "greater", .5, "undecided"), (.6, 2, "greater", .5, "holds"), (-2, -.1, "greater", .5, "undecided"),
    (math.nan, math.nan, "greater", 0, "undecided"), (math.nan, math.nan, "less", 0, "undecided")])
def test_verdicts(low, high, expected, margin, says):
    assert m.verdict(m.Interval(0, low, high, 5), expected, margin) == says


def test_verdict_refuses_nonsense():
    with pytest.raises(ValueError):
        m.verdict(m.Interval(0, 0, 0, 5), "better")
    with pytest.raises(ValueError):
        m.verdict(m.Interval(0, 0, 0, 5), margin=-1)


# ---- cost

def test_flops_include_attention_and_backward():
    q = torch.randn(1, 4, 64, 32)
    assert m.count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 4 * 64 * 64 * 32
    w, x = torch.randn(16, 8, requires_grad=True), torch.randn(5, 16)
    assert m.count_flops(lambda: (x @ w).sum().backward()) == 2 * 2 * 5 * 16 * 8


def test_flops_of_a_hub_class_with_fused_attention():
    """A CLIP tower built by transformers: every product of one block, by hand."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    model, tokens = CLIPVisionModel(config).eval(), 17
    image = torch.randn(1, 3, 32, 32)
    by_hand = 2 * 16 * (3 * 8 * 8) * 32 + 2 * tokens * 32 * (4 * 32 + 2 * 64) + 2 * 2 * tokens * tokens * 32
    with torch.no_grad():
        assert m.count_flops(lambda: model(image)) == by_hand


def test_peak_memory_is_the_worst_moment():
    def work():
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return b.sum()
    assert m.peak_memory(work, "cpu") == pytest.approx(8e6, rel=.01)
    x = torch.randn(500, 500, requires_grad=True)                 # 1 MB

    def four_layers():
        return x.tanh().tanh().tanh().tanh().sum()
    with torch.no_grad():
        assert m.peak_memory(four_layers, "cpu") == pytest.approx(2e6, rel=.01)      # one input, one output at a time
    assert m.peak_memory(four_layers, "cpu") == pytest.approx(4e6, rel=.01)          # kept for the backward pass


def test_peak_memory_says_nothing_on_stderr():
    """The profiler's library announces itself on the file descriptor; readers should not see that."""
    code = "import torch; from promptbook.measure import peak_memory; print(peak_memory(lambda: torch.zeros(1000), 'cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)
    assert done.stdout.strip() == "4000" and "profiler" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_cuda():
    assert m.peak_memory(lambda: (torch.zeros(1 << 20, device="cuda") + 1).sum()) == pytest.approx(8 << 20, rel=.01)


def test_costs_are_compared_in_turns(monkeypatch):
    clock = {"now": 0.0, "price": 1.0}

    def work():
        clock["price"] *= 1.05
        clock["now"] += clock["price"]
    order = []
    monkeypatch.setattr(m.time, "perf_counter", lambda: clock["now"])
    frame = m.compare_costs({"a": lambda: (order.append("a"), work()), "b": lambda: (order.append("b"), work(), work())}, rounds=6, warmup=0, device="cpu")
    assert "".join(order[:12]) == "ab" "ba" "ab" "ba" "ab" "ba"
    assert frame.loc["b", "ratio"] == pytest.approx(2, abs=.2) and frame.loc["a", "ratio"] == 1
    with pytest.raises(ValueError):
        m.compare_costs({})


def test_measure_cost_reports_the_median(monkeypatch):
    ticks = iter([0, 1, 0, 9, 0, 2])
    monkeypatch.setattr(m, "call_seconds", lambda f, d: abs(next(ticks) - next(ticks)))
    cost = m.measure_cost(lambda: torch.zeros(10) + 1, warmup=0, repeats=3, device="cpu")
    assert (cost["seconds"], cost["seconds_low"], cost["seconds_high"]) == (2, 1, 9) and set(cost) == {"seconds", "seconds_low", "seconds_high", "flops", "peak_memory"}


def test_parameters():
    layer = nn.Linear(8, 4)
    layer.weight.requires_grad_(False)
    assert m.count_parameters(nn.Sequential(layer, layer)) == {"trainable": 4, "total": 36}


# ---- fingerprints

def test_the_fingerprint_sees_every_bit_name_shape_type_and_buffer():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    hashes = [m.tensor_hash(base)]
    assert m.tensor_hash(dict(reversed(base.items()))) == hashes[0]
    assert m.tensor_hash({k: v.T.contiguous().T if v.ndim == 2 else v for k, v in base.items()}) == hashes[0]     # memory layout is no content
    nudged = base["a"].clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    hashes += [m.tensor_hash(base | change) for change in ({"a": nudged}, {"a": base["a"].reshape(3, 2)}, {"a": base["a"].double()}, {"d": torch.zeros(0)})]
    hashes.append(m.tensor_hash({"x": base["a"], "b": base["b"], "c": base["c"]}))
    assert len(set(hashes)) == len(hashes)


def test_the_fingerprint_of_a_module_includes_buffers_that_are_not_saved():
    module = nn.Linear(2, 2)
    module.register_buffer("position", torch.zeros(3), persistent=False)
    before = m.tensor_hash(module)
    module.position[0] = 1
    assert m.tensor_hash(module) != before


def test_the_fingerprint_refuses_what_is_no_tensor():
    with pytest.raises(ValueError, match="'a'"):
        m.tensor_hash({"a": [1.0]})
