"""Evaluation: measures against plain loops, each protocol from its command line, resuming, processes, bad videos."""

import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import conftest
import encoding
import numpy as np
import pytest
import torch
from helpers import ALONE, free_port, one_line, same
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import augment
import cli
import data
import evaluate
import features
import fima
import find
import moco
import pretrain
import processes
import runs
import synthetic
import train
from train import Process
from video import Video

UNTRAINED = ["--encoder", "r3d_18", "--width", 0.0625, "--crop", 48]
FAST = ["--clips", 2, "--workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def pretrained(videos, tmp_path_factory):
    """A checkpoint of two steps of MoCo, whose batch-norm statistics are no round numbers."""
    out = tmp_path_factory.mktemp("pretrained")
    flags = [*conftest.SMALL, "--workers=0", "--max_steps=2", "--dataset=synthetic", f"--data={videos}", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moco.py", *flags])
        pretrain.main(moco.MoCo, moco.MoCoConfig, moco.PRESETS, "")
    return out / "checkpoint.pt"


def numbers(path):
    return json.loads(path.read_text())["result"]


def encoder_of(path):
    return {k: v for k, v in runs.load_checkpoint(path)["model"].items() if k.startswith("encoder.")}


# --------------------------------------------------------------------------------------------------------- measures


def neighbours_by_loops(query, gallery):
    """(cosine, index) of every gallery video, nearest first."""
    cosines = [float(query @ other / (query.norm() * other.norm())) for other in gallery]
    return sorted(((cosine, i) for i, cosine in enumerate(cosines)), reverse=True)


def draw(seed, queries, gallery, classes):
    generator = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (queries, gallery))
    return q, g, *(torch.randint(classes, (n,), generator=generator) for n in (queries, gallery))


SIZES = (st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 15), st.integers(1, 7))


@given(*SIZES)
def test_recall_equals_the_plain_loop(seed, queries, gallery, classes):
    q, g, labels, gallery_labels = draw(seed, queries, gallery, classes)
    hits = evaluate.recall_at_k(q, labels, g, gallery_labels, (1, 2, 5, 50))
    for k, hit in hits.items():
        for query, label, found in zip(q, labels, hit.tolist(), strict=True):
            assert found == any(gallery_labels[i] == label for _, i in neighbours_by_loops(query, g)[:k])
    assert (hits[1] <= hits[2]).all() and (hits[2] <= hits[5]).all() and (hits[5] <= hits[50]).all()


@given(*SIZES, st.sampled_from([1, 3, 20]), st.sampled_from([0.07, 1.0]))
def test_votes_of_neighbours_equal_the_plain_loop(seed, queries, gallery, classes, k, temperature):
    q, g, _, gallery_labels = draw(seed, queries, gallery, classes)
    scores = evaluate.knn_scores(q, g, gallery_labels, classes, k, temperature)
    for query, found in zip(q, scores.tolist(), strict=True):
        votes = [0.0] * classes
        for cosine, i in neighbours_by_loops(query, g)[:k]:
            votes[gallery_labels[i]] += math.exp(cosine / temperature)
        assert found == pytest.approx([vote / sum(votes) for vote in votes])


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_top_k_equals_the_plain_loop_and_ties_count_against(seed, videos, classes, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (videos, classes), generator=generator).float()  # many ties
    labels = torch.randint(classes, (videos,), generator=generator)
    for row, label, found in zip(scores.tolist(), labels.tolist(), evaluate.in_top_k(scores, labels, k), strict=True):
        others = [score for c, score in enumerate(row) if c != label]
        assert bool(found) == (sum(score >= row[label] for score in others) < k)
    assert not evaluate.in_top_k(torch.full((1, 6), math.nan), torch.tensor([2]), 5).any()  # no number is no hit


def test_accuracies_by_hand(tmp_path, capsys, monkeypatch):
    """Five test videos of four classes, of which one has none, and the last video is unreadable."""
    test = data.VideoList(["a", "b", "c", "d", "e"], [0, 0, 1, 3, 3], ["w", "x", "y", "z"], "")
    scores, good, bad = torch.eye(4)[[0, 1, 1, 3, 3]], torch.tensor([True] * 4 + [False]), [("e", "cut")]
    config = evaluate.KnnConfig(dataset="folder", encoder="i3d", out=str(tmp_path / "knn.json"))
    drawn = []
    monkeypatch.setattr(evaluate, "draw_confusion", lambda path, percent, *_: drawn.append(percent.tolist()))
    evaluate.save_accuracy(ALONE, config, test, scores, good, bad, {"gallery": 7})
    record = json.loads((tmp_path / "knn.json").read_text())
    assert record["result"] == {
        "top1_percent": 60.0,
        "top5_percent": 80.0,
        "mean_class_percent": 66.67,
        "per_class_percent": {"w": 50.0, "x": 100.0, "y": None, "z": 50.0},
        "test_videos": 5,
        "unreadable": [["e", "cut"]],
        "gallery": 7,
    }
    assert record["protocol"] == "knn" and record["config"]["k"] == 20 and record["versions"] == runs.versions()
    assert {"command", "git_commit", "processes"} <= record.keys()
    assert "top1 60.0 %" in capsys.readouterr().out
    (tmp_path / "knn.json").unlink()
    evaluate.save_accuracy(Process(1, 2, ALONE.device), config, test, scores, good, [], {})
    assert not (tmp_path / "knn.json").exists() and capsys.readouterr().out == ""
    assert drawn == [[[50, 50, 0, 0], [0, 100, 0, 0], [0, 0, 0, 0], [0, 0, 0, 50]]]  # true, predicted


@pytest.mark.parametrize("count", [10, pytest.param(101, marks=pytest.mark.slow)])
def test_confusion_matrix_is_drawn_with_every_name(count, tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **how: drawn.append(figure) or save(figure, *given))
    names = ["a$b^$", "r\udcff", *(f"Playing{i:03}" for i in range(2, count))]  # no formulas, and no text
    percent = 100 * torch.eye(count)
    percent[0, :2] = torch.tensor([70, 30])
    evaluate.draw_confusion(tmp_path / "confusion.png", percent, names, "title")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array()[0, 1] == 30  # true, predicted
    assert [text.get_position() for text in axes.texts if text.get_text() == "30"] == [(1, 0)] * (count == 10)
    assert all(
        [label.get_text() for label in axis.get_ticklabels()][2:] == names[2:] for axis in (axes.xaxis, axes.yaxis)
    )
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(train.UserError, match="Is a directory"):
        evaluate.draw_confusion(tmp_path / "folder.png", percent, names, "title")


# ------------------------------------------------------------------------------------------------ videos and outputs


class Constant(torch.nn.Module):
    """An encoder whose two features are a clip's mean brightness and 1."""

    out_channels = 2

    def forward(self, clips):
        mean = clips.mean((1, 2, 3, 4))
        return torch.stack([mean, torch.ones_like(mean)], 1)[..., None, None, None]


def test_features_come_in_the_order_of_the_videos_and_bad_ones_are_marked(videos):
    listed = evaluate.find_labelled("synthetic", videos, train=False, split=1)
    listed.paths[3] = "nowhere.mp4"
    clips = data.TestClips(listed, 48, clips=2)
    encoder = Constant().train()
    found, good, bad = features.clip_outputs(features.unit_features(encoder), clips, ALONE, 2, 3, "")
    assert not encoder.training
    assert good.tolist() == [i != 3 for i in range(10)] and [path for path, _ in bad] == ["nowhere.mp4"]
    for i in (0, 9):
        expected = Constant()(augment.normalize(clips[i]["clips"] / 255))[..., 0, 0, 0]
        torch.testing.assert_close(found[i], torch.nn.functional.normalize(expected, dim=1))


def test_features_are_means_over_time_and_space():
    maps = torch.randn(2, 5, 3, 4, 4)
    pooled = features.pooled_features(lambda _: maps, torch.zeros(2, 3, 2, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(pooled, maps.flatten(2).mean(2))


def test_no_output_that_is_not_finite_and_none_of_unreadable_videos_alone(videos):
    listed = evaluate.find_labelled("synthetic", videos, train=False, split=1)
    calls = itertools.count()

    def outputs(clips):
        return torch.full((len(clips), 1), math.inf if next(calls) == 3 else 1.0)

    with pytest.raises(train.UserError, match="held-out: the network's outputs are not finite for 1 of 10") as error:
        features.clip_outputs(outputs, data.TestClips(listed, 16, clips=1), ALONE, 0, 1, "held-out")
    assert repr(listed.paths[3]) in str(error.value)
    bad = dataclasses.replace(listed, paths=["nowhere.mp4"] * 10)
    with pytest.raises(train.UserError, match="held-out: none of 10 can be read"):
        features.clip_outputs(outputs, data.TestClips(bad, 16, clips=1), ALONE, 0, 1, "held-out")


def test_class_probabilities_are_averaged_over_clips(videos):
    clips = data.TestClips(evaluate.find_labelled("synthetic", videos, train=False, split=1), 48, clips=3)
    classifier = evaluate.Classifier(Constant(), 10, frozen=False, dropout=0.9).eval()
    torch.nn.init.normal_(classifier.fc.weight, std=5)
    found, _, _ = features.clip_outputs(classifier.probabilities, clips, ALONE, 0, 4, "", average=True)
    for i, row in enumerate(found.tolist()):
        expected = [0.0] * 10
        for clip in clips[i]["clips"]:
            logits = classifier.fc(Constant()(augment.normalize(clip[None] / 255))[0, :, 0, 0, 0]).tolist()
            total = sum(math.exp(logit) for logit in logits)
            expected = [p + math.exp(logit) / total / 3 for p, logit in zip(expected, logits, strict=True)]
        assert row == pytest.approx(expected, abs=1e-5)


def test_a_fraction_is_of_each_class_and_at_least_one_video():
    labels = [0] * 40 + [1] * 4 + [2] * 21
    videos = data.VideoList([f"{i}" for i in range(65)], labels, ["a", "b", "c", "none"], "")
    few = evaluate.share_of(videos, 0.1, seed=0)
    assert [few.labels.count(label) for label in range(4)] == [4, 1, 2, 0]
    assert all(labels[int(path)] == label for path, label in zip(few.paths, few.labels, strict=True))
    assert few == evaluate.share_of(videos, 0.1, seed=0) and few.paths != evaluate.share_of(videos, 0.1, seed=1).paths
    assert evaluate.share_of(videos, 1.0, seed=0).paths == videos.paths
    alike = evaluate.share_of(data.VideoList(list(range(80)), [0, 1] * 40, ["a", "b"], ""), 0.1, seed=0)
    assert {n // 2 for n in alike.paths if n % 2} != {n // 2 for n in alike.paths if n % 2 == 0}  # each class its own


# -------------------------------------------------------------------------------------------------------- protocols


def test_learning_rates_are_the_papers_at_each_epoch():
    linear, finetune = evaluate.LinearConfig(), evaluate.FinetuneConfig()
    assert (linear.epochs, finetune.epochs) == (100, 150) and linear.weight_decay == 0 and finetune.weight_decay == 1e-4
    rates = [linear.learning_rate(16, epoch) for epoch in range(100)]
    assert rates == pytest.approx([1.5] * 60 + [0.15] * 20 + [0.015] * 20)
    rates = [finetune.learning_rate(16, epoch) for epoch in range(150)]
    assert rates == pytest.approx([0.0033] * 60 + [0.00033] * 60 + [0.000033] * 30)
    assert linear.learning_rate(128, 59.99) == pytest.approx(12) and linear.learning_rate(128, 60) == pytest.approx(1.2)
    for epochs in (5, 35, 200):  # the drops stay at the same parts of the schedule, to the step
        short = dataclasses.replace(linear, epochs=epochs)
        steps = [short.learning_rate(16, step / 7) for step in range(7 * epochs)]
        assert [steps.count(rate) for rate in dict.fromkeys(steps)] == [7 * epochs * n // 5 for n in (3, 1, 1)]


def test_linear_moves_the_classifier_alone(run, pretrained):
    flags = ["--batch_size", 8, "--cached", 2, "--log_every", 1, "--epochs", 5, "--out", "run"]
    code, out, err = run(evaluate, "linear", "--checkpoint", pretrained, *FAST, *flags)
    assert code == 0, err
    before, after = encoder_of(pretrained), encoder_of(run.path / "run" / "checkpoint.pt")
    assert len(before) > 100 and any("running_var" in name for name in before)
    assert same(before, after)
    lines = [json.loads(line) for line in (run.path / "run" / "log.jsonl").open()]
    assert [line["lr"] for line in lines] == pytest.approx([0.75] * 6 + [0.075] * 2 + [0.0075] * 2)
    assert lines[0]["chance/class"] == pytest.approx(math.log(10)) and lines[-1]["loss"] != lines[0]["loss"]
    assert all(0 <= line["accuracy"] <= 1 for line in lines) and "lr                1.5" in out
    result = numbers(run.path / "run" / "result.json")
    assert result["test_videos"] == 10 and result["training_videos"] == 18 and result["trained_epochs"] == 5
    assert (run.path / "run" / "result_confusion.png").is_file()


@pytest.mark.slow
def test_all_views_cached_are_the_views_of_the_epochs(run, pretrained):
    flags = ["linear", "--checkpoint", pretrained, *FAST, "--batch_size", 8, "--epochs", 3]
    weights = []
    for cached in (0, 3, 1):
        assert run(evaluate, *flags, "--cached", cached, "--out", f"{cached}")[0] == 0
        weights.append(runs.load_checkpoint(run.path / f"{cached}" / "checkpoint.pt")["model"]["fc.weight"])
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(weights[0], weights[2], atol=1e-5, rtol=1e-4)


def test_cached_features_keep_their_labels_where_a_video_is_unreadable(videos):
    found = evaluate.find_labelled("synthetic", videos, train=True, split=1)
    found.paths[0] = "nowhere.mp4"
    config = evaluate.LinearConfig(cached=2, crop=48, frames=8, frame_stride=2, workers=0)
    views = evaluate.training_views(config, found, jitter_p=0, gray_p=0, blur_p=0)
    cached, labels = evaluate.cached_features(Constant(), config, ALONE, views)
    assert cached.shape == (17, 2, 2) and labels.tolist() == found.labels[1:] != found.labels[:-1]


@pytest.mark.slow
def test_finetune_moves_the_encoder_and_what_it_leaves_can_be_retrieved_with(run, pretrained, monkeypatch):
    tested, probabilities = [], evaluate.Classifier.probabilities

    def test(self, clips):
        tested.append((self.training, self.encoder.training, len(clips)))
        return probabilities(self, clips)

    monkeypatch.setattr(evaluate.Classifier, "probabilities", test)
    flags = ["finetune", "--checkpoint", pretrained, *FAST, "--batch_size", 8, "--epochs", 1, "--out", "run"]
    code, out, err = run(evaluate, *flags)
    assert code == 0, err
    before, after = encoder_of(pretrained), encoder_of(run.path / "run" / "checkpoint.pt")
    assert all((before[name] != after[name]).any() for name in before)
    assert "dropout           0.5" in out and "weight_decay      0.0001" in out
    assert tested == [(False, False, 2 * count) for count in (4, 4, 2)]  # 10 videos, 4 a batch, 2 clips each
    code, _, err = run(evaluate, "retrieve", "--checkpoint", "run/checkpoint.pt", *FAST, dataset=None)
    assert code == 0, err
    assert numbers(run.path / "run" / "retrieve_synthetic.json")["gallery"] == 18


@pytest.mark.parametrize("dataset, given, dropout", [("ucf101", -1, 0.7), ("hmdb51", -1, 0.5), ("ucf101", 0.2, 0.2)])
def test_finetune_has_the_papers_dropout_and_the_views_that_were_asked_for(monkeypatch, dataset, given, dropout):
    videos, called = data.VideoList(["a", "b"], [0, 0], ["x"], ""), []
    monkeypatch.setattr(evaluate, "load_encoder", lambda config, _: (Constant(), config))
    for name, value in (("find_labelled", videos), ("with_same_classes", (videos, videos)), ("start_process", ALONE)):
        monkeypatch.setattr(evaluate, name, lambda *_, value=value: value)
    monkeypatch.setattr(find, "same_files", lambda *_: [])
    monkeypatch.setattr(evaluate, "train_and_test", lambda *arguments: called.append(arguments))
    shape = dict(crop=48, frames=8, frame_stride=2)
    options = dict(dropout=given, min_scale=0.5, jitter_p=0.3, gray_p=0.1, fraction=0.5)
    evaluate.finetune(evaluate.FinetuneConfig(dataset=dataset, **shape, **options))
    classifier, config, _, views, *_ = called[0]
    assert classifier.dropout.p == config.dropout == dropout and not classifier.frozen
    assert (views.min_scale, views.color, len(views)) == (0.5, dict(jitter_p=0.3, gray_p=0.1, blur_p=0), 1)
    classifier.fc.weight.data.fill_(1)
    scores = classifier.train().scores(torch.ones(4000, 2)) - classifier.fc.bias
    assert (scores == 0).double().mean().item() == pytest.approx(dropout**2, abs=0.05)


def test_linear_normalises_features_and_finetune_does_not():
    for frozen in (True, False):
        classifier = evaluate.Classifier(Constant(), 3, frozen)
        torch.nn.init.eye_(classifier.fc.weight)
        torch.nn.init.zeros_(classifier.fc.bias)
        expected = [0.6, 0.8, 0.0] if frozen else [3.0, 4.0, 0.0]
        assert classifier.scores(torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx(expected)


def test_only_finetune_augments_colours(videos):
    found, clips = evaluate.find_labelled("synthetic", videos, True, 1), {}
    for config, color in ((evaluate.LinearConfig, {}), (evaluate.FinetuneConfig, dict(jitter_p=1, gray_p=1))):
        config = config(crop=48, frames=8, frame_stride=2)
        views = evaluate.training_views(config, found, **{"jitter_p": 0, "gray_p": 0, "blur_p": 0} | color)
        batch = data.collate([views[0, index] for index in range(4)])
        seen = []
        classifier = evaluate.Classifier(Constant(), 10, frozen=not color).train()
        classifier.encoder.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        classifier(batch)
        clips[bool(color)] = seen[0], augment.normalize(batch["clip"][:, 0] / 255)
    torch.testing.assert_close(*clips[False])
    assert not torch.allclose(*clips[True], atol=0.1)
    assert batch["label"].tolist() == found.labels[:4]


COLORS = {"blue": (40, 40, 200), "gray": (128, 128, 128), "green": (40, 200, 40), "red": (200, 40, 40)}


class Color(torch.nn.Module):
    """An encoder whose features are a clip's mean colour, in which classes of plain colours are separable."""

    out_channels, strides = 3, (1, 1, 1)

    def forward(self, clips):
        return clips.mean((2, 3, 4), keepdim=True)


@pytest.mark.parametrize("protocol", ["linear", "knn", "retrieve"])
def test_separable_features_reach_100_percent(run, monkeypatch, protocol):
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 3)):
        for name, color in COLORS.items():
            (run.path / "videos" / part / name).mkdir(parents=True)
            for n in range(count):
                video = np.clip(rng.normal(color, 20, (6, 32, 32, 3)), 0, 255).astype(np.uint8)
                encoding.encode(run.path / "videos" / part / name / f"{n}.avi", video, "mpeg4")
    monkeypatch.setattr(features, "build_encoder", lambda *_: Color())
    flags = [protocol, "--dataset", "folder", "--data", "videos", "--crop", 16, "--frames", 2, *FAST]
    flags += ["--k", 4] if protocol == "knn" else []
    flags += ["--cached", 1, "--epochs", 20, "--batch_size", 16] if protocol == "linear" else []
    code, out, err = run(evaluate, *flags, "--out", "run" if protocol == "linear" else "run/result.json", dataset=None)
    assert code == 0, err
    result = numbers(run.path / "run" / "result.json")
    found = result["recall_percent"] if protocol == "retrieve" else result["per_class_percent"]
    assert set(found.values()) == {100} and "100.0 %" in out


@pytest.mark.slow
@pytest.mark.parametrize("protocol, flags", [("linear", ["--cached", 2]), ("finetune", ["--fraction", 0.5])])
def test_resuming_is_exact_to_the_last_bit(run, pretrained, protocol, flags):
    flags = [*FAST, "--batch_size", 5, "--epochs", 3, *flags]
    pretrained = Path(shutil.copy(pretrained, run.path / "pretrained.pt"))
    for out, stop in (("whole", 0), ("half", 1)):
        start = [protocol, "--checkpoint", pretrained, *flags, "--max_steps", stop, "--out", out]
        assert run(evaluate, *start)[0] == 0
    assert numbers(run.path / "half" / "result.json")["trained_epochs"] < 1
    resume = [protocol, "--resume", "half/checkpoint.pt", "--workers", 1]
    state = runs.load_checkpoint(pretrained)
    pretrained.unlink()  # not needed any more
    code, out, err = run(evaluate, *resume, dataset=None)
    assert code == 0 and "resumed after step 1" in out, err
    weights = {name: runs.load_checkpoint(run.path / name / "checkpoint.pt") for name in ("whole", "half")}
    assert weights["whole"]["step"] == weights["half"]["step"] == 3 * (2 if protocol == "finetune" else 3)
    assert same(weights["whole"]["model"], weights["half"]["model"])
    assert numbers(run.path / "whole" / "result.json") == numbers(run.path / "half" / "result.json")
    other = "finetune" if protocol == "linear" else "linear"
    for wrong, says in (
        ([*resume, "--checkpoint", pretrained / "other"], "was trained with --checkpoint"),
        ([other, *resume[1:]], f"checkpoint of {protocol.title()}"),
    ):
        code, _, err = run(evaluate, *wrong, dataset=None)
        assert code == 2 and says in err and err.count("\n") == 1
    moved = run.path / "moved.pt"
    torch.save(state, moved)
    code, out, err = run(evaluate, *start, "--checkpoint", moved, "--resume", "auto")
    assert code == 0 and "found half/checkpoint.pt" in out, err
    torch.save(state | {"model": {name: value + 1 for name, value in state["model"].items()}}, pretrained)
    code, out, err = run(evaluate, *start, "--resume", "auto")  # of an encoder that was trained on
    assert code == 2 and "another run is in half: another encoder" in out, err


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(run, pretrained, monkeypatch):
    rate = evaluate.ClassifyConfig.learning_rate

    def press(config, total_batch, epoch):
        if epoch == 1.5:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(config, total_batch, epoch)

    monkeypatch.setattr(evaluate.ClassifyConfig, "learning_rate", press)
    code, out, _ = run(evaluate, "finetune", "--checkpoint", pretrained, *FAST, "--batch_size", 8, "--out", "run")
    assert code == 130 and "evaluate.py finetune --resume run/checkpoint.pt" in out
    assert runs.load_checkpoint(run.path / "run" / "checkpoint.pt")["step"] == 4


def evaluate_as(rank, pretrained, videos, out, ports):
    """Process `rank` of 3, of 2 and of 1: three probe a checkpoint, all test the probe, and vote; scores are kept.

    Only the first can write results, as where each node has a disk of its own: for others there is a file in the way.
    """
    save, own = evaluate.save_accuracy, out / "file" if rank else out
    for world, port in zip((3, 2, 1), ports, strict=True):
        if rank >= world:
            return
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")

        def keep(process, config, test, scores, *rest, world=world):
            torch.save(scores, out / f"{config.protocol}-{rank}-{world}.pt")
            save(process, config, test, scores, *rest)

        evaluate.save_accuracy = keep
        start = ["--checkpoint", pretrained, "--data", videos, *FAST]
        probe = ["linear", *start, "--test_batch", 3, "--epochs", 2, "--batch_size", 4, "--out", own / "run"]
        test = ["linear", "--resume", out / "run" / "checkpoint.pt", "--batch_size", 12 // world, "--out", own / "run"]
        vote = ["knn", *start, "--test_batch", 8, "--out", own / f"{world}.json"]  # 2 batches, fewer than 3 processes
        for flags in (probe if world == 3 else test, vote):
            sys.argv = ["evaluate.py", *map(str, flags)]
            evaluate.main()
        processes.end_process()


class FatalVideo(Video):
    """A reader that the file fatal.mp4 kills."""

    def __init__(self, path):
        if path.endswith("fatal.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(path)


@pytest.mark.slow
def test_a_video_that_kills_its_process_is_named_and_the_others_are_read(videos, tmp_path, monkeypatch):
    good = find.find_videos("synthetic", videos, train=False)
    fatal = str(tmp_path / "fatal.mp4")
    listed = data.VideoList([*good.paths[:4], fatal, *good.paths[4:]], [0] * 11, ["a"], "")
    monkeypatch.setattr(data, "Video", FatalVideo)

    def pixels(clips, count):
        return features.clip_outputs(lambda x: x.flatten(1).float(), clips, ALONE, count, 3, "videos", average=True)

    reason = "the process that read it died (exit code -9)"
    found, readable, bad = pixels(data.TestClips(listed, 16, 4, 1, 2), 2)
    expected = pixels(data.TestClips(good, 16, 4, 1, 2), 0)[0]
    assert bad == [(fatal, reason)] and readable.tolist() == [i != 4 for i in range(11)]
    assert torch.equal(found[readable], expected) and not found[4].any()


@pytest.mark.slow
def test_one_two_and_three_processes_test_the_same_to_the_last_bit(pretrained, videos, tmp_path, monkeypatch):
    """And the probe's encoder stays bit for bit, which averaging over three processes would not leave it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "file").touch()
    ports = [free_port() for _ in range(3)]
    torch.multiprocessing.spawn(evaluate_as, (pretrained, videos, tmp_path, ports), 3)
    before, after = encoder_of(pretrained), encoder_of(tmp_path / "run" / "checkpoint.pt")
    assert same(before, after)
    for protocol in ("linear", "knn"):
        scores = {name: torch.load(tmp_path / f"{protocol}-{name}.pt") for name in ("0-3", "1-3", "2-3", "0-2", "0-1")}
        assert scores["0-1"].shape == (10, 10) and len(scores["0-1"].unique(dim=0)) == 10
        assert all(torch.equal(found, scores["0-1"]) for found in scores.values())
    results = [numbers(tmp_path / f"{world}.json") for world in (1, 2, 3)]
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["retrieve", "knn", "linear"])
def test_an_unreadable_test_video_counts_as_wrong_and_is_named(run, pretrained, videos, protocol):
    damaged = run.path / "damaged"
    shutil.copytree(videos, damaged)
    for path in [*sorted(damaged.glob("test/*/*.mp4"))[:4], *sorted(damaged.glob("train/*/*.mp4"))[:2]]:
        path.write_bytes(b"not a video")
    where = ["--out", "run", "--cached", 1, "--epochs", 1] if protocol == "linear" else ["--out", "run/result.json"]
    code, out, err = run(evaluate, protocol, "--checkpoint", pretrained, *FAST, "--data", damaged, *where, dataset=None)
    assert code == 0, err
    result = numbers(run.path / "run" / "result.json")
    assert len(result["unreadable"]) == out.count("test videos: '") == 4 and out.count("training videos: '") == 2
    assert result.get("training_videos", result.get("gallery")) == 16
    if protocol == "retrieve":
        assert result["recall_percent"]["R@50"] == 60 and result["queries"] == 10
        assert list(result["recall_percent"]) == ["R@1", "R@5", "R@10", "R@20", "R@50"]
    else:
        unreadable = {Path(path).parent.name for path, _ in result["unreadable"]}
        assert {name for name, value in result["per_class_percent"].items() if value is None} <= unreadable


FINITE = {  # protocol → flags
    "cached": ["--epochs", 1, "--batch_size", 8, "--out", "run", "--cached", 1],
    "finetune": ["--epochs", 1, "--batch_size", 8, "--out", "run"],
    "knn": ["--out", "run/result.json"],
    "export": ["--out", "run.pt"],
}


@pytest.mark.parametrize("name", FINITE)
def test_an_encoder_that_is_not_finite_gives_no_number(run, pretrained, name):
    state = torch.load(pretrained)
    state["model"]["encoder.stem.0.weight"][0] = math.nan
    torch.save(state, run.path / "broken.pt")
    where = [] if name == "export" else FAST
    protocol = "linear" if name == "cached" else name
    dataset = None if name == "export" else "synthetic"
    code, out, err = run(evaluate, protocol, "--checkpoint", "broken.pt", *where, *FINITE[name], dataset=dataset)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "not finite" in last and "Traceback" not in err, err
    assert ".mp4'" in last or (name == "export" and "stem.0.weight" in last)
    assert "%  of" not in out and not (run.path / "run" / "result.json").exists() and not (run.path / "run.pt").exists()


def test_logits_that_are_not_finite_are_no_probabilities():
    """Of a score of −∞, softmax makes 0, and of this a rank."""
    classifier = evaluate.Classifier(features.build_encoder("conv4", 0.25), 3, frozen=True).eval()
    clips = torch.zeros(2, 3, 8, 32, 32, dtype=torch.uint8)
    assert classifier.probabilities(clips).isfinite().all()
    classifier.fc.bias.data[1] = -math.inf
    assert classifier.probabilities(clips).isnan().all()


def test_results_lie_beside_the_checkpoint_or_in_a_folder_of_the_untrained_encoder(run, pretrained):
    knn = evaluate.KnnConfig(checkpoint="here/checkpoint.pt", dataset="hmdb51", split=2)
    linear = evaluate.LinearConfig(checkpoint="here/checkpoint.pt", dataset="k400", split=1, fraction=0.5)
    assert evaluate.result_file(knn) == Path("here/knn_hmdb51_split2.json")
    assert evaluate.result_file(linear) == Path("here/linear_k400_0.5/result.json")
    assert evaluate.result_file(dataclasses.replace(linear, out="there")) == Path("there/result.json")
    untrained = dataclasses.replace(knn, checkpoint="", encoder="i3d")
    assert evaluate.result_file(untrained).parent == Path("runs/untrained_i3d")
    shutil.copy(pretrained, run.path / "checkpoint.pt")
    assert run(evaluate, "knn", "--checkpoint", "checkpoint.pt", *FAST)[0] == 0
    assert (run.path / "knn_synthetic.json").is_file() and (run.path / "knn_synthetic_confusion.png").is_file()


def test_the_vote_is_by_the_options(run, pretrained, monkeypatch):
    votes, scores = [], evaluate.knn_scores
    monkeypatch.setattr(evaluate, "knn_scores", lambda *given: votes.append(given[-2:]) or scores(*given))
    assert run(evaluate, "knn", "--checkpoint", pretrained, *FAST, "--k", 3, "--temperature", 0.5)[0] == 0
    assert votes == [(3, 0.5)]


def test_an_untrained_encoder_is_drawn_from_the_seed():
    config = evaluate.RetrieveConfig(dataset="hmdb51", encoder="r3d_18", width=0.0625)
    first, again, other = (
        evaluate.load_encoder(dataclasses.replace(config, seed=seed))[0].state_dict() for seed in (0, 0, 1)
    )
    assert same(first, again) and not same(first, other)


def test_what_is_left_open_is_as_in_the_checkpoints_training(pretrained, videos):
    _, config = features.load_encoder(evaluate.RetrieveConfig(checkpoint=str(pretrained)))
    assert (config.dataset, config.data, config.encoder) == ("synthetic", str(videos), "r3d_18")
    assert (config.crop, config.frames, config.frame_stride, config.width) == (48, 16, 2, 0.0625)
    _, config = features.load_encoder(evaluate.RetrieveConfig(checkpoint=str(pretrained), dataset="ucf101", frames=8))
    assert (config.data, config.split, config.frames, config.crop) == ("datasets/ucf101", 1, 8, 48)
    _, config = features.load_encoder(evaluate.RetrieveConfig(dataset="hmdb51", encoder="r3d_18", split=2))
    assert (config.width, config.crop, config.split) == (1.0, 224, 2)


# ------------------------------------------------------------------------------------------------------ command line


def test_help_teaches_commands_that_are_right(run):
    code, out, _ = run(evaluate, "--help", dataset=None)
    commands = [line.partition("#")[0].strip() for line in out.splitlines() if ".py " in line and line[:4] == "    "]
    assert not code and len(commands) > 8
    for command in map(shlex.split, commands):
        if "fima.py" in command:
            cli.parse(fima.FIMAConfig, "", fima.PRESETS, command[2:])
        elif "--resume" not in command:
            name, *flags = command[command.index("evaluate.py") + 1 :]
            cli.parse(evaluate.PROTOCOLS[name][1], "", {}, flags)
    code, out, _ = run(evaluate, "knn", "--help", dataset=None)
    assert not code and "evaluate.py knn" in out and "--temperature" in out and "--epochs" not in out


SYNTHETIC = [*UNTRAINED, "--dataset", "synthetic", "--data", "{videos}"]
BAD_INPUT = {
    "no protocol": (["--clips", 1], ["linear, finetune, retrieve, knn"]),
    "not divided": (["knn", *UNTRAINED, "--dataset", "folder", "--data", "{videos}/test"], ["train/ and test/"]),
    "too few": (["linear", *SYNTHETIC, *FAST, "--batch_size", 19], ["19"]),
    "other encoder": (["linear", "--checkpoint", "{pretrained}", "--encoder", "i3d"], ["checkpoint.pt", "i3d"]),
    "other width": (["knn", "--checkpoint", "{pretrained}", "--width", 0.5], ["checkpoint.pt", "width 0.5"]),
    "one list": (["knn", *UNTRAINED, "--dataset", "folder", "--list_file", "a.txt"], ["--list_file", "--test_list"]),
    "a folder to write": (["knn", *SYNTHETIC, "--out", "."], [". is a folder", "--out"]),
    "no split": (["retrieve", *SYNTHETIC, "--split", 2], ["split 2"]),
    "crop too small": (["knn", "--encoder", "s3d", "--crop", 16], ["--crop 16", "32"]),
    "too few frames": (["knn", *UNTRAINED, "--frames", 4], ["--frames 4", "needs 8"]),
    "another's flag": (["retrieve", "--k", 3], ["--k"]),
    "resume pretraining": (["linear", "--resume", "{pretrained}"], ["checkpoint of MoCo, not of Linear"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(run, pretrained, videos, case):
    flags, says = BAD_INPUT[case]
    flags = [str(flag).format(videos=videos, pretrained=pretrained) for flag in flags]
    code, _, err = run(evaluate, *flags, dataset=None)
    assert code == 2
    one_line(err, *says)


@pytest.mark.parametrize("out", ["file/result.json", "locked/result.json"])
def test_a_result_that_can_not_be_written_is_said_before_the_work(run, videos, monkeypatch, out):
    (run.path / "file").write_text("")
    (run.path / "locked").mkdir()
    access = os.access  # for root, every folder is open
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    monkeypatch.delattr(evaluate, "video_features")
    flags = [*UNTRAINED, "--dataset", "synthetic", "--data", videos, "--out", out]
    code, _, err = run(evaluate, "knn", *flags, dataset=None)
    assert code == 2
    one_line(err, out.split("/")[0])


def lists_of(videos, folder, names):
    """Writes train.txt and test.txt of the generated set, each class by the name that `names` gives it."""
    for half in ("train", "test"):
        lines = (f"{path.relative_to(videos)} {names[path.parent.name]}" for path in videos.glob(f"{half}/*/*.mp4"))
        (folder / f"{half}.txt").write_text("\n".join(sorted(lines)))
    return ["--dataset", "folder", "--data", videos, "--list_file", "train.txt", "--test_list", "test.txt"]


@pytest.mark.slow
def test_lists_give_what_the_folders_give(run, videos):
    names = {name: i for i, name in enumerate(synthetic.MOTIONS)}
    for out, flags in {
        "folders.json": ["--dataset", "synthetic", "--data", videos],
        "lists.json": lists_of(videos, run.path, names),
    }.items():
        code, _, err = run(evaluate, "knn", *UNTRAINED, *FAST, *flags, "--out", out, dataset=None)
        assert code == 0, err
    by_folder, by_list = (numbers(run.path / name) for name in ("folders.json", "lists.json"))
    assert list(by_list["per_class_percent"]) == [str(name) for name in names.values()]
    assert list(by_list.pop("per_class_percent").values()) == list(by_folder.pop("per_class_percent").values())
    assert by_list == by_folder


@given(st.tuples(*[st.lists(st.sampled_from("abcdef"), min_size=1)] * 2))
def test_every_video_keeps_its_class_when_lists_name_different_ones(names):
    found = []
    for labels in names:
        classes = sorted(set(labels))
        found.append(data.VideoList(labels, [classes.index(name) for name in labels], classes, "videos"))
    if not set(names[0]) & set(names[1]):
        with pytest.raises(ValueError, match="no class of the test videos"):
            evaluate.with_same_classes(*found)
        return
    train_videos, test_videos = evaluate.with_same_classes(*found)
    for videos, labels in zip((train_videos, test_videos), names, strict=True):
        assert [videos.classes[label] for label in videos.labels] == labels
    assert train_videos.classes == test_videos.classes and len(set(test_videos.classes)) == len(test_videos.classes)
    unseen = ", ".join(sorted(set(names[1]) - set(names[0])))
    assert test_videos.report == (f"videos; without training videos: {unseen}" if unseen else "videos")


def test_lists_that_make_no_sense_are_refused(run, videos):
    def refused(*flags):
        code, _, err = run(evaluate, "svm", *UNTRAINED, *FAST, *flags, dataset=None)
        assert code == 2 and err.count("\n") == 1
        return err

    for path in videos.glob("test/*/*.mp4"):
        shutil.copy(path, run.path / path.name)
    assert "no label" in refused("--dataset", "folder", "--data", run.path)
    flags = lists_of(videos, run.path, dict.fromkeys(synthetic.MOTIONS, ""))
    assert all(words in refused(*flags) for words in ("no label", "train.txt"))
    flags = lists_of(videos, run.path, dict.fromkeys(synthetic.MOTIONS, "one"))
    assert "two classes" in refused(*flags)
    (run.path / "both.txt").write_text(line := (run.path / "test.txt").read_text().splitlines()[0])
    assert "is a training video and a test video, one of 1 " in refused(*flags, "--list_file", "both.txt")
    (run.path / "twice.txt").write_text(f"{line}\n{line}\n")
    assert "is named more than once" in refused(*flags, "--test_list", "twice.txt")


def test_videos_that_training_and_test_share_by_name_or_link_are_counted(run):
    root = run.path / "set"
    for name in ("train/jump/a.mp4", "train/run/b.mp4", "train/run/c.mp4", "test/jump/d.mp4", "test/run/e.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "soft.mp4").symlink_to("train/jump/a.mp4")
    os.link(root / "train/run/b.mp4", root / "hard.mp4")
    (root / "far").symlink_to("train")
    (root / "train.txt").write_text("train/jump/a.mp4 jump\ntrain/run/b.mp4 run\ntrain/run/c.mp4 run\n")
    (root / "test.txt").write_text("soft.mp4 jump\nhard.mp4 run\nfar/run/c.mp4 run\ntest/run/e.mp4 run\n")
    flags = [*UNTRAINED, *FAST, "--dataset", "folder", "--data", root]
    for lists in (["--list_file", "train.txt", "--test_list", "test.txt"], []):
        code, _, err = run(evaluate, "knn", *flags, *lists, dataset=None)
        assert code == 2 and "is a training video and a test video, one of 3 by name or link" in err
        assert err.count("\n") == 1
        assert f"error: {root}/train/" in err
        if lists:  # now in the tree
            (root / "train/run/soft.mp4").symlink_to("../../test/jump/d.mp4")
            os.link(root / "test/run/e.mp4", root / "train/run/hard.mp4")
            (root / "train/jump/more.mp4").symlink_to("../../test/run/e.mp4")


def test_names_reach_no_terminal_with_codes(run, videos):
    """Of classes, of videos that cannot be read, and of those that are missing."""
    name = "\x1b[31m\udcff\rclass\x9b"
    paths = sorted(str(path.relative_to(videos)) for path in videos.glob("*/*/*.mp4"))
    (videos / f"bad{name}.mp4").write_bytes(b"nothing")
    lists = {
        "train": [f"{path} {name}" for path in paths[15:24]]
        + [f"{path} other" for path in paths[24:]]
        + [f"no{name}.mp4 a"],
        "test": [f"{path} {name}" for path in paths[:4]] + [f"bad{name}.mp4 other", f"{paths[5]} alone{name}"],
    }
    for part, lines in lists.items():
        (run.path / f"{part}.txt").write_bytes(os.fsencode("\n".join(lines).replace("\r", "")))
    flags = ["--dataset", "folder", "--list_file", "train.txt", "--test_list", "test.txt", "--out", "k.json"]
    code, out, err = run(evaluate, "knn", *UNTRAINED, *FAST, *flags, "--data", videos, dataset=None)
    (videos / f"bad{name}.mp4").unlink()
    assert code == 0, err
    assert out.count(r"\x1b[31m\udcff") >= 3 and all(char.isprintable() or char in "\n\r" for char in out + err), out
    assert (run.path / "k_confusion.png").is_file()


def test_training_videos_are_left_out_and_test_videos_are_not(run, videos):
    (run.path / "bad.txt").write_text("train/rise/rise_0001.mp4\ntest/rise/rise_0001.mp4\n")
    code, out, _ = run(evaluate, "knn", *UNTRAINED, *FAST, "--exclude", "bad.txt", "--out", "k.json")
    assert code == 0 and "17 videos" in out and "10 videos" in out


# ---------------------------------------------------------------------------------------------------------- linear SVM


@pytest.mark.parametrize("classes", [2, 5])
def test_svm_tells_separable_classes_apart_and_gives_absent_ones_no_score(classes):
    labels = torch.arange(60) % classes
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(1)) * 0.1
    scores = evaluate.svm_scores(centers[labels] + noise[0], centers[labels] + noise[1], 2 * labels, 2 * classes, 1.0)
    assert scores.shape == (60, 2 * classes) and torch.equal(scores.argmax(1), 2 * labels)
    assert scores[:, 1::2].isneginf().all() and scores[:, ::2].isfinite().all()


def test_svm_scores_are_those_of_the_planes_that_minimise_the_squared_hinge_loss():
    generator = torch.Generator().manual_seed(0)
    gallery, queries = (torch.randn(n, 4, generator=generator) for n in (40, 6))
    labels = torch.arange(40) % 3
    found = evaluate.svm_scores(queries, gallery, labels, 3, cost=0.5)
    for label in range(3):
        plane = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        sign = torch.where(labels == label, 1.0, -1.0).double()
        rows = torch.cat([gallery.double(), torch.ones(40, 1, dtype=torch.float64)], 1)
        optimizer = torch.optim.LBFGS([plane], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def loss(plane=plane, rows=rows, sign=sign):
            hinge = (1 - sign * (rows @ plane)).clamp(min=0)
            value = 0.5 * plane.square().sum() + 0.5 * hinge.square().sum()
            plane.grad = torch.autograd.grad(value, plane)[0]
            return value

        optimizer.step(loss)
        expected = queries.double() @ plane[:4].detach() + plane[4].detach()
        assert found[:, label].tolist() == pytest.approx(expected.tolist(), abs=1e-2)


def test_svm_runs_and_one_class_is_a_clear_error(run, videos):
    flags = ["--encoder", "conv4", "--crop", 32, "--clips", 2, "--device", "cpu", "--workers", 0]
    code, out, _ = run(evaluate, "svm", *flags, "--out", "svm.json")
    assert code == 0 and "top1" in out and "svm_confusion.png" in out
    assert json.loads((run.path / "svm.json").read_text())["config"]["cost"] == 1
    with pytest.raises(ValueError, match="class"):
        evaluate.svm_scores(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(3).long(), 2, 1.0)
