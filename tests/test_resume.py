"""What a run goes on with: its options, its data, and files that somebody may have changed."""

import dataclasses
import json
import math
import os
import shutil
import sys
from random import Random

import conftest
import numpy as np
import pytest
import torch
from helpers import ALONE, Bare, same, weights

import cli
import dclr
import evaluate
import fame
import features
import fima
import mcl
import moco
import runs
import train
import visualize

CONFIGS = {
    moco.MoCoConfig: moco.PRESETS,
    fima.FIMAConfig: fima.PRESETS,
    fame.FAMEConfig: fame.PRESETS,
    dclr.DCLRConfig: dclr.PRESETS,
    mcl.MCLConfig: mcl.PRESETS,
    evaluate.LinearConfig: {},
    evaluate.FinetuneConfig: {},
}


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def fit_tiny(config):
    def batches(start):
        while True:
            yield {"x": torch.randn(config.batch_size, 3, generator=torch.Generator().manual_seed(start))}
            start += 1

    path = runs.fit_in_folder(Bare(), config, ALONE, batches, 8 // config.batch_size, "", {})
    return weights(path)["model"]


def another(field, value):
    """Another value that the command line takes for an option, None if there is none."""
    allowed = field.metadata["allowed"]
    if field.type is str:
        return next((choice for choice in allowed if choice not in (value, "")), None) if allowed else f"{value}x"
    return value + 1 if value + 1 <= allowed[1] else (max(allowed[0], 0) + value) / 2


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)
def test_each_option_makes_a_resumed_run_another_or_is_refused_or_is_one_that_defines_nothing(config_class, tmp_path):
    presets = CONFIGS[config_class]
    options = presets.get("synthetic", {}) | dict(epochs=5, batch_size=4, out=str(tmp_path), lr=0.3)
    config = config_class(**options, max_steps=5)  # of 10
    fit_tiny(config)
    path = str(tmp_path / "checkpoint.pt")

    def resumed(*flags):
        return cli.parse(config_class, "", presets, ["--resume", path, "--out", str(tmp_path / "resumed"), *flags])

    undisturbed = fit_tiny(resumed())
    for field in dataclasses.fields(config_class):
        value = another(field, getattr(config, field.name))
        if value is None or field.name == "resume":
            continue
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
        if field.name not in config_class.FREE | config_class.TUNED:
            with pytest.raises(train.UserError, match=rf"with --{field.name} .*, not {value}: start anew") as error:
                resumed(f"--{field.name}={value}")
            assert "\n" not in str(error.value)
        elif field.name in train.TrainConfig.TUNED:
            ended = fit_tiny(resumed(f"--{field.name}={value}"))
            assert not same(ended, undisturbed), field.name
        else:
            try:
                assert getattr(resumed(f"--{field.name}={value}"), field.name) == value
            except train.UserError as error:  # as lists that go in pairs
                assert f"--{field.name}" in str(error)


@pytest.mark.slow
def test_a_resumed_run_reads_each_option_that_may_be_changed(run, videos, monkeypatch):
    """Those of the loop that make it another run are seen in the weights above, the others here where they are used."""
    used, read = set(), object.__getattribute__

    def spy(config, name):
        code = sys._getframe(1).f_code
        if not code.co_filename.endswith("dataclasses.py") and code.co_name not in ("__post_init__", "__str__"):
            used.add(name)
        return read(config, name)

    shutil.copytree(videos, run.path / "fewer")
    next((run.path / "fewer" / "train").glob("*/*.mp4")).unlink()
    begin = ["--epochs", 3, "--max_steps", 1, "--out"]
    pretrain, probe = [*conftest.CONV4, *begin], ["--clips", 1, "--batch_size", 6, "--device", "cpu", *begin]
    monkeypatch.setattr(evaluate, "first_look", lambda *_: None)
    assert run(fima, *pretrain, "fima")[0] == 0
    monkeypatch.setattr(mcl.MotionMaps, "compute", lambda maps, path: np.ones((40, 6, 6), np.float32))  # in no time
    assert run(mcl, *pretrain, "mcl")[0] == 0
    checkpoint = ["--checkpoint", "fima/checkpoint.pt"]
    assert run(evaluate, "linear", *checkpoint, *probe, "linear")[0] == 0
    assert run(evaluate, "finetune", *checkpoint, *probe, "finetune")[0] == 0
    monkeypatch.setattr(train.Options, "__getattribute__", spy)
    for name, script, words in (
        ("fima", fima, []),
        ("mcl", mcl, []),
        *((n, evaluate, [n]) for n in ("linear", "finetune")),
    ):
        flags = ["--resume", f"{name}/checkpoint.pt", "--data", "fewer", "--changed_data", "--max_steps", 3]
        code, out, err = run(script, *words, *flags, small=False, dataset=None)
        assert code == 0 and "goes on with other data" in out, err
    for config_class in CONFIGS:
        assert used | train.TrainConfig.TUNED >= config_class.FREE | config_class.TUNED


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_changed_data_are_said_and_need_a_flag(run, videos):
    tree, away = run.path / "tree", run.path / "away"
    shutil.copytree(videos, tree)
    lists = {}
    for part in ("train", "test"):
        paths = sorted(tree.glob(f"{part}/*/*.mp4"))
        lists[part] = "".join(f"{path.relative_to(tree)} {path.parent.name}\n" for path in paths)
        (run.path / f"{part}.txt").write_text(lists[part])
    small = ["--encoder", "conv4", "--width", 0.25, "--crop", 32, "--device", "cpu", "--max_steps", 1]
    probe = ["--list_file", "train.txt", "--test_list", "test.txt", "--epochs", 2, "--batch_size", 6, "--clips", 1]
    where = ["--dataset", "folder", "--data", tree]
    assert run(moco, *small, *where, "--batch_size", 4, "--out", "moco", dataset=None)[0] == 0
    assert run(evaluate, "linear", *small, *where, *probe, "--out", "linear", dataset=None)[0] == 0
    tree = tree.rename(run.path / "moved")

    def resume(script, *flags):
        name = ["linear"] if script is evaluate else []
        checkpoint = f"{script.__name__ if script is moco else 'linear'}/checkpoint.pt"
        flags = [*name, "--resume", checkpoint, "--data", tree, *flags]
        return run(script, *flags, small=False, dataset=None)

    for script in (moco, evaluate):  # which move with their folder
        code, out, err = resume(script, "--max_steps", 2)
        assert code == 0 and "resumed after step 1" in out and "other data" not in out, err

    def refused(script, says):
        code, out, err = resume(script, "--max_steps", 3)
        assert code == 2 and says in err and "--changed_data" in err and err.count("\n") == 1, (out, err)

    first, second, *_ = sorted(tree.glob("train/*/*.mp4"))
    name, content = str(first.relative_to(tree)), first.read_bytes()
    first.rename(away)
    refused(moco, f"videos: 1 fewer ({name!r})")
    shutil.copy(away, first.with_name("new.mp4"))
    refused(moco, f"1 more ({str(first.with_name('new.mp4').relative_to(tree))!r}), 1 fewer ({name!r})")
    first.with_name("new.mp4").rename(first)
    first.write_bytes(content + b"\0")
    refused(moco, f"videos: 1 of another size ({name!r})")
    refused(evaluate, f"training videos: 1 of another size ({name!r})")
    first.write_bytes(content)
    for part, title in (("train", "training videos"), ("test", "test videos")):
        words = lists[part].split()
        classes = sorted(set(words[1::2]))
        turned = dict(zip(classes, classes[1:] + classes[:1], strict=True))
        lines = [f"{path} {turned[label]}\n" for path, label in zip(words[::2], words[1::2], strict=True)]
        (run.path / f"{part}.txt").write_text("".join(lines))
        refused(evaluate, f"{title}: {len(lines)} with another label ({words[0]!r})")
        (run.path / f"{part}.txt").write_text("".join(reversed(lists[part].splitlines(keepends=True))))
        refused(evaluate, f"{title}: in another order")
        (run.path / f"{part}.txt").write_text(lists[part])
    second.write_bytes(second.read_bytes() + b"\0")
    code, out, _ = resume(moco, "--max_steps", 3, "--changed_data")
    assert code == 0 and "note: goes on with other data" in out and "1 of another size" in out
    code, out, _ = resume(moco, "--max_steps", 4)  # it has seen these now
    assert code == 0 and "other data" not in out
    path = run.path / "moco" / "checkpoint.pt"
    state = weights(path)
    del state["seen"]  # as older code left it
    torch.save(state, path)
    code, out, _ = resume(moco, "--max_steps", 5)
    assert code == 0 and "does not say which videos" in out


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


BAD = [None, True, "x", [], {}, -1, 2.5, math.nan, 10**30, torch.ones(2), torch.ones(2).to_sparse()]


def places(value, place=()):
    """Where something stands in nested containers, of a model's tensors the first three."""
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(entries)[: 3 if place in (("model",), ("optimizer", "state")) else None]:
        yield from places(below, (*place, key))


def changed(value, place, bad):
    """A copy of nested containers with something else at a place."""
    if not place:
        return bad
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], bad)
    return copy


def in_one_line(function):
    """What a function gives; "error" where it is an error of the user's, in one line."""
    try:
        with train.user_errors():
            return function()
    except train.UserError as error:
        assert "\n" not in str(error)
        return "error"


@pytest.mark.slow
def test_ill_typed_values_in_a_checkpoint_change_nothing_or_are_one_clear_line(run, tmp_path, monkeypatch):
    flags = [*conftest.CONV4, "--epochs", 2, "--max_steps", 3, "--out", "run"]
    assert run(fima, *flags, dataset="folder")[0] == 0
    path, seen = tmp_path / "run" / "checkpoint.pt", {"videos": [["a", 0, "b", 1]]}
    state = weights(path) | {"seen": runs.pack(seen)}
    train.save_checkpoint(path, state)
    asked = dataclasses.replace(fima.FIMAConfig(**state["config"]), resume="auto")

    def resumed():
        config = runs.continued(cli.parse(fima.FIMAConfig, "", fima.PRESETS, ["--resume", str(path)]), ALONE, seen)
        found = runs.load_checkpoint(path)
        run = train.Run(fima.FIMA(config), config, ALONE, state["steps_per_epoch"], found)
        counts = run.done, run.skipped, run.bad_videos
        return run.method.state_dict(), run.optimizer.state_dict()["state"], counts, runs.unpack(path, found)

    def evaluated():
        return features.load_encoder(evaluate.RetrieveConfig(checkpoint=str(path)), str)[0].state_dict()

    def drawn():
        return visualize.load_decoder(visualize.FigureConfig(device="cpu"), [str(path)])[1].state_dict()

    def found():
        return runs.find_run(asked, seen, str)

    readers = (resumed, evaluated, drawn, found)
    undisturbed = [reader() for reader in readers]
    assert path.samefile(undisturbed[-1])
    pairs = [(place, bad) for place in places(state) for bad in BAD]
    pairs.remove((("optimizer", "state"), {}))  # as of a run without momentum
    for place, bad in pairs if os.environ.get("ALL_PLACES") else Random(0).sample(pairs, 60):
        monkeypatch.setattr(torch, "load", lambda *_, place=place, bad=bad, **__: changed(state, place, bad))
        for reader, expected in zip(readers, undisturbed, strict=True):
            outcome = in_one_line(reader)
            assert reader is found or outcome == "error" or same(outcome, expected), (place, bad, reader)


@pytest.fixture
def folder(run):
    """A run folder with three lines in its log, and the result of an evaluation."""
    flags = [*conftest.CONV4, "--epochs", 2, "--max_steps", 3, "--log_every", 1, "--out", "run"]
    assert run(moco, *flags, dataset="folder")[0] == 0
    (run.path / "run" / "knn.json").write_text(json.dumps({"protocol": "knn", "result": {"top1_percent": 50.0}}))
    return run.path / "run"


ILL = [None, True, "x", [], {}, -1, 2.5, math.nan, 10**30, 10**400]  # as JSON has them
CUT = [b"", b"[", b"\xff", b"null", b"[" * 100_000, b'{"a": \xff}', b"1" * 5000]


@pytest.mark.slow
def test_ill_typed_values_in_records_change_nothing_or_are_one_clear_line(folder, monkeypatch):
    config = moco.MoCoConfig(**weights(folder / "checkpoint.pt")["config"])
    monkeypatch.setattr(visualize, "SECTIONS", {})
    monkeypatch.setattr(runs, "git_commit", str)
    started = train.Run(moco.MoCo(config), config, ALONE, 4)
    for name in ("run.json", "knn.json"):
        record = json.loads(content := (folder / name).read_bytes())
        pairs = [(place, ill) for place in places(record) for ill in ILL]
        spoiled = [json.dumps(changed(record, *pair)).encode() for pair in Random(0).sample(pairs, 40)]
        for text in (*spoiled, *CUT):
            (folder / name).write_bytes(text)
            in_one_line(lambda: visualize.write_report(visualize.FigureConfig(device="cpu"), [str(folder)]))
            in_one_line(lambda: runs.FolderLog(started, folder, 8).close())
        (folder / name).write_bytes(content)
    (folder / "run.json").chmod(0)
    assert in_one_line(lambda: runs.read_starts(folder / "run.json")) == "error" or os.geteuid() == 0


def test_damaged_lines_of_a_log_are_left_out_and_the_run_goes_on(run, folder):
    path, lines = folder / "log.jsonl", (folder / "log.jsonl").read_bytes().splitlines()
    for name in ("step", "epoch", "loss/vv", "chance/vv"):
        for ill in ILL:  # which a curve has or leaves out
            path.write_bytes(b"\n".join([*lines, json.dumps(json.loads(lines[0]) | {name: ill}).encode(), b""]))
            visualize.plt.close(visualize.draw_curves(visualize.FigureConfig(), [str(folder)]))
    for text in CUT:
        path.write_bytes(text)
        assert in_one_line(lambda: visualize.draw_curves(visualize.FigureConfig(), [str(folder)])) == "error"
    damaged = [line for line in CUT if line]
    path.write_bytes(b"\n".join([lines[0], *damaged, *lines[1:]]))
    (folder / "bad_videos.log").write_bytes(b"step 1\t'a\xff.mp4'\tcut\nstep 2\t'b")
    assert len(visualize.read_log(str(folder))) == 3
    code, _, err = run(moco, "--resume", folder / "checkpoint.pt", "--max_steps", 4, small=False, dataset=None)
    assert code == 0, err
    assert (folder / "bad_videos.log").read_bytes() == b"step 1\t'a\xff.mp4'\tcut\n"
    assert path.read_bytes().splitlines()[:3] == lines and len(path.read_bytes().splitlines()) == 4


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(folder):
    (path := folder / "checkpoint.pt").chmod(0)
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        with pytest.raises(train.UserError, match=r"checkpoint\.pt can't be read: Permission denied"):
            runs.load_checkpoint(path)
    finally:
        os.seteuid(before)
    with pytest.raises(train.UserError, match="no checkpoint at"):
        runs.load_checkpoint(folder)
