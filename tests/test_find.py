"""Finding videos: official layouts and lists, the ways people keep them, and what is said when something is missing."""

import contextlib
import itertools
import json
import os
import re
import time
from pathlib import Path
from unittest.mock import Mock

import av
import pytest
from helpers import touch, write
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import find
import train
import video
from data import VideoList
from find import SYNTHETIC_MARKER, SYNTHETIC_VERSION, find_videos

FOLDERS = st.lists(st.sampled_from(["train", "test", "val", "bus", "set"]), max_size=4).map("/".join)
VIDEOS = ["a.mp4", "b.mp4", "c/d e.avi", "x.avi", "x.mp4", "y/a.mp4"]
TIMES = "'path label': start and end are not read"


def found(videos: VideoList, root: Path) -> dict[str, str | None]:
    """Path below root → name of its class."""
    names = [videos.classes[label] if label >= 0 else None for label in videos.labels]
    return dict(zip([os.path.relpath(path, root) for path in videos.paths], names, strict=True))


def parts(dataset: str, root: Path, **options) -> tuple[VideoList, VideoList]:
    """Training and held-out videos, which always have the same classes."""
    train, held_out = (find_videos(dataset, root, half, **options) for half in (True, False))
    assert train.classes == held_out.classes
    return train, held_out


UCF_LAYOUTS = [("UCF-101", "ucfTrainTestlist", 1, 9537), ("data", "anno", 2, 9586), (".", ".", 3, 9624)]
UCF_CLASSES = ["Hammering", "HammerThrow", "HandstandPushups"]  # not sorted
UCF_TRAIN = ["Hammering/v_Hammering_g08_c01.avi", "HandstandPushups/v_HandStandPushups_g08_c01.avi"]
UCF_FRAMES = ["HammerThrow/v_HammerThrow_g08.5_c02", "HammerThrow/v_HammerThrow_g08.5_c03.avi"]  # some keep the suffix
UCF_TEST = ["HammerThrow/v_HammerThrow_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]


def make_ucf101(videos: Path, lists: Path, split: int = 1) -> None:
    """Videos and their lists; two of the training videos are folders of frames."""
    listed = [name.removesuffix(".avi") for name in UCF_TRAIN + UCF_FRAMES]
    write(lists / "classInd.txt", *[f"{i} {name}" for i, name in enumerate(UCF_CLASSES, 1)], "", end="\r\n")
    write(lists / f"trainlist0{split}.txt", *[f"{name}.avi 1" for name in listed], end="\r\n")
    write(lists / f"testlist0{split}.txt", *UCF_TEST, end="\r\n")
    touch(videos, *UCF_TRAIN, *UCF_TEST, *[f"{folder}/{k}.jpg" for folder in UCF_FRAMES for k in (1, 2)])


@pytest.mark.parametrize(("videos", "lists", "split", "expected"), UCF_LAYOUTS)
def test_ucf101(tmp_path, videos, lists, split, expected):
    make_ucf101(tmp_path / videos, tmp_path / lists, split)
    touch(tmp_path / lists, "an_old_classInd.txt", f"an_old_trainlist0{split}.txt")
    train, test = parts("ucf101", tmp_path, split=split)
    assert train.classes == UCF_CLASSES and train.labels == [0, 2, 1, 1] and test.labels == [1, 2]
    assert train.paths == [str(tmp_path / videos / name) for name in UCF_TRAIN + UCF_FRAMES]
    assert train.report == f"ucf101 train split {split}: 4 videos of {expected} expected, 3 classes"
    write(tmp_path / lists / f"testlist0{split}.txt", "HammerThrow/v_a.avi", "HammerThrow/v_A.avi")
    touch(tmp_path / videos, "HammerThrow/v_A.avi", "HammerThrow/v_a.avi")
    test = find_videos("ucf101", tmp_path, train=False, split=split)
    assert [path[-5:] for path in test.paths] == ["a.avi", "A.avi"]
    gone, spelled, *_ = map(Path, train.paths)
    gone.unlink()
    spelled.rename(tmp_path / "v_HandstandPushups_g08_c01.mp4")
    videos = find_videos("ucf101", tmp_path, train=True, split=split)
    assert videos.labels == [2, 1, 1] and "; 1 of 4 listed videos are not on disk: v_Hammering_" in videos.report


@pytest.mark.slow
def test_twenty_thousand_files_are_found_in_seconds(tmp_path):
    names = [f"class{i % 100}/{i}.avi" for i in range(20_000)]
    touch(tmp_path, *names)
    write(tmp_path / "list.txt", *names[1:])
    begin = time.process_time()
    assert find_videos("folder", tmp_path, True, exclude=tmp_path / "list.txt").paths == [f"{tmp_path}/{names[0]}"]
    assert len(find_videos("folder", tmp_path, True, list_file="list.txt")) == 19_999
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(("videos", "lists", "split"), [(".", "testTrainMulti_7030_splits", 1), ("data", ".", 3)])
def test_hmdb51_whose_names_are_odd_and_in_two_classes(tmp_path, videos, lists, split):
    odd = "A & B; (2)!_clap_f_cm_np1_ba_bad_1.avi"
    touch(tmp_path / videos, "brush hair/b_0.avi", "clap/b_0.avi", "clap/#20_u_nm_0.avi", "clap/x_0.avi", f"clap/{odd}")
    tags = "#20_u_nm_0.avi 1 ", f"{odd} 2 ", "x_0.avi 0 ", "b_0.avi 1 "
    write(tmp_path / lists / f"clap_test_split{split}.txt", *tags)
    write(tmp_path / lists / f"brush_hair_test_split{split}.txt", "b_0.avi 1 ")
    train, test = parts("hmdb51", tmp_path, split=split)
    expected = {"brush hair/b_0.avi": "brush_hair", "clap/#20_u_nm_0.avi": "clap", "clap/b_0.avi": "clap"}
    assert found(train, tmp_path / videos) == expected and [*found(test, tmp_path / videos)] == [f"clap/{odd}"]
    assert train.report == f"hmdb51 train split {split}: 3 videos of 3570 expected, 2 classes"


@pytest.mark.parametrize(
    ("train_list", "held_out_list", "columns"),
    [
        ("train.csv", "a/val.csv", "label,youtube_id,time_start,split"),
        ("train.csv", "valid.csv", "youtube_id,label,time_start,is_cc"),
        ("k400_train.csv", "k400_validate.csv", "label, youtube_id"),
        ("b/Train.csv", "validation.csv", "split,youtube_id,label"),
        ("train.csv", "val.csv", '"youtube_id","label"'),
    ],
)
def test_k400(tmp_path, train_list, held_out_list, columns):
    videos = {"-abcdefghi1_000417_000427.mp4": "playing guitar", "_abcdefghi2_417_427.mkv": "ski jumping"}
    videos |= {"Abcdefghi_3.mp4": "skiing (not slalom or crosscountry)", "abcdefghi-4.webm": "massaging person's head"}
    fields = columns.replace(" ", "")
    rows = [fields.replace("label", label).replace("youtube_id", name[:11]) for name, label in videos.items()]
    write(tmp_path / train_list, columns, *rows)
    write(tmp_path / held_out_list, columns, rows[3])
    touch(tmp_path / "any folder", *videos)
    train, validation = parts("k400", tmp_path)
    assert train.classes == sorted(videos.values()) and found(train, tmp_path / "any folder") == videos
    assert train.report == "k400 train: 4 videos of 4 listed, 4 classes" and validation.labels == [0]


def test_diving48(tmp_path):
    touch(tmp_path / "rgb", "_8Vy3dlHg2w_00000.mp4", "_8Vy3dlHg2w_00001.mp4", "other_00002.mp4")
    vocabulary = [["Back", "15som", "05Twis", "FREE"]] * 30 + [["Forward", "25som", "NoTwis", "PIKE"]] * 18
    write(tmp_path / "Diving48_vocab.json", json.dumps(vocabulary))
    for half, labels in (("train", {"_8Vy3dlHg2w_00000": 34, "other_00002": 0}), ("test", {"_8Vy3dlHg2w_00001": 47})):
        entries = [{"vid_name": name, "label": label, "start_frame": 0} for name, label in labels.items()]
        write(tmp_path / f"Diving48_V2_{half}.json", json.dumps(entries))
    train, test = parts("diving48", tmp_path)
    assert (train.labels, test.labels) == ([34, 0], [47])
    assert len(train.classes) == 48 and train.classes[34] == "Forward 25som NoTwis PIKE"
    assert train.report == "diving48 train: 2 videos of 15027 expected, 48 classes"
    touch(tmp_path / "flow", "other_00002.mp4")  # first by name
    touch(tmp_path / "small", "_8Vy3dlHg2w_00000.mp4")
    again = find_videos("diving48", tmp_path, train=True)
    assert again.paths == train.paths
    copies = f"; there are copies of 1, and one is taken, such as {tmp_path}/rgb/_8Vy3dlHg2w_00000.mp4"
    assert again.report == train.report + copies
    (tmp_path / "flow").rename(tmp_path / "Flows")
    assert find_videos("diving48", tmp_path, train=True).paths == train.paths
    for label in (48, -1, "0"):
        write(tmp_path / "Diving48_V2_test.json", json.dumps([{"vid_name": "other_00002", "label": label}]))
        with pytest.raises(ValueError, match="not a list of diving48"):
            find_videos("diving48", tmp_path, train=False)


@pytest.mark.parametrize(("prefix", "numbers"), [("", "10"), ("something-something-v2-", "21"), ("", "93")])
def test_ssv2(tmp_path, prefix, numbers):
    touch(tmp_path / "videos", "1.webm", "22.webm", "333.webm")
    put, move = "Putting something on a surface", "Moving something (up)"
    puts = [{"id": name, "template": "Putting [something] on a surface"} for name in ("22", "1")]
    moves = [{"id": "333", "label": "moving pen (up)", "template": "Moving [something] (up)"}]
    write(tmp_path / "a" / "b" / f"{prefix}train.json", json.dumps(moves))  # the upper list counts
    for name, content in (("labels", {move: numbers[0], put: numbers[1]}), ("train", puts), ("validation", moves)):
        write(tmp_path / "labels" / f"{prefix}{name}.json", json.dumps(content))
    train, validation = parts("ssv2", tmp_path)
    assert found(train, tmp_path / "videos") == {"22.webm": put, "1.webm": put}
    assert train.classes == [put, move] and validation.labels == [1]
    assert validation.report == "ssv2 validation: 1 videos of 24777 expected, 2 classes"


TREES = {  # training videos and their classes, held-out ones, how many are outside of both
    "videos beside": ("train/jump/a.mp4=jump", "test/jump/b.mp4=jump", "e.mp4, more/c.mp4, more/train_d.mp4"),
    "validation beside test": ("train/jump/a.mp4=jump", "test/jump/b.mp4=jump", "val/jump/v.mp4"),
    "classes called as parts": ("train/bus/b.mp4=bus, train/train/a.mp4=train", "test/train/c.mp4=train", ""),
    "wrapped": ("sets/UCF/Training/jump/a.mp4=jump", "sets/UCF/valid_256/jump/b.mp4=jump", "sets/c.mp4"),
    "two wrapped": ("h/train-set/r/c.mp4=h/r, u/train/j/a.mp4=u/j", "h/TEST/r/d.mp4=h/r, u/test/j/b.mp4=u/j", ""),
    "parts in classes": ("all/j/train/a.mp4=j, all/r/train/c.mp4=r", "all/j/test/b.mp4=j, all/r/test/d.mp4=r", ""),
    "parts apart": ("kinetics_train/train/jump/a.mp4=jump", "kinetics_val/val/jump/b.mp4=jump", ""),
    "no parts": (*["a.webm=, j/a.mp4=j, j/high/B.MOV=j/high, r/c.avi=r"] * 2, ""),
    "a class called train": (*["plane/b.mp4=plane, train/a.mp4=train"] * 2, ""),
    "k400": ("K/train_2/a_b/a.mp4=a b, K/train_2/c/b.mp4=c", "K/val_2/a b/c.mp4=a b", "K/test/d.mp4, e.mp4"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_split_that_exists_is_used_wherever_it_is(tmp_path, name):
    *expected, outside = [list(filter(None, texts.split(", "))) for texts in TREES[name]]
    expected = [dict(pair.split("=") for pair in half) for half in expected]
    touch(tmp_path, *expected[0], *expected[1], *outside)
    for videos, held in zip(parts("k400" if name == "k400" else "folder", tmp_path), expected, strict=True):
        assert found(videos, tmp_path) == {path: name or None for path, name in held.items()}
        assert ("one list for both" in videos.report) == (expected[0] == expected[1])
        left_out = f"; {len(outside)} videos outside of the training and the held-out folder left out"
        assert videos.report.endswith(left_out if outside else f"{len(videos.classes)} classes")


def test_parts_may_have_any_of_these_names_and_no_others():
    parts = ["train Training trainset train_set train-2 train_340x256 TRAIN_256p", "test testing TestSet Test-set"]
    for names in (*parts, "val valid validate validation valset Validation-256"):
        kinds = {match[match.lastindex].lower() for match in map(find.PART.fullmatch, names.split())}
        assert kinds == {names.split()[0]}
    assert not any(map(find.PART.fullmatch, ("trains", "tester", "retrain", "value", "train_me", "test.old")))


def test_what_is_hidden_is_never_read(tmp_path):
    hidden = [".Trash-1000/files", "@eaDir/a.mp4", "#recycle", "__MACOSX/train", "lost+found", "@tmp", "$RECYCLE.BIN"]
    hidden += ["System Volume Information", "train/@eaDir", "test/jump/.AppleDouble", ".hidden/train/jump"]
    touch(tmp_path, "train/jump/a.mp4", "test/jump/b.mp4", "train/jump/._a.mp4", "._list.txt", "train/Thumbs.db")
    touch(tmp_path, *[f"{folder}/{name}" for folder in hidden for name in ("x.mp4", "y.jpg")])
    train, test = parts("folder", tmp_path)
    assert found(train, tmp_path) | found(test, tmp_path) == {"train/jump/a.mp4": "jump", "test/jump/b.mp4": "jump"}
    assert train.report == "folder train: 1 videos, 1 classes"


def test_a_training_video_that_a_link_makes_a_test_video_is_left_out(tmp_path):
    touch(tmp_path, "train/jump/a.mp4", "test/jump/b.mp4", "test/jump/c.mp4", "outside/d.mp4")
    touch(tmp_path, "test/jump/frames/1.jpg", "test/jump/frames/2.jpg")
    links = {"jump/soft.mp4": "../../test/jump/b.mp4", "jump/linked": "../../test/jump/frames", "more": "../test"}
    for link, target in (links | {"back": "..", "loop.mp4": "loop.mp4"}).items():
        (tmp_path / "train" / link).symlink_to(target)
    (tmp_path / "train/jump/hard.mp4").hardlink_to(tmp_path / "test/jump/c.mp4")
    videos = find_videos("folder", tmp_path, train=True)
    assert [*found(videos, tmp_path)] == ["train/loop.mp4", "train/jump/a.mp4"]
    assert "; 6 that are held-out videos too (links) left out" in videos.report and len(videos.shared) == 6
    assert len(find_videos("folder", tmp_path, train=False)) == 3
    write(tmp_path / "bad.txt", *videos.shared)
    assert not find_videos("folder", tmp_path, train=True, exclude=tmp_path / "bad.txt").shared


def test_links_of_folders_keep_their_part_and_end_in_circles(tmp_path):
    touch(tmp_path, "beside/e.mp4", "set/train/x", "set/test/x")
    touch(root := tmp_path / "set", "all/jump/a.mp4", "all/run/b.mp4", "circle/jump/c.mp4", "circle/run/d.mp4")
    links = {"train/jump": "all/jump", "test/run": "all/run", "circle/jump/back": "circle", "train/up": ".."}
    for link, target in (links | {"circle/jump/run": "circle/run", "circle/run/jump": "circle/jump"}).items():
        (root / link).symlink_to(root / target)
    train, test = parts("folder", root)
    assert (found(train, root), found(test, root)) == ({"train/jump/a.mp4": "jump"}, {"test/run/b.mp4": "run"})
    assert len(find_videos("folder", root / "circle", train=True)) == 2


def test_folders_that_cannot_be_listed_are_counted_and_evaluation_refuses_them(tmp_path, monkeypatch):
    touch(tmp_path, "jump/a.mp4", "run/b.mp4")
    refuse, scan = Mock(side_effect=PermissionError), os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (refuse if folder.endswith("run") else scan)(folder))
    videos = find_videos("folder", tmp_path, train=True)
    assert videos.report.endswith(f"; 1 folders left out, for want of permission to list them, such as {tmp_path}/run")
    assert len(videos) == 1 and videos.closed == (str(tmp_path / "run"),)
    with pytest.raises(ValueError, match=f"{tmp_path}/run"):
        evaluate.find_labelled("folder", str(tmp_path), True, 1)
    with pytest.raises(train.UserError, match=f"{tmp_path}/run"):
        find.check(find.CheckConfig(), tmp_path)


@given(st.sets(FOLDERS, min_size=1, max_size=6), st.booleans())
def test_no_tree_gives_a_training_video_that_is_evaluated(folders, kinetics):
    """Oracle: training and held-out parts in one folder divide; then each part's videos lie below its topmost part."""
    paths = [os.path.join("/root", folder, "a.mp4") for folder in sorted(folders)]
    train, classes, held, outside, halved = find._read_tree("/root", paths, True, kinetics)
    test, *_ = find._read_tree("/root", paths, False, kinetics)
    assert max((label for _, _, label in train), default=-1) < len(classes)
    train, test = ([path for path, _, _ in half] for half in (train, test))
    marks = {name: [*re.finditer(r"\b(train|test|val)\b", name)] for name in folders}
    parts = {(name[: m.start()], m[0]) for name in folders for m in marks[name]}
    divided = {above for above, part in parts if part == "train" and {(above, "test"), (above, "val")} & parts}
    if divided or kinetics or all(marks.values()):
        assert halved and not set(train) & set(test) and test == held
        assert len(train) + len(test) + outside == len(paths)
    else:
        assert not halved and train == test == paths and not outside
    for path in train if divided else []:
        name = os.path.dirname(path)[len("/root/") :]
        assert next(m for m in marks[name] if name[: m.start()] in divided)[0] == "train"


def test_suffixes_of_all_containers_are_found_and_others_counted(tmp_path):
    sound = {"avif", "heic", "heif", "isma", "ism", "m4a", "m4b", "mj2", "psp", "mka", "mks", "mpo", "ogg", "wma"}
    for name, mode in itertools.product({*video.CONTAINERS.split(",")} - {"jpeg_pipe"}, "rw"):
        with contextlib.suppress(ValueError):
            assert av.format.ContainerFormat(name, mode).extensions <= {*find.SUFFIXES} | sound, name
    names = [f"{n}.{suffix.upper() if n % 2 else suffix}" for n, suffix in enumerate(find.SUFFIXES)]
    others = [f"other {n}.{suffix}" for n, suffix in enumerate(("jpg", "JPG", "jpg", "zip", "zip", "wav", "md", "py"))]
    touch(tmp_path, *names, *others, "mp4", "srt", "list.txt", ".x.jpg")
    videos = find_videos("folder", tmp_path, train=True)
    assert found(videos, tmp_path).keys() == set(names)
    assert "; 10 other files passed over (3 .jpg, 2 without suffix, 2 .zip, 1 " in videos.report


def test_list_file_takes_absolute_paths_counts_what_is_missing_and_takes_none_for_another(tmp_path):
    touch(tmp_path, "root/a.mp4", "root/run.mp4", "far/away/b.mp4", "far/a.mp4")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "far" / "away")  # which dots do not go through
    missing = ["gone.mp4 0", "no/folder.mp4 0", "/elsewhere/a.mp4", "run fast 3", "run fast.mp4 3", "gone 2", "b.xyz 1"]
    there = [f"{tmp_path}/root/a.mp4", f"{tmp_path}/root/link/b.mp4", f"{tmp_path}/root/link/../a.mp4"]
    write(tmp_path / "mine.txt", *[f"{path} 1" for path in there], *missing)
    for root in (tmp_path / "root", "/"):
        videos = find_videos("folder", root, train=True, list_file=tmp_path / "mine.txt")
        assert videos.paths == [*there[:2], there[0]]
        assert "3 videos, 3 classes; 7 of 10 listed videos are not on disk: gone.mp4" in videos.report


def test_lists_name_videos_as_well_by_the_folder_to_which_a_link_leads(tmp_path):
    touch(tmp_path, "disk/a.mp4", "disk/b.mp4", "disk/link/c.mp4")
    links = [tmp_path / "link", tmp_path / "disk" / "here"]  # the second leads to a folder that it is in
    for link in links:
        link.symlink_to(tmp_path / "disk")
        write(tmp_path / "mine.txt", f"{tmp_path}/disk/a.mp4 0", f"{link}/b.mp4 1", f"{link}/link/c.mp4 1")
        write(tmp_path / "bad.txt", f"'{tmp_path}/disk/b.mp4'\tempty")
        videos = find_videos("folder", link, True, list_file=tmp_path / "mine.txt", exclude=tmp_path / "bad.txt")
        assert videos.paths == [f"{link}/a.mp4", f"{link}/link/c.mp4"]


SHAPES = {  # lines: class of each of a.mp4 and b.mp4
    "sep=;\nFile name;Label\na.mp4;run\nb.mp4;jump": ["run", "jump"],
    '"path","label"\n"a.mp4","run, fast"\n"b.mp4","jump"': ["run, fast", "jump"],
    "a.mp4 'run'\n'b.mp4' \"brush hair\"": ["run", "brush hair"],
    '"a.mp4 1"\n\t"b.mp4"\t0': ["1", "0"],
    "# made by hand\na.mp4 1 # a note\n#c/d e.avi 5\n# c/d e.avi 5\n\nb.mp4 0 #": ["1", "0"],
    "a.mp4;1;\n;;\nb.mp4;0;\n;;": ["1", "0"],
    ".\\a.mp4 1\nno\\..\\b.mp4 0": ["1", "0"],
    "a.mp4 2\nb.mp4 -1": ["2", None],
    "a.mp4 run\nb.mp4": ["run", None],
    "a run\nb 0": ["run", "0"],
    "a\nb": [None, None],
    "a.mp4\u00a01\nb.mp4 \u30000 ": ["1", "0"],
    "a\tbrush hair\nb\trun": ["brush hair", "run"],
    "a.mp4 2 hand wave\nb.mp4 3 hands clap": ["2 hand wave", "3 hands clap"],
    "a.mp4 2 hands\nb.mp4 3 hands\ngone.mp4 2 hands\nlost.mp4 3 hands": ["2 hands", "3 hands"],
    "path num_frames label\na.mp4,163,1\nb.mp4,98,0": ["1", "0"],
    "a 163 0\nb 98 1": ["0", "1"],
    "a.mp4 163 jump\nb.mp4 98 jump": ["jump", "jump"],
}


@pytest.mark.parametrize("text", SHAPES)
def test_lists_of_all_shapes(tmp_path, text):
    touch(tmp_path, *VIDEOS)
    coded = text.encode(), text.replace("\n", "\r\n").encode(), text.replace("\n", "\r").encode("utf-8-sig")
    for content in (*coded, ("\ufeff" + text).encode("utf-16-le"), ("\ufeff" + text).encode("utf-16-be")):
        (tmp_path / "list").write_bytes(content)
        videos = find_videos("folder", tmp_path, train=True, list_file="list")
        assert [*found(videos, tmp_path).items()] == [*zip(["a.mp4", "b.mp4"], SHAPES[text], strict=True)]
        assert ("number of frames" in videos.report) == ("163" in text)


def test_names_as_they_stand_come_first_in_lists(tmp_path):
    names = ['#20; (a, b) "c".avi', "'q'.mp4", "a\\b.mp4", "a/b.mp4", "x.mp4 1.mp4", "x.mp4", "C:\\x.mp4", '"x.mp4']
    names += ["y.mp4.mkv", "x  5ß 3 ~#¡.mp4", "été 視 \U0001f3ac.mp4", os.fsdecode(b"caf\xe9 & ; ( ' \".mp4")]
    touch(tmp_path, *names)
    lines = [f"{above}{name} {n}\n" for n, name in enumerate(names) for above in ("", f"{tmp_path}/")]
    (tmp_path / "list.txt").write_bytes(os.fsencode("".join(lines)))
    videos = find_videos("folder", tmp_path, train=True, list_file="list.txt")
    assert found(videos, tmp_path) == {name: str(n) for n, name in enumerate(names)} and len(videos) == len(lines)


def test_a_missing_or_empty_root_says_where_and_what_is_expected_and_synthetic_is_made(tmp_path, monkeypatch):
    for dataset, root in itertools.product(find.DATASETS[1:], (tmp_path / "absent", tmp_path)):
        with pytest.raises(FileNotFoundError, match=f"{root}.*{re.escape(find.LAYOUTS[dataset])}"):
            find_videos(dataset, root, train=True)
    monkeypatch.setattr(find, "make_synthetic", lambda root: touch(Path(root), "train/rise/a.mp4", "test/rise/b.mp4"))
    here = tmp_path / "datasets" / "synthetic"
    assert find_videos("synthetic", here, train=True).paths == [f"{here}/train/rise/a.mp4"]
    mistyped = tmp_path / "datasets" / "motoin_1"
    with pytest.raises(FileNotFoundError, match=f"{mistyped}: no such set; .*data.py synthetic {mistyped}"):
        find_videos("synthetic", mistyped, train=True)
    for name in ("jump/a.mp4", "train/jump/b.mp4"):  # the user's own
        touch(tmp_path / "own", name)
        with pytest.raises(ValueError, match=f"{tmp_path}/own: not made by this project.*--dataset folder"):
            find_videos("synthetic", tmp_path / "own", train=True)


def test_a_set_of_an_older_version_is_made_anew_with_its_own_options(tmp_path, monkeypatch):
    touch(tmp_path, "train/rise/a.mp4", "unlabeled/0001.mp4")
    options = {"train": 10, "test": 10, "seed": 7, "frames": 48, "size": [40, 40], "shake": 0.1, "shots": 4}
    made = []
    monkeypatch.setattr(find, "make_synthetic", lambda root, **given: made.append((root, given)))
    for version in (SYNTHETIC_VERSION, SYNTHETIC_VERSION - 1):
        write(tmp_path / SYNTHETIC_MARKER, json.dumps({"version": version} | options))
        find_videos("synthetic", tmp_path, train=True)
    assert made == [(str(tmp_path), options)]
    write(tmp_path / SYNTHETIC_MARKER, json.dumps({"version": SYNTHETIC_VERSION + 1, "zoom": 2}))
    with pytest.raises(ValueError, match=f"{tmp_path}: made by newer code"):
        find_videos("synthetic", tmp_path, train=True)
    for other in ('{"version": ', "[]", "5"):
        write(tmp_path / SYNTHETIC_MARKER, other)
        with pytest.raises(ValueError, match=f"{tmp_path}: not made by this project"):
            find_videos("synthetic", tmp_path, train=True)


def test_a_folder_of_frames_is_no_root(tmp_path):
    touch(tmp_path, "1.jpg", "2.jpg")
    for look in (lambda: find_videos("folder", tmp_path, train=True), lambda: find.walk_whole(str(tmp_path))):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*give the folder above it"):
            look()


def test_labels_of_a_list_are_the_numbers_that_occur(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")

    def listed(text):
        (tmp_path / "list.txt").write_text(text)
        return find_videos("folder", tmp_path, train=True, list_file="list.txt")

    videos = listed("a.mp4 399\nb.mp4 5\nc.mp4 17")
    assert (videos.classes, videos.labels) == (["5", "17", "399"], [2, 0, 1])
    assert listed("a.mp4 5\na.mp4 5\nb.mp4 1").report.endswith("; 1 listed again")
    (tmp_path / "bad.txt").write_text("a.mp4\nc.mp4")
    videos = find_videos("folder", tmp_path, True, list_file="list.txt", exclude=f" {tmp_path}/bad.txt, ")
    assert found(videos, tmp_path) == {"b.mp4": "1"} and "; 1 of the 2 named in" in videos.report
    assert listed("a.mp4 5\nb.mp4 5\na.mp4 7\nb.mp4 5").report.endswith("; 2 listed again, 1 with another label")


REFUSED = {  # the content of a list, and what is said
    "a.mp4 jump 0 31\nb.mp4 run 5 36": TIMES,
    "a.mp4 0.5 3.25 jump\nb.mp4 1.0 2.0 run": TIMES,
    "a.mp4 4 31\nb.mp4 5 36": TIMES,
    "a.mp4 0 3\nb.mp4 5 2": TIMES,
    "a.mp4 163 1\nb.mp4 0": TIMES,
    "a.mp4 1\nb.mp4 0 31 0": f"line 2: .*{TIMES}",
    "path,label,split\na.mp4,jump,train\nb.mp4,run,test": "line 2: .*'path label'",
    "..\\a.mp4 1": "line 1: .* is not in",
    "a.mp4 1\nb/../../root2/a.mp4 1": "line 2: .* is not in .*--data",
    "x 1": "line 1: 'x' may be x.avi or x.mp4: write its suffix",
    "a.mp4 1 " * 100_000: "line 1: 800000 characters",
}
WRONG = [  # arguments, the content of the lists, and what is said
    (["hmdb51", True, 4], "", "hmdb51 has no split 4: --split goes from 1 to 3"),
    (["ucf101", True, 2], "", r"no list trainlist02\.txt"),
    (["ucf101", True], "Hammering/v_gone.avi 3", "1 of 1 listed videos are not on disk"),
    (["k400", True], "path label\na.mp4 3", r"train\.csv: not a list of k400 .*no entry 'youtube_id'"),
    (["k400", True], 'youtube_id,label\n"' + "a" * 2**18, r"train\.csv: not a list of k400 .*field larger"),
    (["diving48", True], "{", r"Diving48_vocab\.json: not a list of diving48"),
    (["ucf", True], "", "known are synthetic"),
    (["ucf101", True, 4], "", "split 4"),
    (["k400", True, 0], "", "split 0"),
    (["ucf101", True, 1, "a.txt"], "", "'folder'"),
    (["folder", True, 1, "a.txt"], "", "no such list file"),
    *((["folder", True, 1, "list.csv"], text, rf"list\.csv.*{says}") for text, says in REFUSED.items()),
]


@pytest.mark.parametrize(("arguments", "text", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments_and_lists_are_named(tmp_path, arguments, text, says):
    root = tmp_path / "root"
    make_ucf101(root, root)
    touch(tmp_path, "a.mp4", "root2/a.mp4", *[f"root/{name}" for name in VIDEOS])
    for name in ("trainlist01.txt", "train.csv", "Diving48_vocab.json", "list.csv"):
        write(root / name, text)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        find_videos(arguments[0], root, *arguments[1:])
    assert "\n" not in str(caught.value)
