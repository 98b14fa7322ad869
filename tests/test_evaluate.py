"""Evaluation: measures against plain loops, protocols on videos and on files of features, resuming, processes."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scene_bias
import torch
from helpers import ALONE, CONV4, ROOT, collate, encode, free_port, generator, processes, same, touch, weights, write
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import augment
import cli
import data
import evaluate
import features
import find
import train

FAST = ["--clips=2", "--workers=0", "--device=cpu"]
UNTRAINED = [*CONV4, *FAST, "--frames=8", "--clips=3"]
FLAGS = ["features", *UNTRAINED, "--out=f.npz"]
PRETRAINED = ROOT / "runs" / "small" / "checkpoint.pt"
SEED = st.integers(0, 2**31)


class Color(torch.nn.Module):
    """An encoder whose features are a clip's mean colour, in which classes of plain colours are separable."""

    out_channels, strides = 3, (1, 1, 1)

    def forward(self, clips):
        return clips.mean((2, 3, 4), keepdim=True)


def numbers(path):
    return json.loads(path.read_text())["result"]


def encoder_of(state):
    return {k: v for k, v in state["model"].items() if k.startswith("encoder.")}


@given(SEED, *[st.integers(1, most) for most in (12, 15, 7)], st.sampled_from([1, 3, 20]), st.sampled_from([0.07, 1.0]))
def test_recall_its_chance_and_votes_of_neighbours_equal_plain_loops(seed, queries, gallery, classes, k, temperature):
    drawn = generator(seed)
    q, g = (torch.randn(n, 3, generator=drawn, dtype=torch.float64) for n in (queries, gallery))
    labels, known = (torch.randint(classes, (n,), generator=drawn).tolist() for n in (queries, gallery))
    hits = evaluate.recall_at_k(q, torch.tensor(labels), g, torch.tensor(known), (1, 2, 5, 50))
    scores = evaluate.knn_scores(q, g, torch.tensor(known), classes, k, temperature)
    for n, (query, label) in enumerate(zip(q, labels, strict=True)):
        cosines = [float(query @ other / (query.norm() * other.norm())) for other in g]
        nearest = sorted(zip(cosines, known, strict=True), reverse=True)
        for rank, hit in hits.items():
            assert hit[n] == any(other == label for _, other in nearest[:rank])
        votes = [0.0] * classes
        for cosine, other in nearest[:k]:
            votes[other] += math.exp(cosine / temperature)
        assert scores[n].tolist() == pytest.approx([vote / sum(votes) for vote in votes])
    for rank, chance in evaluate.chance_at_k(torch.tensor(labels), torch.tensor(known), classes).items():
        shown = min(rank, gallery)
        missed = [math.comb(gallery - known.count(label), shown) / math.comb(gallery, shown) for label in labels]
        assert chance == pytest.approx(1 - sum(missed) / queries)


@given(SEED, st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_top_k_equals_the_plain_loop_and_ties_count_against(seed, videos, classes, k):
    scores = torch.randint(4, (videos, classes), generator=generator(seed)).float()  # many ties
    labels = torch.randint(classes, (videos,), generator=generator(seed + 1))
    for row, label, found in zip(scores.tolist(), labels.tolist(), evaluate.in_top_k(scores, labels, k), strict=True):
        others = [score for c, score in enumerate(row) if c != label]
        assert bool(found) == (sum(score >= row[label] for score in others) < k)
    assert not evaluate.in_top_k(torch.full((1, 6), math.nan), torch.tensor([2]), 5).any()


def test_accuracies_by_hand(tmp_path, capsys, monkeypatch):
    """Five test videos of four classes, of which one has none, and the last video is unreadable."""
    test = data.VideoList(["a", "b", "c", "d", "e"], [0, 0, 1, 3, 3], ["w", "x", "y", "z"], "")
    scores, good, bad = torch.eye(4)[[0, 1, 1, 3, 3]], torch.tensor([True] * 4 + [False]), [("e", "cut")]
    config = evaluate.KnnConfig(dataset="folder", encoder="i3d", out=str(tmp_path / "knn.json"))
    monkeypatch.setattr(evaluate, "draw_confusion", drawn := mock.Mock())
    evaluate.save_accuracy(ALONE, config, test, scores, good, bad, {"gallery": 7})
    record = json.loads((tmp_path / "knn.json").read_text())
    expected = {"top1_percent": 60.0, "top5_percent": 80.0, "mean_class_percent": 66.67, "test_videos": 5, "gallery": 7}
    expected["chance_percent"] = {"top1": 25.0, "top5": 100.0, "mean_class": 25.0}
    expected["per_class_percent"] = {"w": 50.0, "x": 100.0, "y": None, "z": 50.0}
    assert record["result"] == expected | {"unreadable": [["e", "cut"]]}
    assert (
        record["protocol"] == "knn"
        and record["config"]["k"] == 20
        and capsys.readouterr().out.startswith(
            "top1 60.0 %  top5 80.0 %  mean_class 66.7 %  of 5 test videos\n"
            "by chance: top1 25.0 %  top5 100.0 %  mean_class 25.0 %\n"
        )
    )
    assert record.keys() >= {"command", "git_commit", "processes", "versions"}
    _, percent, *_ = drawn.call_args.args
    assert percent.tolist() == [[50, 50, 0, 0], [0, 100, 0, 0], [0, 0, 0, 0], [0, 0, 0, 50]]  # true, predicted


def test_no_output_that_is_not_finite_and_none_of_unreadable_videos_alone(videos):
    listed = evaluate.find_labelled("synthetic", videos, train=False, split=1)
    values = iter([1.0, 1.0, 1.0, math.inf, *[1.0] * 16])

    def found(listed):
        clips = data.TestClips(listed, 16, clips=1)
        return features.clip_outputs(lambda _: torch.full((1, 1), next(values)), clips, ALONE, 0, 1, "held-out")

    with pytest.raises(train.UserError, match=rf"held-out: .* not finite for 1 of 10, as '{listed.paths[3]}'"):
        found(listed)
    with pytest.raises(train.UserError, match="none of 10"):
        found(dataclasses.replace(listed, paths=["nowhere.mp4"] * 10))


@torch.no_grad()
@pytest.mark.parametrize("frozen", [True, False])
def test_outputs_of_clips_are_averaged_and_linear_alone_normalises_features(videos, frozen):
    listed = evaluate.find_labelled("synthetic", videos, train=False, split=1)
    listed.paths[3] = "nowhere.mp4"
    clips, encoder = data.TestClips(listed, 48, clips=3), Color().train()
    classifier = evaluate.Classifier(encoder, 10, frozen, dropout=0.9).eval()
    torch.nn.init.normal_(classifier.fc.weight, std=5)
    arguments = clips, ALONE, 2, 4, ""
    found, good, bad, _ = features.clip_outputs(classifier.probabilities, *arguments, average=True)
    assert good.tolist() == [i != 3 for i in range(10)] and [path for path, _ in bad] == ["nowhere.mp4"]
    of_clips, *_ = features.clip_outputs(features.unit_features(encoder.train()), *arguments)
    assert not encoder.training
    for i in good.nonzero()[:, 0].tolist():
        pooled = augment.normalize(clips[i]["clips"] / 255).mean((2, 3, 4))  # (3 clips, 3 colours)
        units = pooled / pooled.norm(dim=1, keepdim=True)
        torch.testing.assert_close(of_clips[i], units)
        probabilities = classifier.fc(units if frozen else pooled).softmax(1)
        torch.testing.assert_close(found[i], probabilities.mean(0), atol=1e-5, rtol=1e-4)
    classifier.fc.bias[1] = -math.inf  # of which softmax makes 0, and of this a rank
    assert classifier.probabilities(clips[0]["clips"]).isnan().all()


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


def test_learning_rates_are_the_papers_at_each_epoch():
    linear, finetune = evaluate.LinearConfig(), evaluate.FinetuneConfig()
    assert (linear.epochs, finetune.epochs) == (100, 150) and linear.weight_decay == 0 and finetune.weight_decay == 1e-4
    rates = [linear.learning_rate(16, epoch) for epoch in range(100)]
    assert rates == pytest.approx([1.5] * 60 + [0.15] * 20 + [0.015] * 20)
    rates = [finetune.learning_rate(32, epoch) for epoch in range(150)]
    assert rates == pytest.approx([0.0066] * 60 + [0.00066] * 60 + [0.000066] * 30)
    for epochs in (5, 35, 200):  # the drops stay at the same parts of the schedule, to the step
        short = dataclasses.replace(linear, epochs=epochs)
        steps = [short.learning_rate(16, step / 7) for step in range(7 * epochs)]
        assert [steps.count(rate) for rate in dict.fromkeys(steps)] == [7 * epochs * n // 5 for n in (3, 1, 1)]


@pytest.mark.slow
def test_all_views_cached_are_the_views_of_the_epochs(run):
    flags = ["linear", "--checkpoint", PRETRAINED, *FAST, "--batch_size", 8, "--epochs", 3]
    found = []
    for cached in (0, 3, 1):
        run.ok(evaluate, *flags, "--cached", cached, "--out", f"{cached}")
        found.append(weights(run.path / f"{cached}" / "checkpoint.pt")["model"]["fc.weight"])
    assert numbers(run.path / "3" / "result.json")["trained_epochs"] == 3
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[2], atol=1e-5, rtol=1e-4)


def test_cached_features_keep_their_labels_where_a_video_is_unreadable(videos):
    found = evaluate.find_labelled("synthetic", videos, train=True, split=1)
    found.paths[0] = "nowhere.mp4"
    config = evaluate.LinearConfig(cached=2, crop=48, frames=8, frame_stride=2, workers=0)
    cached, labels = evaluate.cached_features(Color(), config, ALONE, evaluate.training_views(config, found))
    assert cached.shape == (17, 2, 3) and labels.tolist() == found.labels[1:] != found.labels[:-1]


@pytest.mark.parametrize("dataset, given, dropout", [("ucf101", -1, 0.7), ("hmdb51", -1, 0.5), ("ucf101", 0.2, 0.2)])
def test_finetune_has_the_papers_dropout(run, monkeypatch, dataset, given, dropout):
    find_labelled, fit = evaluate.find_labelled, mock.Mock(side_effect=ZeroDivisionError)
    monkeypatch.setattr(evaluate, "find_labelled", lambda _, *where: find_labelled("synthetic", *where))
    monkeypatch.setattr(evaluate, "fit_in_folder", fit)
    with pytest.raises(ZeroDivisionError):
        run(evaluate, "finetune", *CONV4, *FAST, "--dropout", given, "--batch_size=1", dataset=dataset)
    classifier, config = fit.call_args.args[:2]
    classifier.fc = torch.nn.Identity()
    zero = (classifier.train().scores(torch.ones(100, 100)) == 0).double().mean().item()
    assert config.dropout == dropout == pytest.approx(zero, abs=0.05)


def test_only_finetune_augments_colours_and_views_are_as_asked_for(videos):
    found = evaluate.find_labelled("synthetic", videos, True, 1)
    for config, color in ((evaluate.LinearConfig, {}), (evaluate.FinetuneConfig, dict(jitter_p=1, gray_p=0.9))):
        config = config(crop=48, frames=8, frame_stride=2, min_scale=0.5, fraction=0.6, **color)
        views = evaluate.training_views(config, found)
        assert (views.min_scale, views.color) == (0.5, dict(jitter_p=0, gray_p=0, blur_p=0) | color)
        assert len(views) == 10  # one of each class's one or two
        batch, encoder = collate([views[0, index] for index in range(4)]), Color()
        encoder.forward = mock.Mock(side_effect=encoder.forward)
        evaluate.Classifier(encoder, 10, frozen=not color).train()(batch)
        plain = augment.normalize(batch["clip"][:, 0] / 255)
        assert torch.allclose(*encoder.forward.call_args.args, plain, atol=0.1 if color else 1e-4) == (not color)
    assert batch["label"].tolist() == views.videos.labels[:4]


@pytest.mark.parametrize("protocol", ["linear", "knn", "svm", "retrieve"])
def test_separable_features_reach_100_percent(run, monkeypatch, protocol):
    rng, lists = np.random.default_rng(0), {"train.txt": [], "test.txt": []}
    colors = {"blue": (40, 40, 200), "gray": (128, 128, 128), "green": (40, 200, 40), "red": (200, 40, 40)}
    for name, n in itertools.product(colors, range(7)):
        video = np.clip(rng.normal(colors[name], 20, (6, 32, 32, 3)), 0, 255).astype(np.uint8)
        encode(run.path / f"{name}{n}.avi", video, "mpeg4")
        lists["train.txt" if n < 4 else "test.txt"].append(f"{name}{n}.avi {name}")
    for name, lines in (lists | {"bad.txt": ["red0.avi", "red6.avi"]}).items():
        write(run.path / name, *lines)
    monkeypatch.setattr(features, "build_encoder", lambda *_: Color())
    monkeypatch.setattr(evaluate, "knn_scores", votes := mock.Mock(side_effect=evaluate.knn_scores))
    where = ["--dataset=folder", "--data=.", "--list_file=train.txt", "--test_list=test.txt", "--crop=16", "--frames=2"]
    own = {"linear": ["--cached=1", "--epochs=20"], "knn": ["--k=3", "--temperature=0.5", "--exclude=bad.txt"]}
    out = "run" if protocol == "linear" else "run/result.json"
    out = run.ok(evaluate, protocol, *where, *FAST, *own.get(protocol, []), "--out", out, dataset=None)
    result = numbers(run.path / "run" / "result.json")
    found = result["recall_percent"] if protocol == "retrieve" else result["per_class_percent"]
    assert set(found.values()) == {100} and "100.0 %" in out
    assert result["chance_percent"]["R@1" if protocol == "retrieve" else "top1"] == 25
    if protocol == "knn":  # of the videos to leave out, one is for training
        assert votes.call_args.args[-2:] == (3, 0.5) and (result["gallery"], result["test_videos"]) == (15, 12)


def test_the_small_encoder_of_the_project_finds_motions(run):
    assert PRETRAINED.stat().st_size < 1e6
    found = {}
    for name, flags in {"small": ["--checkpoint=small"], "none": ["--encoder=conv4", "--crop=32"]}.items():
        run.ok(evaluate, "retrieve", *flags, "--workers=0", f"--out={name}.json")
        found[name] = numbers(run.path / f"{name}.json")["recall_percent"]["R@5"]
    assert found["small"] >= found["none"] + 20


@pytest.mark.slow
@pytest.mark.parametrize("protocol, flag", [("linear", "--cached=2"), ("finetune", "--fraction=0.5")])
def test_resuming_is_exact_to_the_last_bit_and_the_encoder_moves_in_finetune_alone(run, protocol, flag):
    state, checkpoint = weights(PRETRAINED), run.path / "pretrained.pt"
    shutil.copy(PRETRAINED, checkpoint)
    start = [protocol, "--checkpoint", checkpoint, *FAST, "--batch_size=1", "--accumulate=5", "--epochs=3", flag]
    run.ok(evaluate, *start, "--out=whole")
    run.ok(evaluate, *start, "--out=half", "--max_steps=1")
    assert numbers(run.path / "half" / "result.json")["trained_epochs"] < 1
    checkpoint.unlink()  # not needed any more
    resume = [protocol, "--resume=half/checkpoint.pt", "--workers=1"]
    assert "resumed after step 1" in run.ok(evaluate, *resume, dataset=None)
    whole, half = (weights(run.path / name / "checkpoint.pt") for name in ("whole", "half"))
    before, after = encoder_of(state), encoder_of(whole)
    assert any("running_var" in name for name in before)
    assert {torch.equal(before[name], after[name]) for name in after} == {protocol == "linear"}
    assert whole["step"] == half["step"] == 3 * (2 if protocol == "finetune" else 3)
    assert same(whole["model"], half["model"])
    assert numbers(run.path / "whole" / "result.json") == numbers(run.path / "half" / "result.json")
    run.ok(evaluate, "retrieve", "--checkpoint=half/checkpoint.pt", *FAST, dataset=None)
    run.refused(evaluate, *resume, "--checkpoint=other", dataset=None, says=["was trained with --checkpoint"])
    torch.save(state | {"model": {name: value + 1 for name, value in state["model"].items()}}, checkpoint)
    code, out, err = run(evaluate, *start, "--out=half", "--resume=auto")  # of an encoder that was trained on
    assert code == 2 and "another run is in half: another encoder" in out, err


def evaluate_as(rank, world, port, videos, out):
    """Process `rank` of 3 or of 1: three probe a checkpoint, all test the probe, vote, and write features."""
    save, own = evaluate.save_accuracy, out / "file" if rank else out  # as where each node has a disk of its own
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    features.PART = 8  # of 28 videos

    def keep(process, config, test, scores, *rest):
        torch.save(scores, out / f"{config.protocol}-{rank}-{world}.pt")
        save(process, config, test, scores, *rest)

    evaluate.save_accuracy = keep
    start = ["--checkpoint", PRETRAINED, "--data", videos, *FAST]
    probe = ["linear", *start, "--test_batch=3", "--epochs=2", "--batch_size=4", "--out", own / "run"]
    test = ["linear", "--resume", out / "run" / "checkpoint.pt", "--batch_size=12", "--out", own / "run"]
    vote = ["knn", *start, "--test_batch=8", "--out", own / f"{world}.json"]  # 2 batches, fewer than 3 processes
    write = ["features", *start, "--out", out / f"{world}.npz"]
    for flags in (probe if world == 3 else test, vote, write):
        sys.argv = ["evaluate.py", *map(str, flags)]
        evaluate.main()
    cli.end_process()


@pytest.mark.slow
def test_one_and_three_processes_find_the_same_to_the_last_bit(videos, tmp_path, monkeypatch):
    """And the probe's encoder stays bit for bit, which averaging over three processes would not leave it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "file").touch()
    for world in (3, 1):
        processes(evaluate_as, world, free_port(), videos, tmp_path, count=world)
    assert same(*(encoder_of(weights(path)) for path in (PRETRAINED, tmp_path / "run" / "checkpoint.pt")))
    for protocol in ("linear", "knn"):
        alone, *others = (torch.load(tmp_path / f"{protocol}-{name}.pt") for name in ("0-1", "0-3", "1-3", "2-3"))
        assert alone.shape == (10, 10) and len(alone.unique(dim=0)) == 10
        assert all(torch.equal(found, alone) for found in others)
    assert numbers(tmp_path / "1.json") == numbers(tmp_path / "3.json")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()


def test_results_lie_beside_the_checkpoint_or_in_a_folder_of_the_untrained_encoder():
    knn = evaluate.KnnConfig(checkpoint="here/checkpoint.pt", dataset="hmdb51", split=2)
    linear = evaluate.LinearConfig(checkpoint="here/checkpoint.pt", dataset="k400", split=1, fraction=0.5)
    untrained, named = dataclasses.replace(knn, checkpoint="", encoder="i3d"), dataclasses.replace(linear, out="there")
    cached = dataclasses.replace(linear, cached=10)
    earlier = dataclasses.replace(knn, checkpoint="here/epoch_0010.pt")
    assert str(evaluate.result_files(earlier)[0]) == "here/knn_hmdb51_split2_epoch_0010.json"
    found = [str(evaluate.result_files(config)[0]) for config in (knn, linear, cached, named, untrained)]
    assert found[:2] == ["here/knn_hmdb51_split2.json", "here/linear_k400_0.5/result.json"]
    assert found[2] == "here/linear_k400_0.5_cached10/result.json"
    assert found[3:] == ["there/result.json", "runs/untrained_i3d/knn_hmdb51_split2.json"]


def test_an_untrained_encoder_is_drawn_from_the_seed(monkeypatch):
    monkeypatch.chdir(PRETRAINED.parent)  # a checkpoint that nobody named
    config = evaluate.RetrieveConfig(dataset="hmdb51", encoder="conv4")
    configs = (dataclasses.replace(config, seed=seed) for seed in (0, 0, 1))
    first, again, other = (features.load_encoder(config)[0].state_dict() for config in configs)
    assert same(first, again) and not same(first, other)


def test_an_encoder_by_its_path_or_by_torch_hub_and_a_clip_by_its_path_give_what_evaluation_does(videos):
    encoder, config = features.load_encoder("small")
    path = str(videos / "test" / "rise" / "rise_0001.mp4")
    clip = data.read_clip(path, config.frames, config.frame_stride, config.crop)
    one = data.VideoList([path], [0], ["rise"], "")
    function, config = features.unit_features(encoder), dataclasses.replace(config, clips=3, workers=0)
    found = features.video_outputs(function, one, config, ALONE, "one", average=False)[0][0, 1]
    by_hub = torch.hub.load(str(ROOT), "fima", source="local", checkpoint="small")
    pooled = features.pooled_features(by_hub, clip[None])[0]
    torch.testing.assert_close(pooled / pooled.norm(), found)
    assert torch.hub.load(str(ROOT), "fima", source="local", encoder="conv4", width=0.25).out_channels == 24


def test_what_is_left_open_is_as_in_the_checkpoints_training(tmp_path):
    def filled(**given):
        return features.load_encoder(evaluate.RetrieveConfig(**given))[1]

    state, other = torch.load(PRETRAINED), str(tmp_path / "other.pt")
    torch.save(state | {"config": state["config"] | {"split": 2, "data": "here", "frames": 8}}, other)
    config = filled(checkpoint=other)
    assert (config.dataset, config.data, config.encoder, config.split) == ("synthetic", "here", "conv4", 2)
    assert (config.crop, config.frames, config.frame_stride, config.difference) == (32, 8, 2, "spans")
    config = filled(checkpoint=other, dataset="ucf101", frames=9)
    assert (config.data, config.split, config.frames, config.crop) == ("datasets/ucf101", 1, 9, 32)
    config = filled(dataset="hmdb51", encoder="conv4", split=2)
    assert (config.width, config.crop, config.split) == (1.0, 224, 2)


@pytest.mark.parametrize(
    "words, says",
    [
        ("knn --dataset=folder --data=set/test", ["train/ and test/"]),
        ("linear --batch_size=19", ["19"]),
        ("knn --encoder=s3d --width=1 --crop=16", ["--crop 16", "32"]),
        ("knn --encoder=s3d --width=2", ["--width 2", "s3d"]),
        ("knn --frames=4", ["--frames 4", "needs 8"]),
        ("knn --dataset=folder --data=unlabelled", ["no label"]),
        ("svm --dataset=folder --list_file=one.txt --test_list=twice.txt", ["more than once"]),
        ("svm --dataset=folder --list_file=one.txt --test_list=same.txt", ["at least 2 classes"]),
        ("knn --out=twice.txt/result.json", ["twice.txt"]),
        ("knn --out=locked/result.json", ["locked"]),
    ],
)
def test_bad_input_is_one_clear_line_before_the_work_where_it_can_be_known(run, videos, monkeypatch, words, says):
    (run.path / "set").symlink_to(videos)
    (run.path / "locked").mkdir()
    touch(run.path, "unlabelled/a.mp4")
    write(run.path / "one.txt", "train/rise/rise_0001.mp4 class")
    write(run.path / "same.txt", "test/rise/rise_0001.mp4 class")
    write(run.path / "twice.txt", *["test/rise/rise_0001.mp4 class"] * 2)
    access = os.access  # for root, every folder is open
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    monkeypatch.setattr(evaluate, "video_outputs", work := mock.Mock(side_effect=evaluate.video_outputs))
    protocol, *flags = words.split()
    flags = [*CONV4, *FAST, "--dataset=synthetic", "--data=set", *flags]
    run.refused(evaluate, protocol, *flags, dataset=None, says=says)
    assert work.called == (says == ["at least 2 classes"])


@given(st.tuples(*[st.lists(st.sampled_from("abcdef"), min_size=1)] * 2))
def test_every_video_keeps_its_class_when_lists_name_different_ones(names):
    lists = ((labels, sorted(set(labels))) for labels in names)
    found = [data.VideoList(own, list(map(classes.index, own)), classes, "videos") for own, classes in lists]
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


def test_videos_that_training_and_test_share_by_name_or_link_are_counted(run):
    touch(run.path, "train/jump/a.mp4", "train/run/b.mp4", "train/run/c.mp4", "test/run/e.mp4")
    (run.path / "soft.mp4").symlink_to("train/jump/a.mp4")
    os.link(run.path / "train/run/b.mp4", run.path / "hard.mp4")
    (run.path / "far").symlink_to("train")
    write(run.path / "train.txt", "train/jump/a.mp4 jump", "train/run/b.mp4 run", "train/run/c.mp4 run")
    write(run.path / "test.txt", "soft.mp4 jump", "hard.mp4 run", "far/run/c.mp4 run", "test/run/e.mp4 run")
    flags = [*CONV4, *FAST, "--dataset=folder", "--data=.", "--list_file=train.txt", "--test_list=test.txt"]
    says = ["train/jump/a.mp4 is a training video and a test video, one of 3 by name or link"]
    run.refused(evaluate, "knn", *flags, dataset=None, says=says)


def test_svm_tells_separable_classes_apart_and_gives_absent_ones_no_score():
    labels = torch.arange(60) % 5
    noise = torch.randn(2, 60, 16, generator=generator(1)) * 0.1
    gallery, queries = torch.randn(5, 16, generator=generator(0))[labels] + noise
    scores = evaluate.svm_scores(queries, gallery, 2 * labels, 10, 1.0, ALONE)
    assert scores.shape == (60, 10) and torch.equal(scores.argmax(1), 2 * labels)
    assert scores[:, 1::2].isneginf().all() and scores[:, ::2].isfinite().all()


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
def test_a_file_of_features_has_the_outputs_of_all_videos_in_order(run, flag, shape):
    out = run.ok(evaluate, *FLAGS, "--test_batch=3", flag)
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

    both = data.VideoList(train.paths + test.paths, [], [], "")
    expected, *_ = features.video_outputs(outputs, both, config, ALONE, "", average=False)
    np.testing.assert_allclose(file["features"], expected, atol=1e-5)
    assert file["features"].shape == (28, 3, *shape) and file["features"].dtype == np.float32
    assert os.listdir(run.path) == ["f.npz"]
    names = {}
    exec("\n".join(line.strip() for line in out.splitlines()[-2:]), names)
    np.testing.assert_array_equal(names["features"], file["features"])
    run.refused(evaluate, *FLAGS, says=["f.npz is there already"])


def test_features_go_on_after_a_kill(run, monkeypatch):
    run.ok(evaluate, *FLAGS, "--out=whole.npz")
    monkeypatch.setattr(features, "PART", 2)
    killed = mock.Mock(wraps=features.clip_outputs, side_effect=[mock.DEFAULT] * 5 + [KeyboardInterrupt])
    with monkeypatch.context() as patch:
        patch.setattr(features, "clip_outputs", killed)
        assert run(evaluate, *FLAGS)[0] == 130
    (partial,) = run.path.glob("f.npz.*.partial")
    with open(partial, "ab") as file:
        file.write(b"half a row")
    monkeypatch.setattr(data, "Video", read := mock.Mock(side_effect=data.Video))
    run.ok(evaluate, *FLAGS, "--crop=48")
    assert read.call_count == 28 and partial.exists()  # other features are not those of a part
    (run.path / "f.npz").rename(run.path / "other.npz")
    run.ok(evaluate, *FLAGS)
    assert read.call_count == 28 + 18
    assert (run.path / "f.npz").read_bytes() == (run.path / "whole.npz").read_bytes()
    assert {*os.listdir(run.path)} == {"f.npz", "whole.npz", "other.npz"}


def test_unreadable_videos_are_named_once_and_numbers_from_the_file_are_those_from_the_videos(run, damaged):
    out = run.ok(evaluate, *FLAGS, *damaged, dataset=None)
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
        out = run.ok(evaluate, protocol, *UNTRAINED, *damaged, "--data=videos", f"--out={protocol}.json", dataset=None)
        assert out.count("mp4' cannot be read") == 2
        own = run.path / "runs" / "untrained_conv4" / f"{protocol}_folder.json"
        found, expected = (json.loads(path.read_text()) for path in (own, run.path / f"{protocol}.json"))
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


def test_linear_trains_on_the_clips_of_a_file_of_features(run, damaged):
    run.ok(evaluate, *FLAGS, *damaged, "--normalise=off", dataset=None)  # the probe does it itself
    own = ["--features=f.npz", "--epochs=4", "--batch_size=6", "--device=cpu"]
    out = run.ok(evaluate, "linear", *own, "--out=linear", dataset=None)
    result = numbers(run.path / "linear" / "result.json")
    assert result["training_videos"] == 17 and result["test_videos"] == 10 and "of 10 test videos" in out
    saved = torch.load(run.path / "linear" / "checkpoint.pt")["model"]
    assert saved.keys() == {"fc.weight", "fc.bias", "encoder.sum"}
    torch.manual_seed(7)  # whatever was drawn before
    run.ok(evaluate, "linear", *own, "--out=same", dataset=None)
    assert torch.load(run.path / "same" / "checkpoint.pt")["model"]["fc.weight"].equal(saved["fc.weight"])
    file = load(run.path / "f.npz")
    units = torch.from_numpy(file["features"][file["test"]])
    units = units / units.norm(dim=2, keepdim=True)
    scores = (units @ saved["fc.weight"].T + saved["fc.bias"]).softmax(2).mean(1)
    hits = (scores.argmax(1) == torch.from_numpy(file["labels"][file["test"]])) & scores.isfinite().all(1)
    assert result["top1_percent"] == pytest.approx(100 * hits.double().mean().item())
    run.ok(evaluate, "linear", *own, "--fraction=0.5", "--out=few", dataset=None)
    assert numbers(run.path / "few" / "result.json")["training_videos"] == 9
    again = ["linear", "--resume=linear/checkpoint.pt", "--batch_size=3"]
    assert "nothing left to train" in run.ok(evaluate, *again, dataset=None)
    record = json.loads((run.path / "linear" / "result.json").read_text())
    assert record["result"]["trained_epochs"] == 4 and record["config"]["batch_size"] == 6  # as it was trained


def test_a_file_of_features_of_which_no_training_video_could_be_read_is_one_line(run, damaged):
    run.ok(evaluate, *FLAGS, *damaged, dataset=None)
    file = load(run.path / "f.npz")
    file["features"][~file["test"]] = np.nan
    np.savez(run.path / "unread.npz", **file)
    for protocol in ("retrieve", "knn", "linear"):
        run.refused(evaluate, protocol, "--features=unread.npz", dataset=None, says=["none of 18 could be read"])


def test_a_result_is_replaced_by_one_of_the_same_options_alone(run, damaged):
    run.ok(evaluate, *FLAGS, *damaged, dataset=None)
    for more in ([], ["--device=cpu", "--test_batch=2"]):
        run.ok(evaluate, "knn", "--features=f.npz", "--k=3", *more, dataset=None)
    run.refused(evaluate, "knn", "--features=f.npz", "--k=5", dataset=None, says=["holds the result of --k 3: name"])
    run.ok(evaluate, "knn", "--features=f.npz", "--k=5", "--out=5.json", dataset=None)
    other = ["retrieve", "--features=f.npz", "--out=5.json"]
    run.refused(evaluate, *other, dataset=None, says=["5.json holds the result of knn: name another --out"])


def test_a_file_of_features_of_a_video_that_is_listed_twice_is_refused(run, damaged):
    run.ok(evaluate, *FLAGS, *damaged, dataset=None)
    file = load(run.path / "f.npz")
    file["paths"][np.flatnonzero(file["test"])[:2]] = file["paths"][-1]
    np.savez(run.path / "twice.npz", **file)
    run.refused(evaluate, "knn", "--features=twice.npz", dataset=None, says=["twice.npz", "a test video twice"])


def test_videos_need_neither_labels_nor_a_test_part(run):
    (run.path / "films").mkdir()
    for n, path in enumerate(sorted(run.videos.glob("train/*/*.mp4"))[:3]):
        shutil.copy(path, run.path / "films" / f"{n}.mp4")
    (run.path / "list.txt").write_text("2.mp4\n0.mp4\n")
    (run.path / "bad.txt").write_text("1.mp4\n")
    where = ["--dataset=folder", "--data=films"]
    for more, names in ([[], "012"], [["--list_file", run.path / "list.txt"], "20"], [["--exclude=bad.txt"], "02"]):
        run.ok(evaluate, *FLAGS, *where, *more, dataset=None)
        file = load(run.path / "f.npz")
        assert [os.path.basename(path) for path in file["paths"]] == [f"{n}.mp4" for n in names]
        assert (file["labels"] == -1).all() and not file["test"].any() and file["features"].shape == (len(names), 3, 24)
        run.refused(evaluate, "knn", "--features=f.npz", dataset=None, says=["videos without labels"])
        (run.path / "f.npz").unlink()
    run.refused(evaluate, *FLAGS, *where, "--test_list=no.txt", dataset=None, says=["no.txt"])


def test_a_file_of_features_that_does_not_serve_is_refused_in_one_line(run):
    run.ok(evaluate, *FLAGS, "--map", "--out=maps.npz")
    run.ok(evaluate, *FLAGS, "--dataset=folder", f"--data={run.videos / 'train'}", dataset=None)
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
    run.refused(evaluate, "finetune", "--features=f.npz", dataset=None, says=["finetune needs the encoder"])
    run.refused(evaluate, "linear", "--features=f.npz", "--cached=2", dataset=None, says=["take out --cached"])
    with pytest.raises(train.UserError, match="bias needs the encoder"):
        evaluate.prepare(scene_bias.BiasConfig(features="f.npz"))


def test_clips_of_frame_folders_begin_by_the_frame_rate(run):
    (folder := run.path / "films" / "a").mkdir(parents=True)
    for k in range(40):
        Image.new("RGB", (48, 32), (k, 2 * k, 3 * k)).save(folder / f"{k}.png")
    run.ok(evaluate, *FLAGS, "--dataset=folder", "--data=films", "--frame_rate=10", dataset=None)
    np.testing.assert_allclose(load(run.path / "f.npz")["starts"], [[0, 1.2, 2.5]], atol=1e-6)  # 26 starts
