"""Motion against scene: encoders made by hand, of which one sees colours alone and one motion alone."""

from unittest import mock

import pytest
import scene_bias
import torch
from test_evaluate import FAST, Color, numbers

import evaluate
import features
import synthetic


class Motion(Color):
    """One whose features are how far the place and the extent of what changes go, to and fro, and in the end."""

    def forward(self, clips):
        changed = (clips.diff(dim=2).abs().mean(1) - 0.3).relu()  # (N, T − 1, H, W)
        weights = changed / changed.sum((2, 3), keepdim=True).clamp(min=1e-6)
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, side) for side in changed.shape[2:]], indexing="ij")
        extent = (changed > 0).float().mean((2, 3)).sqrt()
        paths = torch.stack([(weights * y).sum((2, 3)), (weights * x).sum((2, 3)), extent], 2)  # (N, T − 1, 3)
        early, late = (half.mean(1) for half in paths.tensor_split(2, 1))
        return torch.cat([late - early, paths.std(1), torch.full((len(clips), 1), 0.2)], 1)[..., None, None, None]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A set whose scenes tell the motion of most videos; one of test/ and one of other/ are unreadable."""
    root = tmp_path_factory.mktemp("biased") / "set"
    synthetic.make_synthetic(root, train=100, test=20, frames=40, shake=0, scene_bias=0.8)
    for part in ("test", "other"):
        next(root.glob(f"{part}/rise/rise_0001_*")).write_bytes(b"not a video")
    return root


def bias_of(run, monkeypatch, encoder, dataset, root):
    """The percentages by row, as they are printed, and the whole result."""
    monkeypatch.setattr(features, "build_encoder", lambda *_: encoder())
    where = ["--dataset", dataset, "--data", root, "--crop=32", "--clips=1", "--out=bias.json"]
    out = run.ok(scene_bias, *FAST, *where, dataset=None, small=False)
    result = numbers(run.path / "bias.json")
    rows = {row: values["percent"] for row, values in result["table"].items()}
    assert all(f"{row:<30}{percent:>7.1f} %" in out for row, percent in rows.items())
    return rows, result


def test_bias_tells_an_encoder_of_colours_from_one_of_motion(run, biased, monkeypatch):
    monkeypatch.setattr(scene_bias, "svm_scores", scores := mock.Mock(side_effect=evaluate.svm_scores))
    colour, _ = bias_of(run, monkeypatch, Color, "synthetic", biased)
    motion, result = bias_of(run, monkeypatch, Motion, "synthetic", biased)
    shown = [synthetic.scene_of(path) for path in sorted(biased.glob("train/*/*"))]
    assert [synthetic.MOTIONS[label] for label in scores.call_args.args[2]] == shown
    own = [synthetic.scene_of(path) == path.parent.name for path in biased.glob("test/*/*") if path.stat().st_size > 99]
    assert {colour[row] for row in ("test", "still", "shuffled")} == {5 * sum(own)} != {100}
    assert {colour[row] for row in ("scene of test", "scene of other", "other, as its scene's motion")} == {95}
    assert colour["other"] == colour["test less shuffled"] == 0 and max(colour["unseen"], colour["noise"]) < 30
    assert min(motion[row] for row in ("test", "unseen", "other", "noise")) > 40
    assert max(motion[row] for row in ("still", "scene of other", "other, as its scene's motion")) < 20
    assert motion["grow or shrink"] == 100 and motion["test less shuffled"] > 15
    assert motion["rise or fall"] == 75 and result["table"]["rise or fall"]["videos"] == 4  # one is unreadable
    assert len(result["unreadable"]) == 2


def test_bias_without_scenes_is_of_still_and_shuffled_frames_alone(run, biased, videos, monkeypatch):
    for dataset, root in (("folder", biased), ("synthetic", videos)):
        rows, _ = bias_of(run, monkeypatch, Color, dataset, root)
        assert [*rows] == ["test", "still", "shuffled", "test less shuffled"]


def test_a_clip_is_shown_with_its_middle_frame_alone_and_with_frames_in_another_order():
    clips = torch.arange(9).expand(4, 3, 9).mul(20).byte()[..., None, None].expand(-1, -1, -1, 2, 2)
    found = scene_bias.with_stills(lambda clips: clips.float().mean((1, 3, 4)) / 20, seed=0)(clips)
    whole, still, shuffled = found.unbind(1)
    assert whole.equal(torch.arange(9.0).expand(4, 9)) and (still == 4).all()
    assert shuffled.sort().values.equal(whole) and len(torch.cat([whole[:1], shuffled]).unique(dim=0)) == 5
