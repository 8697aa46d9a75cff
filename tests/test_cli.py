"""The command line: what it prints, its exit codes, and that mistakes cost one line."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_protocols  # noqa: E402, F401
from promptbook import cli  # noqa: E402
from promptbook import experiment as ex  # noqa: E402
from promptbook.experiment import Arm, Claim, Comparison, Store  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROMPTBOOK_RESULTS", raising=False)
    monkeypatch.setitem(ex.CLAIMS, "test-cli", Claim(
        "test-cli", "nobody", "Good beats bad.", [Arm("Good", "good", grid={"lr": [1, 2]}), Arm("Bad", "bad")], ["numbers", "letters"], "test-toy", "base",
        [Comparison("Good", "Bad", "base")], backbone="none", quick={"data": ["numbers"], "seeds": 2}, tuning_metric="val_base"))


def call(capsys, *words):
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("words, says", [
    ([], "required: COMMAND"), (["lst"], "invalid choice: 'lst'"), (["run"], "required: METHOD"), (["run", "good", "--seed", "one"], "invalid int value"),
    (["run", "good", "--set", "lr"], "name=value"), (["reproduce", "test-cli", "--seeds", "0"], "from 1 on"),
    (["reproduce", "test-clu"], "Did you mean 'test-cli'"), (["reproduce", "test-cli", "--workers", "many"], "workers is"),
    (["run", "goood", "--protocol", "test-toy", "--backbone", "none"], "Did you mean 'good'"), (["run", "good", "--protocol", "test-toi"], "Did you mean 'test-toy'"),
    (["run", "good", "--protocol", "test-toy", "--seed", "-1"], "seed"),
    (["show", "mapel"], "maple"), (["list", "source=nothing"], "nothing"), (["doctor", "--repair", "nowhere.jsonl"], "no result file"), (["pretrain", "huge-clip"], "huge-clip")])
def test_bad_input_costs_one_line_and_exit_code_2(capsys, words, says):
    code, out, err = call(capsys, *words)
    assert code == 2 and says in err and err.startswith("promptbook: ") and err.count("\n") == 1 and "Traceback" not in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no claim"):
        cli.main(["reproduce", "no-such-claim", "--debug"])


def test_list_and_show(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0 and "maple" in out and len(out.splitlines()) > 51
    code, out, _ = call(capsys, "show", "maple")
    assert code == 0 and "MaPLe" in out


def test_run_prints_and_stores_one_experiment(capsys, tmp_path):
    words = ["run", "good", "--data", "numbers", "--protocol", "test-toy", "--backbone", "none", "--seed", "3", "--sampling-seed", "4", "--set", "lr=0.5", "--set", "position=end", "--quiet"]
    code, out, _ = call(capsys, *words)
    assert code == 0 and "base                68.00" in out
    row, = Store("results/runs.jsonl").rows()
    assert row["settings"] == {"lr": 0.5, "position": "end"} and (row["seed"], row["sampling_seed"]) == (3, 4)
    assert call(capsys, *words)[0] == 0 and len(Store("results/runs.jsonl")) == 1


def test_reproduce_quick_then_full_then_the_ledger(capsys, tmp_path):
    code, out, _ = call(capsys, "reproduce", "test-cli", "--quick")
    assert code == 0 and "too few seeds (2 of 5)" in out and "figure: results/test-cli-quick.png" in out and Path("results/test-cli-quick.png").exists()
    code, out, err = call(capsys, "reproduce", "test-cli", "--quiet", "--tune")
    assert code == 0 and "holds" in out and err == ""
    assert {r["settings"].get("lr") for r in Store("results/test-cli.jsonl").rows() if r["method"] == "good"} == {2}
    code, out, _ = call(capsys, "ledger", "--markdown", "--output", "ledger.md")
    assert code == 0 and "| test-cli | Good > Bad on base |" in Path("ledger.md").read_text()


def test_reproduce_with_your_own_folders_and_workers(capsys, tmp_path):
    Path("my_images").mkdir()
    code, out, _ = call(capsys, "reproduce", "test-cli", "--data", "my_images/", "numbers", "--seeds", "1", "--workers", "1", "--store", "elsewhere/mine.jsonl", "--quiet")
    assert code == 0
    assert {r["data"] for r in Store("elsewhere/mine.jsonl").rows()} == {"folder:my_images", "numbers"}


def test_an_experiment_that_fails_gives_exit_code_1_and_keeps_the_others(capsys, monkeypatch):
    monkeypatch.setitem(ex.CLAIMS, "test-broken", Claim("test-broken", "nobody", "x", [Arm("A", "breaks")], ["numbers"], "test-toy", "base", [], backbone="none"))
    code, _, err = call(capsys, "reproduce", "test-broken", "--quiet")
    assert code == 1 and "1 of 5 experiments failed" in err and "seed 2 does not work" in err and len(Store("results/test-broken.jsonl")) == 4


def test_ctrl_c_says_that_rows_are_safe(capsys, monkeypatch):
    def interrupted(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(ex, "reproduce", interrupted)
    code, _, err = call(capsys, "reproduce", "test-cli")
    assert code == 130 and "rows are safe" in err


def test_a_bug_is_not_reported_as_bad_input(capsys, monkeypatch):
    monkeypatch.setattr(ex, "ledger", lambda *a: 1 / 0)
    code, _, err = call(capsys, "ledger")
    assert code == 1 and "unexpected ZeroDivisionError" in err and "--debug" in err


def test_doctor_finds_what_is_wrong(capsys, monkeypatch, tmp_path):
    from promptbook import zoo
    good = tmp_path / "zoo" / "a-model"
    good.mkdir(parents=True)
    (good / "model.safetensors").write_bytes(b"weights")
    (good / "card.json").write_text(json.dumps({"sha256": "9" * 64}))
    (tmp_path / "zoo" / "half-model").mkdir()
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    code, out, _ = call(capsys, "doctor")
    lines = {line[4:26].strip(): line for line in out.splitlines()}
    assert code == 1 and lines["torch"].startswith("ok") and lines["threads"].startswith("ok")
    assert lines["model a-model"].startswith("!!") and "damaged" in lines["model a-model"] and "incomplete" in lines["model half-model"]
    import hashlib
    (good / "card.json").write_text(json.dumps({"sha256": hashlib.sha256(b"weights").hexdigest()}))
    assert ("model a-model", True) in [f[:2] for f in cli.examine()]


def test_doctor_notices_a_folder_that_cannot_be_written(monkeypatch):
    def refused(*a, **k): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(cli.tempfile, "NamedTemporaryFile", refused)
    name, fine, what = cli._folder_state(Path("results"))[0]
    assert not fine and "Permission denied" in what


def test_doctor_repairs_a_result_file(capsys):
    call(capsys, "run", "good", "--data", "numbers", "--protocol", "test-toy", "--backbone", "none", "--store", "r.jsonl", "--quiet")
    Path("r.jsonl").write_text(Path("r.jsonl").read_text().replace('"base":66', '"base":96').replace('"base":61', '"base":96'))
    assert "96" in Path("r.jsonl").read_text()
    words = ["run", "good", "--data", "numbers", "--protocol", "test-toy", "--backbone", "none", "--store", "r.jsonl", "--quiet"]
    code, _, err = call(capsys, *words)
    assert code == 1 and "promptbook doctor --repair r.jsonl" in err
    assert call(capsys, "doctor", "--repair", "r.jsonl")[0] == 0
    assert call(capsys, *words)[0] == 0 and len(Store("r.jsonl")) == 1


def test_as_a_program_and_into_a_closed_pipe():
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    program = f'{sys.executable} -c "import sys; from promptbook.cli import main; sys.exit(main())"'
    done = subprocess.run(f"set -o pipefail; {program} list | head -1", shell=True, executable="/bin/bash", env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
