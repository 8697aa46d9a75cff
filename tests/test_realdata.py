"""Real data sets: the registry against the papers' table, both sources, laziness, determinism, errors. No network."""
import builtins
import json
import pickle
import random
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from promptbook import realdata as rd
from promptbook.realdata import REAL, REAL_ELEVEN, REAL_SHIFTED, Files, PictureList, load_real
from promptbook.universe import SUITE, Split, base_and_new, companions, few_shot, load_data

TABLE = {  # classes, test pictures, template: the table in the CLIP chapter's sources
    "imagenet": (1000, 50000, "a photo of a {}."), "caltech101": (100, 2465, "a photo of a {}."), "oxford_pets": (37, 3669, "a photo of a {}, a type of pet."),
    "stanford_cars": (196, 8041, "a photo of a {}."), "oxford_flowers": (102, 2463, "a photo of a {}, a type of flower."), "food101": (101, 30300, "a photo of {}, a type of food."),
    "fgvc_aircraft": (100, 3333, "a photo of a {}, a type of aircraft."), "sun397": (397, 19850, "a photo of a {}."), "dtd": (47, 1692, "{} texture."),
    "eurosat": (10, 8100, "a centered satellite photo of {}."), "ucf101": (101, 3783, "a photo of a person doing {}."), "imagenetv2": (1000, 10000, "a photo of a {}."),
    "imagenet_sketch": (1000, 50889, "a photo of a {}."), "imagenet_a": (200, 7500, "a photo of a {}."), "imagenet_r": (200, 30000, "a photo of a {}.")}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("PROMPTBOOK_PARTIAL", "1")
    monkeypatch.delenv("PROMPTBOOK_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    rd._load.cache_clear()


def picture(number, width=48, height=40):
    """Noise that is different for every number, so that two pictures are never mixed up."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))


def table(labels, names=None, image="image", label="label", start=0, **more):
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    columns = {image: [picture(start + n) for n in range(len(labels))], label: list(labels), **{k: v for k, (v, _) in more.items()}}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({image: datasets.Image(), label: kind, **{k: t for k, (_, t) in more.items()}}))


def saved(root, name, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(root / name))
    return root


# -- the registry -----------------------------------------------------------------------------------------------------

def test_registry_has_the_papers_fifteen_with_their_counts_and_templates():
    assert {name: (s.classes, s.test_images, s.template) for name, s in REAL.items()} == TABLE
    assert list(REAL) == [*REAL_ELEVEN, *REAL_SHIFTED] and (len(REAL_ELEVEN), len(REAL_SHIFTED)) == (11, 4)
    assert sorted(s.counterpart for s in REAL.values()) == sorted(SUITE), "each data set of the universe stands for one real one"
    assert all(SUITE[s.counterpart].flavour == s.title for s in REAL.values())
    assert all(s.home.startswith("https://") and s.licence and s.rewrite in rd.REWRITES and s.order in ("hub", "sorted") and s.repo.count("/") == 1 for s in REAL.values())
    assert [s.name for s in REAL.values() if not s.confirmed] == ["fgvc_aircraft", "ucf101"] and all(s.note for s in REAL.values() if not s.confirmed)
    frame = rd.registry()
    assert list(frame.index) == list(REAL) and {"repo", "split_rule", "licence", "confirmed"} <= set(frame.columns)
    rules = {r: sorted(n for n, s in REAL.items() if s.split_rule == r) for r in set(frame.split_rule)}
    assert rules == {"pooled, 50/20/30 %": ["caltech101", "dtd", "eurosat", "food101", "oxford_flowers"], "20 % of training is validation": ["oxford_pets", "stanford_cars", "sun397", "ucf101"],
                     "given": ["fgvc_aircraft"], "validation = test": ["imagenet"], "test only": sorted(REAL_SHIFTED)}


def test_companions_stay_in_their_own_world():
    assert companions("imagenet") == (REAL_ELEVEN[1:], REAL_SHIFTED)
    others, shifted = companions("things")
    assert "things" not in others and set(others + shifted) < set(SUITE)


@pytest.mark.parametrize("name, given, wanted", [
    ("stanford_cars", "AM General Hummer SUV 2000", "2000 AM General Hummer SUV"), ("ucf101", "ApplyEyeMakeup", "Apply Eye Makeup"), ("ucf101", "TaiChi", "Tai Chi"), ("ucf101", "YoYo", "Yo Yo"),
    ("caltech101", "Faces", "face"), ("caltech101", "Faces_easy", None), ("caltech101", "BACKGROUND_Google", None), ("caltech101", "airplanes", "airplane"), ("caltech101", "crocodile_head", "crocodile head"),
    ("eurosat", "AnnualCrop", "Annual Crop Land"), ("eurosat", "Annual Crop", "Annual Crop Land"), ("eurosat", "SeaLake", "Sea or Lake"), ("eurosat", "Residential Buildings", "Residential Buildings"),
    ("eurosat", "Herbaceous Vegetation", "Herbaceous Vegetation Land"), ("sun397", "/c/church/indoor", "indoor church"), ("sun397", "church indoor", "indoor church"),
    ("sun397", "/a/abbey", "abbey"), ("sun397", "/w/wine_cellar/barrel_storage", "barrel storage wine cellar"), ("sun397", "wine cellar barrel storage", "barrel storage wine cellar"),
    ("sun397", "theater indoor procenium", "indoor procenium theater"), ("sun397", "car interior backseat", "backseat car interior"), ("sun397", "gift shop", "gift shop"), ("sun397", "home office", "home office"),
    ("oxford_pets", "Egyptian_Mau", "egyptian mau"), ("food101", "apple_pie", "apple pie"), ("imagenet", "goldfish, Carassius auratus", "goldfish"), ("oxford_flowers", "pink-yellow dahlia?", "pink-yellow dahlia")])
def test_class_names_are_rewritten_as_the_papers_do(name, given, wanted):
    assert rd.REWRITES[REAL[name].rewrite](given) == wanted


# -- the two sources --------------------------------------------------------------------------------------------------

NAMES = ("Abyssinian", "american_bulldog", "Bengal", "Birman")


def both_sources(root, per_class=10):
    """The same pictures as a table with the hub's columns and in CoOp's folders."""
    labels = [k for k in range(4) for _ in range(per_class)]
    saved(root / "hub", "oxford_pets", train=table(labels, NAMES), test=table(labels, NAMES, start=100))
    folder = root / "coop" / "oxford_pets"
    (folder / "images").mkdir(parents=True)
    split = {"train": [], "val": [], "test": []}
    for part, start in (("train", 0), ("test", 100)):
        for n, k in enumerate(labels):
            picture(start + n).save(folder / "images" / f"{part}_{n}.png")
            split["val" if part == "train" and n % 5 == 0 else part].append([f"{part}_{n}.png", k, NAMES[k].lower()])
    (folder / "split_zhou_OxfordPets.json").write_text(json.dumps(split))
    return root


def test_both_sources_give_the_same_names_and_pictures(tmp_path):
    root = both_sources(tmp_path)
    hub, coop = load_real("oxford_pets", 32, root / "hub"), load_real("oxford_pets", 32, root / "coop")
    assert hub.classes == coop.classes == ("abyssinian", "american bulldog", "bengal", "birman") and hub.template == REAL["oxford_pets"].template
    assert torch.equal(hub.test.images[:], coop.test.images[:]) and torch.equal(hub.test.labels, coop.test.labels)
    assert (len(hub.train), len(hub.val), len(hub.test)) == (len(coop.train), len(coop.val), len(coop.test)) == (32, 8, 40)
    everything = lambda d: {t.numpy().tobytes() for s in (d.train, d.val) for t in s.images[:]}
    assert everything(hub) == everything(coop) and len(everything(hub)) == 40, "the same pictures, held out differently"
    assert hub.flavour == "OxfordPets, same rule" and coop.flavour == "OxfordPets, papers' split"


def test_environment_names_the_folder_and_load_data_the_size(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTBOOK_DATA", str(both_sources(tmp_path) / "coop"))
    assert load_data("oxford_pets").test.images.shape == (40, 3, 224, 224)
    assert load_data("oxford_pets", 16).test.images[:2].shape == (2, 3, 16, 16)


def test_parquet_files_are_read_like_a_saved_dictionary(tmp_path):
    labels = [0, 0, 1, 1]
    for split in ("train", "test"):
        (tmp_path / "oxford_pets" / "data").mkdir(parents=True, exist_ok=True)
        table(labels, NAMES[:2]).to_parquet(str(tmp_path / "oxford_pets" / "data" / f"{split}-00000-of-00001.parquet"))
    data = load_real("oxford_pets", 16, tmp_path)
    assert data.classes == ("abyssinian", "american bulldog") and torch.equal(data.test.images[0], torch.from_numpy(np.array(rd.square_picture(picture(0), 16))).permute(2, 0, 1))


def test_pooled_sets_have_the_class_sizes_of_coops_rounding(tmp_path):
    counts, names = (24, 31, 7), ("Faces", "Faces_easy", "accordion", "Leopards")
    labels = [0] * 24 + [1] * 5 + [2] * 31 + [3] * 7
    data = load_real("caltech101", 16, saved(tmp_path, "caltech101", train=table(labels, names)))
    assert data.classes == ("face", "leopard", "accordion"), "capitals first, as CoOp sorts folders; Faces_easy is dropped"
    by_name = dict(zip(("face", "accordion", "leopard"), counts))
    for k, name in enumerate(data.classes):
        n = by_name[name]
        assert [(s.labels == k).sum().item() for s in (data.train, data.val, data.test)] == [round(n * .5), round(n * .2), n - round(n * .5) - round(n * .2)]
    pixels = [t.numpy().tobytes() for s in (data.train, data.val, data.test) for t in s.images[:]]
    assert len(set(pixels)) == len(pixels) == sum(counts), "every picture is in exactly one part"
    again = rd.cut([k for k, n in enumerate(counts) for _ in range(n)], (.5, .2))
    assert again == rd.cut([k for k, n in enumerate(counts) for _ in range(n)], (.5, .2)) != rd.cut([k for k, n in enumerate(counts) for _ in range(n)], (.5, .2), seed=1)
    assert 1692 == 47 * (120 - 60 - 24) and 30300 == 101 * (1000 - 500 - 200), "the rule gives the papers' test sizes of DTD and Food101"


def test_video_frames_become_the_middle_one_of_each_clip(tmp_path):
    clips, frames = ["b"] * 3 + ["a"] * 4, [2, 0, 1, 3, 1, 0, 2]
    make = lambda: table([1] * 3 + [0] * 4, ("ApplyLipstick", "BabyCrawling"), clip_id=(clips, datasets.Value("string")), frame=(frames, datasets.Value("int64")))
    data = load_real("ucf101", 16, saved(tmp_path, "ucf101", train=make(), test=make()))
    assert data.classes == ("Apply Lipstick", "Baby Crawling") and data.test.labels.tolist() == [1, 0]
    wanted = [torch.from_numpy(np.array(rd.square_picture(picture(n), 16))).permute(2, 0, 1) for n in (2, 6)]        # frames 1 of b and 2 of a
    assert torch.equal(data.test.images[:], torch.stack(wanted))


def test_plain_number_labels_take_their_names_from_a_file(tmp_path):
    saved(tmp_path, "imagenet_a", test=table([1, 0, 1], image="jpg", label="cls"))
    (tmp_path / "imagenet_a" / "classnames.txt").write_text("stingray\ngoldfinch\n")
    data = load_real("imagenet_a", 16, tmp_path)
    assert data.classes == ("stingray", "goldfinch") and data.test.labels.tolist() == [1, 0, 1] and len(data.train) == len(data.val) == 0
    assert data.train.images.shape == (0, 3, 16, 16) and data.train.images[:].shape == (0, 3, 16, 16)


def test_folders_of_imagenet_its_versions_and_aircraft(tmp_path):
    def write(*parts, number=0):
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    for part in ("train", "val"):
        for synset in ("n01", "n02"):
            write("imagenet", "images", part, synset, "x.png")
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01 tench\nn02 great white shark\n")
    data = load_real("imagenet", 16, tmp_path)
    assert data.classes == ("tench", "great white shark") and len(data.train) == len(data.test) == 2 and torch.equal(data.val.images[:], data.test.images[:])
    write("imagenet-rendition", "imagenet-r", "n02", "y.png")
    assert load_real("imagenet_r", 16, tmp_path).classes == ("great white shark",), "names from ImageNet's file"
    for label in (0, 1):
        write("imagenetv2", "imagenetv2-matched-frequency-format-val", str(label), "z.png")
    assert load_real("imagenetv2", 16, tmp_path).classes == data.classes
    for number in ("0034309", "0034310", "0034311"):
        write("fgvc_aircraft", "images", f"{number}.jpg", number=int(number))
    folder = tmp_path / "fgvc_aircraft"
    (folder / "variants.txt").write_text("707-320\nA340-300\n")
    for part, number, name in (("train", "0034309", "A340-300"), ("val", "0034310", "707-320"), ("test", "0034311", "A340-300")):
        (folder / f"images_variant_{part}.txt").write_text(f"{number} {name}\n")
    data = load_real("fgvc_aircraft", 16, tmp_path)
    assert data.classes == ("707-320", "A340-300") and [s.labels.tolist() for s in (data.train, data.val, data.test)] == [[1], [0], [1]]


# -- pictures that wait -----------------------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    for n in range(6):
        picture(n, 60 + 7 * n, 50).save(tmp_path / f"{n}.png")
    return PictureList(Files([tmp_path / f"{n}.png" for n in range(6)]), 24)


def test_nothing_is_decoded_before_it_is_asked_for(pictures, monkeypatch):
    opened, real_open = [], Image.open
    monkeypatch.setattr(rd.Image, "open", lambda file, *a, **k: opened.append(str(file)) or real_open(file, *a, **k))
    split = Split(pictures, torch.tensor([0, 0, 1, 1, 2, 2]))
    data = rd.ImageData("x", ("a", "b", "c"), "a {}", split, split, split)
    base, new = base_and_new(data)
    kept = few_shot(base.train, 1, seed=1)
    assert not opened and isinstance(kept.images, PictureList) and len(kept) == 2 and new.classes == ("c",) and len(new.test) == 2
    assert kept.images[:1].shape == (1, 3, 24, 24) and len(opened) == 1 and base.test.rows(slice(1, 3)).images.shape == (2, 3, 24, 24) and len(opened) == 1


def test_indexing_by_slice_list_tensor_mask_and_number(pictures):
    full = pictures[:]
    assert full.shape == pictures.shape == (6, 3, 24, 24) and full.dtype == pictures.dtype == torch.uint8 and len(pictures) == 6
    mask = torch.tensor([True, False, True, False, False, True])
    for index in (slice(1, 5), [4, 2, 2], torch.tensor([5, 0]), mask, mask.tolist(), np.array([3, 1]), slice(0, 0), [], -1, 2):
        wanted = full[torch.tensor(index) if isinstance(index, (list, np.ndarray)) and len(index) else index]
        assert torch.equal(pictures[index], wanted), index
        if not isinstance(index, int):
            assert torch.equal(pictures.rows(index)[:], wanted), index
    assert torch.equal(pictures.rows([5, 3, 1]).rows([2, 0])[:], full[[1, 5]])


@pytest.mark.parametrize("kind", ["crop", "strong"])
def test_training_pictures_depend_on_seed_view_and_place_alone(pictures, kind):
    one = pictures.augmented(3, 1, kind)
    full = one[:]
    assert full.shape == (6, 3, 24, 24) and torch.equal(one[[4, 1]], full[[4, 1]]) and torch.equal(pictures.rows([4, 1]).augmented(3, 1, kind)[:], full[[4, 1]])
    assert torch.equal(pickle.loads(pickle.dumps(one))[:], full)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(one[:], full)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(pictures.augmented(3, 2, kind)[:], full) and not torch.equal(pictures.augmented(4, 1, kind)[:], full) and not torch.equal(pictures[:], full)


def test_a_loader_with_processes_gives_the_same_batches(pictures):
    class Views(torch.utils.data.Dataset):
        def __len__(self): return 6
        def __getitems__(self, rows): return pictures.augmented(1, 0)[rows]
    loader = torch.utils.data.DataLoader(Views(), 3, num_workers=1, collate_fn=lambda batch: batch)
    assert torch.equal(torch.cat(list(loader)), pictures.augmented(1, 0)[:])


def test_the_test_view_is_that_of_clips_own_processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False)
    for size in ((320, 240), (97, 300), (64, 64), (40, 50)):
        assert (np.asarray(processor(picture(1, *size), return_tensors="np").pixel_values[0], dtype=int) == np.array(rd.square_picture(picture(1, *size), 64)).transpose(2, 0, 1)).all(), size


def test_crops_keep_the_documented_share_and_proportions(monkeypatch):
    seen = []
    real_crop = Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: seen.append((box[2] - box[0], box[3] - box[1])) or real_crop(self, box))
    for seed in range(200):
        assert rd.crop_picture(picture(0, 300, 200), 8, np.random.default_rng(seed)).size == (8, 8)
    shares, ratios = [w * h / 60000 for w, h in seen], [w / h for w, h in seen]
    assert .078 <= min(shares) and max(shares) <= 1 and min(shares) < .2 and max(shares) > .7 and .74 <= min(ratios) and max(ratios) <= 1.35
    assert rd.crop_picture(picture(0, 500, 10), 8, np.random.default_rng(0)).size == (8, 8), "a very long picture"


def test_randaugment_has_the_documented_ranges_and_moves_as_named():
    space = rd.augmentation_space(224)
    at = {name: v[10] for name, (v, _) in space.items()}
    assert len(space) == 14 and sum(signed for _, signed in space.values()) == 9
    assert at["rotate"] == pytest.approx(10) and at["shear x"] == pytest.approx(.1) and at["shift y"] == pytest.approx(150 / 331 * 224 / 3) and at["brightness"] == pytest.approx(.3)
    assert at["posterise"] == 7 and at["solarise"] == pytest.approx(170)
    image = picture(0, 50, 50)
    pixels = np.array(image)
    assert (np.array(rd.augment_once(image, "shift x", 7.9))[:, 7:] == pixels[:, :-7]).all() and (np.array(rd.augment_once(image, "shift x", 7.9))[:, :7] == 0).all()
    assert (np.array(rd.augment_once(image, "shift y", -5))[:-5] == pixels[5:]).all()
    assert (np.array(rd.augment_once(image, "nothing", 0)) == pixels).all() and (np.array(rd.augment_once(image, "brightness", 0)) == pixels).all()
    assert (np.array(rd.augment_once(image, "posterise", 7)) == pixels // 2 * 2).all()
    solar = np.array(rd.augment_once(image, "solarise", 170))
    assert (solar == np.where(pixels < 170, pixels, 255 - pixels)).all()


def test_shots_are_drawn_as_coops_code_draws_them(pictures):
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    random.seed(7)
    wanted = random.sample([0, 1, 2], 2) + random.sample([3, 4, 5], 2)        # classes in the order of the file
    chosen = few_shot(Split(pictures, labels), 2, seed=7)
    assert chosen.labels.tolist() == [1, 1, 0, 0] and torch.equal(chosen.images[:], pictures[wanted])
    assert len(few_shot(Split(pictures, labels), 16, seed=7)) == 6, "fewer than 16: all of them"


# -- errors -----------------------------------------------------------------------------------------------------------

def test_bad_data_is_named_in_one_sentence(tmp_path, monkeypatch):
    root = both_sources(tmp_path, per_class=2)
    folder = root / "coop" / "oxford_pets"
    victim = folder / "images" / "test_3.png"
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(ValueError, match="test_3.png' cannot be read as a picture"):
        load_real("oxford_pets", 16, root / "coop").test.images[:]
    victim.unlink()
    with pytest.raises(ValueError, match="test_3.png' is missing"):
        load_real("oxford_pets", 16, root / "coop").test.images[:]
    (folder / "images").rename(folder / "pictures")
    rd._load.cache_clear()
    with pytest.raises(FileNotFoundError, match="put the pictures into"):
        load_real("oxford_pets", 16, root / "coop")
    (folder / "split_zhou_OxfordPets.json").write_text('{"train": [')
    with pytest.raises(ValueError, match="not a split file"):
        load_real("oxford_pets", 16, root / "coop")
    with pytest.raises(ValueError, match="not one of the fifteen"):
        load_real("oxford_cats")
    with pytest.raises(FileNotFoundError, match="No folder"):
        load_real("oxford_pets", 16, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="should have a column 'image', but this copy has picture, label"):
        load_real("oxford_pets", 16, saved(tmp_path / "a", "oxford_pets", train=table([0], NAMES[:1], image="picture"), test=table([0], NAMES[:1], image="picture")))
    with pytest.raises(ValueError, match="should have a split 'test', but this copy has train"):
        load_real("oxford_pets", 16, saved(tmp_path / "b", "oxford_pets", train=table([0], NAMES[:1])))
    monkeypatch.setenv("PROMPTBOOK_PARTIAL", "0")
    with pytest.raises(ValueError, match="37 classes in the papers, but 4 were found"):
        load_real("oxford_pets", 16, root / "hub")


def test_another_number_of_test_pictures_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTBOOK_PARTIAL", "0")
    names = sorted(rd.EUROSAT_NAMES)
    root = saved(tmp_path, "eurosat", **{s: table(list(range(10)) * 2, names, start=100 * k) for k, s in enumerate(("train", "validation", "test"))})
    with pytest.warns(UserWarning, match="8100 test pictures in the papers"):
        assert load_real("eurosat", 16, root).classes[0] == "Annual Crop Land"


def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "dtd").mkdir()
    real_import = builtins.__import__
    def refuse(name, *args, **more):
        if name == "datasets": raise ImportError("no")
        return real_import(name, *args, **more)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "promptbook\[full\]"'):
        load_real("dtd", 16, tmp_path)


@pytest.mark.parametrize("offline, says", [(True, "HF_HUB_OFFLINE forbids"), (False, "could not be fetched")])
def test_an_unreachable_hub_names_what_was_wanted_and_the_tiny_alternative(monkeypatch, offline, says):
    import huggingface_hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    def silent(self, *args, timeout=None, **more):
        assert timeout <= 10, "the question must be a short one"
        raise OSError("no route")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", silent)
    with pytest.raises(FileNotFoundError) as caught:
        load_data("dtd")
    text = str(caught.value)
    assert says in text and "tanganke/dtd" in text and "--data textures" in text and "\n" not in text


def test_fingerprints_tell_splits_apart_and_ask_no_network(tmp_path, monkeypatch):
    root = both_sources(tmp_path)
    assert rd.fingerprint("oxford_pets") is None and rd.fingerprint("dtd", root / "hub") is None
    hub, coop = rd.fingerprint("oxford_pets", root / "hub"), rd.fingerprint("oxford_pets", root / "coop")
    assert hub.startswith("same rule:") and coop.startswith("papers' split:") and hub != coop == rd.fingerprint("oxford_pets", root / "coop")


# -- the universe keeps its numbers -----------------------------------------------------------------------------------

def test_sizes_of_drawn_data(tmp_path):
    assert load_data("pets", 32) is load_data("pets") and load_data("pets", size=None) is load_data("pets")
    large = load_data("digits", 48)
    assert large is load_data("digits", 48) and large.test.images.shape[1:] == (3, 48, 48) and torch.equal(large.val.labels, load_data("digits").val.labels)
    back = torch.nn.functional.interpolate(large.test.images[:50].float(), size=32, mode="area")
    assert (back - load_data("digits").test.images[:50].float()).abs().mean() < 8
    with pytest.raises(ValueError, match="size is a number of pixels"):
        load_data("pets", 0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for n in range(3):
            picture(n).save(tmp_path / label / f"{n}.png")
    assert load_data(str(tmp_path), 20).train.images.shape[1:] == (3, 20, 20) and load_data(f"folder:{tmp_path}").train.images.shape[-1] == 32


def test_rows_and_subsets_of_tensors_are_what_they_were():
    data = load_data("flowers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = data.subset(range(3, 6))
    keep = (data.train.labels >= 3) & (data.train.labels < 6)
    assert torch.equal(base.train.images, data.train.images[keep]) and torch.equal(base.train.labels, data.train.labels[keep] - 3)
    generator, rows = torch.Generator().manual_seed(5), []
    for label in range(3):
        own = (base.train.labels == label).nonzero(as_tuple=True)[0]
        rows.append(own[torch.randperm(len(own), generator=generator)[:2]])
    assert torch.equal(few_shot(base.train, 2, 5).images, base.train.images[torch.cat(rows)])
