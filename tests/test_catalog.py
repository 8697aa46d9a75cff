"""The catalogue: 51 papers, sound data, status that follows from what exists, a README table that can be read back."""
import copy
import json
import re
import sys
import types
from pathlib import Path

import pytest

from promptbook import catalog

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {  # the plan of the course: chapter -> papers
    "10_strategies": "prompt-survey promptor", "11_search": "promptquine llm-bbo-vlm", "12_blackbox": "unsup-blackbox dsp",
    "13_cloze": "clinical-prompt sciprompt bayesprompt", "14_fewlabels": "pcp list slm-prompt", "15_soft": "dept ept",
    "16_adaptive": "iapt cpt ptec", "17_forgetting": "promot conjugate behavior-shift", "18_instruct": "llamait self-prompt-tuning mft itool",
    "20_clip": "clip-baselines", "21_multimodal": "maple promptsrc", "22_consistency": "coprompt restore", "23_conditional": "mocoop kapt ctp-tft spg",
    "24_transfer": "panda mvlpt gram", "25_labelfree": "difftpt tfup", "26_dense": "tunevlseg apt", "30_visual": "pvp prompt-cam petl-ast",
    "31_continual": "multi-lane mvp", "40_diffusion": "ip-adapter cones", "41_editing": "dpl t-prompter", "42_rewriting": "uf-fgtg prompt-a-video vpo"}


@pytest.fixture(scope="module")
def frame():
    return catalog.papers(yardsticks=True)


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A package without methods, chapters or results: what exists is then put in by the test."""
    methods, chapters = {}, {}
    monkeypatch.setattr(catalog, "_methods", lambda: methods)
    monkeypatch.setattr(catalog, "_chapter_module", lambda chapter: chapters.get(chapter))
    monkeypatch.setattr(catalog, "_results_folder", lambda: tmp_path)
    monkeypatch.setattr(catalog, "_claim_files", lambda paper: [f for f in [tmp_path / f"{paper}.jsonl"] if f.exists()])
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: chapters.get(next((c for c in CHAPTERS if name == catalog._module_name(c)), None)))
    return types.SimpleNamespace(methods=methods, chapters=chapters, results=tmp_path)


def test_51_papers_and_the_yardsticks():
    ids = catalog.papers(with_status=False).index
    assert len(ids) == 51 and ids.is_unique
    assert [y["id"] for y in catalog.catalog()["yardsticks"]] == ["clip-baselines"]


def test_the_shipped_data_is_sound():
    assert catalog.problems() == []


@pytest.mark.parametrize("harm, word", [
    (lambda d: d["papers"][0].update(source=["moonlight"]), "moonlight"), (lambda d: d["papers"][0].update(readout=[]), "readout"),
    (lambda d: d["papers"][0].update(id="maple"), "twice"), (lambda d: d["papers"][0].update(chapter="99_x"), "99_x"),
    (lambda d: d["papers"][0].update(arxiv="abc"), "arXiv"), (lambda d: d["papers"][0].update(idea=""), "idea"),
    (lambda d: d["papers"][0].update(objective=["none", "none"]), "repeated")])
def test_unsound_data_is_noticed(harm, word):
    data = copy.deepcopy(catalog.catalog())
    harm(data)
    assert len(catalog.problems(data)) >= 1 and any(word in sentence for sentence in catalog.problems(data))


def test_all_arxiv_numbers_differ(frame):
    numbers = [n for n in frame.arxiv if n]
    assert len(numbers) == len(set(numbers)) == 51


def test_chapters_follow_the_plan(frame):
    assert {c: set(part.index) for c, part in frame.groupby("chapter")} == {c: set(ids.split()) for c, ids in CHAPTERS.items()}
    assert list(dict.fromkeys(frame.chapter)) == list(CHAPTERS)


def test_find_knows_further_values_and_rejects_unknown_ones():
    assert "tunevlseg" in catalog.find(source="conditioned").index       # a further value, not the first
    assert set(catalog.find(source="coupled", readout="mask").index) == {"tunevlseg"}
    with pytest.raises(ValueError, match="did you mean coupled"):
        catalog.find(source="copuled")
    with pytest.raises(ValueError, match="did you mean source"):
        catalog.find(sorce="coupled")


@pytest.mark.parametrize("call", [catalog.record, catalog.show, catalog.show_text, catalog.bibtex, catalog.status])
def test_an_unknown_id_names_the_closest(call):
    with pytest.raises(KeyError) as caught:
        call("mapel")
    assert "'mapel'" in str(caught.value) and "maple" in str(caught.value) and not str(caught.value).startswith('"')


def test_combinations_count_papers():
    table = catalog.combinations("source", "readout")
    assert table.loc["coupled", "mask"] == len(catalog.find(source="coupled", readout="mask")) == 1


def steps(paper="maple"):
    return catalog.step(catalog.status(paper))


def test_status_follows_from_what_exists(nothing):
    assert steps() == 0
    module = types.ModuleType("promptbook.multimodal")
    nothing.chapters["21_multimodal"] = module
    assert catalog.status("maple") == {"explained": True, "implemented": False, "checked": False, "claim_run": False}
    nothing.methods["other"] = types.SimpleNamespace(paper="promptsrc")
    assert steps() == 1, "another paper's method does not count"
    nothing.methods["maple"] = types.SimpleNamespace(paper="maple")
    assert steps() == 2
    module.check_promptsrc_weights = lambda: None
    assert steps() == 2, "another paper's check does not count"
    module.check_maple_step_zero = lambda: None
    assert steps() == 3 and steps("promptsrc") == 3
    write(nothing.results / "maple.jsonl", ["maple", "ivlp"], range(5))
    assert steps() == 4
    del nothing.methods["maple"]
    assert steps() == 1, "without a method the later steps do not count"


def write(path, methods, seeds):
    path.write_text("\n".join(json.dumps({"method": m, "seed": s, "settings": {}, "metrics": {"new": 1.0}}) for m in methods for s in seeds))


@pytest.mark.parametrize("methods, seeds, run", [(["maple", "ivlp"], range(5), True), (["maple", "ivlp"], range(4), False), (["maple"], range(9), False),
                                                 (["maple", "ivlp"], [1, 1, 1, 1, 1], False)])
def test_a_claim_needs_two_arms_of_five_seeds(nothing, methods, seeds, run):
    write(nothing.results / "maple.jsonl", methods, seeds)
    assert catalog.status("maple")["claim_run"] is run


def test_an_interrupted_second_arm_does_not_count_and_a_torn_line_does_no_harm(nothing):
    path = nothing.results / "maple.jsonl"
    write(path, ["maple", "ivlp"], range(5))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert catalog.status("maple")["claim_run"] is False


def test_the_mark_assigns_a_check(nothing):
    module = types.ModuleType("promptbook.multimodal")
    nothing.chapters["21_multimodal"] = module
    module.check_anything = catalog.checks("promptsrc")(lambda: "done")
    assert [f() for f in catalog.paper_checks("promptsrc")] == ["done"] and catalog.paper_checks("maple") == []
    with pytest.raises(KeyError):
        catalog.checks("mapel")


def test_a_chapter_without_its_extra_is_reported_and_not_counted(monkeypatch, tmp_path):
    (tmp_path / "needs_an_extra.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(catalog, "_module_name", lambda chapter: "needs_an_extra")
    with pytest.warns(UserWarning, match="a_package_nobody_has"):
        assert catalog._chapter_module("21_multimodal") is None
    sys.modules.pop("needs_an_extra", None)


def read_back(markdown):
    """Paper -> status out of the README table."""
    by_number = {p["arxiv"]: p["id"] for p in catalog.catalog()["papers"]}
    pairs = re.findall(r"([○◔◑◕●]) \[[^\]]+\]\(https://arxiv\.org/abs/([\d.]+)\)", markdown)
    return {by_number[number]: catalog.STEPS[catalog.SYMBOLS.index(symbol)] for symbol, number in pairs}


def test_the_readme_table_can_be_read_back(frame):
    changed = frame.copy()
    changed.loc["maple", "status"] = "claim run"
    for table in (frame, changed):
        assert read_back(catalog.readme_table(table)) == table.status.drop("clip-baselines").to_dict()


def test_the_readme_shows_the_present_table(frame):
    readme = ROOT / "README.md"
    if not readme.exists() or "arxiv.org/abs/2210.03117" not in readme.read_text(encoding="utf-8"):
        pytest.skip("this README has no map")
    assert read_back(readme.read_text(encoding="utf-8")) == frame.status.drop("clip-baselines").to_dict(), "refresh the README's map with catalog.readme_table()"


def test_text_for_the_command_line():
    text = catalog.list_text()
    assert all(re.search(rf"^  [○◔◑◕●] {re.escape(i)} ", text, re.M) for i in catalog.papers(True, False).index)
    assert set(re.findall(r"^  [○◔◑◕●] (\S+)", catalog.list_text(modality="audio"), re.M)) == {"petl-ast"}
    assert "coupled" in catalog.show_text("maple") and "2109.01134" in catalog.show_text("clip-baselines")


def test_bibtex_is_balanced_and_leads_to_the_paper():
    for name in catalog.papers(True, False).index:
        entry = catalog.bibtex(name)
        assert entry.count("{") == entry.count("}") and "arxiv.org/abs/" in entry
    assert catalog.bibtex("clip-baselines").count("@misc") == 7


def test_the_map_has_a_row_for_every_paper(frame):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ax = catalog.map_figure(frame.drop("clip-baselines"))
    words = {t.get_text() for t in ax.texts}
    assert set(frame.short.drop("clip-baselines")) <= words and set(catalog.AXES) <= words
    plt.close(ax.figure)
