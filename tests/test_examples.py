"""The examples: against plain loops, one process against two, and their checkpoints in all that evaluates one."""

import cmath
import itertools
import json
import math

import draw_method
import foreground
import pytest
import simclr
import torch
import tubelet_contrast as tubelet
from helpers import CONV4, join_group, log_ratio, make_views, mean, weights
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from matplotlib.text import Text

import cli
import data
import evaluate
import find
import moco
import visualize


def build():
    """A method whose weights are always the same, with frozen batch norm."""
    torch.manual_seed(0)
    return simclr.SimCLR(simclr.SimCLRConfig(encoder="conv4", width=0.25, crop=32)).eval()


def test_the_loss_is_that_of_a_loop():
    method, views = build(), make_views(3, 0, 32)
    clips, color = method.both(views["clip"]), method.both(views["color"])
    with torch.no_grad():
        z = method.head(method.encoder(method.encoder_input(clips, color[:, 0])).mean((2, 3, 4)))
    z = (z / z.norm(dim=1, keepdim=True)).tolist()
    rows = [log_ratio(query, [z[(i + 3) % 6]], z[:i] + z[i + 1 :], 0.1) for i, query in enumerate(z)]
    assert method(views)["nce"].item() == pytest.approx(sum(rows) / 6, rel=1e-4)
    assert method.metrics["chance/nce"] == pytest.approx(math.log(5))


def step_process(rank, folder):
    views, whole, method = make_views(4, 0, 32), build(), build()
    (expected,) = whole(views).values()
    expected.backward()
    join_group(rank, folder)
    parallel = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    (loss,) = parallel({name: value.chunk(2)[rank] for name, value in views.items()}).values()
    loss.backward()
    torch.distributed.all_reduce(loss := loss.detach() / 2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(method.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6 + 1e-4 * q.grad.abs().max())
    cli.end_process()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one_with_the_same_batch(tmp_path):
    torch.multiprocessing.spawn(step_process, (str(tmp_path),), nprocs=2)


@pytest.mark.slow
def test_its_checkpoint_goes_through_evaluation_and_into_a_report(run):
    out = run.ok(simclr, *CONV4, "--batch_size=4", "--device=cpu", "--epochs=1", "--out=run", small=False)
    assert "(chance 1.946)" in out and "own other half" in out
    state = weights(run.path / "run" / "checkpoint.pt")
    assert state["optimizer"]["state"][0].keys() == {"exp_avg", "exp_avg_sq", "step"}
    run.ok(evaluate, "retrieve", "--checkpoint=run", "--device=cpu", "--workers=0", "--clips=2")
    run.refused(evaluate, "export", "--checkpoint=run", dataset=None, says=["torchvision has r2plus1d_18"])  # no conv4
    run.ok(visualize, "report", "run", "--device=cpu", "--workers=0", dataset=None)
    assert "SimCLR on synthetic" in (run.path / "run" / "report.html").read_text()


def test_the_learning_rate_is_adamws_on_every_data_set_and_rises_first():
    for dataset in simclr.PRESETS:
        assert cli.parse(simclr.SimCLRConfig, "", simclr.PRESETS, ["--dataset", dataset]).lr == 0.008
    config = simclr.SimCLRConfig(lr=0.01, epochs=10, warmup=2.0)
    rates = [config.learning_rate(256, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates[0] == 0 and 0.004 < rates[1] < 0.006 < rates[2] < 0.01 and rates[2] > rates[3] > rates[4]


# ---------------------------------------------------------------------------------------------------- Tubelet-Contrast


def draw(shape=(2, 2), frames=16, **options):
    torch.manual_seed(0)
    return tubelet.draw_tubelets(shape, frames, tubelet.TubeletContrastConfig(**options), torch.device("cpu"))


def pixel(image, x, y):
    """Bilinear, of (3, H, W), at x and y in pixels from the corner of the first."""
    x, y = (min(max(place - 0.5, 0), 31) for place in (x, y))
    weights = {(i, j): (1 - abs(y - i)) * (1 - abs(x - j)) for i in range(32) for j in range(32)}
    return sum(w * image[:, i, j] for (i, j), w in weights.items() if abs(y - i) < 1 and abs(x - j) < 1)


@pytest.mark.parametrize("transform", ["none", "scale", "rotation", "shear"])
def test_pasted_pixels_are_those_of_a_loop(transform):
    clips, source = make_views(2, 0, 32)["clip"], make_views(2, 0, 32, seed=1)["clip"][:, 0]
    tubelets = draw(transform=transform)
    tubelets["outline"] = torch.tensor([[0, 1], [2, 0]])
    pasted = tubelet.paste(clips, source, tubelets)
    for n, view, t, i, j in itertools.product(range(2), range(2), (0, 9, 15), range(0, 32, 5), range(2, 32, 5)):
        color = clips[n, view, :, t, i, j].double()
        for m in range(2):
            one = {name: value[n, m].tolist() for name, value in tubelets.items()}
            (x, y), (half_x, half_y), (base_x, base_y) = one["center"][t], one["half"][t], one["half"][0]
            place = complex((j + 0.5) / 32 - x, (i + 0.5) / 32 - y) * cmath.exp(-1j * one["angle"][t])
            u, v = (place.real - one["shear"][t] * place.imag) / half_x, place.imag / half_y
            distance = (max(abs(u), abs(v)), math.hypot(u, v), abs(u) + abs(v))[one["outline"]]
            alpha = one["opacity"] * min(max((1 - distance) / one["edge"], 0), 1)
            if alpha:
                shown = 32 * (one["patch"][0] + u * base_x), 32 * (one["patch"][1] + v * base_y)
                color = (1 - alpha) * color + alpha * pixel(source[n, :, one["frame"]], *shown)
        assert pasted[n, view, :, t, i, j].tolist() == pytest.approx(color.tolist(), abs=0.51)


def test_tubelets_move_as_asked():
    plain, linear = draw((50, 2)), draw((50, 2), motion="linear", transform="shear")
    for tubelets in (plain, linear):
        extent = tubelets["center"].amax(2) - tubelets["center"].amin(2)
        assert tubelets["center"].min() >= 0 and tubelets["center"].max() <= 1
        assert tubelets["half"][:, 0].prod(-1).ge(tubelets["half"][:, 1].prod(-1)).all()  # the largest lies below
    assert extent.mean() > 0.1 and plain["angle"].any() and not plain["shear"].any() and not linear["angle"].any()
    assert (plain["center"].amax(2) - plain["center"].amin(2)).max() <= 90 / 112 + 1e-6
    slopes = linear["shear"].diff().flatten(0, 1)
    assert slopes.abs().max() <= 0.066 and all(len(row.mul(1e5).round().unique()) <= 5 for row in slopes)
    steps = plain["center"].diff(dim=2)
    assert steps.diff(dim=2).abs().mean() < 0.8 * steps.abs().mean()  # of random points, about 1.7


def test_a_pair_is_of_two_videos_and_shows_the_same_tubelets_of_a_third(monkeypatch):
    seen = []
    monkeypatch.setattr(moco.MoCo, "encode", lambda method, views, moving: seen.append(views["clip"]))
    method = tubelet.TubeletContrast(tubelet.TubeletContrastConfig(encoder="conv4", width=0.25, crop=32))
    values = 10 + 20 * torch.arange(4)[:, None] + torch.arange(2)  # of video and view
    method.encode({"clip": values.byte()[..., None, None, None, None].expand(-1, -1, 3, 16, 32, 32)}, None)
    clips = seen[0].float()
    behind = torch.stack([values[:, 0], values[:, 1].roll(1)], 1)[..., None, None, None, None]
    patch = values[:, 0].roll(-1)[:, None, None, None, None, None]
    alpha = (clips - behind) / (patch - behind)
    assert (alpha >= 0).all() and (alpha <= 1).all() and 0.02 < (alpha > 0.7).float().mean() < 0.6
    torch.testing.assert_close(alpha[:, 0], alpha[:, 1], atol=0.06, rtol=0)  # of uint8
    assert not torch.equal(alpha[0], alpha[1])


def test_foreground_adds_up_what_masks_hold(run, monkeypatch):
    """Masks of the upper half of a feature map, against a plain loop over the pixels of the frames."""
    half = torch.tensor([[True, True], [False, False]])
    monkeypatch.setattr(foreground, "foreground_masks", lambda rgb, motion, ratio: half.expand(3, len(rgb), 2, 2))
    encoder = ["--encoder=r3d_18", "--width=0.0625", "--crop=48", "--frames=8"]
    run.ok(foreground, *encoder, "--clips=2", "--out=fg.json", small=False)
    found = json.loads((run.path / "fg.json").read_text())["result"]["inside_percent"]
    test = find.find_videos("synthetic", run.videos, False, 1)
    for kind, clips in (("motion", data.TestClips), ("objects", foreground.ObjectClips)):
        shares = []
        for clip in torch.cat([item["clips"] for item in clips(test, 48, 8, 2, 2)]).double():
            if kind == "motion":
                clip = clip.diff(dim=1, append=2 * clip[:, -1:] - clip[:, -2:-1]).abs()  # the last difference twice
            shares.append(float(100 * clip[:, :, :24].sum() / clip.sum()))
        assert found[f"{kind}_both"] == found[f"{kind}_rgb"] == pytest.approx(mean(shares), abs=0.02)
        assert found[f"{kind}_best"] > found[f"{kind}_both"]


def test_nothing_lies_on_the_texts_of_the_picture_of_the_method_which_is_wide_enough():
    fig = draw_method.draw()
    texts = [text for text in fig.findobj(Text) if text.get_text() and text.get_visible()]
    places = {text.get_text(): text.get_window_extent() for text in texts}
    assert len(places) > 20 and fig.bbox.width >= 1000
    for (one, place), (other, taken) in itertools.combinations(places.items(), 2):
        assert not place.overlaps(taken), f"{one!r} and {other!r}"
    for patch in fig.findobj(FancyArrowPatch):
        for line in patch.get_path().to_polygons(patch.get_transform(), closed_only=False):
            assert not [text for text, place in places.items() if Path(line).intersects_bbox(place, filled=False)]
