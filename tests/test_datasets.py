"""Finding videos: official layouts and lists, the ways people keep them, and what is said when something is missing."""

import contextlib
import csv
import json
import os
import re
import time
from pathlib import Path

import av
import pytest
from encoding import encode, moving_texture
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import evaluate
import find
import synthetic
import video
from find import find_videos
from video import Video


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, *lines: str, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def found(videos: data.VideoList, root: Path) -> dict[str, str | None]:
    """Path below root → name of its class."""
    names = [videos.classes[label] if label >= 0 else None for label in videos.labels]
    return dict(zip([os.path.relpath(path, root) for path in videos.paths], names, strict=True))


def parts(dataset: str, root: Path, **options) -> tuple[data.VideoList, data.VideoList]:
    """Training and held-out videos, which always have the same classes."""
    train, held_out = (find_videos(dataset, root, half, **options) for half in (True, False))
    assert train.classes == held_out.classes
    return train, held_out


UCF_CLASSES = ["ApplyEyeMakeup", "HammerThrow", "Hammering", "HandstandPushups", "HandstandWalking"]  # not sorted
UCF_FILES = [
    ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01", 1),
    ("Hammering/v_Hammering_g08_c01", 3),
    ("HandstandPushups/v_HandStandPushups_g08_c01", 4),
    ("HandstandWalking/v_HandstandWalking_g08_c01", 5),
]
UCF_TEST = ["HammerThrow/v_HammerThrow_g01_c01", "HandstandPushups/v_HandStandPushups_g01_c01"]


def make_ucf101(videos: Path, lists: Path, split: int = 1, suffix: str = ".avi") -> None:
    write(lists / "classInd.txt", *[f"{i} {name}" for i, name in enumerate(UCF_CLASSES, 1)], "", end="\r\n")
    write(lists / f"trainlist0{split}.txt", *[f"{name}.avi {label}" for name, label in UCF_FILES], end="\r\n")
    write(lists / f"testlist0{split}.txt", *[f"{name}.avi" for name in UCF_TEST], end="\r\n")
    touch(videos, *[name + suffix for name in [name for name, _ in UCF_FILES] + UCF_TEST])


@pytest.mark.parametrize(
    ("videos", "lists"), [("UCF-101", "ucfTrainTestlist"), ("data", "anno"), ("videos", "annotations"), (".", ".")]
)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_ucf101(tmp_path, videos, lists, split):
    make_ucf101(tmp_path / videos, tmp_path / lists, split)
    train, test = parts("ucf101", tmp_path, split=split)
    assert train.classes == UCF_CLASSES
    assert train.labels == [label - 1 for _, label in UCF_FILES] and test.labels == [1, 3]
    assert train.paths == [str(tmp_path / videos / f"{name}.avi") for name, _ in UCF_FILES]
    expected = {1: "9537", 2: "9586", 3: "9624"}[split]
    assert train.report == f"ucf101 train split {split}: 4 videos of {expected} expected, 5 classes"


def test_ucf101_in_another_spelling_and_container_and_not_all_there(tmp_path):
    make_ucf101(tmp_path / "clips", tmp_path, suffix=".mp4")
    clips = tmp_path / "clips"
    (clips / "HandstandPushups/v_HandStandPushups_g08_c01.mp4").rename(clips / "v_HandstandPushups_g08_c01.mp4")
    (clips / "Hammering/v_Hammering_g08_c01.mp4").unlink()
    videos = find_videos("ucf101", tmp_path, train=True)
    assert videos.labels == [0, 3, 4]
    assert videos.report.endswith("; 1 of 4 listed videos are not on disk: v_Hammering_g08_c01")


@pytest.mark.slow
def test_the_whole_of_ucf101_is_found_in_seconds(tmp_path):
    """13 320 links in 101 folders."""
    classes = [f"Class{i:03d}" for i in range(101)]
    names = [f"{classes[i % 101]}/v_{classes[i % 101]}_g{i // 101:03d}_c01.avi" for i in range(13_320)]
    touch(tmp_path, "a.avi", *names[:101])
    for name in names[101:]:
        (tmp_path / name).symlink_to(tmp_path / "a.avi")
    write(tmp_path / "classInd.txt", *[f"{i} {name}" for i, name in enumerate(classes, 1)])
    write(tmp_path / "trainlist01.txt", *[f"{name} {1 + i % 101}" for i, name in enumerate(names[:9537])])
    write(tmp_path / "testlist01.txt", *names[9537:])
    begin = time.process_time()
    train, test = parts("ucf101", tmp_path)
    assert time.process_time() - begin < 5
    assert (len(train), len(test), len(train.classes)) == (9537, 3783, 101)
    assert train.labels == [i % 101 for i in range(9537)]


HMDB_NAMES = [
    "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi",
    "A & B; (2)!_clap_f_cm_np1_ba_bad_1.avi",
    "x_clap_0.avi",
    "y_clap_0.avi",
]


@pytest.mark.parametrize(("videos", "lists"), [(".", "testTrainMulti_7030_splits"), ("data", "anno")])
@pytest.mark.parametrize("split", [1, 2, 3])
def test_hmdb51(tmp_path, videos, lists, split):
    touch(tmp_path / videos / "clap", *HMDB_NAMES)
    touch(tmp_path / videos / "brush_hair", "b_brush_hair_0.avi")
    ends = zip(HMDB_NAMES, (1, 2, 0, 1), strict=True)
    write(tmp_path / lists / f"clap_test_split{split}.txt", *[f"{name} {tag} " for name, tag in ends])
    write(tmp_path / lists / f"brush_hair_test_split{split}.txt", "b_brush_hair_0.avi 1 ")
    train, test = parts("hmdb51", tmp_path, split=split)
    trained = ["brush_hair/b_brush_hair_0.avi", f"clap/{HMDB_NAMES[0]}", f"clap/{HMDB_NAMES[3]}"]
    assert found(train, tmp_path / videos) == {path: os.path.dirname(path) for path in trained}
    assert found(test, tmp_path / videos) == {f"clap/{HMDB_NAMES[1]}": "clap"}
    assert train.report == f"hmdb51 train split {split}: 3 videos of 3570 expected, 2 classes"


def test_equal_names_in_two_classes_are_told_apart_by_their_folders(tmp_path):
    touch(tmp_path, "clap/a.avi", "brush hair/a.avi")
    for name in ("brush_hair", "clap"):
        write(tmp_path / f"{name}_test_split1.txt", "a.avi 1 ")
    videos = find_videos("hmdb51", tmp_path, True)
    assert found(videos, tmp_path) == {"brush hair/a.avi": "brush_hair", "clap/a.avi": "clap"}


K400_ROWS = [
    ("playing guitar", "-abcdefghi1"),
    ("ski jumping", "_abcdefghi2"),
    ("skiing (not slalom or crosscountry)", "Abcdefghi_3"),
    ("massaging person's head", "abcdefghi-4"),
]


def write_k400_csv(path: Path, rows: list[tuple[str, str]], header: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    others = {"time_start": 417, "time_end": 427, "split": "x", "is_cc": 0}
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, header.split(","), extrasaction="ignore")
        table.writeheader()
        table.writerows({"label": label, "youtube_id": identifier, **others} for label, identifier in rows)


@pytest.mark.parametrize("header", ["label,youtube_id,time_start,time_end,split", "youtube_id,label,time_start,is_cc"])
@pytest.mark.parametrize(
    "csv_names", [("train.csv", "val.csv"), ("kinetics-400_train.csv", "kinetics-400_validate.csv")]
)
@pytest.mark.parametrize("folders", ["flat", "spaces", "underscores", "stripped"])
def test_k400(tmp_path, header, csv_names, folders):
    write_k400_csv(tmp_path / csv_names[0], K400_ROWS, header)
    write_k400_csv(tmp_path / "annotations" / csv_names[1], K400_ROWS[3:], header)
    folder = {
        "flat": lambda label: "",
        "spaces": lambda label: label,
        "underscores": lambda label: label.replace(" ", "_"),
        "stripped": lambda label: "".join(c for c in label if c.isalnum()),
    }[folders]
    endings = ("_000417_000427.mp4", "_417_427.mkv", ".mp4", "_000417_000427.webm")
    for (label, identifier), ending in zip(K400_ROWS, endings, strict=True):
        touch(tmp_path / "train" / folder(label), identifier + ending)
    train, validation = parts("k400", tmp_path)
    assert train.classes == sorted(label for label, _ in K400_ROWS)
    assert [train.classes[label] for label in train.labels] == [label for label, _ in K400_ROWS]
    assert [os.path.basename(path)[:11] for path in train.paths] == [identifier for _, identifier in K400_ROWS]
    assert train.report == "k400 train: 4 videos of 4 listed, 4 classes"
    assert validation.labels == [0]


def test_k400_without_lists_goes_by_its_class_folders(tmp_path):
    touch(tmp_path, "K/train_256/playing_guitar/a.mp4", "K/train_256/skiing_crosscountry/b.mp4")
    touch(tmp_path, "K/val_256/skiing crosscountry/c.mp4", "K/test/d.mp4", "e.mp4")
    train, validation = parts("k400", tmp_path)
    assert found(train, tmp_path) == {
        "K/train_256/playing_guitar/a.mp4": "playing guitar",
        "K/train_256/skiing_crosscountry/b.mp4": "skiing crosscountry",
    }
    assert found(validation, tmp_path) == {"K/val_256/skiing crosscountry/c.mp4": "skiing crosscountry"}
    assert "; 2 videos outside of" in train.report


def test_diving48(tmp_path):
    touch(tmp_path / "rgb", "_8Vy3dlHg2w_00000.mp4", "_8Vy3dlHg2w_00001.mp4", "other_00002.mp4")
    vocabulary = [["Back", "15som", "05Twis", "FREE"]] * 30 + [["Forward", "25som", "NoTwis", "PIKE"]] * 18
    write(tmp_path / "Diving48_vocab.json", json.dumps(vocabulary))
    for half, names in (
        ("train", [("_8Vy3dlHg2w_00000", 34), ("other_00002", 0)]),
        ("test", [("_8Vy3dlHg2w_00001", 47)]),
    ):
        entries = [{"vid_name": name, "label": label, "start_frame": 0, "end_frame": 99} for name, label in names]
        write(tmp_path / f"Diving48_V2_{half}.json", json.dumps(entries))
    train, test = parts("diving48", tmp_path)
    assert (train.labels, test.labels) == ([34, 0], [47])
    assert len(train.classes) == 48 and train.classes[34] == "Forward 25som NoTwis PIKE"
    assert train.report == "diving48 train: 2 videos of 15027 expected, 48 classes"


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2(tmp_path, prefix):
    touch(tmp_path / "20bn-something-something-v2", "1.webm", "22.webm", "333.webm")
    classes = {"Putting something on a surface": "1", "Moving something (up)": "0"}
    write(tmp_path / "labels" / f"{prefix}labels.json", json.dumps(classes))
    entry = {"id": "22", "label": "putting cup on a surface", "template": "Putting [something] on a surface"}
    write(tmp_path / "labels" / f"{prefix}train.json", json.dumps([entry, {**entry, "id": "1"}]))
    other = {"id": "333", "label": "moving pen (up)", "template": "Moving [something] (up)"}
    write(tmp_path / "labels" / f"{prefix}validation.json", json.dumps([other]))
    train, validation = parts("ssv2", tmp_path)
    assert train.classes == ["Moving something (up)", "Putting something on a surface"]
    assert [os.path.basename(path) for path in train.paths] == ["22.webm", "1.webm"]
    assert (train.labels, validation.labels) == ([1, 1], [0])
    assert validation.report == "ssv2 validation: 1 videos of 24777 expected, 2 classes"


def test_folder_of_classes(tmp_path):
    touch(tmp_path, "jump/a.mp4", "jump/high/b 1.MOV", "run/c.avi", "d.webm", "notes.txt", "run/._c.avi", "run/e.jpg")
    train, test = parts("folder", tmp_path)
    classes = {"d.webm": None, "jump/a.mp4": "jump", "jump/high/b 1.MOV": "jump/high", "run/c.avi": "run"}
    assert found(train, tmp_path) == classes and train == test
    title = "folder (no train/ and test/ folders: one list for both)"
    assert train.report == f"{title}: 4 videos, 3 classes; 1 other files passed over (1 .jpg)"
    flat = find_videos("folder", str(tmp_path / "run"), train=True)
    assert (flat.labels, flat.classes) == ([-1], []) and "1 videos, no labels" in flat.report


TREES = {  # training videos and their classes, held-out ones, how many are outside of both
    "a video above": ("train/jump/a.mp4=jump", "test/jump/b.mp4=jump", "c.mp4"),
    "folders beside": ("train/jump/a.mp4=jump", "test/jump/b.mp4=jump", "more/c.mp4 more/train_d.mp4"),
    "validation beside test": ("train/jump/a.mp4=jump", "test/jump/b.mp4=jump", "val/jump/v.mp4"),
    "several classes": ("train/jump/a.mp4=jump train/run/b.mp4=run", "val/run/c.mp4=run", ""),
    "classes called as parts": ("train/bus/b.mp4=bus train/train/a.mp4=train", "test/train/c.mp4=train", ""),
    "wrapped": ("sets/UCF/Training/jump/a.mp4=jump", "sets/UCF/valid_256/jump/b.mp4=jump", "sets/c.mp4"),
    "two wrapped": (
        "h/train-set/run/c.mp4=h/run u/train/jump/a.mp4=u/jump",
        "h/TEST/run/d.mp4=h/run u/test/jump/b.mp4=u/jump",
        "",
    ),
    "parts in classes": (
        "all/jump/train/a.mp4=jump all/run/train/c.mp4=run",
        "all/jump/test/b.mp4=jump all/run/test/d.mp4=run",
        "",
    ),
    "parts apart": ("kinetics_train/train/jump/a.mp4=jump", "kinetics_val/val/jump/b.mp4=jump", ""),
    "a class called train": ("plane/b.mp4=plane train/a.mp4=train", "plane/b.mp4=plane train/a.mp4=train", ""),
}


@pytest.mark.parametrize("name", TREES)
def test_a_split_that_exists_is_used_wherever_it_is(tmp_path, name):
    *expected, outside = TREES[name]
    expected, outside = [dict(pair.split("=") for pair in half.split()) for half in expected], outside.split()
    touch(tmp_path, *expected[0], *expected[1], *outside)
    for videos, held in zip(parts("folder", tmp_path), expected, strict=True):
        assert found(videos, tmp_path) == held
        left_out = f"; {len(outside)} videos outside of the training and the held-out folder left out"
        assert videos.report.endswith(left_out if outside else f"{len(videos.classes)} classes")


@pytest.mark.parametrize(
    "train", ["train", "Training", "trainset", "train_set", "train set", "train-2", "train_340x256"]
)
@pytest.mark.parametrize("test", ["test", "testing", "TestSet", "val", "valid", "validate", "validation", "valset"])
def test_parts_may_have_any_of_these_names(tmp_path, train, test):
    touch(tmp_path, f"{train}/a.mp4", f"{test}/b.mp4", "c.mp4")
    assert [[*found(half, tmp_path)] for half in parts("folder", tmp_path)] == [[f"{train}/a.mp4"], [f"{test}/b.mp4"]]


HIDDEN = [".Trash-1000/files", ".ipynb_checkpoints", "@eaDir/a.mp4", "#recycle", "__MACOSX/train", "lost+found", "@tmp"]
HIDDEN += ["$RECYCLE.BIN", "System Volume Information", "train/@eaDir", "test/jump/.AppleDouble", ".hidden/train/jump"]


def test_what_is_hidden_is_never_read(tmp_path):
    touch(tmp_path, "train/jump/a.mp4", "test/jump/b.mp4", "train/jump/._a.mp4", "._list.txt", "train/Thumbs.db")
    touch(tmp_path, *[f"{folder}/{name}" for folder in HIDDEN for name in ("x.mp4", "y.jpg")])
    train, test = parts("folder", tmp_path)
    assert found(train, tmp_path) | found(test, tmp_path) == {"train/jump/a.mp4": "jump", "test/jump/b.mp4": "jump"}
    assert train.report == "folder train: 1 videos, 1 classes"
    write(tmp_path / "list.txt", "train/jump/._a.mp4 0", "train/jump/a.mp4 0")
    assert len(find_videos("folder", tmp_path, train=True, list_file="list.txt")) == 1


def test_hidden_lists_are_no_lists_of_a_data_set(tmp_path):
    make_ucf101(tmp_path / "UCF-101", tmp_path / "lists")
    touch(tmp_path, "lists/._trainlist01.txt", ".Trash-1000/trainlist01.txt", ".Trash-1000/classInd.txt")
    assert len(find_videos("ucf101", tmp_path, train=True)) == 4
    write_k400_csv(tmp_path / "k400" / "train.csv", K400_ROWS, "label,youtube_id")
    touch(tmp_path / "k400", "._train.csv", "train/-abcdefghi1.mp4", "train/.-abcdefghi1.mp4")
    assert len(find_videos("k400", tmp_path / "k400", train=True)) == 1


def test_folders_that_are_links_keep_their_part(tmp_path):
    touch(tmp_path, "all/jump/a.mp4", "all/run/b.mp4")
    for link, target in (("train/jump", "all/jump"), ("test/run", "all/run")):
        (tmp_path / link).parent.mkdir()
        (tmp_path / link).symlink_to(tmp_path / target)
    train, test = parts("folder", tmp_path)
    assert (found(train, tmp_path), found(test, tmp_path)) == ({"train/jump/a.mp4": "jump"}, {"test/run/b.mp4": "run"})


def test_a_training_video_that_a_link_makes_a_test_video_is_left_out(tmp_path):
    touch(tmp_path, "train/jump/a.mp4", "test/jump/b.mp4", "test/jump/c.mp4")
    (tmp_path / "train" / "jump" / "soft.mp4").symlink_to("../../test/jump/b.mp4")
    os.link(tmp_path / "test" / "jump" / "c.mp4", tmp_path / "train" / "jump" / "hard.mp4")
    (tmp_path / "train" / "more").symlink_to("../test")
    (tmp_path / "train" / "back").symlink_to("..")
    (tmp_path / "train" / "loop.mp4").symlink_to("loop.mp4")
    videos = find_videos("folder", tmp_path, train=True)
    assert [*found(videos, tmp_path)] == ["train/loop.mp4", "train/jump/a.mp4"]
    assert videos.report.endswith("; 4 that are held-out videos too (links) left out")
    assert len(videos.shared) == 4
    assert len(find_videos("folder", tmp_path, train=False)) == 2
    write(tmp_path / "bad.txt", *videos.shared)
    assert not find_videos("folder", tmp_path, train=True, exclude=tmp_path / "bad.txt").shared


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "jump/a.mp4", "run/b.mp4")
    (tmp_path / "jump" / "back").symlink_to(tmp_path)
    (tmp_path / "jump" / "to_run").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "to_jump").symlink_to(tmp_path / "jump")
    assert len(find_videos("folder", tmp_path, train=True)) == 2


def test_folders_that_cannot_be_listed_are_counted_and_evaluation_refuses_them(tmp_path, monkeypatch):
    def scan(folder, scandir=os.scandir):
        if str(folder).endswith("run"):
            raise PermissionError
        return scandir(folder)

    touch(tmp_path, "jump/a.mp4", "run/b.mp4")
    monkeypatch.setattr(os, "scandir", scan)
    videos = find_videos("folder", tmp_path, train=True)
    assert videos.report.endswith(f"; 1 folders left out, for want of permission to list them, such as {tmp_path}/run")
    assert len(videos) == 1 and videos.closed == (str(tmp_path / "run"),)
    with pytest.raises(ValueError, match=f"permission to list them, such as {tmp_path}/run: .*`chmod -R"):
        evaluate.find_labelled("folder", str(tmp_path), True, 1)
    with pytest.raises(PermissionError, match=f"{tmp_path}/run: no permission to list this folder"):
        find.check_videos(tmp_path, tmp_path / "bad.txt", 1)
    monkeypatch.undo()

    def status(path, *rest, stat=os.stat, **options):
        if str(path) == f"{tmp_path}/away":
            raise PermissionError
        return stat(path, *rest, **options)

    (tmp_path / "away").symlink_to(tmp_path / "elsewhere")  # to where nothing may be seen
    monkeypatch.setattr(os, "stat", status)
    assert find_videos("folder", tmp_path, train=True).closed == (f"{tmp_path}/away",)


FOLDERS = st.lists(st.sampled_from(["train", "test", "val", "bus", "set"]), max_size=4).map("/".join)


@given(st.sets(FOLDERS, min_size=1, max_size=6), st.booleans())
def test_no_tree_gives_a_training_video_that_is_evaluated(folders, kinetics):
    """Oracle: training and held-out parts in one folder divide; then each part's videos lie below its topmost part."""
    paths = [os.path.join("/root", folder, "a.mp4") for folder in sorted(folders)]
    (train, classes, held, outside, halved), (test, *_) = (
        find._read_tree("/root", paths, half, kinetics) for half in (True, False)
    )
    assert max((label for _, _, label in train), default=-1) < len(classes)
    train, test = ([path for path, _, _ in half] for half in (train, test))
    parts = {(name[: m.start()], m[0]) for name in folders for m in re.finditer(r"\b(train|test|val)\b", name)}
    divided = {above for above, part in parts if part == "train" and {(above, "test"), (above, "val")} & parts}
    if divided or kinetics or all(re.search(r"\b(train|test|val)\b", name) for name in folders):
        assert halved and not set(train) & set(test) and test == held
        assert len(train) + len(test) + outside == len(paths)
    else:
        assert not halved and train == test == paths and not outside
    for path in train if divided else []:
        name = os.path.dirname(path)[len("/root/") :]
        first = min(
            (m for m in re.finditer(r"\b(train|test|val)\b", name) if name[: m.start()] in divided),
            key=lambda m: m.start(),
        )
        assert first[0] == "train"


def test_suffixes_of_all_containers_are_found_and_others_counted(tmp_path):
    sound = {"avif", "heic", "heif", "isma", "ism", "m4a", "m4b", "mj2", "psp", "mka", "mks", "mpo", "wma"}
    for name in {*video.CONTAINERS.split(",")} - {"jpeg_pipe"}:
        for mode in "rw":
            with contextlib.suppress(ValueError):
                assert av.format.ContainerFormat(name, mode).extensions <= {*find.SUFFIXES} | sound, name
    names = [f"{n}.{suffix.upper() if n % 2 else suffix}" for n, suffix in enumerate(find.SUFFIXES)]
    others = "a.jpg b.JPG c.jpg d.zip e.zip mp4 f.wav g.md h.srt i.py list.txt .x.jpg".split()  # noqa: SIM905
    touch(tmp_path, *names, *others)
    videos = find_videos("folder", tmp_path, train=True)
    assert found(videos, tmp_path).keys() == set(names)
    counted = r"; 10 other files passed over \(3 \.jpg, 2 \.zip, 1 \S+, 1 \S+, 1 \S+, …\)"
    assert re.search(counted, videos.report.replace("without suffix", "none"))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mjpg", "mjpeg"), ("a.ogv", "libvpx"), ("a.mxf", "mpeg2video"), ("a.ivf", "libvpx"), ("a.f4v", "mpeg4")),
        *(("a.vob", "mpeg2video"), ("a.divx", "mpeg4"), ("a.3g2", "mpeg4"), ("a.asf", "wmv2"), ("a.m2v", "mpeg2video")),
    ],
)
def test_a_video_of_each_new_suffix_is_read(tmp_path, name, codec):
    images = moving_texture(24)
    inner = {"divx": "avi", "vob": "mpg", "f4v": "mp4"}.get(name[2:], name[2:])
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    encode(tmp_path / f"a.{inner}", images, codec, pix_fmt=pix_fmt, b="2M").rename(tmp_path / name)
    (path,) = find_videos("folder", tmp_path, train=True).paths
    with Video(path) as video:
        brightness = [image.mean() for image in video.read(range(len(video)))]
    assert brightness == pytest.approx(images.mean((1, 2, 3)), abs=4)


def test_synthetic_is_made_when_it_is_not_there(tmp_path, monkeypatch):
    def make(root):
        touch(Path(root), "train/rise/a.mp4", "test/rise/b.mp4")
        Path(root, synthetic.SYNTHETIC_MARKER).write_text(f'{{"version": {synthetic.SYNTHETIC_VERSION}, …}}')

    monkeypatch.setattr(find, "make_synthetic", make)
    root = tmp_path / "new"
    assert found(find_videos("synthetic", root, train=True), root) == {"train/rise/a.mp4": "rise"}
    monkeypatch.delattr(find, "make_synthetic")
    assert find_videos("synthetic", root, train=False).report == "synthetic test: 1 videos, 1 classes"


@settings(max_examples=15)
@given(
    name=st.text(
        st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cc", "Zl", "Zp", "Zs"]), min_size=1
    ),
    spaces=st.integers(0, 2),
    label=st.integers(0, 400),
)
def test_any_name_goes_through_a_list_file(tmp_path_factory, name, spaces, label):
    root = tmp_path_factory.getbasetemp()
    path = root / f"x{' ' * spaces}{name[:20]}.mp4"
    path.touch()
    write(root / "any.txt", f"{path.name} {label}", f"{path} {label}")
    videos = find_videos("folder", root, train=True, list_file=root / "any.txt")
    assert videos.paths == [str(path)] * 2
    assert videos.labels == [label] * 2


def test_list_file_counts_what_is_missing_and_takes_absolute_paths(tmp_path):
    touch(tmp_path, "root/a.mp4")
    write(tmp_path / "mine.txt", f"{tmp_path}/root/a.mp4 1", "gone.mp4 0", "no/such/folder.mp4 0")
    for root in (tmp_path / "root", "/"):
        videos = find_videos("folder", root, train=True, list_file=tmp_path / "mine.txt")
        assert videos.paths == [str(tmp_path / "root" / "a.mp4")]
        assert "1 videos, 2 classes; 2 of 3 listed videos are not on disk: " in videos.report


VIDEOS = ["a.mp4", "b.mp4", "c/d e.avi"]
SHAPES = {  # lines: name of each video's class
    "path label\na.mp4 1\nb.mp4 0": ["1", "0"],
    "video_path,class\na.mp4,run\nb.mp4,jump": ["run", "jump"],
    "sep=;\nFile name;Label\na.mp4;run\nb.mp4;jump": ["run", "jump"],
    '"path","label"\n"a.mp4","run, fast"\n"b.mp4","jump"': ["run, fast", "jump"],
    "a.mp4 'run'\n'b.mp4' \"brush hair\"": ["run", "brush hair"],
    '"a.mp4 1"\n\t"b.mp4"\t0': ["1", "0"],
    "# made by hand\na.mp4 1 # a note\n#c/d e.avi 5\n# c/d e.avi 5\n\nb.mp4 0 #": ["1", "0"],
    "a.mp4;1;\n;;\nb.mp4;0;\n;;": ["1", "0"],
    "a.mp4|run\nb.mp4|jump": ["run", "jump"],
    ".\\a.mp4 1\nno\\..\\b.mp4 0": ["1", "0"],
    "a.mp4 2\nb.mp4 -1": ["2", None],
    "a.mp4 run\nb.mp4": ["run", None],
    "a 1\nb 0": ["1", "0"],
    "a\nb": [None, None],
    "a\tbrush hair\nb\trun": ["brush hair", "run"],
    '"a" 1\n./b,0': ["1", "0"],
    "a.mp4 2 hands clap\nb.mp4 brush hair": ["2 hands clap", "brush hair"],
    "a.mp4 1 hand wave\nb.mp4 2 hands clap": ["1 hand wave", "2 hands clap"],
    "a.mp4 3 jump\nb.mp4 3 jump": ["3 jump", "3 jump"],
    "a.mp4 163 0\nb.mp4 98 1": ["0", "1"],
    "path num_frames label\na.mp4,163,1\nb.mp4,98,0": ["1", "0"],
    "a 163 0\nb 98 1": ["0", "1"],
    "a.mp4 163 jump\nb.mp4 98 jump": ["jump", "jump"],
}


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("way", ["\n", "\r\n", "\r", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_lists_of_all_shapes(tmp_path, text, way):
    touch(tmp_path, *VIDEOS)
    coded = text.replace("\n", way) if way.isspace() else text
    coding = "utf-8" if way.isspace() else way
    (tmp_path / "list").write_bytes((("\ufeff" if "16" in way else "") + coded).encode(coding))
    videos = find_videos("folder", tmp_path, train=True, list_file="list")
    assert [*found(videos, tmp_path).items()] == [*zip(["a.mp4", "b.mp4"], SHAPES[text], strict=True)]
    assert ("number of frames" in videos.report) == ("163" in text)


REFUSED = {
    "a.mp4 0 31 0\nb.mp4 5 36 1": "line 1: three numbers after 'a.mp4'; lines are 'path label'",
    "path,start,end,label\na.mp4,0,31,0": "line 2: three numbers after 'a.mp4'",
    "a.mp4 0 31 jump\nb.mp4 5 36 brush hair": "line 1: two numbers after 'a.mp4'",
    "a.mp4 0.5 3.25 jump\nb.mp4 1.0 2.0 run": "line 1: two numbers after 'a.mp4'",
    "a.mp4 jump 0 31\nb.mp4 run 5 36": "line 1: two numbers after 'a.mp4'",
    "a.mp4 0 31\nb.mp4 5 36": "line 1: two numbers after 'a.mp4'",
    "a.mp4 0 3\nb.mp4 5 2": "line 1: two numbers after 'a.mp4'",
    "a.mp4 163 1\nb.mp4 98 5 1": "line 1: two numbers after 'a.mp4'",
    "a.mp4 1\nb.mp4 0 31 0": "line 2: three numbers after 'b.mp4'",
    "path,label,split\na.mp4,jump,train\nb.mp4,run,test": "line 2: 3 columns; lines are 'path label'",
    "C:\\videos\\a.mp4 1": "line 1: .* has a drive of Windows: name videos by their path from",
    "a.mp4 1\n'd:/videos/a.mp4',1": "line 2: .* has a drive of Windows",
    "\\\\server\\videos\\a.mp4 1": "line 1: .* is not in",
    "..\\a.mp4 1": "line 1: .* is not in",
    "a.mp4 1\nb/../../elsewhere/a.mp4 1": "line 2: .* is not in .*: give a folder .*--data",
    "/elsewhere/a.mp4": "line 1: .* is not in",
    "../{root}2/a.mp4": "line 1: .* is not in",
    "x 1": "line 1: 'x' may be x.avi or x.mp4: write its suffix",
    "a.mp4 1\nb.xyz 1": "line 2: no video file",
    "nothing 1\na.mp4 0": "line 1: no video file in 'nothing 1'",
    "a.mp4 1\npath label": "line 2: no video file in 'path label'",
    "a.mp4 999999999999": ": label 999999999999; labels count the classes from 0",
    "a.mp4 1 " * 100_000: "line 1: 799999 characters, more than a path and a label",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_lists_that_say_too_much_or_too_little_are_refused(tmp_path, text):
    touch(tmp_path, *VIDEOS, "x.avi", "x.mp4")
    write(tmp_path / "list.csv", *text.replace("{root}", tmp_path.name).split("\n"))
    with pytest.raises(ValueError, match=rf"list\.csv,? ?{REFUSED[text]}") as caught:
        find_videos("folder", tmp_path, train=True, list_file="list.csv")
    assert "\n" not in str(caught.value)


def test_names_as_they_stand_come_first_in_lists(tmp_path):
    names = ['#20; (a, b) "c".avi', "'q'.mp4", "a\\b.mp4", "a/b.mp4", "x.mp4 1.mp4", "x.mp4", "C:\\x.mp4", '"x.mp4']
    names += ["y.mp4.mkv", os.fsdecode(b"caf\xe9 & ; ( ' \".mp4")]
    touch(tmp_path, *names)
    (tmp_path / "list.txt").write_bytes(os.fsencode("".join(f"{name} {n}\n" for n, name in enumerate(names))))
    videos = find_videos("folder", tmp_path, train=True, list_file="list.txt")
    assert found(videos, tmp_path) == {name: str(n) for n, name in enumerate(names)}


def test_listed_videos_without_suffix_that_are_missing_are_counted_and_not_taken_for_others(tmp_path):
    touch(tmp_path, "run.mp4", "walk.mp4")
    write(tmp_path / "list.txt", "walk 1", "run fast 3", "run fast.mp4 3", "gone 2")
    videos = find_videos("folder", tmp_path, train=True, list_file="list.txt")
    assert [*found(videos, tmp_path)] == ["walk.mp4"]
    assert "3 of 4 listed videos are not on disk: run fast, run fast.mp4, gone" in videos.report


def test_links_below_the_root_are_followed_and_dots_do_not_go_through_them(tmp_path):
    touch(tmp_path, "far/away/a.mp4", "far/b.mp4", "root/b.mp4")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "far" / "away")
    write(tmp_path / "mine.txt", "link/a.mp4", "link/../b.mp4")
    for list_file in (None, tmp_path / "mine.txt"):
        videos = find_videos("folder", tmp_path / "root", train=True, list_file=list_file)
        assert {os.path.relpath(path, tmp_path / "root") for path in videos.paths} == {"link/a.mp4", "b.mp4"}


@pytest.mark.parametrize("dataset", [name for name in find.DATASETS if name != "synthetic"])
def test_a_missing_or_empty_root_says_where_and_what_is_expected(tmp_path, dataset):
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            find_videos(dataset, root, train=True)
        message = str(caught.value)
        assert str(root) in message and find.LAYOUTS[dataset] in message and "\n" not in message


def test_a_missing_or_broken_list_and_one_without_videos_are_named(tmp_path):
    make_ucf101(tmp_path / "UCF-101", tmp_path / "lists")
    with pytest.raises(FileNotFoundError, match=r"no list trainlist02\.txt below it; ucf101 expects UCF-101/"):
        find_videos("ucf101", tmp_path, train=True, split=2)
    for path in (tmp_path / "UCF-101").rglob("*.avi"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no videos found .*4 of 4 listed videos are not on disk"):
        find_videos("ucf101", tmp_path, train=True)
    for dataset, name, line, says in (
        ("ucf101", "lists/trainlist01.txt", "Dancing/v_Dancing_g01_c01.avi 1", ".*no entry 'dancing'"),
        ("k400", "train.csv", "path label", ".*no entry 'youtube_id'"),
        ("diving48", "Diving48_vocab.json", "{", ""),
    ):
        write(tmp_path / name, line, "a.mp4 3")
        with pytest.raises(ValueError, match=f"{name}: not a list of {dataset} {says}"):
            find_videos(dataset, tmp_path, train=True)


WRONG = {
    "unknown data set 'ucf'; known are synthetic, folder, ucf101": dict(dataset="ucf"),
    "ucf101 has no split 4; it has 3": dict(dataset="ucf101", split=4),
    "hmdb51 has no split 0; it has 3": dict(dataset="hmdb51", split=0),
    "k400 has no split 2; it has 1": dict(dataset="k400", split=2),
    "a list file goes with the data set 'folder'": dict(dataset="ucf101", list_file="a.txt"),
    "no such list file": dict(dataset="folder", list_file="a.txt"),
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_arguments_are_named(tmp_path, says):
    touch(tmp_path, "a.mp4")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        find_videos(root=tmp_path, train=True, **WRONG[says])
