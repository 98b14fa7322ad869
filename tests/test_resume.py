"""What a run goes on with: its options, its data, and files that somebody may have changed."""

import dataclasses
import json
import math
import os
import shutil
from random import Random

import conftest
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
        name, value = field.name, another(field, getattr(config, field.name))
        if value is None or name == "resume":
            continue
        shutil.rmtree(tmp_path / "resumed", ignore_errors=True)
        if name not in config_class.FREE | config_class.TUNED:
            with pytest.raises(train.UserError, match=rf"with --{name} .*, not {value}: start anew"):
                resumed(f"--{name}={value}")
        elif name in train.TrainConfig.TUNED:
            assert not same(fit_tiny(resumed(f"--{name}={value}")), undisturbed), name
        else:
            try:
                assert getattr(resumed(f"--{name}={value}"), name) == value
            except train.UserError as error:  # as lists that go in pairs
                assert f"--{name}" in str(error)


@pytest.mark.slow
def test_changed_data_are_said_and_need_a_flag(run, videos):
    tree, away = run.path / "tree", run.path / "away"
    shutil.copytree(videos, tree)
    lists = {}
    for part in ("train", "test"):
        paths = sorted(tree.glob(f"{part}/*/*.mp4"))
        lists[part] = [f"{path.relative_to(tree)} {path.parent.name}\n" for path in paths]
        (run.path / f"{part}.txt").write_text("".join(lists[part]))
    small = [*conftest.CONV4, "--device", "cpu", "--max_steps", 1, "--dataset", "folder", "--data", tree]
    probe = ["--list_file", "train.txt", "--test_list", "test.txt", "--epochs", 2, "--batch_size", 6, "--clips", 1]
    run.ok(moco, *small, "--batch_size", 4, "--out", "moco", dataset=None)
    run.ok(evaluate, "linear", *small, *probe, "--out", "linear", dataset=None)
    tree = tree.rename(run.path / "moved")

    def words(script, *flags):
        name = "moco" if script is moco else "linear"
        checkpoint = ["--resume", f"{name}/checkpoint.pt", "--data", tree]
        return script, *["linear"] * (script is evaluate), *checkpoint, *flags

    def resume(script, *flags):
        return run.ok(*words(script, *flags), small=False, dataset=None)

    def refused(script, says):
        run.refused(*words(script, "--max_steps", 3), small=False, dataset=None, says=[says, "--changed_data"])

    for script in (moco, evaluate):  # which move with their folder
        out = resume(script, "--max_steps", 2)
        assert "resumed after step 1" in out and "other data" not in out
    first, second, *_ = sorted(tree.glob("train/*/*.mp4"))
    name, new, content = str(first.relative_to(tree)), first.with_name("new.mp4"), first.read_bytes()
    first.rename(away)
    refused(moco, f"videos: 1 fewer ({name!r})")
    shutil.copy(away, new)
    refused(moco, f"1 more ({str(new.relative_to(tree))!r}), 1 fewer ({name!r})")
    new.rename(first)
    first.write_bytes(content + b"\0")
    refused(moco, f"videos: 1 of another size ({name!r})")
    refused(evaluate, f"training videos: 1 of another size ({name!r})")
    first.write_bytes(content)
    for part, title in (("train", "training videos"), ("test", "test videos")):
        paths, labels = zip(*(line.split() for line in lists[part]), strict=True)
        classes = sorted(set(labels))
        turned = dict(zip(classes, classes[1:] + classes[:1], strict=True))
        changed = [f"{path} {turned[label]}\n" for path, label in zip(paths, labels, strict=True)]
        (run.path / f"{part}.txt").write_text("".join(changed))
        refused(evaluate, f"{title}: {len(labels)} with another label ({paths[0]!r})")
        (run.path / f"{part}.txt").write_text("".join(reversed(lists[part])))
        refused(evaluate, f"{title}: in another order")
        (run.path / f"{part}.txt").write_text("".join(lists[part]))
    second.write_bytes(second.read_bytes() + b"\0")
    out = resume(moco, "--max_steps", 3, "--changed_data")
    assert "note: goes on with other data" in out and "1 of another size" in out
    assert "other data" not in resume(moco, "--max_steps", 4)  # it has seen these now


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
    run.ok(fima, *conftest.CONV4, "--epochs", 2, "--max_steps", 3, "--out", "run", dataset="folder")
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
    run.ok(moco, *flags, dataset="folder")
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
            in_one_line(lambda: runs.open_record(started, folder))
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
    run.ok(moco, "--resume", folder / "checkpoint.pt", "--max_steps", 4, small=False, dataset=None)
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
