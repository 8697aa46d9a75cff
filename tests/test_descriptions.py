"""The sentences that stand in for a language model's class descriptions: complete, of equal count, short, and in words the tiny CLIP knows."""
import json
import re

import pytest

from promptbook import universe, zoo

FILE = zoo.ZOO.parent / "data" / "descriptions.json"
COUNT = 8
NAMES = (*universe.ELEVEN, "digits")


@pytest.fixture(scope="module")
def content():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.tiny_tokenizer()


def classes_of(name):
    if name == "digits": return list(universe.SHAPES[universe.SHAPE_COUNT:])
    return [label for label, _ in universe.SUITE[name].classes]


def words(sentence):
    return re.findall(r"[a-z]+", sentence.lower())


def test_the_file_says_what_it_is(content):
    assert list(content) == ["about", "sentences", "data"] and content["sentences"] == COUNT
    assert "written by hand" in content["about"] and "CC0-1.0" in content["about"]
    assert tuple(content["data"]) == NAMES
    assert FILE.stat().st_size < 350_000


@pytest.mark.parametrize("name", NAMES)
def test_every_class_in_order_with_the_same_count(content, name):
    described = content["data"][name]
    assert list(described) == classes_of(name)
    assert {len(sentences) for sentences in described.values()} == {COUNT}


def test_digits_are_the_classes_of_the_digits(content):
    assert tuple(content["data"]["digits"]) == universe.load_data("digits").classes


@pytest.mark.parametrize("name", universe.SHIFTED)
def test_shifted_sets_find_their_classes_among_things(content, name):
    assert set(classes_of(name)) <= set(content["data"]["things"])


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_twice_in_a_set(content, name):
    sentences = [s for own in content["data"][name].values() for s in own]
    assert len({s.lower() for s in sentences}) == len(sentences)


@pytest.mark.parametrize("name", NAMES)
def test_sentences_are_tidy(content, name):
    for sentence in (s for own in content["data"][name].values() for s in own):
        assert sentence == sentence.strip() and sentence.endswith(".") and sentence[0].isupper() and sentence.isascii(), sentence
        assert "{" not in sentence and "  " not in sentence, sentence
        assert not re.search(r"\ba (?!one\b)[aeiou]|\ba hour|\ban (?!hour)[^aeiou]", sentence.lower()), f"wrong article: {sentence}"


@pytest.mark.parametrize("name", NAMES)
def test_sentences_fit_the_context(content, tokenizer, name):
    sentences = [s for own in content["data"][name].values() for s in own]
    assert max(len(ids) for ids in tokenizer(sentences).input_ids) <= 30 < zoo.CONTEXT_LENGTH


@pytest.mark.parametrize("name", NAMES)
def test_nine_words_in_ten_are_in_the_vocabulary(content, name):
    known = set(zoo.vocabulary())
    all_words = [w for own in content["data"][name].values() for s in own for w in words(s)]
    assert sum(w in known for w in all_words) / len(all_words) > .90


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_names_another_class(content, name):
    others = {label: f" {' '.join(words(label))} " for label in classes_of(name)}
    for own, sentences in content["data"][name].items():
        for sentence in sentences:
            text = f" {' '.join(words(sentence))} "
            named = [label for label, spaced in others.items() if spaced in text and label != own and spaced not in others[own]]
            assert not named, f"{name}, {own}: '{sentence}' names {named}"
