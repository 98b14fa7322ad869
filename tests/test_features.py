"""Files of features: what they hold, resuming, processes, and the same numbers from them as from the videos."""

import json
import os
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ALONE, ROOT, free_port
from PIL import Image

import cli
import evaluate
import features
import find

UNTRAINED = ["--encoder", "conv4", "--width", 0.25, "--crop", 32, "--frames", 8, "--device", "cpu", "--workers", 0]
FLAGS = [*UNTRAINED, "--clips", 3, "--out", "f.npz"]


@pytest.fixture(autouse=True)
def two_videos_a_part(monkeypatch):
    monkeypatch.setattr(features, "PART", 2)


@pytest.fixture
def stored(run, tmp_path_factory):
    """A file of the generated videos, of which one training and one test video can't be read."""
    shutil.copytree(run.videos, run.path / "damaged")
    for part in ("train/rise/rise_0002", "test/fall/fall_0001"):
        (run.path / "damaged" / f"{part}.mp4").write_bytes(b"no video")
    return run, ["--dataset", "folder", "--data", "damaged"]


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def same_file(a, b):
    a, b = load(a), load(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype == np.float32) for k in a)


@pytest.mark.parametrize(
    "flags, shape",
    [([], (3, 24)), (["--normalise", "off"], (3, 24)), (["--map"], (3, 24, 1, 4, 4))],
)
def test_a_file_has_the_outputs_of_all_videos_in_order(run, flags, shape):
    out = run.ok(evaluate, "features", *FLAGS, "--test_batch", 3, *flags)
    file = load(run.path / "f.npz")
    lists = [find.find_videos("synthetic", run.videos, train) for train in (True, False)]
    assert file["paths"].tolist() == lists[0].paths + lists[1].paths
    assert file["labels"].tolist() == lists[0].labels + lists[1].labels and file["classes"].tolist() == lists[0].classes
    assert file["test"].tolist() == [False] * 18 + [True] * 10
    np.testing.assert_allclose(file["starts"], [[0, 12 / 25, 25 / 25]] * 28, atol=1e-6)  # 40 frames, 26 starts
    encoder, config = features.load_encoder(features.EncoderConfig(**options_of(FLAGS), dataset="synthetic"))

    def outputs(clips):
        maps = encoder(features.encoder_input(clips))
        maps = maps if "--map" in flags else maps.mean((2, 3, 4))
        return maps if "off" in flags else maps / maps.norm(dim=1, keepdim=True)

    for videos, found in zip(lists, np.split(file["features"], [18]), strict=True):
        expected, *_ = features.video_outputs(outputs, videos, config, ALONE, "", average=False)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert file["features"].shape == (28, *shape) and file["features"].dtype == np.float32
    assert [path.name for path in run.path.iterdir()] == ["f.npz"]
    names = {}
    exec("\n".join(line.strip() for line in out.splitlines()[-2:]), names)
    np.testing.assert_array_equal(names["features"], file["features"])
    run.refused(evaluate, "features", *FLAGS, says=["f.npz is there already"])


def options_of(flags):
    given = dict(zip([str(flag)[2:] for flag in flags[::2]], flags[1::2], strict=True))
    return {name: value for name, value in given.items() if name != "out"}


def test_after_a_kill_only_the_rest_is_computed(run, monkeypatch):
    run.ok(evaluate, "features", *FLAGS)
    (run.path / "f.npz").rename(run.path / "whole.npz")
    whole, calls = features.clip_outputs, iter([False] * 5 + [True])

    def killed(*arguments, **more):
        if next(calls):
            raise KeyboardInterrupt
        return whole(*arguments, **more)

    monkeypatch.setattr(features, "clip_outputs", killed)
    assert run(evaluate, "features", *FLAGS)[0] == 130
    monkeypatch.setattr(features, "clip_outputs", whole)
    (partial,) = run.path.glob("f.npz.*.partial")
    with open(partial, "ab") as file:
        file.write(b"half a row")
    read = mock.Mock(side_effect=features.data.Video)
    monkeypatch.setattr(features.data, "Video", read)
    run.ok(evaluate, "features", *FLAGS[:-1], "other.npz", "--crop", 48)
    assert read.call_count == 28 and partial.exists()  # other features are not those of a part
    run.ok(evaluate, "features", *FLAGS)
    assert read.call_count == 28 + 18 and same_file(run.path / "f.npz", run.path / "whole.npz")
    assert {path.name for path in run.path.iterdir()} == {"f.npz", "whole.npz", "other.npz"}


def features_as(rank, world, port, videos, out):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    features.PART = 8
    sys.argv = ["evaluate.py", "features", *map(str, FLAGS), "--dataset=synthetic", f"--data={videos}", f"--out={out}"]
    evaluate.main()
    cli.end_process()


@pytest.mark.slow
def test_two_processes_write_the_same_file_as_one(run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(features_as, (2, free_port(), run.videos, run.path / "two.npz"), 2)
    run.ok(evaluate, "features", *FLAGS)
    assert same_file(run.path / "f.npz", run.path / "two.npz")


def test_unreadable_videos_are_named_once_and_numbers_from_the_file_are_those_from_the_videos(stored):
    run, where = stored
    out = run.ok(evaluate, "features", *FLAGS, *where, dataset=None)
    assert out.count("rise_0002.mp4' cannot be read") == out.count("fall_0001.mp4' cannot be read") == 1
    file = load(run.path / "f.npz")
    bad = np.isnan(file["features"]).all((1, 2))
    assert [os.path.basename(path) for path in file["paths"][bad]] == ["rise_0002.mp4", "fall_0001.mp4"]
    assert np.isfinite(file["features"][~bad]).all()
    says = ["--crop 48: f.npz was made with 32"]
    run.refused(evaluate, "knn", "--features", "f.npz", "--crop", 48, dataset=None, says=says)
    shutil.move(run.path / "damaged", run.path / "videos")
    given = ["--dataset", "folder", "--data", "videos", *UNTRAINED, "--clips", 3]
    for protocol in ("retrieve", "knn", "svm"):
        run.ok(evaluate, protocol, "--features", "f.npz", dataset=None)
        run.ok(evaluate, protocol, *given, "--out", "videos.json", dataset=None)
        own = run.path / "runs" / "untrained_conv4" / f"{protocol}_folder.json"
        found, expected = (json.loads(path.read_text()) for path in (own, run.path / "videos.json"))
        unreadable = found["result"].pop("unreadable")
        assert [os.path.basename(path) for path, _ in unreadable] == ["fall_0001.mp4"]
        del expected["result"]["unreadable"]
        assert found["result"] == expected["result"] and found["config"]["features"] == "f.npz"
        assert found["config"]["crop"] == 32 and found["config"]["clips"] == 3


@pytest.mark.parametrize("flags", [[], ["--normalise", "off"]])
def test_linear_trains_on_the_clips_of_the_file(run, flags):
    run.ok(evaluate, "features", *FLAGS, *flags)
    own = ["--features", "f.npz", "--epochs", 4, "--batch_size", 6, "--device", "cpu"]
    out = run.ok(evaluate, "linear", *own, "--out", "linear", dataset=None)
    result = json.loads((run.path / "linear" / "result.json").read_text())["result"]
    assert result["training_videos"] == 18 and result["test_videos"] == 10 and "of 10 test videos" in out
    saved = torch.load(run.path / "linear" / "checkpoint.pt")["model"]
    assert saved.keys() == {"fc.weight", "fc.bias", "encoder.sum"}
    file = load(run.path / "f.npz")
    units = torch.from_numpy(file["features"][file["test"]]).view(10, -1, 24)
    units = units / units.norm(dim=2, keepdim=True)
    scores = (units @ saved["fc.weight"].T + saved["fc.bias"]).softmax(2).mean(1)
    hits = (scores.argmax(1) == torch.from_numpy(file["labels"][file["test"]])).double().mean()
    assert result["top1_percent"] == pytest.approx(100 * hits.item())
    run.ok(evaluate, "linear", *own, "--fraction", 0.5, "--out", "few", dataset=None)
    result = json.loads((run.path / "few" / "result.json").read_text())["result"]
    assert result["training_videos"] == 10
    assert "nothing left to train" in run.ok(evaluate, "linear", "--resume", "linear/checkpoint.pt", dataset=None)


def test_videos_need_neither_labels_nor_a_test_part(run):
    (run.path / "films").mkdir()
    for n, path in enumerate(sorted(run.videos.glob("train/*/*.mp4"))[:3]):
        shutil.copy(path, run.path / "films" / f"{n}.mp4")
    (run.path / "list.txt").write_text("2.mp4\n0.mp4\n")
    where = ["--dataset", "folder", "--data", "films"]
    for more, names in ([[], "012"], [["--list_file", run.path / "list.txt"], "20"]):
        run.ok(evaluate, "features", *FLAGS, *where, *more, dataset=None)
        file = load(run.path / "f.npz")
        assert [os.path.basename(path) for path in file["paths"]] == [f"{n}.mp4" for n in names]
        assert (file["labels"] == -1).all() and not file["test"].any() and file["features"].shape == (len(names), 3, 24)
        run.refused(evaluate, "knn", "--features", "f.npz", dataset=None, says=["videos without labels"])
        (run.path / "f.npz").unlink()
    run.refused(evaluate, "features", *FLAGS, *where, "--test_list", "no.txt", dataset=None, says=["no.txt"])


def test_a_file_that_does_not_serve_is_refused_in_one_line(run):
    run.ok(evaluate, "features", *FLAGS, "--map")
    knn = [evaluate, "knn", "--features", "f.npz"]
    run.refused(*knn, dataset=None, says=["f.npz has feature maps"])
    (run.path / "f.npz").unlink()
    classes = run.videos / "train"
    run.ok(evaluate, "features", *FLAGS, "--dataset", "folder", "--data", classes, dataset=None)
    run.refused(*knn, dataset=None, says=["no test videos"])
    run.refused(evaluate, "finetune", "--features", "f.npz", dataset=None, says=["finetune trains the encoder"])
    content = (run.path / "f.npz").read_bytes()
    np.savez(run.path / "other.npz", features=np.zeros((3, 4)))
    np.save(run.path / "array.npy", np.zeros((3, 4)))
    (run.path / "cut.npz").write_bytes(content[:-100])
    (run.path / "flipped.npz").write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    (run.path / "empty.npz").touch()
    for name in ("other.npz", "array.npy", "cut.npz", "flipped.npz", "empty.npz"):
        says = [f"{name} can't be read as a file of `evaluate.py features`"]
        run.refused(evaluate, "knn", "--features", name, dataset=None, says=says)
    run.refused(evaluate, "knn", "--features", "none.npz", dataset=None, says=["none.npz", "No such file"])


def test_torch_hub_gives_the_encoder(trained, tmp_path):
    import moco

    path = trained(tmp_path / "run", moco) / "checkpoint.pt"
    encoder = torch.hub.load(str(ROOT), "fima", source="local", checkpoint=str(path))
    expected, _ = features.load_encoder(str(path.parent))
    clips = torch.randn(2, 3, 8, 48, 48)
    with torch.no_grad():
        assert not encoder.training and torch.equal(encoder(clips), expected(clips))
    untrained = torch.hub.load(str(ROOT), "fima", source="local", encoder="conv4", width=0.25)
    assert untrained.out_channels == 24


def test_clips_of_frame_folders_begin_by_the_frame_rate(run):
    path = find.find_videos("synthetic", run.videos, True).paths[0]
    for folder in ("a", "b"):
        (run.path / "films" / folder).mkdir(parents=True)
        with features.data.Video(path) as video:
            for k, image in enumerate(video.read(range(40))):
                Image.fromarray(image).save(run.path / "films" / folder / f"{k}.png")
    run.ok(evaluate, "features", *FLAGS, "--dataset=folder", "--data=films", "--frame_rate=10", dataset=None)
    np.testing.assert_allclose(load(run.path / "f.npz")["starts"], [[0, 1.2, 2.5]] * 2, atol=1e-6)  # 26 starts
