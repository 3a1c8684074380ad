"""benchmarks/reproduce.py: stopped, killed and copied runs end as undisturbed ones, and unfinished rows say so."""

import csv
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from support import ROOT, hold_lock, same_state

import train
from engine.errors import UserError
from engine.launch import run_main
from engine.runtime.device import describe_machine
from engine.training import run_folder
from engine.training.run_folder import RunFolder
from evaluation.compare.runs import read_run

OPTIONS = "--dataset shapes --limit 48 --image_size 16 --batch_size 12 --vis_epoch 0 --dpi 10 --epochs 3"
PLAN = f"""
[plan]
seeds = 0 1
options = {OPTIONS}

[first]
none = 2 min --method none
mixup = 3 min --method mixup  # one lam a batch
"""


class ForkedScript(multiprocessing.get_context("fork").Process):
    """What subprocess.Popen does for a script, without its imports: a process that calls main() of train.py."""

    def __init__(self, words, log, threads, before):
        super().__init__(target=self.run_script, args=(words, log, before))
        self.start()

    def run_script(self, words, log, before):
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        before()
        sys.argv = words
        run_main(lambda: train.main(words[1:]))

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)

    @property
    def returncode(self):
        return self.exitcode


@pytest.fixture
def reproduce(monkeypatch, tmp_path):
    """Return a function that runs a plan in tmp_path/out, and returns the rows of results.csv."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("reproduce")

    def run(*words, plan=PLAN, out=tmp_path / "out", before=lambda: None, stop_at=None, compared=False):
        """before(): called in each training process. stop_at: a file; the time is up as soon as it exists.
        compared: whether the runs are compared, which draws figures.
        """
        (tmp_path / "tiny.ini").write_text(plan)
        monkeypatch.setattr(module, "start_process", lambda *words: ForkedScript(*words, before))
        if not compared:
            monkeypatch.setattr(importlib.import_module("plan_results"), "compare", lambda *given: [])
        if stop_at:
            stopped = property(lambda self: self.signal is not None or stop_at.exists())
            monkeypatch.setattr(module.Stop, "requested", stopped)
        common = [str(tmp_path / "tiny.ini"), "--output", str(out), "--device", "cpu"]
        try:
            module.main([*common, *words])
        finally:
            monkeypatch.undo()
            monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        with open(out / "results.csv", newline="") as file:
            return list(csv.DictReader(file))

    return run


def kill_in_second_epoch():
    """Make this process kill itself after it has saved its second epoch, before the log of that epoch is written."""
    write = RunFolder.write_log

    def write_log(self, history):
        if len(history) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, history)

    RunFolder.write_log = write_log


def pause_after_first_epoch():
    """Let this process wait after its first epoch: a fast one would be finished before it is stopped."""
    write = RunFolder.write_log

    def write_log(self, history):
        if len(history) == 1:
            time.sleep(1.0)
        write(self, history)

    RunFolder.write_log = write_log


def check_equal_to_undisturbed(folder, root, *words):
    """Check that the run in `folder` has ended as train.py ends with these options and no interruption."""
    train.main(
        [*OPTIONS.split(), *words, "--device", "cpu", "--no_progress", "--root_dir", str(root), "--name", "whole"]
    )
    states = [
        torch.load(path / "last.pt", weights_only=True) for path in (folder, root / "shapes" / "resnet20" / "whole")
    ]
    for part in ("model", "optimizer", "scheduler", "rng", "best"):
        assert same_state(*(state[part] for state in states)), part
    logs = [[row["test_loss"] for row in state["history"]] for state in states]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_a_killed_run_is_continued_elsewhere_and_ends_as_an_undisturbed_one(reproduce, tmp_path, capsys):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"(?s)mixup, seed 0 was ended by signal 9.*run the same command again"):
        reproduce("--rows", "mixup", plan=PLAN.replace("0 1", "0"), before=kill_in_second_epoch)
    out.rename(elsewhere)

    def move():
        run_folder.describe_machine, run_folder.get_git_commit = (lambda device: "another machine"), (lambda: "b" * 40)

    rows = reproduce("--rows", "mixup", plan=PLAN.replace("0 1", "0"), out=elsewhere, before=move)
    assert rows[1]["machine"] == f"{describe_machine(torch.device('cpu'))}; another machine"
    assert rows[1]["commit"].endswith("b" * 10) and len(rows[1]["commit"]) >= 10
    assert "resumes after epoch" in capsys.readouterr().out
    assert [(row["row"], row["status"]) for row in rows] == [("none", "not started"), ("mixup", "finished")]
    check_equal_to_undisturbed(elsewhere / "shapes/resnet20/mixup/seed_0", tmp_path, "--method", "mixup")


def test_a_plan_stops_when_the_time_is_up_and_continues_exactly(reproduce, tmp_path, capsys):
    out = tmp_path / "out"
    first = out / "shapes/resnet20/none/seed_0"
    one = PLAN.replace("0 1", "0")
    rows = reproduce("--jobs", "2", plan=one, before=pause_after_first_epoch, stop_at=first / "last.pt")
    assert [row["status"] for row in rows if row["last_top1"] or row["minutes"]] == []
    assert rows[0]["status"] == "stopped" and 1 <= int(rows[0]["epochs_done"]) < 3 == int(rows[0]["epochs"])
    assert "run the same command again" in capsys.readouterr().out
    assert "stopped by SIGTERM" in (out / "output" / "none_seed_0.txt").read_text()  # its place in the epoch is saved
    rows = reproduce("--jobs", "2", plan=one, compared=True)
    assert [(row["row"], row["status"]) for row in rows] == [("none", "finished"), ("mixup", "finished")]
    assert "thread" in rows[0]["machine"] and rows[0]["best_split"] == "test"
    assert (out / "compare" / "compare.md").is_file() and "2 runs in 2 groups" in capsys.readouterr().out
    check_equal_to_undisturbed(first, tmp_path, "--method", "none")

    before = {path: path.stat().st_mtime_ns for path in out.glob("shapes/**/last.pt")}
    reproduce(plan=one)  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2


def test_three_failures_in_a_row_end_the_training(reproduce, capsys):
    def fail():
        print("reads the data\ntrain.py: no such data\nunpack it there", flush=True)
        os._exit(1)

    message = "none, seed 0 failed with exit code 1: no such data; unpack it there; see .*none_seed_0.txt"
    with pytest.raises(UserError, match=message) as error:
        reproduce(before=fail)
    assert str(error.value).count("failed") == 3 and "mixup, seed 1" not in capsys.readouterr().out
    assert "after 3 failures in a row the others were not tried" in str(error.value)


def test_a_damaged_run_is_named(reproduce, tmp_path):
    folder = tmp_path / "out/shapes/resnet20/none/seed_0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="row none: .*config.json cannot be read .*; delete that folder"):
        reproduce("--list")


def test_a_row_with_other_options_is_an_error_in_one_line(reproduce, tmp_path, capsys):
    one = PLAN.replace("0 1", "0").replace("--epochs 3", "--epochs 1")
    reproduce("--rows", "none", plan=one)
    for changed in (one.replace("--method none", "--method none --lr 0.01"), one.replace("--epochs 1", "--epochs 2")):
        with pytest.raises(
            UserError, match=r"row none: .*has other options \(run -> plan: --\w+ \S+ -> \S+\); give .*"
        ):
            reproduce("--list", plan=changed)
    capsys.readouterr()
    rows = reproduce("--list", plan=one.replace("2 min --method none", "--method none --workers 3"))  # changes nothing
    assert "finished, " in capsys.readouterr().out and rows[0]["last_top1"] == rows[0]["best_top1"] != ""
    (epoch,) = read_run(tmp_path / "out/shapes/resnet20/none/seed_0").history
    assert rows[0]["epoch_seconds"] == f"{epoch['seconds']:.2f}"


def test_a_run_of_another_process_is_waited_for(reproduce, tmp_path, capsys):
    folder = tmp_path / "out/shapes/resnet20/none/seed_0"
    folder.mkdir(parents=True)
    with hold_lock(folder / ".lock"):
        rows = reproduce("--rows", "none", "--minutes", "0.02", plan=PLAN)
    assert "another process trains it" in capsys.readouterr().out and not (folder / "config.json").exists()
    assert {row["status"] for row in rows} == {"not started"}


def test_lines_of_other_plans_stay_in_the_table(reproduce, tmp_path):
    reproduce("--minutes", "0.01", "--rows", "none", stop_at=tmp_path)
    path = tmp_path / "out" / "results.csv"
    path.write_text(path.read_text().replace("tiny,", "other,"))
    rows = reproduce("--minutes", "0.01", stop_at=tmp_path)
    assert [row["plan"] for row in rows] == ["other"] * 4 + ["tiny"] * 4
    assert rows[-1]["command"] == f"python train.py {OPTIONS} --method mixup --seed 1"


@pytest.mark.parametrize("by_nohup", [False, True])
def test_a_closed_terminal_stops_the_runs_unless_nohup_started_them(monkeypatch, by_nohup):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stop = importlib.import_module("reproduce").Stop(minutes=None)
    for name in ("stdout", "stderr"):  # the signal replaces them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if by_nohup else signal.SIG_DFL)
    try:
        with stop.on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is not by_nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_seeds_at_the_same_time_are_in_one_summary(reproduce, tmp_path):
    reproduce("--rows", "none", "--jobs", "2", plan=PLAN.replace("--epochs 3", "--epochs 1"))
    summary = json.loads((tmp_path / "out/shapes/resnet20/none/seeds.json").read_text())
    assert sorted(summary["seeds"]) == ["0", "1"] and summary["summary"]["last_top1"]["n"] == 2


def test_a_table_with_other_finished_runs_is_not_overwritten(reproduce, tmp_path, capsys):
    one = PLAN.replace("0 1", "0").replace("--epochs 3", "--epochs 1")
    reproduce("--rows", "none", plan=one)
    table = tmp_path / "out" / "results.csv"
    published = table.read_text()
    with pytest.raises(UserError, match="has 1 finished run of plan tiny that --output does not have"):
        reproduce("--csv", str(table), plan=one, out=tmp_path / "fresh")
    assert table.read_text() == published and not (tmp_path / "fresh").exists()
    table.write_text("\ufeff" + published)  # as a spreadsheet saves it
    assert reproduce("--csv", str(table), "--rows", "none", plan=one)[0]["status"] == "finished"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"plan,note\na,b\n", "is not a table of this command"),
        (b"my only notes\n", "is not a table of this command"),
        (b"plan,row\n\xff\n", "the table cannot be read"),
    ],
)
def test_another_file_is_not_overwritten_by_the_table(reproduce, tmp_path, content, message):
    (tmp_path / "notes.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"notes.csv.* {message}.*; choose another --csv"):
        reproduce("--csv", str(tmp_path / "notes.csv"))
    assert (tmp_path / "notes.csv").read_bytes() == content


def test_the_output_must_be_a_folder(reproduce, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file is a file, not a folder"):
        reproduce(out=tmp_path / "file")


def test_a_part_trains_the_first_seed_of_all_its_rows_first(reproduce, tmp_path):
    plan = PLAN + "[second]\nlast = --method cutmix\n"
    rows = reproduce("--minutes", "0.01", plan=plan, stop_at=tmp_path)
    order = [(row["part"], row["row"], row["seed"]) for row in rows]
    assert order[:4] == [("first", name, seed) for seed in "01" for name in ("none", "mixup")]
    assert order[4:] == [("second", "last", "0"), ("second", "last", "1")]


def test_a_part_can_train_earlier_rows_with_further_seeds(reproduce, tmp_path, capsys):
    plan = PLAN + "[more]\nseeds = 7\nrows = mixup\nlast = 1 min --method cutmix\n"
    rows = reproduce("--minutes", "0.01", plan=plan, stop_at=tmp_path)
    order = [(row["part"], row["row"], row["seed"]) for row in rows[4:]]
    assert order == [("first", "mixup", "7"), ("more", "last", "7")]
    capsys.readouterr()
    reproduce("--list", plan=plan)
    header, none, mixup, last = capsys.readouterr().out.splitlines()[:4]
    assert header.split()[3:] == ["seed", "0", "seed", "1", "seed", "7"]
    counts = [line.count("not started") for line in (none, mixup, last)]
    assert counts == [2, 3, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (("[plan]", "[plans]"), r"no section \[plan\]"),
        (("seeds =", "seed ="), "unknown entry seed in .* did you mean seeds"),
        (("0 1", "0 0"), "name each seed once"),
        (("0 1", "one"), "seeds: expected an integer"),
        (("mixup =", "none ="), "line 8: a second row none; give it another name"),
        (("mixup =", "[second]\nnone ="), r"row none is in \[first\] and in \[second\]"),
        (("mixup =", "mix/up ="), "row mix/up: expected one name without slashes"),
        (("[first]", "[first"), r"line 6: expected NAME = OPTIONS or \[PART\], found \[first$"),
        (("[plan]", "line = --method none\n[plan]"), r"line 2: expected a section such as \[plan\] first"),
        (("--method mixup", "--method 'mixup"), "row mixup: No closing quotation"),
        (("[plan]", "[plan]\nscript = cam.py"), "script = cam.py: choose from train.py, imagenet_train.py"),
        (("[plan]", "[plan]\nmetric = loss"), "metric = loss: choose from top1, "),
        (("[plan]", "[plan]\nmetric = ema_top1"), "metric = ema_top1: row none needs --ema or --ema_ramp"),
        (("[plan]", "[plan]\nmetric = valid_top1"), "row none needs --valid_labels_per_class"),
        (("mixup =", "[more]\nseeds = 2\nrows = none none\nmixup ="), "rows = none none: name each row once"),
        (("mixup =", "[more]\nseeds = 2\nrows = nine\nmixup ="), r"\[more\]: rows: no row nine; did you mean none"),
        (("mixup =", "[more]\nseeds = 1\nrows = none\nmixup ="), r"\[more\]: row none has seed 1 already"),
    ],
)
def test_a_malformed_plan_is_an_error_in_one_line(reproduce, change, message):
    with pytest.raises(UserError, match=message) as error:
        reproduce("--list", plan=PLAN.replace(*change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--metod mixup", "row mixup: unknown option --metod; did you mean --method?"),
        ("--method mixup --seed 3", "row mixup: --seed: reproduce.py sets this"),
        ("--method mixup --device cpu", "row mixup: --device: give this to reproduce.py"),
        ("--method mixup --scheduler points", "row mixup: --scheduler points needs --lr_points"),
    ],
)
def test_wrong_options_of_a_row_are_a_usage_error_before_anything_is_trained(reproduce, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce(plan=PLAN.replace("--method mixup", words))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_time_that_is_left_follows_from_the_estimates_and_the_epochs_that_are_done(
    reproduce, monkeypatch, tmp_path
):
    results = importlib.import_module("plan_results")
    (tmp_path / "tiny.ini").write_text(PLAN)
    runs = importlib.import_module("plan").read_plan(tmp_path / "tiny.ini", tmp_path)
    progress = results.Progress(runs, 2)
    assert progress.estimate_minutes() == (2 + 3 + 2 + 3) / 2  # two at a time
    progress.done, progress.changed = 2.0, progress.start + 60 * 3  # the first run took 3 minutes for 2
    assert progress.estimate_minutes() == pytest.approx(8 * 3 / 2)
