"""What a run goes on with: its options, its data, and files that somebody may have changed."""

import dataclasses
import json
import math
import os
import shutil
from random import Random

import pytest
import torch
from conftest import options_of
from helpers import ALONE, CONV4, Bare, same, weights, write

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


def another(field, value):
    """Another value that the command line takes for an option, None if there is none."""
    allowed = field.metadata["allowed"]
    if field.type is str:
        return next((choice for choice in allowed if choice not in (value, "")), None) if allowed else f"{value}x"
    return value + 1 if value + 1 <= allowed[1] else (max(allowed[0], 0) + value) / 2


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)
def test_what_defines_a_run_stays_when_it_is_resumed_and_other_options_are_as_given(config_class, tmp_path):
    presets, free = CONFIGS[config_class], config_class.FREE | config_class.TUNED
    config = config_class(**presets.get("synthetic", {}) | dict(epochs=5, batch_size=4))
    save(path := tmp_path / "checkpoint.pt", 2, kind=config_class, **dataclasses.asdict(config))
    for field in dataclasses.fields(config_class):
        name, value = field.name, another(field, getattr(config, field.name))
        if value is None or name == "resume":
            continue
        try:
            found = cli.parse(config_class, "", presets, ["--resume", str(path), f"--{name}={value}"])
        except train.UserError as error:
            says = "" if name in free else f", not {value}: start anew"  # "": lists go in pairs
            assert f"--{name}" in str(error) and says in str(error) and name not in train.TrainConfig.TUNED
        else:
            given = {"resume": str(path), "out": str(tmp_path), name: value}
            assert name in free and found == dataclasses.replace(config, **given)


@pytest.mark.slow
def test_changed_data_are_said_and_need_a_flag(run, videos):
    shutil.copytree(videos, tree := run.path / "tree")
    small = [*CONV4, "--device", "cpu", "--workers", 0, "--max_steps", 1, "--dataset", "folder", "--data", tree]
    run.ok(moco, *small, "--batch_size", 4, "--out", "moco", dataset=None)
    run.ok(evaluate, "linear", *small, "--epochs", 2, "--batch_size", 6, "--clips", 1, "--out", "linear", dataset=None)
    tree = tree.rename(run.path / "moved")
    options = dict(small=False, dataset=None)
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


class Code:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def refused(says, function, *arguments, **options):
    with pytest.raises(train.UserError, match=says):
        function(*arguments, **options)


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(path := tmp_path / "checkpoint.pt", 2, bn="local", width=0.5)
    state, method = weights(path), Bare()

    def resumed(*flags, **changes):
        train.save_checkpoint(path, {name: value for name, value in (state | changes).items() if value is not None})
        return cli.parse(moco.MoCoConfig, "", argv=["--resume", str(path), *flags])

    assert resumed().bn == "shuffle"  # what is new has its default
    as_it_was = state["config"] | {"bn": "sync"}  # which there was
    refused("was made with --bn sync", resumed, config=as_it_was)
    assert resumed("--bn", "local", config=as_it_was).bn == "local"
    refused("was trained with --width 0.5, not 0.25", resumed, "--width=0.25")
    refused("is a checkpoint of FIMA, not of MoCo", resumed, method="FIMA")
    refused("is no checkpoint of this project", resumed, model=None)
    refused("no valid step in it", resumed, step=-1)
    refused("is of an older conv4", resumed, model={"units.0.conv3d.weight": torch.ones(1)})
    refused("is of an older conv4", resumed, model={"layers.12.weight": torch.ones(1)})
    refused("is of an older conv4", features.load_encoder, str(path))
    refused("holds code, which is never run", resumed, step=Code())
    assert not os.path.exists("it ran")
    refused("1 tensors differ, as bias", train.load_model, "it", method, {"weight": torch.ones(1, 3)})
    kept = {"state": {0: {"momentum_buffer": torch.ones(5)}}}
    refused("no valid optimizer", train.load_optimizer, "it", train.sgd(method, train.TrainConfig()), kept)
    path.write_bytes(path.read_bytes()[:1000])
    refused("is damaged", runs.load_checkpoint, path)
    refused("no checkpoint at", runs.load_checkpoint, tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.open(tmp_path, os.O_RDWR))  # as where it may not be read
    refused("can't be read: Is a directory", runs.load_checkpoint, path)


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
    some = [case for case in cases if len(case[0]) == 1] + Random(0).sample(cases, 30)
    for place, bad, copy in cases if os.environ.get("ALL_PLACES") else some:
        monkeypatch.setattr(torch, "load", lambda *_, copy=copy, **__: copy)
        for reader, expected in zip(readers, undisturbed, strict=True):
            outcome = in_one_line(reader)
            assert reader is found or outcome == "error" or same(outcome, expected), (place, bad, reader)


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
