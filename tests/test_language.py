"""Texts of the universe, episodes, the four English sets, tables of one's own."""
import json
import random
from itertools import combinations

import pandas as pd
import pytest

from promptbook import language
from promptbook.language import ATTRIBUTES, COLOURS, ENGLISH, EPISODES, FORMS, KIND_OF, NOUNS, SEEN, TASKS, UNSEEN, documents, draw_things, english_texts, episode, invented, load_text, reserved, story

PAIR = [(a, b) for a in COLOURS for b in ATTRIBUTES["shape"]]


def mentioned(text):
    words = text.replace(",", " ").replace(".", " ").replace("?", " ").split()
    return [(s, c) for c, s in zip(words, words[1:]) if c in COLOURS and s in ATTRIBUTES["shape"]]


# -- tasks ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_a_task_is_seeded_and_keeps_combinations_apart(task):
    made = [task.make(random.Random(k)) for k in range(60)]
    assert made == [task.make(random.Random(k)) for k in range(60)]
    assert all(x.strip() and y.strip() for x, y in made) and len(set(made)) > 10
    assert len(task.instructions) >= 2 and len(set(task.instructions)) == len(task.instructions)
    if not task.held_out: assert not [p for x, y in made for p in mentioned(f"{x} ; {y}") if reserved(*p)]
    asked = [p for k in range(60) for p in mentioned(task.make(random.Random(k), True)[0])]
    assert not asked or any(reserved(*p) for p in asked)


def test_answers_follow_from_their_inputs():
    """An independent solver for every task whose input can be read by a few lines."""
    size = ATTRIBUTES["size"]
    words = lambda x: x.split()
    solve = {
        "copy": lambda x: x, "reverse": lambda x: " ".join(words(x)[::-1]), "first": lambda x: words(x)[0], "last": lambda x: words(x)[-1], "second": lambda x: words(x)[1],
        "sort": lambda x: " ".join(sorted(words(x))), "how many words": lambda x: language.NUMBERS[len(words(x))], "pick colours": lambda x: " ".join(w for w in words(x) if w in COLOURS),
        "count": lambda x: language.NUMBERS[x.rsplit(". ", 1)[0].split().count(x.rsplit(". ", 1)[1][:-1])],
        "compare": lambda x: "yes" if size.index(x.split(", ")[0].split()[0]) > size.index(x.split(", ")[1].split()[0]) else "no",
        "same": lambda x: "yes" if len({w for w in x.replace(",", "").split() if w in COLOURS}) == 1 else "no",
        "larger": lambda x: str(max(map(int, x.split(", ")))), "subtract": lambda x: f"{x} = {eval(x)}. answer {eval(x)}", "kind of word": lambda x: KIND_OF[x],
        "colour of": lambda x: next(w for part in x.rsplit(". ", 1)[0].split(", ") if part.endswith(x.rsplit(". ", 1)[1][:-1]) for w in part.split() if w in COLOURS),
        "odd one out": lambda x: next(w for w in words(x) if [KIND_OF[v] for v in words(x)].count(KIND_OF[w]) == 1),
    }
    for name, solver in solve.items():
        for k in range(100):
            asked, answer = TASKS[name].make(random.Random(k))
            assert solver(asked) == answer, (name, asked, answer)


def test_a_story_says_what_is_where():
    for k in range(200):
        text, things, relation = story(random.Random(k), 3)
        place = {t.shape: i for i, t in enumerate(things)}
        for sentence in text.split(". "):
            a, b = [w.strip(".") for w in sentence.split() if w.strip(".") in place]
            first = any(r in sentence for r in ("left of", "above"))
            assert (place[a] < place[b]) == first and (relation in ("left of", "right of")) == ("left" in sentence or "right" in sentence)


def test_invented_words_are_words_of_their_own():
    known = [invented(w, l) for l in ("vorin", "tesk") for w in KIND_OF]
    assert len(set(known)) == len(known) and not set(known) & (set(KIND_OF) | set(NOUNS))


# -- episodes and documents -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", EPISODES)
@pytest.mark.parametrize("form", FORMS, ids=range(len(FORMS)))
def test_an_episode_is_answered_by_its_examples(kind, form):
    for k in range(50):
        e = episode(random.Random(k), 12, kind, 3, UNSEEN, form)
        assert e.label in e.labels and set(e.labels) <= set(UNSEEN) and len(set(e.labels)) == 3 and {l for _, l in e.examples} == set(e.labels)
        assert e.text.startswith(e.prompt() + " " + e.label) and e.prompt(0) == form.split(" {label}")[0].format(item=e.item)
        if kind == "word": assert dict(e.examples)[e.item] == e.label
        if kind == "kind": assert {KIND_OF[i]: l for i, l in e.examples}[KIND_OF[e.item]] == e.label


def test_an_attribute_decides_an_attribute_episode():
    for k in range(100):
        e = episode(random.Random(k), 16, "attribute", 3)
        assert any(all(dict((w, l) for i, l in e.examples for w in i.split() if KIND_OF[w] == a)[w] == l for i, l in (*e.examples, (e.item, e.label)) for w in i.split() if KIND_OF[w] == a)
                   for a in {KIND_OF[w] for w in e.item.split()})


def test_unknown_episode():
    with pytest.raises(ValueError, match="Unknown kind of episode 'colour'"): episode(random.Random(0), 3, "colour")


def test_documents_are_seeded_and_keep_their_promises():
    texts = documents(5, 1500)
    assert texts == documents(5, 1500) != documents(6, 1500)
    hidden = [i for t in TASKS.values() if t.held_out for i in t.instructions]
    assert not [t for t in texts if any(f"Task: {i}\n" in t for i in hidden)]
    plain = documents(5, 800, {"instruction": 1, "story": 1})
    assert sum(len(mentioned(t)) for t in plain) > 500 and not [p for t in plain for p in mentioned(t) if reserved(*p)]
    assert not set(SEEN) & set(UNSEEN) and set(SEEN) | set(UNSEEN) == set(NOUNS)


def test_things_are_reserved_or_not():
    for held_out in (False, True): assert all(reserved(t.shape, t.colour) == held_out for k in range(50) for t in draw_things(random.Random(k), 4, held_out))
    assert {reserved(s, c) for c, s in PAIR} == {False, True}


# -- real English -----------------------------------------------------------------------------------------------------

MINIMUM = {"sectors": (340, 20), "papers": (384, 20), "tickets": (360, 18), "notes": (320, 12)}   # items, labels


def rows(name):
    return [json.loads(line) for line in (language.DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def grams(text, n=3):
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return {tuple(words[k:k + n]) for k in range(len(words) - n + 1)}


@pytest.mark.parametrize("name", ENGLISH)
def test_a_set_is_large_and_its_splits_do_not_overlap(name):
    data = load_text(name)
    parts = (data.train, data.val, data.test)
    assert sum(map(len, parts)) == len(rows(name)) >= MINIMUM[name][0] and len(data.classes) >= MINIMUM[name][1]
    texts = [t for p in parts for t in p.texts]
    assert len(set(texts)) == len(texts) and data.multi_label == (name == "sectors")
    for part in parts: assert (part.labels.sum(0) if data.multi_label else part.labels.bincount(minlength=len(data.classes))).min() >= 1, "every label occurs in every split"
    assert load_text(name).test.texts == data.test.texts


@pytest.mark.parametrize("name", ENGLISH)
def test_no_text_is_a_near_copy_of_another_or_made_from_a_template(name):
    texts = [" ".join(str(v) for k, v in row.items() if k in ("title", "abstract", "text")) for row in rows(name)]
    sets = [grams(t) for t in texts]
    worst = max((len(a & b) / max(1, len(a | b)), i, j) for (i, a), (j, b) in combinations(enumerate(sets), 2))
    assert worst[0] < .25, (texts[worst[1]], texts[worst[2]])
    openings = pd.Series([" ".join(t.lower().split()[:3]) for t in texts]).value_counts(normalize=True)
    assert openings.iloc[0] < .05
    lengths = pd.Series([len(t.split()) for t in texts])
    assert lengths.min() >= 6 and lengths.max() <= 75 and lengths.std() > 3


def test_labels_are_of_the_taxonomy():
    taxonomy = json.loads((language.DATA / "sectors_taxonomy.json").read_text(encoding="utf-8"))
    second = [l for part in taxonomy.values() for l in part]
    assert len(second) == len(set(second)) and {l for r in rows("sectors") for l in r["labels"]} == set(second) and all(1 <= len(set(r["labels"])) == len(r["labels"]) <= 3 for r in rows("sectors"))
    assert .4 < sum(r["known"] for r in rows("sectors")) / len(rows("sectors")) < .6


@pytest.mark.parametrize("label", ["fever", "smoker", "pain", "admitted"])
def test_questions_about_notes_have_enough_answers(label):
    counts = pd.Series([r[label] for r in rows("notes")]).value_counts()
    assert set(counts.index) <= {"yes", "no", "not stated"} and counts["yes"] >= 25 and counts["yes"] / (counts["yes"] + counts["no"]) >= .25
    assert len(load_text("notes", label=label).classes) == len(counts)


def test_pretraining_reads_training_texts_only():
    read = set(english_texts())
    for name in ENGLISH:
        data = load_text(name)
        assert set(data.train.texts) <= read and not (set(data.val.texts) | set(data.test.texts)) & read


# -- tables of one's own ----------------------------------------------------------------------------------------------

@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mine.csv"
    pd.DataFrame({"message": [f"text number {k}" for k in range(40)], "mood": ["glad", "cross", "cross; tired", "tired"] * 10}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_own_tables(table, tmp_path, ending):
    frame, path = pd.read_csv(table), tmp_path / f"own.{ending}"
    {"csv": lambda: frame.to_csv(path, index=False), "parquet": lambda: frame.to_parquet(path), "jsonl": lambda: frame.to_json(path, orient="records", lines=True)}[ending]()
    data = load_text(str(path), text="message", label="mood")
    assert data.classes == ("cross", "glad", "tired") and data.multi_label and data.train.labels.shape[1] == 3 and sum(map(len, (data.train, data.val, data.test))) == 40
    row = data.test.frame.mood.str.contains(";").to_numpy().nonzero()[0][0]
    assert data.test.labels[row].tolist() == [1, 0, 1]


def test_what_is_wrong_with_a_table_is_said_in_one_sentence(table, tmp_path):
    with pytest.raises(ValueError, match="no column 'text'; it has message, mood"): load_text(str(table))
    with pytest.raises(ValueError, match="no column 'label'"): load_text(str(table), text="message")
    with pytest.raises(ValueError, match="Row 1 .* label 'glad', which is not among the 2 classes"): load_text(str(table), "message", "mood", classes=["cross", "tired"])
    with pytest.raises(FileNotFoundError, match="no data set"): load_text(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="is not a table"): load_text(str(_write(tmp_path / "a.txt", b"x")))
    with pytest.raises(ValueError, match="not written in UTF-8"): load_text(str(_write(tmp_path / "b.csv", "text,label\ncafé,a\n".encode("latin-1"))))
    with pytest.raises(ValueError, match="could not be read as a table"): load_text(str(_write(tmp_path / "c.csv", b"")))
    with pytest.raises(ValueError, match="could not be read as a table"): load_text(str(_write(tmp_path / "d.parquet", b"not parquet")))
    with pytest.raises(ValueError, match="Row 2 of .* has no text"): load_text(str(_write(tmp_path / "e.csv", b"text,label\nhello,a\n,b\n")))


def _write(path, content):
    path.write_bytes(content)
    return path
