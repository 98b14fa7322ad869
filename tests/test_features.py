"""Files of features: what they hold, resuming, and the same numbers from them as from the videos."""

import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ALONE, CONV4, ROOT
from PIL import Image
from test_evaluate import numbers

import evaluate
import features
import find

UNTRAINED = [*CONV4, "--frames=8", "--clips=3", "--device=cpu", "--workers=0"]
FLAGS = [*UNTRAINED, "--out=f.npz"]


@pytest.fixture
def damaged(run):
    """Flags of the generated videos, of which one training and one test video can't be read."""
    shutil.copytree(run.videos, run.path / "damaged")
    for part in ("train/rise/rise_0002", "test/fall/fall_0001"):
        (run.path / "damaged" / f"{part}.mp4").write_bytes(b"no video")
    return ["--dataset=folder", "--data=damaged"]


def load(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("flag, shape", [("--map=off", (24,)), ("--normalise=off", (24,)), ("--map", (24, 1, 4, 4))])
def test_a_file_has_the_outputs_of_all_videos_in_order(run, flag, shape):
    out = run.ok(evaluate, "features", *FLAGS, "--test_batch=3", flag)
    file = load(run.path / "f.npz")
    train, test = (find.find_videos("synthetic", run.videos, part) for part in (True, False))
    assert file["paths"].tolist() == train.paths + test.paths
    assert file["labels"].tolist() == train.labels + test.labels and file["classes"].tolist() == train.classes
    assert file["test"].tolist() == [False] * 18 + [True] * 10
    np.testing.assert_allclose(file["starts"], [[0, 12 / 25, 25 / 25]] * 28, atol=1e-6)  # 40 frames, 26 starts
    config = features.EncoderConfig(encoder="conv4", width=0.25, crop=32, frames=8, clips=3, workers=0)
    encoder, config = features.load_encoder(config)

    def outputs(clips):
        maps = encoder(features.encoder_input(clips))
        maps = maps if flag == "--map" else maps.mean((2, 3, 4))
        return maps if flag == "--normalise=off" else maps / maps.norm(dim=1, keepdim=True)

    both = features.data.VideoList(train.paths + test.paths, [], [], "")
    expected, *_ = features.video_outputs(outputs, both, config, ALONE, "", average=False)
    np.testing.assert_allclose(file["features"], expected, atol=1e-5)
    assert file["features"].shape == (28, 3, *shape) and file["features"].dtype == np.float32
    assert os.listdir(run.path) == ["f.npz"]
    names = {}
    exec("\n".join(line.strip() for line in out.splitlines()[-2:]), names)
    np.testing.assert_array_equal(names["features"], file["features"])
    run.refused(evaluate, "features", *FLAGS, says=["f.npz is there already"])


def test_after_a_kill_only_the_rest_is_computed(run, monkeypatch):
    run.ok(evaluate, "features", *FLAGS, "--out=whole.npz")
    monkeypatch.setattr(features, "PART", 2)
    killed = mock.Mock(wraps=features.clip_outputs, side_effect=[mock.DEFAULT] * 5 + [KeyboardInterrupt])
    with monkeypatch.context() as patch:
        patch.setattr(features, "clip_outputs", killed)
        assert run(evaluate, "features", *FLAGS)[0] == 130
    (partial,) = run.path.glob("f.npz.*.partial")
    with open(partial, "ab") as file:
        file.write(b"half a row")
    monkeypatch.setattr(features.data, "Video", read := mock.Mock(side_effect=features.data.Video))
    run.ok(evaluate, "features", *FLAGS, "--crop=48")
    assert read.call_count == 28 and partial.exists()  # other features are not those of a part
    (run.path / "f.npz").rename(run.path / "other.npz")
    run.ok(evaluate, "features", *FLAGS)
    found, whole = load(run.path / "f.npz"), load(run.path / "whole.npz")
    assert read.call_count == 28 + 18 and found.keys() == whole.keys()
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert {*os.listdir(run.path)} == {"f.npz", "whole.npz", "other.npz"}


def test_unreadable_videos_are_named_once_and_numbers_from_the_file_are_those_from_the_videos(run, damaged):
    out = run.ok(evaluate, "features", *FLAGS, *damaged, dataset=None)
    assert out.count("rise_0002.mp4' cannot be read") == out.count("fall_0001.mp4' cannot be read") == 1
    file = load(run.path / "f.npz")
    bad = np.isnan(file["features"]).all((1, 2))
    assert [os.path.basename(path) for path in file["paths"][bad]] == ["rise_0002.mp4", "fall_0001.mp4"]
    assert np.isfinite(file["features"][~bad]).all()
    says = ["--crop 48: f.npz was made with 32"]
    run.refused(evaluate, "knn", "--features=f.npz", "--crop=48", dataset=None, says=says)
    shutil.move(run.path / "damaged", run.path / "videos")
    for protocol in ("retrieve", "knn", "svm"):
        run.ok(evaluate, protocol, "--features=f.npz", dataset=None)
        out = run.ok(evaluate, protocol, *UNTRAINED, *damaged, "--data=videos", "--out=videos.json", dataset=None)
        assert out.count("mp4' cannot be read") == 2
        own = run.path / "runs" / "untrained_conv4" / f"{protocol}_folder.json"
        found, expected = (json.loads(path.read_text()) for path in (own, run.path / "videos.json"))
        for record in (found, expected):
            ((path, _),) = record["result"].pop("unreadable")
            assert os.path.basename(path) == "fall_0001.mp4"
        assert found["result"] == expected["result"] and found["config"]["features"] == "f.npz"
        assert found["config"]["crop"] == 32 and found["config"]["clips"] == 3
        if protocol == "retrieve":
            assert list(found["result"]["recall_percent"]) == ["R@1", "R@5", "R@10", "R@20", "R@50"]
            assert found["result"]["recall_percent"]["R@50"] == 90
            assert found["result"]["chance_percent"]["R@5"] == 44.85  # 7 classes have 2 of 17 videos, and 3 have 1
            assert found["result"]["queries"] == 10 and found["result"]["gallery"] == 17


@pytest.mark.parametrize("switch", ["on", "off"])
def test_linear_trains_on_the_clips_of_the_file(run, damaged, switch):
    run.ok(evaluate, "features", *FLAGS, *damaged, "--normalise", switch, dataset=None)
    own = ["--features=f.npz", "--epochs=4", "--batch_size=6", "--device=cpu"]
    out = run.ok(evaluate, "linear", *own, "--out=linear", dataset=None)
    result = numbers(run.path / "linear" / "result.json")
    assert result["training_videos"] == 17 and result["test_videos"] == 10 and "of 10 test videos" in out
    saved = torch.load(run.path / "linear" / "checkpoint.pt")["model"]
    assert saved.keys() == {"fc.weight", "fc.bias", "encoder.sum"}
    file = load(run.path / "f.npz")
    units = torch.from_numpy(file["features"][file["test"]])
    units = units / units.norm(dim=2, keepdim=True)
    scores = (units @ saved["fc.weight"].T + saved["fc.bias"]).softmax(2).mean(1)
    hits = (scores.argmax(1) == torch.from_numpy(file["labels"][file["test"]])) & scores.isfinite().all(1)
    assert result["top1_percent"] == pytest.approx(100 * hits.double().mean().item())
    run.ok(evaluate, "linear", *own, "--fraction=0.5", "--out=few", dataset=None)
    assert numbers(run.path / "few" / "result.json")["training_videos"] == 9
    assert "nothing left to train" in run.ok(evaluate, "linear", "--resume=linear/checkpoint.pt", dataset=None)


def test_videos_need_neither_labels_nor_a_test_part(run):
    (run.path / "films").mkdir()
    for n, path in enumerate(sorted(run.videos.glob("train/*/*.mp4"))[:3]):
        shutil.copy(path, run.path / "films" / f"{n}.mp4")
    (run.path / "list.txt").write_text("2.mp4\n0.mp4\n")
    where = ["--dataset=folder", "--data=films"]
    for more, names in ([[], "012"], [["--list_file", run.path / "list.txt"], "20"]):
        run.ok(evaluate, "features", *FLAGS, *where, *more, dataset=None)
        file = load(run.path / "f.npz")
        assert [os.path.basename(path) for path in file["paths"]] == [f"{n}.mp4" for n in names]
        assert (file["labels"] == -1).all() and not file["test"].any() and file["features"].shape == (len(names), 3, 24)
        run.refused(evaluate, "knn", "--features=f.npz", dataset=None, says=["videos without labels"])
        (run.path / "f.npz").unlink()
    run.refused(evaluate, "features", *FLAGS, *where, "--test_list=no.txt", dataset=None, says=["no.txt"])


def test_a_file_that_does_not_serve_is_refused_in_one_line(run):
    run.ok(evaluate, "features", *FLAGS, "--map", "--out=maps.npz")
    run.ok(evaluate, "features", *FLAGS, "--dataset=folder", f"--data={run.videos / 'train'}", dataset=None)
    content = (run.path / "f.npz").read_bytes()
    np.savez(run.path / "other.npz", features=np.zeros((3, 4)))
    np.save(run.path / "array.npy", np.zeros((3, 4)))
    (run.path / "cut.npz").write_bytes(content[:-100])
    (run.path / "flipped.npz").write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    (run.path / "empty.npz").touch()
    says = dict.fromkeys(("other.npz", "array.npy", "cut.npz", "flipped.npz", "empty.npz"), "as a file of `evaluate.py")
    says |= {"maps.npz": "has feature maps", "f.npz": "no test videos", "none.npz": "No such file"}
    for name, words in says.items():
        run.refused(evaluate, "knn", "--features", name, dataset=None, says=[name, words])
    run.refused(evaluate, "finetune", "--features=f.npz", dataset=None, says=["finetune trains the encoder"])


@torch.no_grad()
def test_torch_hub_gives_the_encoder():
    encoder = torch.hub.load(str(ROOT), "fima", source="local", checkpoint="small")
    clips = torch.randn(2, 3, 8, 32, 32)
    assert not encoder.training and torch.equal(encoder(clips), features.load_encoder("small")[0](clips))
    untrained = torch.hub.load(str(ROOT), "fima", source="local", encoder="conv4", width=0.25)
    assert untrained.out_channels == 24


def test_clips_of_frame_folders_begin_by_the_frame_rate(run):
    (folder := run.path / "films" / "a").mkdir(parents=True)
    with features.data.Video(str(run.videos / "test" / "rise" / "rise_0001.mp4")) as video:
        for k, image in enumerate(video.read(range(40))):
            Image.fromarray(image).save(folder / f"{k}.png")
    run.ok(evaluate, "features", *FLAGS, "--dataset=folder", "--data=films", "--frame_rate=10", dataset=None)
    np.testing.assert_allclose(load(run.path / "f.npz")["starts"], [[0, 1.2, 2.5]], atol=1e-6)  # 26 starts
