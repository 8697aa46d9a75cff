"""Figures: colours that read on both pages, stable looks, labels that do not collide, small files, clear errors."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402

from promptbook import figures  # noqa: E402


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def runs(names=("coop", "vpt", "ivlp"), n=4):
    rng = np.random.default_rng(0)
    return pd.DataFrame([{"method": m, "base": 80 + i + rng.normal(), "new": 70 - i + rng.normal(), "epoch": e} for i, m in enumerate(names) for e in range(3) for _ in range(n)])


def test_colours_stand_out_on_both_pages():
    for page in (figures.LIGHT, figures.DARK):
        assert figures.contrast(figures.GREY, page) >= 4
        assert min(figures.contrast(c, page) for c in figures.COLOURS) >= 3


def test_the_background_is_transparent():
    from io import BytesIO
    from PIL import Image
    ax = figures.interval_plane(runs())
    picture = Image.open(BytesIO(figures.to_png(ax.figure)))
    assert picture.mode == "RGBA" and picture.getpixel((1, 1))[3] == 0


def test_style_is_undone():
    before = dict(matplotlib.rcParams)
    with figures.style(font_size=20):
        assert matplotlib.rcParams["font.size"] == 20
    assert matplotlib.rcParams["font.size"] == before["font.size"] and matplotlib.rcParams["text.color"] == before["text.color"]


def test_drawing_leaves_settings_alone():
    before = dict(matplotlib.rcParams)
    figures.interval_plane(runs()), figures.curves(runs(), "epoch", "new"), figures.bars_with_intervals(runs(), "new"), figures.heat(np.eye(3)), figures.grid(np.zeros((2, 3, 4, 4)))
    assert {k for k in before if before[k] != matplotlib.rcParams[k]} <= {"interactive"}


def test_hand_given_looks_differ():
    looks = [(s["color"], s["marker"]) for name, s in figures.METHOD_STYLES.items() if name != "vpt-deep"]   # another name of vpt
    assert len(set(looks)) == len(looks)


def test_a_method_keeps_its_look():
    assert figures.method_style("brand new") == figures.method_style("Brand_New")
    with pytest.raises(ValueError, match="keeps one look"):
        figures.register_style("coop", "red", "x")


def test_summary_is_used_for_raw_rows_and_left_out_for_summarised_ones():
    class Wide:
        def __init__(self, v): self.mean, self.low, self.high = v.mean(), v.mean() - 9, v.mean() + 9
    once = figures.summarise(runs(), "method", ["base", "new"], Wide)
    assert np.allclose(once.base_high - once.base_low, 18)
    assert figures.summarise(once, "method", ["base", "new"], Wide).equals(once)
    plain = figures.summarise(runs(), "method", "base")
    assert (plain.base_low < plain.base).all() and plain.base_low.iloc[0] == runs().query("method == 'coop'").base.min()


def test_crowded_labels_do_not_overlap():
    names = [f"method number {i}" for i in range(9)]
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"method": names, "base": 80 + rng.normal(size=9), "new": 70 + rng.normal(size=9)})
    ax = figures.interval_plane(frame)
    ax.figure.canvas.draw()
    boxes = [matplotlib.text.Text.get_window_extent(t) for t in ax.texts if t.get_text() in names]
    assert len(boxes) == 9 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_bars_start_at_zero():
    assert figures.bars_with_intervals(runs(), "new").get_xlim()[0] == 0


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 1, 8, 8), (5, 8, 8), (5, 8, 8, 3)])
def test_grid_takes_the_usual_shapes(shape):
    axes = figures.grid(np.random.default_rng(0).uniform(size=shape), titles=list("abcde"), columns=3)
    assert axes.shape == (2, 3) and axes.flat[0].images[0].get_array().shape == (8, 8, 3)


def test_map_over_picture_keeps_colour_where_it_is_high():
    picture = np.zeros((3, 8, 8)); picture[0] = 1.0                       # red
    shown = figures.heat(np.array([[0.0, 1.0]]), image=picture, strength=0.0).images[0].get_array()
    assert np.allclose(shown[0, -1], [1, 0, 0]) and np.ptp(shown[0, 0]) == 0, "colour kept at the right, grey at the left"


def test_alt_text_travels_with_the_picture():
    data, metadata = figures.alt(figures.heat(np.eye(2)), " two by two ")._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "two by two" and "two by two" in data["text/plain"]
    with pytest.raises(ValueError, match="empty"):
        figures.alt(figures.heat(np.eye(2)), " ")


@pytest.mark.parametrize("call, words", [
    (lambda: figures.grid(np.zeros((2, 5, 8, 8))), "shape"), (lambda: figures.grid(np.zeros((2, 3, 8, 8)), ["one"]), "titles"),
    (lambda: figures.heat(np.zeros(3)), "matrix"), (lambda: figures.interval_plane(runs(), x="bass"), "'bass'"),
    (lambda: figures.save(figures.heat(np.eye(2)), "x.gif"), "ending"), (lambda: figures.style_settings(fnt_size=1), "fnt_size")])
def test_bad_input_gives_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_files_are_small_and_written_into_new_folders(tmp_path):
    path = figures.save(figures.interval_plane(runs()), tmp_path / "a" / "b.png", dpi=100)
    assert path.stat().st_size < 60_000
