"""Experiments, the store, sweeps, claims: what is promised in nbs/06_experiment.ipynb, under bad weather."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_protocols  # noqa: E402
from promptbook import experiment as ex  # noqa: E402
from promptbook.experiment import Arm, Claim, Comparison, Experiment, Store, StoreError, SweepError, evaluate, reproduce, run, sweep, tune  # noqa: E402

HERE = Path(__file__).resolve().parent
ENV = dict(os.environ, PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1")


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTBOOK_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PYTHONPATH", ENV["PYTHONPATH"])


def toy(seed=1, method="good", **settings):
    return Experiment(method, "none", "numbers", "test-toy", seed, settings)


def python(code, **changes):
    done = subprocess.run([sys.executable, "-c", code], env=ENV | changes, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- keys

def test_the_key_is_the_same_in_another_process_and_for_another_order_of_settings():
    here = toy(lr=0.1, epochs=3, names=["b", "a"]).key
    code = "from promptbook.experiment import Experiment as E; print(E('good','none','numbers','test-toy',1,{'names':('b','a'),'epochs':3.0,'lr':0.1}).key)"
    assert [python(code, PYTHONHASHSEED=h) for h in ("1", "2")] == [here, here]


def test_every_field_changes_the_key():
    one = toy(lr=0.1)
    others = [replace(one, **change) for change in ({"method": "bad"}, {"backbone": "b"}, {"data": "d"}, {"protocol": "p"}, {"seed": 2}, {"sampling_seed": 2},
                                                      {"settings": {"lr": 0.2}}, {"settings": {"lr": "0.1"}}, {"settings": {"lr": True}}, {"settings": {"lr": 1}}, {"settings": {}})]
    assert len({e.key for e in others + [one]}) == len(others) + 1


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": {"y": 1}}, {"x": object()}, {1: 2}])
def test_settings_that_have_no_stable_spelling_are_refused(bad):
    with pytest.raises(ValueError, match="(?i)setting"):
        Experiment("good", "none", "numbers", "test-toy", 1, bad)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 1.5}, {"seed": True}, {"method": ""}, {"data": None}])
def test_wrong_fields_are_refused(bad):
    with pytest.raises(ValueError):
        replace(toy(), **bad)


# ---- rows

def test_run_records_what_a_sceptic_asks_for_and_runs_once(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    first = run(toy(calls=str(calls)), tmp_path / "r.jsonl")
    second = run(toy(calls=str(calls)), tmp_path / "r.jsonl")
    assert first == second and len(list(calls.iterdir())) == 1
    assert set(first) == set(ex.ROW_FIELDS) - {"checksum"}
    assert first["selection"] == "last" and first["versions"]["torch"] and first["seconds"] >= 0
    assert first["peak_memory_mb"] > 10 or first["peak_memory_of"] == "not measured"
    assert first["metrics"]["loss"] is None                      # nan is absent, not zero
    assert Store(tmp_path / "r.jsonl").frame()["curve"][0] == [1.0, 2.5]


def test_peak_memory_belongs_to_the_run_and_not_to_an_earlier_one():
    with ex._PeakMemory() as large:
        block = bytearray(300 << 20)
    del block
    with ex._PeakMemory() as small:
        pass
    if large.of == "process during the run":
        assert large.megabytes - small.megabytes > 200
    else:
        assert small.megabytes == large.megabytes                # a mark of the process's life never falls; the row says so


def test_metrics_that_collide_with_the_record_or_are_objects_are_refused():
    for metrics in ({"seconds": 1}, {"x": object()}, 3):
        name = "test-bad"
        ex.PROTOCOLS[name] = ex.Protocol(name, lambda e, progress=None, m=metrics: m)
        with pytest.raises(ValueError, match="test-bad|Metric"):
            run(replace(toy(), protocol=name))


def test_a_changed_folder_of_images_is_noticed(tmp_path):
    images = tmp_path / "mine"
    images.mkdir()
    (images / "a.png").write_bytes(b"1")
    e = replace(toy(), data=f"folder:{images}")
    run(e, tmp_path / "r.jsonl")
    run(e, tmp_path / "r.jsonl")
    (images / "b.png").write_bytes(b"2")
    with pytest.raises(ValueError, match="have changed"):
        run(e, tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="have changed"):
        sweep([e], tmp_path / "r.jsonl", progress=False)


# ---- the store under bad weather

def filled(path, n=3):
    store = Store(path)
    for i in range(n):
        store.append({"key": f"k{i}", "metrics": {"base": 70.5 + i}})
    return store


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_removed_wherever_it_was_cut(tmp_path, cut):
    path = filled(tmp_path / "r.jsonl").path
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match="cut off"):
        store = Store(path)
    assert [r["key"] for r in store.rows()] == ["k0", "k1"]
    store.append({"key": "k2", "metrics": {"base": 72.5}})
    assert path.read_bytes() == whole


def test_zeros_left_by_a_power_cut_are_a_torn_line(tmp_path):
    path = filled(tmp_path / "r.jsonl").path
    with open(path, "ab") as file:
        file.write(b"\0" * 100)
    with pytest.warns(UserWarning, match="cut off"):
        assert len(Store(path)) == 3


@pytest.mark.parametrize("line", [1, 2, 3])
def test_an_edited_row_is_named_and_can_be_set_aside(tmp_path, line):
    path = filled(tmp_path / "r.jsonl").path
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(".5", ".9")
    path.write_text("".join(lines))
    with pytest.raises(StoreError, match=f"line {line}.*edited or damaged.*doctor --repair"):
        Store(path)
    assert ex.set_aside(path) == 1
    assert len(Store(path)) == 2
    assert Path(f"{path}.corrupt").read_text() == lines[line - 1]          # nothing is thrown away


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = filled(tmp_path / "r.jsonl").path
    path.write_bytes(path.read_bytes().replace(b'{"key":"k1"', b'{"key":"k1', 1))
    with pytest.raises(StoreError, match="line 2"):
        Store(path)


def test_a_read_only_store_leaves_the_file_alone(tmp_path):
    path = filled(tmp_path / "r.jsonl").path
    path.write_bytes(path.read_bytes() + b'{"half')
    before = path.read_bytes()
    store = Store(path, read_only=True)
    assert len(store) == 3 and path.read_bytes() == before
    with pytest.raises(StoreError, match="read-only"):
        store.append({"key": "x"})


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_no_half_row(tmp_path, monkeypatch, fails):
    store = filled(tmp_path / "r.jsonl")
    before, real, calls = store.path.read_bytes(), getattr(os, fails), []

    def failing(descriptor, *data):
        calls.append(1)
        if fails == "write" and len(calls) == 1:
            return real(descriptor, bytes(data[0])[:9])                    # the disk takes nine bytes, then is full
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, failing)
        with pytest.raises(StoreError, match="No space left.*same command again; 3 finished rows are safe"):
            store.append({"key": "k3", "metrics": {"base": 1.5}})
    assert calls and store.path.read_bytes() == before and not store.has("k3")
    store.append({"key": "k3", "metrics": {"base": 1.5}})
    assert len(Store(store.path)) == 4


def test_a_real_size_limit_leaves_no_half_row(tmp_path):
    """The operating system itself refuses the bytes (RLIMIT_FSIZE) in the middle of a sweep."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
import toy_protocols
from promptbook.experiment import Experiment, StoreError, Store, sweep
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))
try: sweep([Experiment("good", "none", "numbers", "test-toy", s) for s in range(20)], {str(tmp_path / 'r.jsonl')!r}, progress=False)
except StoreError as error: print("STOPPED", error)
"""
    out = python(code)
    assert out.startswith("STOPPED") and "finished rows are safe" in out
    text = (tmp_path / "r.jsonl").read_bytes()
    assert text.endswith(b"\n") and 0 < len(text) <= 2500
    done = len(Store(tmp_path / "r.jsonl"))
    assert f"{done} finished rows are safe" in out
    frame = sweep([toy(s) for s in range(20)], tmp_path / "r.jsonl", progress=False)   # same command, space again
    assert len(frame) == 20 and len(Store(tmp_path / "r.jsonl")) == 20


def test_two_processes_write_into_one_file(tmp_path):
    code = f"""
from promptbook.experiment import Store
store = Store({str(tmp_path / 'r.jsonl')!r})
for i in range(60): store.append({{"key": f"NAME{{i}}", "filler": "x" * 500}}); store.append({{"key": f"both{{i}}"}})
"""
    processes = [subprocess.Popen([sys.executable, "-c", code.replace("NAME", name)], env=ENV) for name in "ab"]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    keys = [json.loads(line)["key"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert sorted(keys) == sorted([f"{n}{i}" for n in ("a", "b", "both") for i in range(60)])   # all there, the common ones once


def test_a_folder_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="is a folder"):
        Store(tmp_path)


# ---- sweeps

@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_in_mid_sweep_loses_nothing_and_repeats_nothing(tmp_path, workers):
    calls, rows = tmp_path / "calls", tmp_path / "r.jsonl"
    calls.mkdir()
    command = [sys.executable, str(HERE / "toy_protocols.py"), str(calls), str(rows), str(workers)]
    process = subprocess.Popen(command, env=ENV)
    deadline = time.time() + 60
    while time.time() < deadline and not (rows.exists() and rows.read_bytes().count(b"\n") >= 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = Store(rows, read_only=True).rows()
    assert 4 <= len(survived) < 12
    if workers:                                                        # workers whose parent is gone leave, too
        time.sleep(1.5)
        pids = {r["metrics"]["pid"] for r in survived}
        assert 1 <= len(pids) <= 2 and not [p for p in pids if Path(f"/proc/{p}/cmdline").exists() and b"spawn" in Path(f"/proc/{p}/cmdline").read_bytes()]
    before = rows.read_bytes()
    started = len(list(calls.iterdir()))
    subprocess.run(command, env=ENV, check=True, timeout=120)
    assert rows.read_bytes().startswith(before[:before.rfind(b"\n") + 1])         # finished rows are untouched
    keys = [r["key"] for r in Store(rows).rows()]
    assert sorted(keys) == sorted(e.key for e in toy_protocols.plan(calls))
    assert rows.read_bytes().count(b"\n") == 12
    assert len(list(calls.iterdir())) - started == 12 - len(survived)             # only what was missing ran
    done = [c.name.split("-")[0] for c in calls.iterdir()]
    assert all(done.count(r["key"]) == 1 for r in survived)                       # finished ones ran once in all


def test_two_local_workers_share_the_work_with_one_thread_each(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)                                    # they would hide what the workers do themselves
    experiments = [toy(s, "sleepy", seconds=0.2) for s in range(8)]
    frame = sweep(experiments, tmp_path / "r.jsonl", workers=2, progress=False)
    assert frame["seed"].tolist() == list(range(8))                               # order of the request, not of arrival
    assert frame["pid"].nunique() == 2 and os.getpid() not in set(frame["pid"])
    assert set(frame["threads"]) == {1}
    same = sweep(experiments, tmp_path / "other.jsonl", progress=False)           # in this process: the same numbers
    assert same[["key", "base", "new"]].equals(frame[["key", "base", "new"]])


def test_a_failing_experiment_does_not_stop_the_others(tmp_path):
    with pytest.raises(SweepError, match="1 of 4 experiments failed.*\n.*breaks on numbers.*seed 2 does not work") as caught:
        sweep([toy(s, "breaks") for s in range(1, 5)], tmp_path / "r.jsonl", progress=False)
    assert len(Store(tmp_path / "r.jsonl")) == 3 and len(caught.value.failures) == 1


def test_a_dying_worker_costs_one_experiment(tmp_path):
    with pytest.raises(SweepError, match="1 of 5 .*\n.*worker process died .exit code 9") as caught:
        sweep([toy(s, "dies") for s in range(1, 6)], tmp_path / "r.jsonl", workers=1, progress=False)
    assert len(caught.value.failures) == 1 and len(Store(tmp_path / "r.jsonl")) == 4


def test_two_ray_workers(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    # Ray's own processes talk to each other over this machine's address, which the network guard of the test run does not count as local.
    for variable, paths in (("path", sys.path), ("PYTHONPATH", os.environ["PYTHONPATH"].split(os.pathsep))):
        kept = [p for p in paths if Path(p or ".").resolve() != HERE / "offline"]
        monkeypatch.setattr(sys, "path", kept) if variable == "path" else monkeypatch.setenv(variable, os.pathsep.join(kept))
    experiments = [toy(s, "sleepy", seconds=0.5) for s in range(6)]
    frame = sweep(experiments[:1] + experiments, tmp_path / "r.jsonl", workers="ray:2", progress=False)
    assert frame["seed"].tolist() == list(range(6)) and len(Store(tmp_path / "r.jsonl")) == 6
    assert frame["pid"].nunique() == 2 and os.getpid() not in set(frame["pid"])
    assert not __import__("ray").is_initialized()


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "promptbook\[ray\]"'):
        sweep([toy()], workers="ray", progress=False)


@pytest.mark.parametrize("wrong", ["many", -1, "ray:0", "2:3"])
def test_a_wrong_number_of_workers_is_refused(wrong):
    with pytest.raises(ValueError, match="workers is"):
        sweep([toy()], workers=wrong, progress=False)


def test_unknown_names_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="no protocol named 'test-toi'. Did you mean 'test-toy'"):
        sweep([toy(), replace(toy(), protocol="test-toi")], tmp_path / "r.jsonl", progress=False)
    with pytest.raises(ValueError, match="no method named 'goood'. Did you mean 'good'"):
        sweep([toy(), toy(method="goood")], tmp_path / "r.jsonl", progress=False)
    assert not (tmp_path / "r.jsonl").exists()


def test_only_validation_or_the_last_model_may_be_selected():
    with pytest.raises(ValueError, match="never the test set"):
        ex.protocol("test-oracle", selection="test")


def test_one_gpu_for_each_worker_in_turn():
    assert [ex._gpu_for(i, 1) for i in range(2)] == [None, None]
    assert [ex._gpu_for(i, 3) for i in range(4)] == ["0", "1", "2", "0"]
    assert ex._gpu_for(1, 2, "5,7") == "7"


# ---- chapters

def test_a_chapter_that_does_not_exist_is_passed_over_but_an_error_inside_one_is_not(tmp_path, monkeypatch):
    (tmp_path / "broken_chapter.py").write_text("import a_module_that_does_not_exist\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ex, "CHAPTERS", {"promptbook.no_such_chapter": (), "toy_protocols": (), "os": ("a_package_that_is_not_installed",)})
    assert ex.load_chapters() == ["toy_protocols"]
    monkeypatch.setattr(ex, "CHAPTERS", {"broken_chapter": ()})
    with pytest.raises(ModuleNotFoundError, match="a_module_that_does_not_exist"):
        ex.load_chapters()


# ---- claims

def claim(**changes):
    made = Claim("test-claim", "nobody", "Good is better than bad on base and worse on new.",
                 arms=[Arm("Good", "good", grid={"lr": [0.1, 0.3, 0.2]}), Arm("Bad", "bad")], data=["numbers", "letters"], protocol="test-toy", metric="hm", backbone="none",
                 comparisons=[Comparison("Good", "Bad", "base"), Comparison("Good", "Bad", "new")],
                 quick={"data": ["numbers"], "seeds": 2, "settings": {"epochs": 1}}, tuning_metric="val_base",
                 reported=[{"what": "Good, base", "arm": "Good", "metric": "base", "number": 82.69, "source": "a README"}], departures=["Nothing is trained."])
    return replace(made, **changes)


def test_the_verdict_comes_from_the_rows():
    e = reproduce(claim(), progress=False)
    assert e.comparisons["verdict"].tolist() == ["holds", "reversed"] and e.verdict == "reversed"
    good = e.arms.set_index("arm").loc["Good"]
    assert good["base"] == 68.0 and good["seeds"] == 5                              # 60 + 5 + mean of 1..5
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert good["base_low"] == pytest.approx(68 - half, abs=1e-4)
    hm = [2 * b * n / (b + n) for b, n in zip(range(66, 71), range(46, 51))]
    assert good["hm"] == pytest.approx(sum(hm) / 5)


def test_the_harmonic_mean_is_taken_after_averaging_over_data_sets():
    rows = [{**Experiment(m, "none", d, "test-toy", s).fields(), "base": b, "new": n, "seconds": 1.0, "trainable": 0, "peak_memory_mb": 1.0}
            for s in range(1, 6) for m in ("good", "bad") for d, b, n in (("numbers", 90.0, 50.0), ("letters", 40.0, 70.0))]
    plain = claim(arms=[Arm("Good", "good"), Arm("Bad", "bad")])
    e = evaluate(plain, pd.DataFrame(rows))
    assert e.arms["hm"][0] == pytest.approx(2 * 65 * 60 / 125)                      # not the mean 57.6 of 64.3 and 50.9
    assert e.comparisons["verdict"].tolist() == ["undecided", "undecided"]          # equal is not better


def test_fewer_than_five_seeds_never_give_a_verdict():
    four = reproduce(claim(), seeds=4, progress=False, figure=False)
    assert set(four.comparisons["verdict"]) == {"too few seeds (4 of 5)"} and four.verdict == "too few seeds"
    assert evaluate(claim(), Store("nowhere.jsonl").frame()).verdict == "not run"


def test_rows_of_other_settings_or_tuning_seeds_do_not_count(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    sweep([Experiment(m, "none", d, "test-toy", s, {"lr": 9}) for m in ("good", "bad") for d in ("numbers", "letters") for s in range(1, 6)], store, progress=False)
    sweep([Experiment(m, "none", d, "test-toy", s) for m in ("good", "bad") for d in ("numbers", "letters") for s in (101, 102, 1, 2, 3)], store, progress=False)
    assert set(evaluate(claim(), store.frame()).comparisons["seeds"]) == {3}


def test_tuned_settings_are_used_and_recorded(tmp_path):
    assert "no complete search" in ex.chosen_settings(claim())[1]
    assert tune(claim(), progress=False) == {"Good": {"lr": 0.3}}                   # val_base is the learning rate
    assert len(Store(tmp_path / "results/test-claim.tuning.jsonl")) == 3 * 2 * 2
    e = reproduce(claim(), progress=False, figure=False)
    assert e.claim.arms[0].settings == {"lr": 0.3}
    rows = Store(tmp_path / "results/test-claim.jsonl").rows()
    assert {r["seed"] for r in rows} == {1, 2, 3, 4, 5} and all("best of 3 by val_base on seeds 101, 102" in r["tuning"] for r in rows)


def test_tuning_keeps_its_rules():
    with pytest.raises(ValueError, match="must be chosen on other seeds"):
        tune(claim(), tuning_seeds=[5, 6], progress=False)
    with pytest.raises(ValueError, match="begin with 'val'"):
        tune(claim(), metric="new", progress=False)
    with pytest.raises(ValueError, match="same number of candidates"):
        tune(claim(), grid={"Good": {"lr": [1, 2]}, "Bad": {"lr": [1, 2, 3]}}, progress=False)
    assert tune(claim(), grid={"Good": {"epochs": [7, 5]}}, progress=False) == {"Good": {"epochs": 7}}   # a tie goes to the first


def test_quick_is_a_smaller_claim_in_a_file_of_its_own(tmp_path, capsys):
    e = reproduce(claim(), quick=True, progress=True)
    assert e.claim.data == ["numbers"] and e.claim.seeds == [1, 2] and e.claim.arms[1].settings == {"epochs": 1}
    assert (tmp_path / "results/test-claim-quick.png").stat().st_size > 1000
    assert len(Store(tmp_path / "results/test-claim-quick.jsonl")) == 4 and not (tmp_path / "results/test-claim.jsonl").exists()
    out = capsys.readouterr().out
    assert "figure: " in out and "rows: " in out and "settings: " in out


def test_your_own_folder_is_passed_on_to_the_protocol(tmp_path, monkeypatch):
    (tmp_path / "my_images").mkdir()
    monkeypatch.chdir(tmp_path)
    e = reproduce(claim(), quick=True, data=["my_images/"], seeds=1, progress=False, figure=False)
    assert e.claim.data == ["folder:my_images"]
    assert {r["data"] for r in Store(tmp_path / "results/test-claim-quick.jsonl").rows()} == {"folder:my_images"}


@pytest.mark.parametrize("wrong, message", [
    ({"comparisons": [Comparison("Goood", "Bad", "base")]}, "Did you mean 'Good'"), ({"arms": []}, "at least one arm"), ({"quick": {"datas": []}}, "Did you mean 'data'"),
    ({"comparisons": [Comparison("Good", "Bad", "base", expected="better")]}, "greater"), ({"seeds": [101]}, "other seeds")])
def test_claims_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        claim(**wrong)


def test_unknown_claim():
    with pytest.raises(ValueError, match="no claim named 'nothing-like-it'"):
        reproduce("nothing-like-it")


def test_the_ledger_shows_the_papers_number_ours_and_departures(tmp_path):
    never = claim(id="never-run", paper="somebody|else")
    reproduce(claim(), progress=False, figure=False)
    book = ex.ledger(stores=[tmp_path / "results"], claims=[claim(), never])
    first, second, third, _ = book.frame.to_dict("records")
    assert first["verdict"] == "holds" and second["verdict"] == "reversed" and third["verdict"] == "not run"
    assert "82.69 (a README)" in first["paper reports"] and second["paper reports"] == "–"
    assert first["ours"].startswith("+5.00 [+5.00, +5.00], 5 seeds (Good 68.0, Bad 63.0)") and "7 trained" in first["cost"]
    assert first["departures"] == "Nothing is trained." and first["rows"] == "yours" and third["rows"] == "none"
    assert book.markdown().count("\n") == 5 and "reversed" in book._repr_html_()


def test_html_is_escaped():
    e = evaluate(claim(statement="<script>"), Store("nowhere.jsonl").frame())
    assert "<script>" not in e._repr_html_() and "&lt;script&gt;" in e._repr_html_()
