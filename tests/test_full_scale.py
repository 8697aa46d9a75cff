"""Full scale without a network: a ViT-B/16 with random weights on disk and a small data set with the hub's columns go through the loaders and commands that a user runs."""
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from promptbook import cli, realdata, zoo
from promptbook import experiment as ex
from promptbook.experiment import Arm, Claim, Comparison, Experiment, Store, variant
from promptbook.learn import build
from promptbook.realdata import REAL, REAL_ELEVEN
from promptbook.universe import load_data

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("Abyssinian", "american_bulldog", "Bengal", "Birman")
CLAIM = Claim("test-full", "nobody", "Vision prompts beat none.", [Arm("zero-shot", "zero-shot"), Arm("VPT", "vpt-deep", {"lr": 0.2, "batch": 64, "epochs": 9}), Arm("short VPT", "vpt-deep", {"epochs": 9, "length": 1}, full={"length": 1})],
              ["pets"], "base-to-new", "hm", [Comparison("VPT", "zero-shot", "base")])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """ViT-B/16 in the files of an ordinary checkpoint, half precision to save disk."""
    folder = zoo.write_random_clip("vit-b-16", tmp_path_factory.mktemp("clip") / "vit-b-16", dtype=torch.bfloat16)
    assert {f.name for f in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    yield str(folder)
    (folder / "model.safetensors").unlink()
    zoo.load.cache_clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four breeds with the columns of the hub's data set: 3 training (1 becomes validation) and 1 test picture each."""
    root, pets = tmp_path_factory.mktemp("data"), load_data("pets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES)), "image_id": datasets.Value("string")})
    def table(split, per_class):
        rows = [24 * k + i for k in range(4) for i in range(per_class)]
        pictures = [Image.fromarray(split.images[r].permute(1, 2, 0).numpy()).resize((50, 40)) for r in rows]
        return datasets.Dataset.from_dict({"image": pictures, "label": [r // 24 for r in rows], "image_id": [str(r) for r in rows]}, features=kinds)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": table(pets.train, 3), "test": table(pets.test, 1)}).save_to_disk(str(root / "oxford_pets"))
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROMPTBOOK_RESULTS", raising=False)
    monkeypatch.setenv("PROMPTBOOK_DATA", str(data))
    monkeypatch.setenv("PROMPTBOOK_PARTIAL", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(ex.CLAIMS, "test-full", CLAIM)
    ex.load_chapters()


# -- what a claim becomes at full scale -------------------------------------------------------------------------------

def test_tiny_settings_do_not_leak(monkeypatch):
    full = variant(CLAIM, scale="full", chosen={"VPT": {"lr": 1.0}}, settings={"epochs": 1})
    assert [a.settings for a in full.arms] == [{"scale": "full", "epochs": 1}, {"scale": "full", "epochs": 1}, {"length": 1, "scale": "full", "epochs": 1}]
    assert full.backbone == ex.FULL_BACKBONE and full.data == ["oxford_pets"]
    assert variant(CLAIM, scale="full", backbone="b", data=["pets", "dtd"]).data == ["pets", "dtd"], "data sets that are asked for are taken as they are"
    tiny = variant(CLAIM, backbone="b", chosen={"VPT": {"lr": 1.0}})
    assert tiny.backbone == "b" and tiny.data == ["pets"] and tiny.arms[1].settings == {"lr": 1.0, "batch": 64, "epochs": 9}
    same = replace(CLAIM, arms=[*CLAIM.arms, Arm("stopped early", "vpt-deep", {"epochs": 2})])
    with pytest.raises(ValueError, match="'VPT' and 'stopped early'.*full="):
        variant(same, scale="full")
    with pytest.raises(ValueError, match="scale is"):
        variant(CLAIM, scale="huge")


def test_quick_variants_lose_their_shortcuts_at_full_scale():
    claim = replace(CLAIM, quick={"data": ["pets"], "arms": ["VPT"], "seeds": 2, "settings": {"epochs": 2}}, comparisons=[])
    full = variant(claim, quick=True, scale="full")
    assert [a.settings for a in full.arms] == [{"scale": "full"}] and full.data == ["oxford_pets"] and len(full.seeds) == 2


def test_every_claim_has_a_full_scale_without_settings_of_the_tiny_tower():
    """Depth and length were chosen for a tower of four layers; an arm that sets them says what they are at full scale."""
    for claim in ex.CLAIMS.values():
        full = variant(claim, scale="full")
        if claim.protocol == "base-to-new" and len(claim.data) == 11:
            assert sorted(full.data) == sorted(REAL_ELEVEN), claim.id
        for arm, original in zip(full.arms, claim.arms):
            leaked = set(arm.settings) & {"depth", "length", "lr", "epochs", "batch"}
            assert not leaked or original.full is not None, f"{claim.id}, arm {arm.name}: {leaked} come from the tiny scale; give the arm full={{...}}"


def test_commands_refuse_what_makes_no_sense(capsys):
    for words, says in ((["reproduce", "test-full", "--scale", "huge"], "invalid choice: 'huge'"), (["reproduce", "test-full", "--scale", "full", "--tune"], "tiny scale"),
                        (["reproduce", "test-full", "--set", "epochs"], "name=value"), (["run", "coop", "--scale", "full", "--set", "scael=1", "--data", "oxford_pets"], "no setting 'scael'")):
        assert cli.main(words) == 2
        assert says in capsys.readouterr().err


def test_unreachable_model_and_data_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cli.main(["reproduce", "test-full", "--scale", "full", "--backbone", "nobody/no-such-clip", "--seeds", "1", "--quiet"]) in (1, 2)
    err = capsys.readouterr().err
    assert "nobody/no-such-clip" in err and "Traceback" not in err
    assert cli.main(["run", "zero-shot", "--scale", "full", "--backbone", "tiny-clip", "--data", "dtd", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "tanganke/dtd" in err and "--data textures" in err and err.count("\n") == 1


# -- the offline proof ------------------------------------------------------------------------------------------------

def test_zero_shot_is_that_of_the_hub_class(checkpoint):
    """Cosines of our zero-shot classifier and of CLIPModel's own forward agree to 1e-5 in fp32; so do the logits, 100 times larger, relative to their size."""
    backbone, pets = zoo.load(checkpoint), load_data("oxford_pets", 224)
    assert backbone.image_size == 224 and next(backbone.model.parameters()).dtype == torch.float32
    images = pets.test.images[1:3]
    with torch.no_grad():
        ours = build("zero-shot", backbone, pets.classes, pets.template).predict(images)
        tokens = backbone.tokenizer([pets.template.format(name) for name in pets.classes], padding="max_length", return_tensors="pt")
        theirs = backbone.model(pixel_values=backbone.pixels(images), input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits_per_image
    assert tokens.input_ids.shape == (4, 77) and ours.shape == theirs.shape == (2, 4)
    assert (ours / 100 - theirs / 100).abs().max() < 1e-5 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-3)
    assert theirs.std() > .01, "random weights that tell nothing apart would prove nothing"


FAST = ["--set", "epochs=1", "--set", "shots=2", "--set", "batch=4", "--set", "precision=no", "--set", "workers=0"]


def test_a_claim_runs_at_full_scale_from_files_alone(checkpoint, capsys, monkeypatch):
    """One epoch, evaluation, rows, table and ledger, by the command a user types."""
    words = ["reproduce", "test-full", "--scale", "full", "--backbone", checkpoint, "--data", "oxford_pets", "--seeds", "1", *FAST]
    monkeypatch.setitem(ex.CLAIMS, "test-full", replace(CLAIM, arms=CLAIM.arms[:2]))
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "settings: as published, with epochs=1, shots=2" in out and "zero-shot" in out and "VPT > zero-shot on base" in out and "too few seeds (1 of 5)" in out
    rows = Store("results/test-full-full.jsonl").rows()
    assert [r["method"] for r in rows] == ["zero-shot", "vpt-deep"] and not Path("results/test-full.jsonl").exists()
    for row in rows:
        assert row["settings"]["scale"] == "full" and row["backbone"] == checkpoint and row["data"] == "oxford_pets" and row["processes"] == 1
        assert row["data_fingerprint"].startswith("same rule:") and row["backbone_hash"] == ex.backbone_hash(checkpoint) and len(row["backbone_hash"]) == 16
        assert {"base", "new", "val_base", "val_new"} <= set(row["metrics"])
    assert rows[1]["metrics"]["trainable"] == 12 * 8 * 768 and rows[1]["metrics"]["lr"] == 0.0025, "the published depth, length and rate"
    before = Path("results/test-full-full.jsonl").read_bytes()
    assert cli.main([*words, "--quiet"]) == 0 and Path("results/test-full-full.jsonl").read_bytes() == before, "nothing is repeated"
    book = ex.ledger([Path("results")], ["test-full"]).frame
    assert book.rows.tolist() == ["yours, full scale"] and book.verdict.tolist() == ["too few seeds (1 of 5)"] and checkpoint in book.departures[0] and "epochs=1" in book.departures[0]


def test_one_method_runs_with_published_settings_on_the_same_pictures(capsys):
    """Pictures come in the size of the backbone: the tiny one reads the same files at 32 pixels."""
    assert cli.main(["run", "coop", "--scale", "full", "--backbone", "tiny-clip", "--data", "oxford_pets", "--quiet", *FAST]) == 0
    row = Store("results/runs.jsonl").rows()[0]
    assert row["settings"]["scale"] == "full" and row["metrics"]["trainable"] == 4 * 128 and row["metrics"]["lr"] == 0.002 and "base" in capsys.readouterr().out
    assert Experiment("coop", "tiny-clip", "oxford_pets", "base-to-new", 1, row["settings"]).key == row["key"], "hashes are in the row, not in its key"


def test_rows_of_other_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    monkeypatch.setitem(ex.PROTOCOLS, "test-hash", ex.Protocol("test-hash", lambda experiment, progress=None: {"base": 1.0}))
    experiment = Experiment("any", str(folder), "things", "test-hash", 1)
    first = ex.run(experiment, "rows.jsonl")
    assert ex.run(experiment, "rows.jsonl") == first and first["backbone_hash"] == ex.backbone_hash(str(folder))
    (folder / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match="weights of .* have changed since rows.jsonl.*another store"):
        ex.run(experiment, "rows.jsonl")
    with pytest.raises(ValueError, match="have changed"):
        ex.sweep([experiment], "rows.jsonl", progress=False)
    (folder / "model.safetensors").unlink()
    assert ex.backbone_hash(str(folder)) is None and ex.run(experiment, "rows.jsonl") == first, "rows can be read where the weights are not"
    assert ex.backbone_hash("none") is None and ex.backbone_hash("nobody/no-such-model") is None and len(ex.backbone_hash("tiny-clip")) == 16


# -- several processes ------------------------------------------------------------------------------------------------

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_processes_write_the_row_of_one_and_write_it_once():
    words = ["run", "coop", "--data", "textures", "--set", "epochs=2", "--quiet", "--store"]
    assert cli.main([*words, "1.jsonl"]) == 0
    launcher = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "promptbook.cli", *words, "2.jsonl"], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("coop on textures") == 1, "one of the processes speaks"
    (one,), (two,) = ([json.loads(line) for line in Path(f"{n}.jsonl").read_text().splitlines()] for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2) and one["key"] == two["key"] and one["metrics"].keys() == two["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-4), name


def test_several_processes_share_one_experiment_at_a_time(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use workers=0"):
        ex.sweep([], workers=2)
    monkeypatch.setenv("RANK", "1")
    assert not ex.is_main_process() and ex._open("rows.jsonl").read_only


def test_an_error_of_the_main_process_is_everybodys(monkeypatch):
    """Decisions are made by the main process and broadcast, errors too: nobody is left waiting."""
    import accelerate.utils
    monkeypatch.setenv("WORLD_SIZE", "2")
    sent = []
    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", lambda answer, *a, **k: sent.append(list(answer)) or answer)
    assert ex._agreed(lambda: 3) == 3
    with pytest.raises(ex.StoreError, match="full"):
        ex._agreed(lambda: (_ for _ in ()).throw(ex.StoreError("full")))
    assert sent[0] == [3, None] and sent[1][0] is None and isinstance(sent[1][1], ex.StoreError)
