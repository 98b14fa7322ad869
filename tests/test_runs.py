"""Runs on the disk, in the order of runs.py: folders of one run alone, files of others, full disks, damaged records and
checkpoints, and what a run goes on with."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from random import Random
from unittest.mock import MagicMock, Mock

import benchmark
import pytest
import torch
from conftest import options_of
from helpers import ALONE, CONV4, FORK, ROOT, Bare, digests, free_folders, refused, same, touch, weights, write

import cli
import data
import dclr
import evaluate
import fame
import features
import fima
import find
import mcl
import moco
import runs
import synthetic
import train
import visualize

SHORT = [*CONV4, "--device=cpu", "--workers=0"]
CONFIGS = {options_of(module)[1]: module.PRESETS for module in (moco, fima, fame, dclr, mcl)}
CONFIGS |= {evaluate.LinearConfig: {}, evaluate.FinetuneConfig: {}}
A, B, C = ["a", 0, "x", 1], ["b", 1, "y", 2], ["c", 0, "x", 3]  # videos: path, label, class, bytes
SEEN = {"videos": [A, B]}
ILL = [None, True, "x", [], {}, -1, 2.5, math.nan, 10**30]
BAD = [*ILL, torch.ones(2), torch.ones(2).to_sparse()]
OF_JSON = [*ILL, 10**400]  # as JSON has them
CUT = [b"", b"[", b"\xff", b"null", b"[" * 100_000, b'{"a": \xff}', b"1" * 5000]


def save(path, step, seen=SEEN, kind=moco.MoCoConfig, **options):
    """A checkpoint of a method at a step, 4 of them an epoch, as it was before there was an option bn."""
    state = dict(method=train.method_name(kind), config=dataclasses.asdict(kind(**options)), optimizer={})
    state["config"].pop("bn", None)
    state |= dict(model={"w": torch.zeros(9999)}, step=step, steps_per_epoch=4, world_size=1, seen=runs.pack(seen))
    path.parent.mkdir(parents=True, exist_ok=True)
    train.save_checkpoint(path, state)


@pytest.mark.slow
def test_a_run_folder_is_one_processes_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "run"
    with ProcessPoolExecutor(1, FORK, free_folders) as other:  # without this one's locks
        other.submit(runs.claim_folder, folder).result()
        says = f"run is in use by process {other.submit(os.getpid).result()} on "
        for resume in ("", f"{folder}/checkpoint.pt"):
            refused(says, runs.claim_folder, folder, resume)
        runs.claim_folder(tmp_path / "another")
        other.submit(signal.raise_signal, signal.SIGKILL).exception()  # when it has ended
    for _ in range(2):  # as a probe does, for its training and its result
        runs.claim_folder(folder)
    with ProcessPoolExecutor(1, FORK, free_folders) as other:
        refused(f"by process {os.getpid()} on ", other.submit(runs.claim_folder, folder).result)
        child = FORK.Process(target=time.sleep, args=(60,), daemon=True)  # as a loader's worker, which may live on
        child.start()
        free_folders()
        other.submit(runs.claim_folder, folder).result()
        child.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "word"), [(fima, "--epochs=1"), (evaluate, "linear")])
def test_a_second_run_is_refused_before_it_writes_anything(module, word, run):
    with ProcessPoolExecutor(1, FORK, free_folders) as other:
        other.submit(runs.claim_folder, run.path / "run").result()
        before = digests(run.path)
        run.refused(module, word, *CONV4, "--device=cpu", "--out=run", says=["run is in use by process "])
        assert digests(run.path) == before


@pytest.mark.parametrize("fcntl", [None, MagicMock(lockf=Mock(side_effect=OSError("no locks")))])
def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(fcntl, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    runs.claim_folder(tmp_path / "run")
    assert capsys.readouterr().out.count("run can't be locked (") == 1


def test_what_a_killed_run_has_left_half_written_is_deleted_and_nothing_else(tmp_path):
    kept = ["run/mine.partial", "run/knn_ucf101.json.0123abcd.partial", "disk/b.pt.0123abcd.partial"]
    gone = ["run/epoch_0001.pt", "run/run.json", "run/log.jsonl", "run/bad_videos.log", "disk/a.pt", "run/result.json"]
    touch(tmp_path, *kept, *[f"{name}.0123abcd.partial" for name in gone])
    (tmp_path / "run" / "checkpoint.pt").symlink_to("../disk/a.pt")
    runs.claim_folder(tmp_path / "run")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.partial")} == {*kept}


def test_a_run_is_not_overwritten_and_those_that_start_together_have_folders_of_their_own(tmp_path):
    name = str(tmp_path / "runs" / "moco")
    assert [runs.unused_folder(name) for _ in range(3)] == [name, f"{name}-2", f"{name}-3"]
    touch(tmp_path, "run/checkpoint.pt", "other/checkpoint.pt")
    refused(r"--resume \S+run/checkpoint\.pt", runs.claim_folder, tmp_path / "run", f"{tmp_path}/other/checkpoint.pt")


def test_no_later_checkpoint_is_replaced(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path / f"epoch_000{epoch}.pt", 4 * epoch)
    save(tmp_path / "checkpoint.pt", 8)
    runs.claim_folder(tmp_path, str(tmp_path / "checkpoint.pt"))  # of one that was killed between the two
    runs.claim_folder(tmp_path, str(tmp_path / "epoch_0003.pt"))
    refused("epoch_0003.pt is later than .*name another", runs.claim_folder, tmp_path, str(tmp_path / "epoch_0001.pt"))
    damaged = bytearray((tmp_path / "epoch_0003.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "epoch_0003.pt").write_bytes(damaged)
    runs.claim_folder(tmp_path, str(tmp_path / "epoch_0002.pt"))
    refused("epoch_0002.pt is later than", runs.claim_folder, tmp_path, str(tmp_path / "epoch_0001.pt"))


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    refused("mine is a file: name another --out", runs.claim_folder, tmp_path / "mine")


COMMANDS = {  # what commands write, by its name
    "o.json": lambda run: run(evaluate, "knn", *SHORT, "--clips=1", "--out=o.json"),
    "o_confusion.png": lambda run: run(evaluate, "svm", *SHORT, "--clips=1", "--out=o.json"),
    "o.pt": lambda run: run(evaluate, "export", "--checkpoint=none.pt", "--out=o.pt", dataset=None),
    "result.json": lambda run: run(evaluate, "linear", *SHORT, "--out=."),
    **dict.fromkeys(("log.jsonl", "epoch_0001.pt", "lock"), lambda run: run(fima, *CONV4, "--out=.")),
    "o.png": lambda run: run(visualize, "curves", "none", "--out=o.png", dataset=None),
    "o.svg": lambda run: run(visualize, "sample", *CONV4, "--out=o.svg"),
    "o.gif": lambda run: run(visualize, "sample", *CONV4, "--out=o.gif"),
    "o.html": lambda run: run(visualize, "report", "none", "--out=o.html", dataset=None),
    "benchmark_step_cpu.json": lambda run: run(benchmark, "step", "--out=.", dataset=None),
    "bad.txt": lambda run: run(data, "check", ".", "--out=bad.txt", dataset=None),
}
WRITERS = {  # what functions write, by its name
    "checkpoint.pt": lambda log: train.save_checkpoint(log.folder / "checkpoint.pt", {"model": torch.ones(99)}),
    "log.jsonl": lambda log: log.line(),
    "bad_videos.log": lambda log: log.add_bad([("new" * 99, "reason")]),
    "bad.txt": lambda log: find.check(find.CheckConfig(str(log.folder / "bad.txt"), 1), log.folder),
    "_0001.mp4": lambda log: synthetic.make_synthetic(log.folder / "set", 20, 10, frames=2, size=(16, 16)),
}


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_a_commit_is_marked_where_code_differs_not_where_results_do(tmp_path, monkeypatch):
    def git(*words):
        own = [word for option in ("user.name=a", "user.email=a", "commit.gpgsign=false") for word in ("-c", option)]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.git_commit() == ""
    write(tmp_path / "runs.py", "1")
    write(tmp_path / "results.jsonl", "1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "code"]):
        git(*words)
    commit = runs.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    write(tmp_path / "results.jsonl", "2")
    assert runs.git_commit() == commit
    write(tmp_path / "runs.py", "2")
    assert runs.git_commit() == f"{commit}+changes"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("held", [b"PK\3\4weights", b'{"years": "of work"}', b'"name","score"\n', None])
def test_a_file_of_another_kind_or_a_folder_is_never_written_over(name, held, tmp_path, run):
    touch(tmp_path, "video.mp4")
    (tmp_path / name).write_bytes(held) if held else (tmp_path / name).mkdir()
    before = digests(tmp_path)
    COMMANDS[name](functools.partial(run.refused, says=[name]))
    assert digests(tmp_path) == before


def test_two_that_write_the_same_file_leave_it_whole_and_a_link_stays_one(tmp_path, monkeypatch):
    (disk := tmp_path / "disk").mkdir()
    (path := tmp_path / "checkpoint.pt").symlink_to("disk/there.pt")

    def meanwhile(_file):
        monkeypatch.undo()
        train.write_file(path, "the second's")

    monkeypatch.setattr(os, "fsync", sync := Mock(side_effect=meanwhile))
    train.write_file(path, "the first's")
    assert sync.called and path.read_text() == "the first's"
    assert path.is_symlink() and os.listdir(disk) == ["there.pt"]


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 bytes: the system's error is of the same kind as that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_nothing_half(name, tmp_path, capsys):  # capsys: stderr is no file
    log = train.Log(train.Run(Bare(), train.TrainConfig(), ALONE, 1), tmp_path, 1)
    log.steps = [train.Step(1, {"loss": 1.0, "grad_norm": torch.ones(())}, [])]
    touch(tmp_path, f"{'long' * 50}.mp4", "a.mp4")
    (tmp_path / name).write_bytes(b"'old'\t")  # as a list of bad videos begins
    before = sorted(os.listdir(tmp_path))
    with full_disk(), pytest.raises((OSError, train.UserError), match=rf"File too large: '.*{name}'"):
        WRITERS[name](log)
    assert sorted({*os.listdir(tmp_path)} - {"bad.txt.partial"}) == before  # which keeps what was found
    if name in ("checkpoint.pt", "bad.txt"):
        assert (tmp_path / name).read_bytes() == b"'old'\t"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["o.json", "o.svg"])
def test_results_are_replaced_and_stay_as_they_were_on_a_full_disk(name, tmp_path, run):
    for _ in range(2):
        COMMANDS[name](run.ok)
    before = digests(tmp_path)
    with full_disk():
        COMMANDS[name](functools.partial(run.refused, says=[f"File too large: '{name}'"]))
    assert digests(tmp_path) == before


def spoiled(value, bad, place=()):
    """Copies of nested containers, each with something bad at a place, with this place; of a model's tensors, three."""
    yield place, bad
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(entries)[: 3 if place in (("model",), ("optimizer", "state")) else None]:
        for where, content in spoiled(below, bad, (*place, key)):
            copy = value.copy()
            copy[key] = content
            yield where, copy


def in_one_line(function):
    """What a function gives; "error" where it is an error of the user's, in one line."""
    try:
        with train.user_errors():
            return function()
    except train.UserError as error:
        assert "\n" not in str(error)
        return "error"


@pytest.fixture
def run_at_3(tmp_path):
    """A run at step 3, whose folder has three lines in its log, and the result of an evaluation."""
    run = train.Run(Bare(), moco.MoCoConfig(), ALONE, 4)
    run.done = 3
    save(tmp_path / "checkpoint.pt", 3)
    runs.open_record(run, tmp_path)
    numbers = {"loss/vv": 2.0, "chance/vv": 2.0}
    write(tmp_path / "log.jsonl", *[json.dumps({"step": n, "epoch": n / 4} | numbers) for n in (1, 2, 3)])
    write(tmp_path / "knn.json", json.dumps({"config": {}, "result": {"top1_percent": 50.0}}))
    return run


@pytest.mark.slow
def test_ill_typed_values_in_records_change_nothing_or_are_one_clear_line(run_at_3, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "SECTIONS", {})
    monkeypatch.setattr(runs, "git_commit", str)
    for path in (tmp_path / "run.json", tmp_path / "knn.json"):
        record = json.loads(content := path.read_bytes())
        copies = [json.dumps(copy).encode() for ill in OF_JSON for _, copy in spoiled(record, ill)]
        for text in (*Random(0).sample(copies, 40), *CUT):
            path.write_bytes(text)
            in_one_line(lambda: visualize.write_report(visualize.FigureConfig(device="cpu"), [str(tmp_path)]))
            outcome = in_one_line(lambda: runs.open_record(run_at_3, tmp_path))
            assert outcome == "error" or path.name == "knn.json" or text not in CUT
        path.write_bytes(content)


def test_damaged_lines_of_logs_are_left_out(run_at_3, tmp_path):
    path, bad_videos = tmp_path / "log.jsonl", tmp_path / "bad_videos.log"
    lines = path.read_bytes().splitlines()
    for name in ("step", "epoch", "loss/vv", "chance/vv"):
        for ill in OF_JSON:  # which a curve has or leaves out
            path.write_bytes(b"\n".join([*lines, json.dumps(json.loads(lines[0]) | {name: ill}).encode(), b""]))
            visualize.plt.close(visualize.draw_curves(visualize.FigureConfig(), [str(tmp_path)]))
    for text in CUT:
        path.write_bytes(text)
        assert in_one_line(lambda: visualize.read_log(str(tmp_path))) == "error"
    path.write_bytes(b"\n".join([lines[0], *filter(None, CUT), *lines[1:]]))
    bad_videos.write_bytes(b"step 1\t'a\xff.mp4'\tcut\nstep 2\t'b")
    assert len(visualize.read_log(str(tmp_path))) == 3
    runs.open_record(run_at_3, tmp_path)
    assert path.read_bytes().splitlines() == lines and bad_videos.read_bytes() == b"step 1\t'a\xff.mp4'\tcut\n"
    run_at_3.config = dataclasses.replace(run_at_3.config, exclude=f"a.txt, {bad_videos}")
    refused("this run writes there; copy the file", runs.open_record, run_at_3, tmp_path)


@pytest.mark.parametrize(("resume", "done"), [("", 0), ("other/checkpoint.pt", 3)])
def test_a_run_keeps_nothing_of_one_that_was_killed_before_it_saved(run_at_3, tmp_path, resume, done):
    write(tmp_path / "bad_videos.log", "step 1\t'a.mp4'\tcut")
    run_at_3.done, run_at_3.config = done, dataclasses.replace(run_at_3.config, resume=resume)
    runs.open_record(run_at_3, tmp_path)
    assert [start["start_step"] for start in runs.read_starts(tmp_path / "run.json")] == [done]
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "bad_videos.log").exists()
    (tmp_path / "run.json").write_text('{"mine": 1}')
    refused("run.json is damaged", runs.open_record, run_at_3, tmp_path)
    assert (tmp_path / "run.json").read_text() == '{"mine": 1}'


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(path := tmp_path / "checkpoint.pt", 2, bn="local", width=0.5)
    state, method = weights(path), Bare()
    code = type("Code", (), {"__reduce__": lambda _: (os.mkdir, ("it ran",))})()

    def resumed(*flags, **changes):
        train.save_checkpoint(path, {name: value for name, value in (state | changes).items() if value is not None})
        return cli.parse(moco.MoCoConfig, "", argv=["--resume", str(path), *flags])

    assert resumed().bn == "shuffle"  # what is new has its default
    resumed(config={name: value for name, value in state["config"].items() if name != "color_first"})
    found = cli.parse(moco.MoCoConfig, "", moco.PRESETS, ["--resume", str(path)])
    assert found.color_first == "off"  # whatever the preset says now
    as_it_was = state["config"] | {"bn": "sync"}  # which there was
    refused("was made with --bn sync", resumed, config=as_it_was)
    assert resumed("--bn", "local", config=as_it_was).bn == "local"
    refused("is a checkpoint of FIMA, not of MoCo", resumed, method="FIMA")
    refused("is no checkpoint of this project", resumed, model=None)
    refused("no valid step in it", resumed, step=-1)
    refused("is of an older conv4", resumed, model={"units.0.conv3d.weight": torch.ones(1)})
    refused("is of an older conv4", resumed, model={"layers.12.weight": torch.ones(1)})
    refused("holds code, which is never run", resumed, step=code)
    assert not os.path.exists("it ran")
    refused("1 tensors differ, as bias", train.load_model, "it", method, {"weight": torch.ones(1, 3)})
    kept = {"state": {0: {"momentum_buffer": torch.ones(5)}}}
    refused("no valid optimizer", train.load_optimizer, "it", train.sgd(method, train.TrainConfig()), kept)
    for rows in ([[["a"], 0, "c", 1]], [["a", 0, "c"]]):
        refused("no valid seen", runs.unpack, "it", {"seen": runs.pack({"videos": rows})})
    deep = torch.frombuffer(bytearray(zlib.compress(b"[" * 200_000)), dtype=torch.uint8)
    refused("no valid seen", runs.unpack, "it", {"seen": deep})
    refused("no valid model", resumed, model={name: v.to("meta") for name, v in state["model"].items()})
    resumed()
    optimizer, other = (torch.optim.Adafactor(method.parameters()) for _ in range(2))
    method({"x": torch.ones(2, 3)})["x"].backward()
    optimizer.step()  # keeps sums of rows and columns
    train.load_optimizer("it", other, optimizer.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    refused("is damaged", runs.load_checkpoint, path)
    refused("no checkpoint at", runs.load_checkpoint, tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.open(tmp_path, os.O_RDWR))  # as where it may not be read
    refused("can't be read: Is a directory", runs.load_checkpoint, path)


def test_nothing_is_unpickled():
    for code in (path.read_text() for path in ROOT.glob("*.py")):
        assert not re.search(r"(import|from) (pickle|dill|joblib|shelve)\b", code)
        assert code.count("torch.load(") == code.count("weights_only=True") and "allow_pickle=True" not in code


@pytest.mark.slow
def test_ill_typed_values_in_a_checkpoint_change_nothing_or_are_one_clear_line(run, tmp_path, monkeypatch):
    run.ok(fima, *CONV4, "--epochs", 2, "--max_steps", 3, "--out", "run", dataset="folder")
    path = tmp_path / "run" / "checkpoint.pt"
    train.save_checkpoint(path, state := weights(path) | {"seen": runs.pack(SEEN)})
    asked = dataclasses.replace(fima.FIMAConfig(**state["config"]), resume="auto")

    def resumed():
        config = runs.continued(cli.parse(fima.FIMAConfig, "", fima.PRESETS, ["--resume", str(path)]), ALONE, SEEN)
        found = runs.load_checkpoint(path)
        run = train.Run(fima.FIMA(config), config, ALONE, state["steps_per_epoch"], found)
        counts = run.done, run.skipped, run.bad_videos
        return run.method.state_dict(), run.optimizer.state_dict()["state"], counts, runs.unpack(path, found)

    readers = (
        resumed,
        lambda: features.load_encoder(evaluate.RetrieveConfig(checkpoint=str(path)), str)[0].state_dict(),
        lambda: visualize.load_decoder(visualize.FigureConfig(device="cpu"), [str(path)])[1].state_dict(),
        found := lambda: runs.find_run(asked, SEEN, str),
    )
    undisturbed = [reader() for reader in readers]
    assert path.samefile(undisturbed[-1])
    cases = [(place, bad, copy) for bad in BAD for place, copy in spoiled(state, bad)]
    cases = [case for case in cases if case[:2] != (("optimizer", "state"), {})]  # as of a run without momentum
    for place, bad, copy in [case for case in cases if len(case[0]) == 1] + Random(0).sample(cases, 30):
        monkeypatch.setattr(torch, "load", lambda *_, copy=copy, **__: copy)
        for reader, expected in zip(readers, undisturbed, strict=True):
            outcome = in_one_line(reader)
            assert reader is found or outcome == "error" or same(outcome, expected), (place, bad, reader)


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)
def test_what_defines_a_run_stays_when_it_is_resumed_and_other_options_are_as_given(config_class, tmp_path):
    presets, free = CONFIGS[config_class], config_class.FREE | config_class.TUNED
    config = config_class(**presets.get("synthetic", {}) | dict(epochs=5, batch_size=4))
    save(path := tmp_path / "checkpoint.pt", 2, kind=config_class, **dataclasses.asdict(config))
    for field in dataclasses.fields(config_class):
        name, was = field.name, getattr(config, field.name)
        others = [value for value in field.metadata["allowed"] or [f"{was}x"] if value not in (was, "")]
        if name == "resume" or not others:
            continue
        value = field.type(others[-1])
        try:
            found = cli.parse(config_class, "", presets, ["--resume", str(path), f"--{name}={value}"])
        except train.UserError as error:
            says = f"--{name} {was}, not {value}: start anew" if name not in free else f"--{name}"
            assert says in str(error) and name not in train.TrainConfig.TUNED
        else:
            given = {"resume": str(path), "out": str(tmp_path), name: value}
            assert name in free and found == dataclasses.replace(config, **given)


@pytest.mark.slow
def test_changed_data_are_said_and_need_a_flag(run):
    tree, options = shutil.copytree(run.videos, run.path / "tree"), dict(small=False, dataset=None)
    short = [*SHORT, "--max_steps=1", "--dataset=folder", f"--data={tree}"]
    run.ok(moco, *short, "--batch_size=4", "--out=moco", **options)
    run.ok(evaluate, "linear", *short, "--clips=1", "--epochs=2", "--batch_size=6", "--out=linear", **options)
    tree = tree.rename(run.path / "moved")
    resume = [moco, "--resume=moco/checkpoint.pt", "--data", tree, "--max_steps"]
    assert "other data" not in run.ok(*resume, 2, **options)  # they move with their folder
    for part in ("train", "test"):
        with open(next(tree.glob(f"{part}/*/*")), "ab") as file:
            file.write(b"\0")
    says = ["videos: 1 of another size", "--changed_data"]
    run.refused(*resume, 3, says=says, **options)
    says += ["training videos: 1 of", "test videos: 1 of"]
    run.refused(evaluate, "linear", "--resume=linear/checkpoint.pt", "--data", tree, says=says, **options)
    assert "note: goes on with other data" in run.ok(*resume, 3, "--changed_data", **options)
    assert "other data" not in run.ok(*resume, 4, **options)  # it has seen these now


def auto(**options):
    """What --resume auto finds, and what it says."""
    said = []
    return runs.find_run(moco.MoCoConfig(resume="auto", **options), SEEN, said.append), "\n".join(said)


def test_resume_auto_takes_the_furthest_readable_checkpoint_of_the_run_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "starts anew" in auto()[1]
    for name, step, kind in (("b", 7, moco.MoCoConfig), ("a", 1, moco.MoCoConfig), ("c", 8, fima.FIMAConfig)):
        save(tmp_path / "runs" / name / "checkpoint.pt", step, kind=kind, losses="vv")
    path = tmp_path / "runs" / "b" / "checkpoint.pt"
    save(path.with_name("epoch_0001.pt"), 4)  # newer, as of a copy
    path.with_name("epoch_0002.pt").symlink_to("nowhere")
    write(tmp_path / "runs" / "d" / "checkpoint.pt", "no weights")
    found, said = auto()
    assert found == "runs/b/checkpoint.pt" and "found runs/b/checkpoint.pt, step 7" in said
    assert "passes over a checkpoint: runs/d/checkpoint.pt is damaged" in said
    assert auto(out="runs/a", device="cpu", log_every=3)[0] == "runs/a/checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights: torch alone would not notice
    path.write_bytes(content)
    found, said = auto()
    assert found == "runs/b/epoch_0001.pt" and "passes over a checkpoint: runs/b/checkpoint.pt is damaged" in said


def test_resume_auto_passes_over_another_run_and_says_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "a" / "checkpoint.pt"
    for saved, asked, says in (
        (dict(data="here"), dict(data="moved", workers=2), "found runs/a/checkpoint.pt, step 2"),  # they define nothing
        (dict(seed=5), {}, "another run is in runs/a: --seed 5, not 0"),
        ({}, dict(losses="vd", width=0.5), "--width 1.0, not 0.5, --losses vv, not vd"),
        ({}, dict(lr=1), "--lr 0.04, not 1"),
        (dict(seen={"videos": [A]}), {}, "another run is in runs/a: videos: 1 more ('b')"),
        (dict(seen={"videos": [A, B, C]}), {}, "videos: 1 fewer ('c')"),
        (dict(seen={"videos": [B, A]}), {}, "videos: in another order"),
        (dict(seen={"videos": [["a", 0, "x", 9], B]}), {}, "videos: 1 of another size ('a')"),
        (dict(seen={"videos": [["a", 1, "x", 1], B]}), {}, "videos: 1 with another label ('a')\n"),
        (dict(seen={"videos": [["a", 0, "z", 9], B]}), {}, "1 with another label ('a'), 1 of another size ('a')"),
        (dict(seen={}, data="here"), dict(data="moved"), "--data here, not moved"),  # as older code left it
    ):
        save(path, 2, **saved)
        found, said = auto(**asked)
        assert says in said and (found != "") == says.startswith("found")
    save(path, 4, lr=1)
    save(path.with_name("epoch_0001.pt"), 2)
    assert not auto()[0]  # what went on from there is not written over
