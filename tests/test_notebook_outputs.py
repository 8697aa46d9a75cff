"""The comparer of notebook outputs: it must reject a planted difference and accept noise inside its tolerance."""
import copy

import pytest
from notebook_outputs import close, compare_cell, compare_notebooks, compare_text, directives, is_skipped, split_numbers, tolerance_of


def stdout(text):
    return [{"output_type": "stream", "name": "stdout", "text": text}]


def result(text, **data):
    return [{"output_type": "execute_result", "data": {"text/plain": text, **data}, "metadata": {}}]


def notebook(*cells):
    return {"cells": [{"cell_type": "code", "source": s, "outputs": copy.deepcopy(o)} for s, o in cells]}


@pytest.mark.parametrize("old, new", [
    ("accuracy 70.0", "accuracy 72.9"),              # within 5 %
    ("loss 0.6931", "loss 0.7102"),
    ("error 1.2e-07", "error 3.9e-08"),              # noise around zero
    ("difference -0.001", "difference 0.003"),
    ("0.1", "0.2"),                                  # one unit of the last printed digit
    ("base  71.2   new 8.1", "base 70.9 new  8.1"),  # padding moves with the digits
    ("1,024 parameters", "1,024 parameters"),
    ("<Thing at 0x7f31a2b3c4d5>", "<Thing at 0x7f31ffffffff>"),
    ("\r 10%|#  \r100%|###", "\r100%|###"),
])
def test_noise_is_accepted(old, new):
    assert compare_text(old, new) is None


@pytest.mark.parametrize("old, new", [
    ("accuracy 70.0", "accuracy 61.0"),
    ("loss 0.6931", "loss 0.75"),
    ("1,024 parameters", "1,025 parameters"),        # whole numbers are exact
    ("torch.Size([4, 8])", "torch.Size([4, 9])"),
    ("shape (32x32)", "shape (32x33)"),
    ("verdict: holds", "verdict: undecided"),
    ("CoOp 70.0", "KgCoOp 70.0"),
    ("difference -2.0", "difference 2.0"),           # a sign is part of the number
    ("1 2 3", "1 2"),
    ("70.0", "nan"),
    ("key a1b2c3", "key a1b2c4"),
    ("ViT-B/32", "ViT-B/16"),
])
def test_planted_differences_are_rejected(old, new):
    assert compare_text(old, new)


def test_tolerance_of_a_cell():
    source = "#| tolerance: 4\nshow()"
    assert tolerance_of(source) == (4.0, 0.0) and tolerance_of("#| tolerance: 20%\n1") == (0.0, 0.2) and tolerance_of("x = 1") == (0.0, 0.0)
    assert not compare_cell(source, stdout("gain 1.5 of 70"), stdout("gain -2.0 of 73"))
    assert compare_cell(source, stdout("gain 1.5 of 70"), stdout("gain -2.6 of 70"))
    assert compare_cell("show()", stdout("gain 1.5"), stdout("gain -2.0"))
    with pytest.raises(ValueError, match="neither a number"):
        tolerance_of("#| tolerance: wide\n1")


def test_volatile_still_needs_its_outputs():
    assert not compare_cell("#| volatile\ntime()", stdout("12.5 s"), stdout("99.1 s"))
    assert compare_cell("#| volatile\ntime()", stdout("12.5 s"), [])
    assert compare_cell("time()", stdout("12.5 s"), stdout("99.1 s"))


def test_pictures_by_presence():
    a, b = result("<Figure>", **{"image/png": "AAAA"}), result("<Figure size 1x1>", **{"image/png": "BBBB"})
    assert not compare_cell("plot()", a, b)
    assert compare_cell("plot()", a, result("<Figure>")) and compare_cell("plot()", a, a + b)


def test_rich_outputs_are_read():
    old, new = (result("<IPython.core.display.Markdown object>", **{"text/markdown": f"| coop | {v} |"}) for v in (70.0, 50.0))
    assert compare_cell("show()", old, new) and not compare_cell("show()", old, old)
    old, new = (result("<promptbook.experiment.Ledger object>", **{"text/html": f"<td style='padding:4px'>{v}</td>"}) for v in ("holds", "reversed"))
    assert compare_cell("show()", old, new)


def test_streams_are_joined_and_errors_seen():
    assert not compare_cell("f()", stdout("a\n") + stdout("b\n"), stdout("a\nb\n"))
    assert compare_cell("f()", stdout("a\n"), [{"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}])
    assert not compare_cell("f()", [], [{"output_type": "stream", "name": "stderr", "text": "a bar"}])


def test_skipped_cells_are_not_compared():
    for head in ("#| eval: false", "#| slow", "#| gpu", "#| notest", "#| export\n#| eval: false"):
        assert is_skipped(head + "\nf()")
        assert not compare_notebooks(notebook((head + "\nf()", stdout("1"))), notebook((head + "\nf()", [])))
    assert not is_skipped("#| export\ndef f(): pass") and not is_skipped("# slow") and not is_skipped("f()\n#| slow")
    found = compare_notebooks(notebook(("f()", stdout("1"))), notebook(("f()", stdout("2"))))
    assert len(found) == 1 and found[0][:2] == (0, "f()")


def test_directives_and_numbers():
    assert directives("#| export\n#| fig-alt: \"a: b\"\nx") == {"export": "", "fig-alt": '"a: b"'}
    assert split_numbers("seed0 has 1,024 of 70.5% in 3.2s, -1e-3")[1] == ["1,024", "70.5", "3.2", "-1e-3"]
    assert close("1", "1") and not close("1", "2") and close("1.0", "1.04") and not close("100", "104")
