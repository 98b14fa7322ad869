"""Figures: the numbers behind them against plain loops, every command on a tiny checkpoint, and users' mistakes."""

import base64
import html
import io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONV4, write
from PIL import Image
from test_evaluate import numbers

import augment
import data
import evaluate
import fima
import find
import moco
import train
import visualize
from runs import load_checkpoint

UNTRAINED = [*CONV4, "--frames=16", "--clips=2", "--workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Folders of a FIMA and a MoCo run."""
    root = tmp_path_factory.mktemp("<&>")
    for module, flags in (fima, ["--decoder_width=16"]), (moco, []):
        folder = trained(root / module.__name__, module, *CONV4, "--log_every=1", *flags)
        with open(folder / "log.jsonl", "a") as log:
            log.write('{"step": 3, "epo')  # a kill may cut the last line
    return root


@pytest.fixture(autouse=True)
def closed():
    """Leaves neither figures nor their style behind."""
    with plt.rc_context():
        yield
    plt.close("all")


def test_cosines_are_of_each_with_each_of_a_sample():
    x, y = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    torch.testing.assert_close(visualize.cosines(x, y), F.cosine_similarity(x[:, :, None], y[:, None], 3))


def test_masks_keep_the_brightest_pixels_of_each_modality_and_of_their_sum():
    rgb, motion = torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 2, 1, 2, 2)
    rgb[0, :, 0] = torch.tensor([[3.0, 1.0], [0.0, 0.5]])
    motion[0, :, 0] = torch.tensor([[0.0, 1.0], [5.0, 0.5]])
    masks = visualize.foreground_masks(rgb, motion, 0.25)  # ⌈0.25 · 3⌉ = 1 pixel
    assert masks.flatten(2).int().tolist() == [[[1, 0, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 1, 0]]]


def test_neighbours_are_the_nearest_and_never_the_query_itself():
    gallery = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-1.0, 0.0]])
    found = visualize.neighbours_of(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), ["a", "x"], gallery, list("abcd"), 2)
    rounded = [[(i, round(float(cosine), 5)) for i, cosine in row] for row in found]
    assert rounded == [[(1, 0.6), (2, 0.0)], [(2, 1.0), (1, 0.8)]]


def test_names_of_runs_and_checkpoints_differ():
    for paths, names in (
        (["runs/moco/log.jsonl", "runs/fima/log.jsonl", ""], ["moco", "fima", "untrained"]),
        (["moco/linear/log.jsonl", "fima/linear/log.jsonl"], ["moco/linear", "fima/linear"]),
        (["moco/epoch_0010.pt", "moco/checkpoint.pt"], ["moco/epoch_0010", "moco/checkpoint"]),
        (["moco/checkpoint.pt"] * 2, ["/".join([Path.cwd().name, "moco", "checkpoint"])] * 2),
    ):
        assert visualize.run_names(paths) == names


def test_a_video_that_is_named_from_here_is_none_of_its_neighbours(monkeypatch):
    monkeypatch.chdir("/")
    config = visualize.FigureConfig(video="tmp/a.mp4")
    assert visualize.draw_videos(config, 1).paths == ["/tmp/a.mp4"]


def test_results_of_other_test_videos_are_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, test_list, score, chance in (("a", "", 15.0, 10.0), ("b", "one.txt", 100.0, 50.0), ("c", "", 20.0, 10.0)):
        config = {"dataset": "folder", "clips": 10, "test_list": test_list, "encoder": f"of {run}"}
        result = {"recall_percent": {"R@1": score}, "chance_percent": {"R@1": chance}}
        write(tmp_path / run / "retrieve_folder.json", json.dumps({"config": config, "result": result}))
    assert visualize.results(["a", "b", "c"]) == {
        ("retrieve_folder", "R@1"): {"a": "15.00", "b": "–", "c": "20.00", "chance": "10.00"},
        ("retrieve_folder --test_list one.txt", "R@1"): {"a": "–", "b": "100.00", "c": "–", "chance": "50.00"},
    }


def test_results_of_other_options_of_a_protocol_are_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, cost in (("a", 1.0), ("b", 100.0)):
        record = {"config": {"dataset": "folder", "cost": cost}, "result": {"top1_percent": cost}}
        write(tmp_path / run / "svm_folder.json", json.dumps(record))
    assert [name for name, _ in visualize.results(["a", "b"])] == ["svm_folder", "svm_folder --cost 100.0"]


def test_a_hit_is_told_by_the_name_of_the_class_whatever_its_number_in_a_list():
    queries = data.VideoList(["a", "b", "c"], [0, 1, -1], ["run", "jump"], "")
    gallery = data.VideoList(["d", "e", "f"], [0, 1, -1], ["jump", "walk"], "")
    found = [[visualize.verdict(queries, i, gallery, j) for j in range(3)] for i in range(3)]
    assert found == [["✗ ", "✗ ", ""], ["✓ ", "✗ ", ""], [""] * 3]
    assert visualize.verdict(data.VideoList(["a"], [-1], [], ""), 0, gallery, 0) == ""  # of --video


def test_views_are_drawn_as_in_the_checkpoints_training(videos):
    (model,) = visualize.load_models(visualize.FigureConfig(checkpoint="small", device="cpu"), [])
    views = visualize.views_of(model, data.VideoList([], [], [], ""), 2)
    trained = torch.load(model.config.checkpoint)["config"]
    assert views.min_scale == trained["min_scale"] == 0.5
    assert views.color == {name: trained[name] for name in ("jitter_p", "gray_p", "blur_p")}


def test_features_to_embed_are_means_of_unit_vectors_and_bad_videos_are_left_out(videos):
    good = find.find_videos("synthetic", videos, train=False).paths[:2]
    (model,) = visualize.load_models(visualize.FigureConfig(encoder="conv4", crop=32, clips=3, workers=0), [])
    listed = data.VideoList([good[0], "nowhere.mp4", good[1]], [4, 5, 6], [], "")
    features, readable = visualize.video_features(model, listed, "")
    assert readable.paths == good and readable.labels == [4, 6]
    clips = data.TestClips(readable, 32, 16, 2, 3)[1]["clips"] / 255
    with torch.no_grad():
        pooled = model.encoder(augment.normalize(clips)).mean((2, 3, 4))
    assert torch.allclose(features[1], F.normalize(pooled, dim=1).mean(0), atol=1e-5)


def test_key_encoders_see_both_modalities_by_the_statistics_of_their_own_batch(runs):
    state = load_checkpoint(runs / "fima" / "checkpoint.pt")
    for name, value in state["model"].items():
        value += 100 if name.startswith("key_encoder.") and name.endswith("running_mean") else 0
    state["model"]["key_encoder.layers.1.weight"] += 1
    train.save_checkpoint(runs / "fima" / "other.pt", state)
    config, paths = visualize.FigureConfig(workers=0), [str(runs / "fima" / "other.pt")]
    query, key = (visualize.load_models(config, paths, key)[0].encoder for key in (False, True))
    assert torch.equal(query.layers[1].weight, state["model"]["encoder.layers.1.weight"])
    assert torch.equal(key.layers[1].weight, state["model"]["key_encoder.layers.1.weight"])
    maps = visualize.both_modalities(key, torch.randint(0, 256, (3, 3, 16, 32, 32), dtype=torch.uint8))
    for values in maps:  # a ReLU of what has mean 0 and deviation 1 in every channel: about half of it is positive
        assert 0.2 < (values > 0).float().mean() < 0.8


@pytest.mark.parametrize(("size", "pixels", "stride", "offset"), [(64, 4, 16, -7.5), (50, 2, 32, 7.5), (48, 6, 8, 0.0)])
def test_maps_lie_on_what_their_pixels_look_at(size, pixels, stride, offset):
    encoder = SimpleNamespace(strides=(8, stride, stride), offsets=(0, offset, offset))
    maps, places = torch.rand(2, pixels, pixels), (torch.arange(size) + 0.5 - offset) / stride
    near, inside = places.floor().long().clamp(0, pixels - 1), places % 1 > 0  # not on the line between two bins
    drawn = visualize.on_clip(encoder, maps, size, "nearest")
    assert drawn.shape == (2, size, size) and inside.sum() > 0.9 * size
    assert torch.equal(drawn[:, inside][..., inside], maps[:, near[inside]][..., near[inside]])
    if not offset:
        smooth = F.interpolate(maps[:, None], size=size, mode="bicubic")[:, 0]
        torch.testing.assert_close(visualize.on_clip(encoder, maps, size), smooth)


@pytest.mark.parametrize(
    "name, inputs, flags",
    [
        ("activations", ["moco", "fima"], ["--count=2", "--out=x.svg"]),
        ("affinity", ["moco", "fima"], ["--count=3"]),
        ("attention", ["fima"], ["--count=2"]),
        ("curves", ["moco", "fima"], ["--out=x.pdf"]),
        ("masks", ["fima"], ["--count=2", "--foreground=0.3"]),
        ("retrieval", ["fima"], ["--count=2", "--neighbours=3", "--gallery=6"]),
        ("sample", ["fima"], []),
        ("masks", [], ["--video=films/$ 0.mp4", *UNTRAINED]),
        ("retrieval", [], ["--dataset=folder", "--data=films", *UNTRAINED, "--count=2", "--neighbours=9"]),
        ("activations", ["fima"], ["--count=1", "--out=x.webp"]),
        ("retrieval", ["fima"], ["--count=1", "--neighbours=2", "--gallery=4", "--clips=1", "--out=x.gif"]),
        ("sample", ["fima"], ["--out=x.gif"]),
    ],
)
def test_a_command_draws_a_picture_that_may_play(run, runs, videos, tmp_path, name, inputs, flags):
    """Of a run, or of an untrained encoder and one's own videos, without labels."""
    (tmp_path / "films").mkdir()
    for n, path in enumerate(sorted(videos.glob("train/*/*.mp4"))[:5]):
        shutil.copy(path, tmp_path / "films" / f"$ {n}.mp4")
    inputs = [runs / method for method in inputs]
    out = run.ok(visualize, name, *inputs, "--workers=0", "--clips=2", *flags, dataset=None)
    path = tmp_path / next((flag[6:] for flag in flags if flag.startswith("--out=")), f"{name}.png")
    content = path.read_bytes()
    assert f"written to {path.name}" in out and 5_000 < len(content) < 3_000_000
    assert content.startswith((visualize.PICTURES | visualize.MOVIES)[path.suffix])
    if path.suffix == ".png":
        picture = plt.imread(path)[..., :3]
        assert picture.shape[1] <= 7.2 * 200 and picture.std() > 0.05  # of the page's width, and not empty
    if path.suffix in visualize.MOVIES:
        with Image.open(path) as movie:
            steps = [np.asarray(movie.convert("RGB")).astype(int) for i in range(movie.n_frames) if not movie.seek(i)]
        assert 16 <= len(steps) <= (32 if name == "sample" else 16)
        assert all(np.abs(a - b).max() > 30 for a, b in itertools.pairwise(steps))


def test_a_sample_shows_each_box_and_frame_while_its_window_lasts(videos):
    config = visualize.FigureConfig(encoder="conv4", crop=32, data=str(videos), out="x.gif", seed=1)
    figure = visualize.draw_sample(config, [])
    path = visualize.draw_videos(visualize.load_models(config, [])[0].config, 1).paths[0]
    views = data.PretrainingViews(data.VideoList([path], [-1], [], ""), 32, sub_clips=2)
    starts = views.write_views(np.random.default_rng(1), path, item := views.empty()).tolist()
    windows = [range(start, start + 32, 2) for start in starts]  # of videos of 40 frames
    times = sorted({*windows[0], *windows[1]})
    assert len({*starts}) == 2 and figure.axes[0].get_title() in path
    for view, (box, window) in enumerate(zip(figure.axes[0].patches, windows, strict=True)):
        assert [bool(step["visible"]) for step in box.frames] == [window[0] <= t < window[0] + 32 for t in times]
        played = [step["data"] for step in figure.axes[1 + 5 * view].images[0].frames]
        for step, time in zip(played, times, strict=True):
            frame = min(max((time - window[0]) // 2, 0), 15)
            assert np.allclose(step, item["clip"][view, :, frame].permute(1, 2, 0) / 255), (view, time)


def test_maps_play_and_are_still_at_the_middle():
    _, axes = visualize.grid(1, 1, 1)
    maps = torch.stack([torch.eye(3), 3 * torch.eye(3)])
    visualize.show(axes[0, 0], torch.rand(3, 4, 6, 6), heat=maps)
    clip, heat = axes[0, 0].images
    assert len(clip.frames) == 4 and np.array_equal(clip.get_array(), clip.frames[2]["data"])
    assert np.allclose(heat.get_array(), 1.5 * maps[1]) and np.allclose(heat.get_clim(), (0, 4.5))  # by their mean
    for uniform, value in ((0.5, 1), (0.0, 0)):
        visualize.show(axes[0, 0], torch.rand(3, 6, 6), heat=torch.full((3, 3), uniform))
        heat = axes[0, 0].images[-1]
        assert (heat.get_array() == value).all() and heat.get_clim() == (0, 2)  # 1 is in the middle
    rows = [[("", torch.rand(3, 6, 6), heat)] for heat in (torch.ones(2, 2), torch.eye(8))]
    scales = [image.get_clim() for ax in visualize.draw_rows(rows).axes for image in ax.images[1:]]
    assert scales == [(0, 8), (0, 8)]


def page_of(path):
    """What a page in HTML, with tags well nested, has: headings, kinds of pictures, rows of tables, all its text."""
    content = path.read_text()
    assert "color-scheme: light dark" in content and 'name="viewport"' in content
    assert not any(text in content for text in ("://", "<script"))
    pictures = re.findall(' src="data:image/(.*?);base64,(.*?)"', content)
    for kind, picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture)), formats=[kind]).load()
    page = ElementTree.fromstring(re.sub("<(!doctype|meta|img|wbr).*?>", "", content))
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]
    headings, kinds = [heading.text for heading in page.iter("h2")], [kind for kind, _ in pictures]
    return SimpleNamespace(headings=headings, kinds=kinds, rows=rows, text="".join(page.itertext()))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
def test_the_report_is_one_file_that_holds_its_pictures_and_a_browser_shows_it_whole(run, runs, tmp_path):
    run.ok(visualize, "report", runs / "fima", "--workers=0", "--clips=1", dataset=None)
    page = page_of(runs / "fima" / "report.html")
    assert page.headings == ["results", *visualize.SECTIONS, "options"]
    assert page.kinds == ["webp"] * len(visualize.SECTIONS)
    assert "fima: FIMA on synthetic, 2 steps" in page.text and "<&>" in page.text
    assert ["decoder_width", "16"] in page.rows and "fima.py --encoder" in page.text
    assert page.rows[0] == ["protocol", "%"]  # no results yet
    assert f"python evaluate.py retrieve --checkpoint '{runs / 'fima' / 'checkpoint.pt'}'" in page.text
    if not BROWSER:
        pytest.skip("the file is good; no Chromium is installed to show it")
    checked, script = tmp_path / "checked.html", "document.title = [...document.images].map(x => x.naturalWidth > 0)"
    content = (runs / "fima" / "report.html").read_text()
    checked.write_text(content + f"<script>window.onload = () => {{ {script} }}</script>")
    headless = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    headless += ["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", checked.as_uri()]
    done = subprocess.run(headless, capture_output=True, text=True, timeout=120)
    assert f"<title>{','.join(['true'] * len(visualize.SECTIONS))}</title>" in done.stdout
    assert ":CONSOLE" not in done.stderr
    cells, shown = (re.findall("<td>(.*?)</td>", html.unescape(page), re.DOTALL) for page in (content, done.stdout))
    assert shown == cells and len(cells) > 50


@pytest.mark.slow
def test_results_are_those_of_evaluate_beside_chance_and_an_untrained_encoder(run, runs, tmp_path, monkeypatch):
    quick, expected = ["--device=cpu", "--workers=0", "--clips=1"], []
    shutil.copytree(runs / "fima", tmp_path / "own")
    for protocol in ("knn", "retrieve"):
        run.ok(evaluate, protocol, "--checkpoint=own", *quick)
        run.ok(evaluate, protocol, *CONV4, *quick)
        name = f"{protocol}_synthetic"
        records = [numbers(tmp_path / folder / f"{name}.json") for folder in ("own", "runs/untrained_conv4")]
        for kind, chance in records[0]["chance_percent"].items():
            found, untrained = (x["recall_percent"][kind] if "R@" in kind else x[f"{kind}_percent"] for x in records)
            expected.append([name, kind, found, chance, untrained])
    run.ok(evaluate, "knn", *CONV4, *quick, "--clips=2", "--out=runs/untrained_conv4/svm_synthetic.json")  # another
    monkeypatch.setattr(visualize, "SECTIONS", ("curves",))
    run.ok(visualize, "compare", runs / "moco", "own", *quick, dataset=None)
    page = page_of(tmp_path / "compare.html")
    assert page.rows[0] == ["protocol", "%", str(runs / "moco"), "own", "chance", "runs/untrained_conv4"]
    assert [[*row[:2], *map(float, row[3:])] for row in page.rows[1:9]] == expected and page.rows[1][2] == "–"
    assert page.rows[9][0] == "option"  # and no other number is shown
    assert page.headings == ["results", "curves", "own/knn_synthetic_confusion.png", "options"]
    assert page.kinds == ["webp", "png"]
    assert ["decoder_width", "–", "16"] in page.rows and "crop" not in [row[0] for row in page.rows]


@pytest.mark.parametrize(
    "words, message",
    [
        (["activations", "FIMA", "--out=x.jpg"], "end it in .png or .pdf or .svg or .gif or .webp"),
        (["affinity", "FIMA", "--out=x.gif"], "affinity does not move: end it in .png or .pdf or .svg"),
        (["compare", "FIMA"], "compare needs a run folder for each RUN: visualize.py compare RUN RUN"),
        (["activations", "FIMA", "--out=no/x.png"], "no such folder"),
        (["activations", "FIMA", "--video=none.mp4", "--workers=0"], "none.mp4: No such file"),
        (["activations", "FIMA", "--dataset=folder", "--data=.", "--list_file=a", "--test_list=none.txt"], "none.txt"),
        (["attention", "MOCO"], "attention needs a checkpoint of fima.py"),
        (["masks", "FIMA", "MOCO"], "takes one"),
        (["curves"], "curves needs a run folder"),
        (["curves", "nowhere"], "No such file"),
        (["report", "nowhere"], "nowhere: no such run folder"),
    ],
)
def test_a_mistake_is_one_line(run, runs, words, message):
    places = {"FIMA": runs / "fima", "MOCO": runs / "moco"}
    run.refused(visualize, *(places.get(word, word) for word in words), dataset=None, says=[message])


def test_figures_leave_out_unreadable_videos_and_say_if_queries_are_training_videos(run, runs, videos, tmp_path):
    write(tmp_path / "mine" / "cut.mp4", "no video")
    for name, path in zip("ab", sorted(videos.glob("test/*/*.mp4")), strict=False):
        shutil.copy(path, tmp_path / "mine" / f"{name}.mp4")
    flags = ["--dataset=folder", "--data=mine", "--count=3", "--clips=1", "--workers=0", "--out=x.png"]
    for name in ("activations", "masks", "attention", "retrieval"):
        visualize.can_be_read.cache_clear()
        out = run.ok(visualize, name, runs / "fima", *flags, dataset=None)
        assert out.count("note: left out, ") == 1 and "mine/cut.mp4: " in out
        assert ("2 of the 2 queries are training videos, too" in out) == (name == "retrieval")
    write(tmp_path / "bad" / "cut.mp4", "no video")
    run.refused(
        visualize, "masks", runs / "fima", "--dataset=folder", "--data=bad", dataset=None, says=["none of the 1 "]
    )
    code, _, said = run(visualize, "attention", runs / "fima", "--video=mine/cut.mp4", dataset=None)
    assert code == 2 and "mine/cut.mp4" in said and "in a row" not in said


def test_attention_of_a_compiled_run_needs_no_compiler(runs, tmp_path, monkeypatch):
    state = torch.load(runs / "fima" / "checkpoint.pt")
    torch.save(state | {"config": state["config"] | {"compile": "on"}}, tmp_path / "checkpoint.pt")
    monkeypatch.setenv("CXX", "none++")
    visualize.load_decoder(visualize.FigureConfig(), [str(tmp_path)])


def test_curves_play_from_the_first_point_to_the_last_and_are_named_by_it(tmp_path):
    lines = [{"step": n, "epoch": n / 10, "loss/vv": 5 - n / 10, "chance/vv": 5.5} for n in range(1, 31)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for out, frames in (("x.gif", 40), ("x.png", 0)):
        (ax,) = visualize.draw_curves(visualize.FigureConfig(out=out), [str(tmp_path)]).axes
        assert ax.get_title() == "loss/vv 2 (dashed: chance)"
        for curve, name in zip(ax.lines, ("loss/vv", "chance/vv"), strict=True):
            played = [step["data"].tolist() for step in getattr(curve, "frames", ())]
            points = [[line[key] for line in lines] for key in ("epoch", name)]
            assert len(played) == frames and played[-1:] == [points] * bool(frames)
            assert played[:1] == [[values[:1] for values in points]] * bool(frames)


def test_a_curve_of_one_line_has_another_mark_for_chance(tmp_path):
    line = {"step": 1, "epoch": 1, "loss/vv": 5, "chance/vv": 5.5}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    (ax,) = visualize.draw_curves(visualize.FigureConfig(), [str(tmp_path)]).axes
    assert [curve.get_marker() for curve in ax.lines] == ["o", "_"]


@pytest.mark.parametrize("name", ["✓ HandstandPushups 0.97", "query: pretending_to_put_something_into_something " * 2])
def test_titles_do_not_reach_into_their_neighbours(name):
    with visualize.plt.rc_context(visualize.STYLE):
        fig = visualize.draw_rows([[(name, torch.rand(3, 8, 8))] * 4] * 2)
        fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in fig.axes[:4]]
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= fig.bbox.width
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_row_of_very_many_pictures_is_drawn():
    assert len(visualize.draw_rows([[("name", torch.rand(3, 2, 2))] * 120]).axes) == 120


def test_masks_are_named_by_their_share_of_the_frame_differences(runs, videos, monkeypatch):
    """Masks of the left half of the frame."""
    half = torch.tensor([1.0, 1, 0, 0]).expand(3, 2, 4, 4)
    monkeypatch.setattr(visualize, "foreground_masks", lambda *_: half)
    monkeypatch.setattr(visualize, "draw_rows", lambda rows: rows)
    config = visualize.FigureConfig(count=2, workers=0, device="cpu", data=str(videos))
    for (_, clip), _, *masked in visualize.draw_masks(config, [str(runs / "moco")]):
        moved = clip.diff(dim=1).abs().mean((0, 1))
        share = moved[:, :16].sum() / moved.sum()
        names = [f"{name}: {share:.0%} of motion" for name in ("by RGB", "by difference", "by both")]
        assert [title for title, _ in masked] == names
        assert all(torch.equal(picture[..., :16], clip[..., :16]) for _, picture in masked)


def test_strips_are_frames_from_first_to_last():
    clip = torch.arange(9.0)[None, :, None, None].expand(3, 9, 2, 2) / 10
    found = visualize.strip(clip, 3)
    assert found.shape == (3, 2, 12)
    assert np.allclose(found[0, 0], [1, 0, 0, 1, 1, 0.4, 0.4, 1, 1, 0.8, 0.8, 1])
