"""The examples: benchmarks, the picture of README, measures, smaller copies of videos, methods."""

import cmath
import importlib
import itertools
import json
import math
import os
import signal
from unittest import mock

import av
import benchmark
import draw_method
import foreground
import numpy as np
import pytest
import scene_bias
import shrink
import simclr
import torch
import tubelet_contrast as tubelet
from conftest import options_of
from helpers import (
    ALONE,
    CONV4,
    FORK,
    ROOT,
    encode,
    join_group,
    log_ratio,
    make_views,
    moving_texture,
    processes,
    write_sound,
)
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path
from matplotlib.text import Text
from test_evaluate import FAST, Color, numbers

import cli
import data
import evaluate
import find
import synthetic
import visualize
from models import recorded_inputs
from video import Video

TINY = dict(encoder="r3d_18", width=0.0625, crop=32, batch_size=2, queue=8, device="cpu")


@pytest.mark.parametrize("terms, keys", [("vv", [4]), ("vv,vd", [4, 4]), ("vv,pix", [4, 4]), ("vv,pix,fra", [4, 4, 8])])
def test_the_floor_is_the_encoder_passes_of_the_step(terms, keys):
    """With B = 2 videos and T = 2 sub-clips: 2B clips of query, 2B of key RGB, 2B of differences, 2TB of sub-clips."""
    training, backwards = benchmark.Training(benchmark.StepConfig(**TINY), ALONE, losses=terms), []
    method, inputs = training.method, training.encoder_inputs()
    method.encoder.register_full_backward_pre_hook(lambda *_: backwards.append(1))
    for take in (training.step, lambda: training.encoders_alone(*inputs)):
        with recorded_inputs([method.encoder]) as query, recorded_inputs([method.key_encoder]) as key:
            take()
        assert ([len(clips) for clips in query], [len(clips) for clips in key]) == ([4], keys)
    assert len(backwards) == 2  # of the step and of the floor
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == name.startswith("encoder."), name
    for clips in query + key:
        assert clips.is_contiguous(memory_format=torch.channels_last_3d) and not clips.is_contiguous()


def test_variants_of_a_benchmark_take_turns_and_ratios_are_of_the_same_round():
    order, took = [], [99, 99, 98, 98, 1, 2, 2, 6, 10, 10]  # seconds of a, b, a, b, …: two rounds are to warm up
    works = {name: lambda name=name: order.append(name) for name in "ab"}
    clock = iter([time for seconds in took for time in (5, 5 + seconds)])
    seconds = benchmark.take_turns(works, clock.__next__, 3, ALONE)
    assert "".join(order) == "ab" * 5 and seconds == {"a": [1, 2, 10], "b": [2, 6, 10]}
    assert benchmark.compare("", seconds, "a")["b"] == {"median_ms": 6000, "ratio": 2, "rounds_ms": [2000, 6000, 10000]}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["moco", "fima", "fame", "dclr", "mcl"])
def test_a_step_waits_for_no_value_and_has_no_shape_that_depends_on_one(name, bf16):
    kind, config, *_ = options_of(importlib.import_module(name))
    method, motion = kind(config(**TINY)).train(), torch.rand(3, 2, 16, 32, 32)
    views = make_views(3, method.sub_clips, 32) | {"motion": motion, "epoch": 1.5}
    counter = benchmark.counted_step(method, views, "h100", bf16)
    assert counter.parts.keys() >= {"colours", "query pass", "key passes", "losses", "backward", "optimizer"}
    assert all(row["GB"] > 0 and row["ms"] > 0 for row in counter.parts.values()) and 0 < counter.peak < 1e9


def test_waiting_for_a_value_is_found():
    training = benchmark.Training(benchmark.StepConfig(**TINY), ALONE)
    training.method.project = lambda head, features: head(features)[: int(features.sum()) % 1 + 2]
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        benchmark.counted_step(training.method, training.views, "h100", False)


def test_bytes_flop_and_memory_are_counted():
    counter, a, b = benchmark.Counter(1e9, 1e12), torch.zeros(100, 50), torch.zeros(50, 1)
    with counter:
        c = counter.counts_as("product")(torch.mm)(a, b.expand(50, 10))
        d = c.T + 1
        del d
        c * 2  # takes the place of d, and is gone
    size = a.nbytes + b.nbytes + c.nbytes
    expected = {"GB": size / 1e9, "TFLOP": 2 * 100 * 50 * 10 / 1e12, "operators": 1, "ms": size / 1e6}
    assert counter.parts["product"] == pytest.approx(expected)
    assert counter.parts["losses"]["operators"] == 2 and counter.peak == size + c.nbytes


TABLES = {benchmark.reading: ["one_core"], benchmark.step: ["floor", "losses", "settings"], benchmark.count: ["parts"]}


@pytest.mark.slow
@pytest.mark.parametrize("command", TABLES)
def test_a_command_of_the_benchmark_writes_its_json(command, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(benchmark, "SAMPLES", 2)
    command(benchmark.StepConfig(**TINY, rounds=1, data=str(videos), out=str(tmp_path)))
    (path,) = tmp_path.glob("benchmark_*_cpu.json")
    record = json.loads(path.read_text())
    assert record.keys() >= {"command", "config", "machine", "git_commit", "versions", "written"}
    assert all(len(record[name]) > 1 for name in TABLES[command])


def test_decoding_alone_makes_no_pixels(videos):
    with benchmark.PicturesDropped(next(videos.glob("train/*/*.mp4"))) as video:
        assert video.read([3, 4, 30]) == [None] * 3


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


def test_foreground_adds_up_what_masks_hold(run, monkeypatch):
    """Masks of the upper half of a feature map, against a plain loop over the pixels of the frames."""
    half = torch.tensor([[True, True], [False, False]])
    monkeypatch.setattr(foreground, "foreground_masks", lambda rgb, motion, ratio: half.expand(3, len(rgb), 2, 2))
    run.ok(foreground, *CONV4, "--frames=8", "--clips=2", "--out=fg.json", small=False)
    found = numbers(run.path / "fg.json")["inside_percent"]
    test = find.find_videos("synthetic", run.videos, False, 1)
    for kind, clips in (("motion", data.TestClips), ("objects", foreground.ObjectClips)):
        shares = []
        for clip in torch.cat([item["clips"] for item in clips(test, 32, 8, 2, 2)]).double():
            if kind == "motion":
                clip = clip.diff(dim=1, append=2 * clip[:, -1:] - clip[:, -2:-1]).abs()  # the last difference twice
            shares.append(float(100 * clip[:, :, :16].sum() / clip.sum()))
        same = [found[f"{kind}_{mask}"] for mask in ("rgb", "difference", "both", "another")]
        assert same == 4 * [pytest.approx(np.mean(shares), abs=0.02)]
        assert found[f"{kind}_best"] > found[f"{kind}_both"]


class Motion(Color):
    """One whose features are how far the place and the extent of what changes go, to and fro, and in the end; for
    grainy pictures, their negatives."""

    def forward(self, clips):
        changed = (clips.diff(dim=2).abs().mean(1) - 0.3).relu()  # (N, T − 1, H, W)
        weights = changed / changed.sum((2, 3), keepdim=True).clamp(min=1e-6)
        line, extent = torch.linspace(-1, 1, 32), (changed > 0).float().mean((2, 3)).sqrt()
        paths = torch.stack([weights.sum(3) @ line, weights.sum(2) @ line, extent], 2)  # (N, T − 1, 3)
        early, late = (half.mean(1) for half in paths.tensor_split(2, 1))
        features = torch.cat([late - early, paths.std(1), torch.full((len(clips), 1), 0.2)], 1)
        grainy = clips[:, :, 0].diff(dim=3).abs().mean((1, 2, 3)) > 0.5
        return features.where(~grainy[:, None], -features)[..., None, None, None]


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
    monkeypatch.setattr("features.build_encoder", lambda *_: encoder())
    where = ["--dataset", dataset, "--data", root, "--crop=32", "--clips=2", "--out=bias.json"]
    (run.path / "bias.json").unlink(missing_ok=True)
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
    assert min(motion[row] for row in ("test", "unseen", "other")) > 40 and motion["noise"] > 30  # of 16 videos
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


CASES = [path.with_suffix("") for path in (ROOT.parent / "shared" / "cases").glob("*.npy")]
FILES = {
    "train/a/packed.avi": dict(codec="mpeg4", bf="2", g="40"),
    "train/b/uneven.mkv": dict(codec="libx264", bf="2", times=np.cumsum(np.arange(40) % 4 + 1).tolist()),
    "train/b/small.webm": dict(codec="libvpx-vp9", images=moving_texture(40, 17, 35)),
    "test/a/turned.mov": dict(codec="libx264"),
    "test/b/raw.h264": dict(codec="libx264", bf="2"),
    "test/b/damaged.mp4": dict(codec="libx264", bf="0", g="1"),  # in the middle
}
OWN = {shrink.FAILED, shrink.RECIPE}
STOPPED = {f"{shrink.FAILED}.partial", shrink.RECIPE}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Videos of 40 frames, 72 × 96, in folders, with a link, a list, a sound, and one that is broken."""
    root = tmp_path_factory.mktemp("tree")
    for name, options in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        encode(root / name, **dict(images=moving_texture(40, 72, 96)) | options)
    turned = root / "test/a/turned.mov"
    upright, left = (np.array([cos, sin, 0, -sin, cos], ">i4").tobytes() for cos, sin in ((1 << 16, 0), (0, 1 << 16)))
    before, _, after = turned.read_bytes().rpartition(upright)
    turned.write_bytes(before + left + after)
    with Video(damaged := root / "test/b/damaged.mp4") as opened:
        packet, content = opened._packets[20], bytearray(damaged.read_bytes())
    content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    damaged.write_bytes(content)
    (root / "test/b/broken.mp4").write_bytes(turned.read_bytes()[:3000])
    (root / "train/b/same.h264").hardlink_to(root / "test/b/raw.h264")
    write_sound(root / "sound.wav")
    (root / "test/list.txt").write_text("".join(f"{name} {name.split('/')[1]}\n" for name in FILES))
    for path in CASES:
        (root / path.name).symlink_to(path)
    return root


def listed(folder):
    """What tells files below a folder from others in their place: number, size and time."""
    states = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in states.items()}


def test_a_shrunken_copy_has_all_frames_at_their_times_and_stands_in_for_the_original(tree, run, monkeypatch):
    monkeypatch.setattr("video.CHUNK", 100_000)  # a few frames, of which the damaged one comes last
    before, out, videos = listed(tree), run.path / "out", [*FILES, *(path.name for path in CASES)]
    flags = [tree, out, "--side=36", "--keyframes=8", "--crf=10", "--workers=2"]
    code, said, err = run(shrink, *flags, dataset=None)
    assert code == 1 and "error" not in err and listed(tree) == before
    assert said.startswith(f"{len(videos)} videos, ") and f"\n1 of {len(videos) + 1} " in said
    assert (out / shrink.FAILED).read_text().startswith("'test/b/broken.mp4'\t")
    assert listed(out).keys() == before.keys() - {"test/b/broken.mp4"} | OWN
    for name in ("sound.wav", "test/list.txt"):
        assert (out / name).read_bytes() == (tree / name).read_bytes()
    uneven = [25 * time for time in Video(out / "train/b/uneven.mkv").times()]
    assert uneven == [time - 1 for time in FILES["train/b/uneven.mkv"]["times"]]
    for name in videos:
        with Video(tree / name) as old, Video(out / name) as new, av.open(str(out / name)) as container:
            packets = [packet for packet in container.demux() if packet.size]
            assert old.times() == new.times() == [packet.pts * packet.time_base for packet in packets]
            assert len(container.streams) == 1 and (len(packets) == 40 or name not in FILES)
            keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
            assert keys[0] == 0 and max(np.diff([*keys, len(packets)])) <= 8
            frames = [torch.from_numpy(np.stack(part.read(range(len(part))))).float() for part in (old, new)]
        luminance = torch.tensor([0.299, 0.587, 0.114])  # colours are at half the size
        was, now = ((part @ luminance)[:, None] for part in frames)
        assert min(now.shape[2:]) == min(36, min(was.shape[2:]) // 2 * 2)
        shown = torch.nn.functional.interpolate(was, now.shape[2:], mode="bilinear", antialias=True)
        assert 10 * torch.log10(255**2 / (shown - now).square().mean()) > 36, name
    assert Video(out / "test/a/turned.mov").read([0])[0].shape == (48, 36, 3)
    for options in ({}, {"list_file": "test/list.txt"}):
        old, new = (
            find.find_videos("folder", root, True, exclude=out / shrink.FAILED, **options) for root in (tree, out)
        )
        assert [row[:3] for row in old.seen(tree)] == [row[:3] for row in new.seen(out)]
        assert len(old.shared) == len(new.shared) == (0 if options else 1)
    made = listed(out)
    assert run(shrink, *flags, dataset=None)[0] == 1 and {name for name, _ in made.items() ^ listed(out).items()} <= OWN
    refused = {"holds {": [*flags, "--side=20"], "is in": [tree, tree / "a"], "two": [tree], "other files": [tree, "."]}
    for says, words in refused.items():
        run.refused(shrink, *words, dataset=None, says=[says])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_shrinking_goes_on_and_nothing_is_ever_half(tree, tmp_path, monkeypatch, in_process, number, code):
    out, whole = tmp_path / "out", shrink._encode

    def stopped(opened, config):
        content = whole(opened, config)
        if opened.path.endswith("uneven.mkv"):
            os.kill(os.getppid(), number)
        return content

    words = [str(tree), str(out), "--workers=1"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with monkeypatch.context() as patch:
        patch.setattr(shrink, "_encode", stopped)
        patch.setattr("sys.argv", ["shrink.py", *words])
        process = FORK.Process(target=cli.command_line, args=(shrink.main,))
        process.start()
        process.join(120)
    before = {name: state for name, state in listed(out).items() if not name.startswith(shrink.HIDDEN)}
    assert process.exitcode == code and {"test/b/raw.h264"} | STOPPED < before.keys() < listed(tree).keys() | STOPPED
    assert (out / shrink.HIDDEN).exists() == (number == signal.SIGKILL)
    assert in_process(shrink, *words)[0] == 1 and not (out / shrink.HIDDEN).exists()
    assert {name for name, _ in before.items() - listed(out).items()} == STOPPED
    assert all(Video(tree / name).times() == Video(out / name).times() for name in FILES)


def build():
    """SimCLR with weights that are always the same, and frozen batch norm."""
    torch.manual_seed(0)
    return simclr.SimCLR(simclr.SimCLRConfig(encoder="conv4", width=0.25, crop=32)).eval()


def test_simclrs_loss_is_that_of_a_loop():
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
def test_simclr_has_in_two_processes_the_loss_and_the_gradient_of_one_with_the_same_batch(tmp_path):
    processes(step_process, str(tmp_path), count=2)


@pytest.mark.slow
def test_simclrs_checkpoint_goes_through_evaluation_and_into_a_report(run):
    out = run.ok(simclr, *CONV4, "--batch_size=4", "--device=cpu", "--epochs=1", "--out=run", small=False)
    assert "(chance 1.946)" in out and "own other half" in out
    assert torch.load("run/checkpoint.pt")["optimizer"]["state"][0].keys() == {"exp_avg", "exp_avg_sq", "step"}
    run.ok(evaluate, "retrieve", "--checkpoint=run", "--device=cpu", "--workers=0", "--clips=2")
    run.refused(evaluate, "export", "--checkpoint=run", dataset=None, says=["torchvision has r2plus1d_18"])  # no conv4
    run.ok(visualize, "report", "run", "--device=cpu", "--workers=0", "--count=2", dataset=None)
    assert "SimCLR on synthetic" in (run.path / "run" / "report.html").read_text()


def test_simclrs_learning_rate_is_adamws_on_every_data_set_and_rises_first():
    for dataset in simclr.PRESETS:
        assert cli.parse(simclr.SimCLRConfig, "", simclr.PRESETS, ["--dataset", dataset]).lr == 0.008
    config = simclr.SimCLRConfig(lr=0.01, epochs=10, warmup=2.0)
    rates = [config.learning_rate(256, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates[0] == 0 and 0.004 < rates[1] < 0.006 < rates[2] < 0.01 and rates[2] > rates[3] > rates[4]


def draw(shape=(2, 2), **options):
    torch.manual_seed(0)
    return tubelet.draw_tubelets(shape, 16, tubelet.TubeletContrastConfig(**options), torch.device("cpu"))


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
    monkeypatch.setattr("moco.MoCo.encode", lambda method, views, moving: seen.append(views["clip"]))
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
