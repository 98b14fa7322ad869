"""Finding the videos of a data set, by its own lists or in any tree or list of files; and checking them.

`find_videos` reads directory listings and lists, never a video.
"""

import ast
import contextlib
import csv
import functools
import json
import math
import os
import re
import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from data import VideoList, visit_videos
from synthetic import MOTIONS, SYNTHETIC_MARKER, SYNTHETIC_VERSION, UNLABELED, make_synthetic
from train import SWITCH, Options, option, user_errors
from video import FLOW, Video, frames_of

SUFFIXES = (  # of files in CONTAINERS, without those of sounds and single pictures
    *("avi", "divx", "xvid", "mp4", "m4v", "mp4v", "mpeg4", "mov", "qt", "f4v", "3gp", "3gpp", "3g2", "3gp2", "ismv"),
    *("mkv", "mk3d", "webm", "mpg", "mpeg", "mpe", "mpv", "m1v", "m2v", "m2p", "mp2v", "mpv2", "vob", "evo", "vro"),
    *("tod", "mod", "ts", "mts", "m2ts", "m2t", "tp", "trp", "flv", "wmv", "asf", "h264", "264", "avc", "h26l", "26l"),
    *("h265", "265", "hevc", "mjpg", "mjpeg", "ogv", "ogm", "mxf", "dv", "dif", "ivf"),
)
NOT_READ = re.compile(  # names of files and folders that operating systems, network storage and editors make
    r"(?i)\..*|@eadir|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|~snapshot|\$recycle\.bin|recycler|lost\+found|"
    r"system volume information|__macosx|network trash folder|temporary items|__pycache__|thumbs\.db|desktop\.ini"
)
PART = re.compile(  # names of folders that divide a data set
    r"(?i)(?:(train)(?:ing)?|(test)(?:ing)?|(val)(?:id(?:at(?:e|ion))?)?)(?:[_ -]?set)?[_ -]?(?:\d+(?:p|x\d+)?)?"
)
NUMBER, SEPARATED = r"[+-]?\d+(?:\.\d*)?", r"[\s,;|]+"  # in a list, and what may stand between its fields
# Ends of a video's name in a line of a list, with suffix and without: of "a b c", "a b" may be it, and "b c" its label.
SUFFIXED = re.compile(rf"(?i)\.(?:{'|'.join(SUFFIXES)})(?=[\s,;|]|$)")
BARE = re.compile(rf"(?<=[^\s,;|])(?=(?:\s+\S+|(?:\s+{NUMBER})*|\s*[,;|\t].*)$)")
QUOTED = re.compile(r"""(["'])((?:(?!\1).|\1\1)*)\1(?=[\s,;|]|$)""")  # a field in quotes, in which a quote is doubled
K400_TRAIN, K400_VALIDATION = ("train.csv",), ("val.csv", "valid.csv", "validate.csv", "validation.csv")
LAYOUTS = {
    "synthetic": "train/CLASS/*.mp4 and test/CLASS/*.mp4, and perhaps unlabeled/*.mp4 for pretraining",
    "folder": "videos anywhere below it, a folder a class, and if wanted train/ and test/ (or val/) side by side",
    "ucf101": "UCF-101/Class/v_Class_gGG_cCC.avi and ucfTrainTestlist/{classInd,trainlist0K,testlist0K}.txt",
    "hmdb51": "class/*.avi and testTrainMulti_7030_splits/class_test_splitK.txt",
    "k400": "train/ and val/ of ID_000417_000427.mp4, and train.csv and val.csv (label, youtube_id) or class folders",
    "diving48": "rgb/VID_NAME.mp4, Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json",
    "ssv2": "ID.webm below any folder, labels.json, train.json and validation.json",
}
DATASETS = tuple(LAYOUTS)
LISTS = ("txt", "csv", "json")  # suffixes of files that may be a data set's own lists
OFFICIAL_COUNTS = {  # train and test videos of each split
    "ucf101": [(9537, 3783), (9586, 3734), (9624, 3696)],
    "hmdb51": [(3570, 1530)] * 3,
    "diving48": [(15027, 1970)],
    "ssv2": [(168913, 24777)],
}


def find_videos(
    dataset: str, root: str | Path, train: bool, split: int = 1, list_file="", exclude="", unlabeled: bool = False
) -> VideoList:
    """List the training or test videos of a data set (validation where the test labels are not public: k400, ssv2).

    Videos and lists are found by their names anywhere below `root` (`LAYOUTS`). Listed videos that are not on disk are
    left out and counted. Class indices follow the data set's own list where it has one, else the sorted names.

    Without lists, a folder that holds a training part (`PART`) and a held-out one divides the videos, at whatever
    depth; what lies outside of the parts is left out and counted. A part without the other divides nothing (a class may
    be called "train"), unless all videos lie in parts. Of "test" and "val" the first is held out (k400: the other).
    Files and folders of `NOT_READ` are never read. A training video that is a held-out one too, by a link, is left out.

    Args:
        list_file: for "folder" only, a file of "path label" lines (`_read_list`), labels optional.
        exclude: a file of videos to leave out, as `check` writes it, or several with commas between.
        unlabeled: take those of "synthetic" that are for pretraining, where there are any (`make_synthetic`).

    Raises ValueError for an unknown data set or split, and a list that can't be understood or names a path outside
    `root`; FileNotFoundError for a missing folder or list, or no video at all. Of "synthetic", datasets/synthetic is
    made if it is not there, and a set of an older version anew.
    """
    splits = len(OFFICIAL_COUNTS.get(dataset, [None]))
    if dataset not in DATASETS:
        raise ValueError(f"no data set {dataset!r}; known are {', '.join(DATASETS)}")
    if not 1 <= split <= splits:
        raise ValueError(f"{dataset} has no split {split}: --split goes from 1 to {splits}")
    if list_file and dataset != "folder":
        raise ValueError(f"a list file goes with the data set 'folder', not with {dataset!r}")
    root = os.path.abspath(root)
    if os.path.isfile(root):
        raise NotADirectoryError(f"{root} is a file: give the folder that holds the videos")
    if dataset == "synthetic":
        marker = Path(root, SYNTHETIC_MARKER)
        recipe = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, TypeError, ValueError):
            recipe = dict(json.loads(marker.read_text()))
        version, there = recipe.pop("version", SYNTHETIC_VERSION), os.path.isdir(os.path.join(root, "train"))
        if not recipe and os.path.isdir(root) and os.listdir(root):
            raise ValueError(f"{root}: not made by this project; with videos of your own, give --dataset folder")
        if not there and Path(root).parts[-2:] != ("datasets", "synthetic"):  # else a mistyped name would make a set
            raise FileNotFoundError(f"{root}: no such set; make it by `python data.py synthetic {shlex.quote(root)}`")
        if there and version not in range(SYNTHETIC_VERSION + 1):
            raise ValueError(f"{root}: made by newer code, version {version}: update this code, or remove the folder")
        if not there or version != SYNTHETIC_VERSION:
            make_synthetic(root, **recipe)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; {dataset} expects {LAYOUTS[dataset]}")
    part = "train" if train else "validation" if dataset in ("k400", "ssv2") else "test"
    title = f"{dataset} {part} split {split}" if splits > 1 else f"{dataset} {part}"
    expected = f" of {OFFICIAL_COUNTS[dataset][split - 1][not train]} expected" if dataset in OFFICIAL_COUNTS else ""
    outside, passed, twice, closed, copied = 0, Counter(), set(), [], []
    # Of each video its path (None: not on disk), its name in a list, and its label (-1: none).
    if list_file:
        rows, classes, note = _read_list(root, list_file)
        title = f"{dataset} list {list_file}{note}"
    else:
        videos, others, closed = walk(root)
        suffixes = {path: os.path.splitext(path)[1][1:].lower() for path in others}
        lists = {os.path.basename(path): path for path in reversed(others) if suffixes[path] in LISTS}  # topmost ones
        passed = Counter(suffix for suffix in suffixes.values() if suffix not in LISTS)
        above = os.path.join(root, UNLABELED, "")
        apart = {path for path in videos if dataset == "synthetic" and path.startswith(above)}
        if unlabeled and apart:
            rows, classes, title = [(path, path, -1) for path in sorted(apart)], [], f"{dataset} {UNLABELED}"
        elif dataset in OFFICIAL_COUNTS or (dataset == "k400" and _named(lists, *K400_TRAIN, *K400_VALIDATION)):
            rows, classes, copied = _read_official(dataset, root, videos, lists, part, split)
            expected = expected or f" of {len(rows)} listed"  # copies of k400 differ
        else:
            tree = [path for path in videos if path not in apart]
            rows, classes, held, outside, halved = _read_tree(root, tree, train, dataset == "k400")
            title = title if halved else f"{dataset} (no train/ and test/ folders: one list for both)"
            twice = {*same_files([path for path, _, _ in rows], held)} if train and held else set()
    excluded = _read_bad(root, exclude) if exclude else set()
    twice -= excluded
    left_out = excluded | twice
    found = [(path, label) for path, _, label in rows if path and path not in left_out]
    again, labelled = len(found) - len(dict(found)), len({*found}) - len(dict(found))
    listed, missing = {path for path, _, _ in rows}, [name for path, name, _ in rows if not path]
    kinds = ", ".join(f"{n} {f'.{suffix}' if suffix else 'without suffix'}" for suffix, n in passed.most_common(5))
    notes = [
        missing and f"{len(missing)} of {len(rows)} listed videos are not on disk: {', '.join(missing[:3])}",
        excluded and f"{len(excluded & listed)} of the {len(excluded)} named in {exclude} left out",
        copied and f"there are copies of {len(copied)}, and one is taken, such as {copied[0]}",
        outside and f"{outside} videos outside of the training and the held-out folder left out",
        twice and f"{len(twice)} that are held-out videos too (links) left out",
        again and f"{again} listed again" + f", {labelled} with another label" * (labelled > 0),
        passed and f"{passed.total()} other files passed over ({kinds})",
        closed and f"{len(closed)} folders left out, for want of permission to list them, such as {closed[0]}",
    ]
    head = f"{title}: {len(found)} videos{expected}, {f'{len(classes)} classes' if classes else 'no labels'}"
    report = "; ".join([head, *filter(None, notes)])
    if not found:
        advice = f"{dataset} expects {LAYOUTS[dataset]}"
        if not closed and frames_of(root):
            advice = "these are the frames of one: give the folder above it"
        raise FileNotFoundError(f"{root}: no videos found ({report}); {advice}")
    paths, labels = [path for path, _ in found], [label for _, label in found]
    return VideoList(paths, labels, classes, report, tuple(sorted(twice)), tuple(closed))


def identity(path: str) -> tuple[int, ...] | str:
    """What the paths of one file have in common, by whatever name or link: its number, and its device's."""
    with contextlib.suppress(OSError):
        return os.stat(path)[1:3]
    return path  # a link to nothing


def same_files(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of the paths whose file is among the others, by whatever name or link, symbolic or hard."""
    known = set(map(identity, others))
    return [path for path in paths if identity(path) in known]


def _read_text(file: str | Path) -> str:
    """A list's text, UTF-16 with its mark (as Excel writes it) or UTF-8; other bytes stay as in file names. Raises
    ValueError for what is no file, such as a pipe, which might have no end."""
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file}: no such file")
    if not os.path.isfile(file):
        raise ValueError(f"{file}: no file on a disk")
    if not os.path.getsize(file):  # as files of /proc say, some of which have no end
        return ""
    with open(file, "rb") as opened:
        marked = opened.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return Path(file).read_text(*(("utf-16", "replace") if marked else ("utf-8-sig", "surrogateescape")))


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in SUFFIXES


def walk(root: str) -> tuple[list[str], list[str], list[str]]:
    """Paths of all videos below a folder; of all other files, the upper ones first; of folders that can't be listed."""
    videos, others, closed, seen, stems = [], [], [], set(), set()
    folders = [(root, "", {os.stat(folder)[1:3] for folder in Path(os.path.realpath(root)).parents})]
    while folders:
        folder, part, above = folders.pop()  # the part that it is in, and where the folders above it are
        try:
            place, entries = os.stat(folder)[1:3], sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            closed.append(folder)
            continue
        below, own, rest = [], [], []
        for entry in entries:
            if NOT_READ.fullmatch(entry.name):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if not (entry.is_symlink() and re.match(r"/(proc|sys)(/|$)", os.path.realpath(entry.path))):
                    below.append((entry.path, part or (entry.path if PART.fullmatch(entry.name) else "")))
            else:  # if a video is a link to nothing, reading it will say so
                (own if is_video(entry.name) else rest).append(entry.path)
        holds_others = below or own or folder == root or folder in stems  # by its name, the frames of a file beside it
        frames = set() if holds_others else {*frames_of(folder, map(os.path.basename, rest))}
        if not frames and (place in above or (part, place) in seen):  # by a link, upwards or in this part of the set
            continue
        seen.add((part, place))
        stems.update(os.path.splitext(path)[0] for path in own)
        videos.extend([folder] if frames else own)
        others.extend(path for path in rest if path not in frames)
        folders += [(*inner, above | {place}) for inner in reversed(below)]
    return videos, sorted(others, key=lambda path: path.count(os.sep)), closed


def walk_whole(root: str) -> tuple[list[str], list[str]]:
    """Paths of all videos below a folder, and of all other files. Raises FileNotFoundError when there is no video,
    PermissionError when there is a folder that may not be listed."""
    if not os.path.isdir(root):
        what = "is a file: give the folder that holds the videos" if os.path.isfile(root) else "no such folder"
        raise FileNotFoundError(f"{root}: {what}")
    videos, others, closed = walk(root)
    if closed:
        raise PermissionError(f"{closed[0]}: no permission to list this folder")
    if not videos:
        hint = ", but its own pictures: give the folder above it" * bool(frames_of(root))
        raise FileNotFoundError(f"{root}: no videos (.{', .'.join(SUFFIXES)}) below it{hint}")
    return videos, others


def _letters(name: str) -> str:
    """A name's letters and digits in lower case: what all ways of making a folder's name from a class's keep."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _named(lists: Iterable[str], *ends: str) -> list[str]:
    """Those of the names that end, whatever their case, with one of the ends, in alphabetical order."""
    return sorted(name for name in lists if name.lower().endswith(ends))


def _read_official(
    dataset: str, root: str, videos: Iterable[str], lists: dict[str, str], part: str, split: int
) -> tuple[list[tuple[str | None, str, int]], list[str], list[str]]:
    """Path (None: not on disk), name and label of each listed video, and the classes, by the data set's own lists; and
    the paths taken of videos that are there more than once, if possible none in a folder of optical flow."""
    file = root

    def read(*ends: str) -> str:
        nonlocal file
        if not (names := _named(lists, *ends)):
            raise FileNotFoundError(f"{root}: no list {ends[0]} below it; {dataset} expects {LAYOUTS[dataset]}")
        file = lists[min(names, key=len)]
        return _read_text(file)

    def lines(*ends: str) -> list[str]:
        return [line.strip() for line in read(*ends).split("\n") if line.strip()]

    named, tables, end = [], {}, f"_test_split{split}.txt"  # of each video: name without suffix, and label
    try:
        if dataset == "ucf101":
            classes = [line.split()[1] for line in lines("classind.txt")]
            index = {_letters(name): i for i, name in enumerate(classes)}
            # In training lists the class number follows the name.
            listed = [line.split()[0].partition("/") for line in lines(f"{part}list0{split}.txt")]
            named = [(os.path.splitext(name)[0], index[_letters(folder)]) for folder, _, name in listed]
        elif dataset == "hmdb51":
            classes = [name[: -len(end)] for name in _named(lists, end)] or read(end)
            for label, name in enumerate(classes):
                for line in lines(name.lower() + end):
                    name, tag = line.rsplit(maxsplit=1)
                    if int(tag) == (1 if part == "train" else 2):  # 0: not in this split
                        named.append((os.path.splitext(name)[0], label))
        elif dataset == "k400":
            for half, ends in (("train", K400_TRAIN), ("validation", K400_VALIDATION)):
                if half == part or _named(lists, *ends):
                    header, *rest = lines(*ends)
                    fields = [field.strip().lower() for field in next(csv.reader([header]))]
                    tables[half] = [(row["youtube_id"], row["label"]) for row in csv.DictReader(rest, fields)]
            classes = sorted({label for table in tables.values() for _, label in table})
            index = {name: i for i, name in enumerate(classes)}
            named = [(str(name), index[label]) for name, label in tables[part]]
        elif dataset == "diving48":
            classes = [" ".join(dive) for dive in json.loads(read("diving48_vocab.json"))]
            entries = json.loads(read(f"diving48_v2_{part}.json"))
            known = range(len(classes))
            named = [(str(entry["vid_name"]), known.index(entry["label"])) for entry in entries]
        else:
            numbers = {name: int(i) for name, i in json.loads(read("labels.json")).items()}
            classes = sorted(numbers, key=numbers.get)
            index = {name: i for i, name in enumerate(classes)}  # of numbers that may begin with 1, or leave some out
            entries = json.loads(read(f"{part}.json"))
            named = [(str(e["id"]), index[e["template"].replace("[", "").replace("]", "")]) for e in entries]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, csv.Error) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: not a list of {dataset} as it is published ({what})") from error

    stems, rows, copied = {}, [], []
    length = 11 if dataset == "k400" else None  # what follows a YouTube identifier is written in many ways
    for path in videos:
        name = os.path.basename(path) + "." * (not is_video(path))  # of a folder of frames
        stems.setdefault(os.path.splitext(name)[0][:length].casefold(), []).append(path)
    for name, label in named:
        paths = stems.get(name.casefold(), [None])
        if len(paths) > 1:
            paths = [p for p in paths if os.path.basename(p).startswith(name)] or paths  # in upper or lower case, too
            paths = [p for p in paths if not re.match(FLOW, os.path.dirname(p[len(root) :]), re.IGNORECASE)] or paths
            paths = [p for p in paths if _letters(p.split(os.sep)[-2]) == _letters(classes[label])] or paths
        copied += paths[:1] if len(paths) > 1 else []
        rows.append((paths[0], name, label))
    return rows, classes, copied


def _read_tree(
    root: str, videos: Iterable[str], train: bool, kinetics: bool
) -> tuple[list[tuple[str, str, int]], list[str], list[str], int, bool]:
    """The videos of a part of a tree whose folders are the classes, the classes, the paths of the held-out part, how
    many videos lie outside of both, and whether there are parts (`find_videos` says what they are). A class is named
    by the folders below a part, and those above where these differ: ucf/train/jump, or jump/train."""
    folders = {folder: folder[len(root) :].strip(os.sep).split(os.sep) for folder in map(os.path.dirname, videos)}
    places, kinds_in = {}, {}  # of each folder, the parts in its path; of the folder above a part, the parts there
    for folder, names in folders.items():
        matches = [(i, match) for i, name in enumerate(names) if (match := PART.fullmatch(name))]
        places[folder] = [(tuple(names[:i]), match[match.lastindex].lower(), names[i + 1 :]) for i, match in matches]
        for above, kind, _ in places[folder]:
            kinds_in.setdefault(above, set()).add(kind)
    divided = {above for above, kinds in kinds_in.items() if "train" in kinds and len(kinds) > 1}
    if apart := not divided and (kinetics or all(places.values())):
        divided = set(kinds_in)
    common = len(os.path.commonprefix([*divided]))  # noqa: RUF071, as they are tuples: folders above all parts
    rows = {}  # of a folder, its part and class
    for folder, names in folders.items():
        if inside := [place for place in places[folder] if place[0] in divided]:
            above, kind, below = inside[0]
            name = "/".join(below if apart and below else [*above[common:], *below])
            rows[folder] = kind, name.replace("_", " ") if kinetics else name
        elif not (divided or kinetics):
            rows[folder] = None, "/".join(names)
    classes = sorted({name for _, name in rows.values()} - {""})
    index = {name: i for i, name in enumerate(classes)}
    held_out = "val" if kinetics or "test" not in {kind for kind, _ in rows.values()} else "test"
    found = [(*rows.get(os.path.dirname(path), ("outside", "")), path) for path in videos]
    wanted = (None, "train" if train else held_out)
    kept = [(path, path, index.get(name, -1)) for kind, name, path in found if kind in wanted]
    held = [path for kind, _, path in found if kind == held_out]
    outside = sum(kind not in (None, "train", held_out) for kind, _, _ in found)
    return kept, classes, held, outside, kinetics or bool(divided)


def _placer(root: str) -> Callable[[str], str]:
    """A function: the name of a file in a list, from `root` or whole, → its path, below `root` where the list names it
    by the folder to which `root` links."""
    above, real = os.path.join(root, ""), os.path.join(os.path.realpath(root), "")

    def place(name: str) -> str:
        path = os.path.normpath(os.path.join(root, name))
        return path if path.startswith(above) or not path.startswith(real) else above + path.removeprefix(real)

    return place


def _read_list(root: str, list_file: str | Path) -> tuple[list[tuple[str | None, str, int]], list[str], str]:
    """The lines "path label" of a file: path (None: not on disk), name and label (-1: none) of each; classes, a remark.

    Fields stand apart by blanks, tabs, commas, semicolons or bars, and may be quoted; folders may stand apart as on
    Windows, and a suffix may be missing where one video fits. The first way to read a line by which a video is there
    counts, the longest name first: "#20; (a, b).avi" may be one. Else lines that begin with "#" are comments, and one
    without digit, dot and folder before all others is a header. `_read_labels` tells what lines of more fields mean.
    """
    file = next((f for f in (os.path.abspath(list_file), os.path.join(root, list_file)) if os.path.isfile(f)), None)
    if file is None:
        raise FileNotFoundError(f"{os.path.abspath(list_file)}: no such list file, and none by that name in {root}")

    place = _placer(root)

    @functools.cache
    def videos_in(folder: str) -> dict[str, list[str]]:
        """Paths of a folder's videos by their names, and by these up to the suffix's dot."""
        found = {}
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            stem = os.path.splitext(name)[0]
            for key in (name, f"{stem}.") if is_video(name) and not NOT_READ.fullmatch(name) else ():
                found.setdefault(key, []).append(os.path.join(folder, name))
        return found

    def paths_of(name: str) -> list[str]:
        paths = [place(n) for n in {name: 0, name.replace("\\", "/"): 0}]
        files = [found for folder, last in map(os.path.split, paths) if (found := videos_in(folder).get(last))]
        folders = (folder for path in paths for folder in (path, os.path.splitext(path)[0]))
        return files[0] if files else [folder for folder in folders if frames_of(folder)][:1]

    rows, columns, remark, above = [], 0, "", os.path.join(root, "")
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        where = f"{file}, line {number}"
        if len(line) > 9000:
            raise ValueError(f"{where}: {len(line)} characters, more than a path and a label")
        if not (line := re.sub(rf"{SEPARATED}$", "", line).lstrip()):
            continue
        texts = [line]
        if quoted := QUOTED.match(line):
            texts.append(quoted[2].replace(2 * quoted[1], quoted[1]) + line[quoted.end() :])
        ends = SUFFIXED if any(map(SUFFIXED.search, texts)) else BARE
        ways = [(text[: m.end()], text[m.end() :]) for text in texts for m in [*ends.finditer(text)][::-1]]
        hits = [(*way, paths) for way in ways if (paths := paths_of(way[0] + "." * (ends is BARE)))]
        name, rest, paths = hits[0] if hits else (*ways[0], [])
        if len(paths) > 1:
            raise ValueError(f"{where}: {name!r} may be {' or '.join(map(os.path.basename, paths))}: write its suffix")
        if paths and not paths[0].startswith(above):
            raise ValueError(f"{where}: {name!r} is not in {root}: give a folder that holds all (--data)")
        if not paths and line.startswith("#"):
            continue
        if not (paths or rows or remark) and re.fullmatch(r"[^\d\\/.]*", line):
            columns, remark = len(re.split(r"[,;|\t]", line)), f" (line {number} is a header)"
            continue
        rows.append((where, name, rest, *(paths or [None])))
    labels, classes, more = _read_labels([(where, rest) for where, _, rest, _ in rows], columns)
    return [(path, name, label) for (_, name, _, path), label in zip(rows, labels, strict=True)], classes, remark + more


def _read_labels(rows: list[tuple[str, str]], columns: int) -> tuple[list[int], list[str], str]:
    """Labels (-1: none) of the lines of a list, of which (where, what follows the name) is given; classes, a remark.
    What a number before the label is is told by all lines together. One on every line is the number of frames, if it is
    never below 2 and once not below a label that is a number (else the two may be start and end), or if names come with
    several; else it is part of the class's name. Two (start and end) are refused, as videos are read as a whole."""
    lines = []  # of each, where it is, what stands there, and of this the leading numbers and the rest
    for where, rest in rows:
        text = re.sub(rf"^{SEPARATED}|{SEPARATED}$", "", re.sub(r"(^|\s)#(\s.*)?$", "", rest))
        before, label = re.fullmatch(rf"((?:[\"']?{NUMBER}[\"']?{SEPARATED})*)(.*)", text).groups()
        text, label = (re.sub(r"""^(["'])(.*)\1$""", r"\2", field) for field in (text, label))
        lines.append((where, text, re.findall(NUMBER, before), label))
    given = [(numbers, label) for _, text, numbers, label in lines if text]
    pairs = {(float(numbers[0]), label) for numbers, label in given if numbers}
    if all(re.fullmatch(NUMBER, label) for _, label in given):
        counted = any(frames >= float(label) for frames, label in pairs)
    else:
        counted = 2 * len(pairs) > len(given) and len({label for _, label in pairs}) < len(pairs)
    counted &= all(len(numbers) == 1 for numbers, _ in given) and all(frames > 1 for frames, _ in pairs)
    for where, text, numbers, label in lines:
        times = len(numbers) > 1 or re.search(rf"({SEPARATED}{NUMBER}){{2}}$", label)
        several = columns > 2 and re.search(SEPARATED, text)
        if times or (not counted and (several or (numbers and re.fullmatch(NUMBER, label)))):
            raise ValueError(f"{where}: {text!r}, but lines are 'path label': start and end are not read")
    texts = [label if counted else text for _, text, _, label in lines]
    classes, remark = sorted({*texts} - {""}), " (lines of path, number of frames, label)" * counted
    if not all(re.fullmatch(r"-?\d+", label) for label in classes):
        return [classes.index(label) if label else -1 for label in texts], classes, remark
    labels = [max(int(label or -1), -1) for label in texts]
    index = {label: i for i, label in enumerate(sorted({*labels} - {-1}))}
    return [index.get(label, -1) for label in labels], [*map(str, index)], remark


def _read_bad(root: str, files: str | Path) -> set[str]:
    """Paths named by a list of `check`, by a run's bad_videos.log, or by a file of bare paths, one a line."""
    paths, place = set(), _placer(root)
    for file in [files] if os.path.exists(files) else filter(None, map(str.strip, str(files).split(","))):
        for number, line in enumerate(_read_text(file).split("\n"), 1):
            fields = line.split("\t")
            quoted = [field for field in fields if field.startswith(("'", '"'))]
            try:
                name = os.fspath(ast.literal_eval(quoted[0])) if quoted else fields[0]
            except (SyntaxError, TypeError, ValueError):
                raise ValueError(f"{file}, line {number}: no path in quotes, {quoted[0]}") from None
            if name:
                paths.add(place(name))
    return paths


def check_video(full: bool, path: str) -> None:
    """Reads the first, middle and last 32 frames of a video, or all."""
    with Video(path) as video:
        last = max(len(video) - 32, 0)
        step = 32 if full else max(math.ceil(last / 2), 1)
        for start in (*range(0, last, step), last):
            deque(video.stream(range(start, min(start + 32, len(video)))), maxlen=0)  # they are of no more use


@dataclass(frozen=True)
class CheckConfig(Options):
    """Options of `data.py check`."""

    out: str = option("bad_videos.txt", "list to write, for --exclude")
    workers: int = option(os.cpu_count() or 1, "processes, one a core if not given", (1, 1024))
    full: str = option("off", "read all frames, not only 32 at three places: slower", SWITCH)


def check(config: CheckConfig, root: str) -> None:
    """Finds videos that can't be read below ROOT, the --data of training; exit code 1 if there are any."""
    root, visit = os.path.abspath(root), functools.partial(check_video, config.full == "on")
    with user_errors(path=config.out):
        paths, _ = walk_whole(root)
        bad = visit_videos(visit, paths, root, config.out, config.workers, f"checking {root}")
    advice = f": leave them out with --exclude {shlex.quote(config.out)}, which has the reasons" if bad else ""
    named = "".join(f"  {line}\n" for line in Path(config.out).read_text().splitlines()[:5]) + "  …\n" * (bad > 5)
    print(f"{named}{bad} of {len(paths)} videos can't be read{advice}", flush=True)
    if bad:
        raise SystemExit(1)


@dataclass(frozen=True)
class SyntheticConfig(Options):
    """Options of `data.py synthetic`."""

    train: int = option(1500, "training videos", (1, 10**6))
    test: int = option(500, "test videos", (1, 10**6))
    seed: int = option(0, "seed of all that is drawn", (0, 2**31 - 1))
    frames: int = option(48, "frames of a shot", (2, 10_000))
    size: int = option(40, "height and width in pixels", (1, 2048))
    shake: float = option(0.008, "how far the camera moves at most, in sides of the frame", (0, 1))
    shots: int = option(1, "from 2 on: as many unlabeled videos of so many shots, for pretraining", (1, len(MOTIONS)))
    scene_bias: float = option(0.0, "share of videos in the scenes of their motion; 0: there are none such", (0, 1))


def generate(config: SyntheticConfig, root: str) -> None:
    """Makes videos whose class is their motion: ROOT/train, ROOT/test, and with --shots or --scene_bias other parts."""
    make_synthetic(root, **asdict(config) | {"size": (config.size, config.size)})
