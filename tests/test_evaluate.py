"""Retrieval: against plain loops, from checkpoints and untrained, over processes, and with unreadable videos."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import fima
from train import Process

ROOT = Path(__file__).parents[1]


def recall_by_loops(queries, labels, gallery, gallery_labels, k):
    """R@k of Table 6: a query is a hit if any of its k most similar gallery videos has its label."""
    hits = []
    for query, label in zip(queries, labels, strict=True):
        cosines = [float(query @ other / (query.norm() * other.norm())) for other in gallery]
        nearest = sorted(range(len(gallery)), key=lambda i: -cosines[i])[:k]
        hits.append(any(gallery_labels[i] == label for i in nearest))
    return hits


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 15), st.integers(1, 4))
def test_recall_equals_the_plain_loop(seed, queries, gallery, classes):
    generator = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (queries, gallery))
    labels, gallery_labels = (torch.randint(classes, (n,), generator=generator) for n in (queries, gallery))
    hits = evaluate.recall_at_k(q, labels, g, gallery_labels, (1, 2, 5, 50))
    for k, hit in hits.items():
        assert hit.tolist() == recall_by_loops(q, labels, g, gallery_labels, k)
    assert (hits[1] <= hits[2]).all() and (hits[2] <= hits[5]).all() and (hits[5] <= hits[50]).all()


def test_a_perfect_feature_retrieves_everything():
    labels = torch.arange(5).repeat(3)
    features = torch.nn.functional.one_hot(labels).float()
    assert all(hit.all() for hit in evaluate.recall_at_k(features, labels, features * 3, labels).values())


class Constant(torch.nn.Module):
    """An encoder whose two features are a clip's mean brightness and 1."""

    def forward(self, clips):
        mean = clips.mean((1, 2, 3, 4))
        return torch.stack([mean, torch.ones_like(mean)], 1)[..., None, None, None]


def test_features_come_in_the_order_of_the_videos_and_bad_ones_are_marked(videos):
    found = evaluate.find_labelled("synthetic", videos, train=False, split=1)
    found.paths[3] = "nowhere.mp4"
    clips = evaluate.data.TestClips(found, 48, clips=2)
    process = Process(0, 1, torch.device("cpu"))
    features, good, bad = evaluate.clip_features(Constant(), clips, process, workers=2, batch_size=3, title="")
    assert good.tolist() == [i != 3 for i in range(10)] and [path for path, _ in bad] == ["nowhere.mp4"]
    for i in (0, 9):
        expected = Constant()(evaluate.data.normalize(clips[i]["clips"] / 255))[..., 0, 0, 0]
        torch.testing.assert_close(features[i], torch.nn.functional.normalize(expected, dim=1))


def test_retrieve_from_a_checkpoint_counts_an_unreadable_video_as_a_miss(run, videos):
    assert run(fima, "--max_steps", 1, "--out", "run")[0] == 0
    damaged = run.path / "damaged"
    shutil.copytree(videos, damaged)
    for path in sorted(damaged.glob("test/*/*.mp4"))[:4]:
        path.write_bytes(b"not a video")
    recalls = {}
    for root in (videos, damaged):
        flags = ["retrieve", "--checkpoint", "run/checkpoint.pt", "--clips", 2, "--workers", 0]
        code, out, err = run(evaluate, *flags, "--dataset", "synthetic", "--data", root, dataset=None)
        assert code == 0, err
        result = json.loads((run.path / "run" / "retrieve_synthetic.json").read_text())
        recalls[root] = result["recall_percent"]
        assert result["queries"] == 10 and result["gallery"] == 18
        assert len(result["unreadable"]) == out.count("counts as a miss") == (4 if root is damaged else 0)
    assert recalls[videos]["R@50"] == 100 and recalls[damaged]["R@50"] == 60
    assert list(recalls[videos]) == ["R@1", "R@5", "R@10", "R@20", "R@50"]


def test_an_untrained_encoder_gives_the_same_numbers_on_one_and_two_processes(videos, tmp_path):
    flags = ["retrieve", "--dataset", "synthetic", "--data", str(videos), "--encoder", "r3d_18", "--width", "0.0625"]
    flags += ["--crop", "48", "--clips", "2", "--workers", "0", "--batch_size", "1", "--device", "cpu"]
    results = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launch, str(ROOT / "evaluate.py"), *flags, "--out", str(out)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results[processes] = json.loads(out.read_text())
    assert results[1] == results[2]


def test_a_folder_that_is_not_divided_is_refused(run, videos):
    flags = ["retrieve", "--encoder", "r3d_18", "--dataset", "folder", "--data", videos / "test"]
    code, _, err = run(evaluate, *flags, dataset=None)
    assert code == 2 and "train/ and test/" in err and err.count("\n") == 1


def test_videos_without_labels_are_refused(run, videos):
    for path in videos.glob("test/*/*.mp4"):
        shutil.copy(path, run.path / path.name)
    flags = ["retrieve", "--encoder", "r3d_18", "--dataset", "folder", "--data", run.path]
    code, _, err = run(evaluate, *flags, dataset=None)
    assert code == 2 and "label" in err and err.count("\n") == 1


@pytest.mark.parametrize("key", ["encoder.stem.0.weight", "encoder.layer4.1.bn.weight"])
def test_a_checkpoint_without_all_of_its_encoder_is_refused(run, key):
    assert run(fima, "--max_steps", 1, "--out", "run")[0] == 0
    path = run.path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name in [name for name in state["model"] if name.startswith(key[:14])]:
        del state["model"][name]
    torch.save(state, path)
    code, _, err = run(evaluate, "retrieve", "--checkpoint", path, dataset="synthetic")
    assert code == 2 and "checkpoint.pt" in err
