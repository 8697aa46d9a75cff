"""The universe: determinism, ground truth, data sets, and one clear error for each kind of bad input."""
import hashlib
import subprocess
import sys

import pytest
import torch
from PIL import Image

from promptbook import universe as u
from promptbook.zoo import CONTEXT_LENGTH, tiny_tokenizer

BYTES = "import hashlib; from promptbook.universe import load_data; print(hashlib.sha256(load_data('gliders').test.images.numpy().tobytes()).hexdigest())"


def test_same_seed_same_bytes_in_another_process():
    here = hashlib.sha256(u.load_data("gliders").test.images.numpy().tobytes()).hexdigest()
    assert subprocess.run([sys.executable, "-c", BYTES], capture_output=True, text=True, check=True).stdout.strip() == here


def test_a_scene_does_not_depend_on_its_batch():
    scenes = u.pretraining_batch(1500, seed=5)[0]
    whole = u.render(scenes)[0]
    rows = torch.tensor([1400, 3, 700])
    assert torch.equal(u.render(scenes[rows])[0], whole[rows])


def test_vocabulary_is_as_rich_as_promised():
    assert u.SHAPE_COUNT >= 12 and len(u.COLOURS) >= 10 and len(u.TEXTURES) >= 6 and len(u.STYLES) >= 6
    counts = u.pretraining_batch(3000, seed=0)[0].count
    assert set(counts.tolist()) == {1, 2, 3, 4}


def test_masks_say_where_things_are():
    scenes = u.sample_scenes(200, torch.Generator().manual_seed(0), relation=torch.full((200,), u.RELATIONS.index("beside")))
    masks = u.render(scenes)[1]
    columns = torch.arange(u.CANVAS).float()
    for thing, side in ((1, lambda x: x < 16), (2, lambda x: x > 16)):
        found = (masks == thing).float()
        centre = (found.sum(1) * columns).sum(1) / found.sum((1, 2))
        assert side(centre).all()


def test_left_out_combinations_never_occur_alone():
    for seed in range(4):
        scenes, captions = u.pretraining_batch(2000, seed=seed)
        lone = (scenes.relation == 0) & (scenes.shape[:, 0] < u.SHAPE_COUNT) & (scenes.size[:, 0] < 3)
        bad = u.left_out(scenes.shape[:, 0], scenes.colour[:, 0], scenes.texture[:, 0]) & lone
        kinds = torch.tensor([u.SHAPES[s] in ("heart", "drop", "arrow", "pill", "crescent") for s in scenes.shape[:, 0].tolist()])   # kinds fix attributes themselves
        assert (bad & ~kinds).float().mean() < .005


def test_narrator_rates():
    scenes = u.sample_scenes(3000, torch.Generator().manual_seed(0))
    share = lambda **rates: sum("thing" in c for c in u.Narrator(seed=0, **rates)(scenes)) / 3000
    assert abs(share(vague=.3, wrong=0) - .3) < .03 and share(vague=0, wrong=0) == 0
    with pytest.raises(ValueError, match="between 0 and 1"): u.Narrator(wrong=2)


@pytest.mark.parametrize("name", [*u.SUITE, "digits"])
def test_data_sets(name):
    data = u.load_data(name)
    assert len(set(data.classes)) == len(data.classes) >= 10
    for split in (data.train, data.val, data.test): assert set(split.labels.tolist()) == set(range(len(data.classes))) and split.images.dtype == torch.uint8
    tokens = tiny_tokenizer()([data.template.format(c) for c in data.classes]).input_ids
    unknown = tiny_tokenizer().unk_token_id
    assert max(map(len, tokens)) <= CONTEXT_LENGTH and not any(unknown in row for row in tokens)
    hashes = [{hashlib.sha256(i.numpy().tobytes()).digest() for i in split.images} for split in (data.train, data.test)]
    allowed = .05 if name == "textures" else .02             # two plain swatches of one colour are one picture
    assert len(hashes[0] & hashes[1]) <= allowed * len(data.test), "test images leak into training"


def test_suite_mirrors_the_real_one():
    assert len(u.ELEVEN) == 11 and len(u.SHIFTED) == 4
    assert {u.SUITE[n].flavour for n in u.ELEVEN} == {"ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101", "FGVCAircraft", "SUN397", "DTD", "EuroSAT", "UCF101"}
    assert all(set(u.load_data(n).classes) <= set(u.load_data("things").classes) for n in u.SHIFTED)


def test_trust_is_the_share_of_true_attributes():
    spec = u.SUITE["flowers"]
    share = lambda k: (u.draw_class(spec, k, 400).texture[:, 0] == u.TEXTURES.index(spec.classes[k][1]["texture"])).float().mean().item()
    assert abs(share(1) - (.25 + .75 / 10)) < .07 and share(20) == 1.0


def test_few_shot_and_halves():
    data = u.load_data("pets")
    shots = u.few_shot(data.train, 3, seed=1)
    assert torch.equal(shots.labels.bincount(), torch.full((20,), 3)) and not torch.equal(shots.images, u.few_shot(data.train, 3, seed=2).images)
    base, new = u.base_and_new(data)
    assert base.classes + new.classes == data.classes and new.train.labels.unique().tolist() == list(range(10))
    with pytest.raises(ValueError, match="at least 1"): u.few_shot(data.train, 0, 0)
    with pytest.raises(ValueError, match="at least two classes"): u.base_and_new(data.subset([0]))
    with pytest.raises(ValueError, match="empty"): data.subset([])


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "sea_lion"):
        (tmp_path / name).mkdir()
        for k in range(6): Image.effect_noise((40 + k, 50), 60).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_your_own_folder(folder):
    data = u.load_data(str(folder))
    assert data.classes == ("cat", "sea lion") and data.train.images.shape[1:] == (3, 32, 32) and len(data.train) + len(data.val) + len(data.test) == 12
    assert min(len(data.train), len(data.val), len(data.test)) >= 2


def test_bad_folders_are_one_clear_error(folder, tmp_path):
    (folder / "cat" / "0.png").write_bytes((folder / "cat" / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="0.png' cannot be read as an image"): u.load_data(str(folder))
    (folder / "cat" / "0.png").write_text("hello")
    with pytest.raises(ValueError, match="0.png' cannot be read as an image"): u.load_data(str(folder))
    with pytest.raises(FileNotFoundError, match="No folder"): u.load_data(str(tmp_path / "missing") + "/")
    empty = tmp_path / "empty"; empty.mkdir()
    with pytest.raises(ValueError, match="no sub-folders"): u.load_data(str(empty))
    (empty / "dog").mkdir()
    with pytest.raises(ValueError, match="'dog'.* has 0 images"): u.load_data(str(empty))
    with pytest.raises(ValueError, match="did you mean"): u.load_data("flowrs")


def test_unknown_words_are_refused():
    scenes = u.sample_scenes(2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="is not a shape"): scenes.where(shape="pentagram")
    with pytest.raises(ValueError, match="no attribute"): scenes.where(smell="sweet")
