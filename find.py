"""Finding the videos of a data set, by its folders and its own lists or in any tree or list of files; checking them.

`find_videos` reads directory listings and lists, never a video.
"""

import ast
import codecs
import csv
import functools
import itertools
import json
import math
import os
import re
import shlex
import stat
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data import VideoList, visit_videos
from synthetic import SYNTHETIC_MARKER, SYNTHETIC_VERSION, UNLABELED, make_synthetic
from train import SWITCH, Options, UserError, option, user_errors
from video import Video

DATASETS = ("synthetic", "folder", "ucf101", "hmdb51", "k400", "diving48", "ssv2")
SUFFIXES = (  # of files in CONTAINERS, without those of sounds and single pictures
    *("avi", "divx", "xvid", "mp4", "m4v", "mp4v", "mpeg4", "mov", "qt", "f4v", "3gp", "3gpp", "3g2", "3gp2", "ismv"),
    *("mkv", "mk3d", "webm", "mpg", "mpeg", "mpe", "mpv", "m1v", "m2v", "m2p", "mp2v", "mpv2", "vob", "evo", "vro"),
    *("tod", "mod", "ts", "mts", "m2ts", "m2t", "tp", "trp", "flv", "wmv", "asf", "h264", "264", "avc", "h26l", "26l"),
    *("h265", "265", "hevc", "mjpg", "mjpeg", "ogv", "ogg", "ogm", "mxf", "dv", "dif", "ivf"),
)
NOT_READ = re.compile(  # names of files and folders that operating systems, network storage and editors make
    r"\..*|@eadir|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|~snapshot|\$recycle\.bin|recycler|lost\+found|"
    r"system volume information|__macosx|network trash folder|temporary items|__pycache__|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
PART = re.compile(  # names of folders that divide a data set
    r"(?:(train)(?:ing)?|(test)(?:ing)?|(val)(?:id(?:at(?:e|ion))?)?)(?:[_ -]?set)?[_ -]?(?:\d+(?:p|x\d+)?)?",
    re.IGNORECASE,
)
SEPARATED = r"[\s,;|]+"  # what may stand between the fields of a list
SUFFIXED, BARE = rf"\.({'|'.join(SUFFIXES)})(?=[\s,;|]|$)", r"(?<=[^\s,;|])(?=[\s,;|]|$)"  # ends of a video's name
LABEL = r"\s*\S*|(\s+[+-]?\d+(\.\d*)?)*|\s*[,;|\t].*"  # after a name without suffix; of "a b c", "b c" may be its name
QUOTED = r"""(["'])((?:(?!\1).|\1\1)*)\1(?=[\s,;|]|$)"""  # a field in quotes, in which a quote is doubled
HEADER = (
    r"sep=.|[^\d\\/.]*(\b|_)(path|video|file|clip|name|id|label|class|category|action)s?_?(path|name|id)?\b[^\d\\/]*"
)
K400_TRAIN, K400_VALIDATION = r".*train\.csv", r".*(val|valid|validate|validation)\.csv"
LAYOUTS = {
    "synthetic": "train/CLASS/*.mp4 and test/CLASS/*.mp4, and perhaps unlabeled/*.mp4 for pretraining",
    "folder": "videos anywhere below it, a folder a class, and if wanted train/ and test/ (or val/) side by side",
    "ucf101": "UCF-101/Class/v_Class_gGG_cCC.avi and ucfTrainTestlist/{classInd,trainlist0K,testlist0K}.txt "
    "(or data/Class/ and anno/)",
    "hmdb51": "class/*.avi (or data/class/) and testTrainMulti_7030_splits/class_test_splitK.txt (or anno/)",
    "k400": "train/ and val/ (or train_256/, val_256/) of ID_000417_000427.mp4, flat or in class folders, train.csv "
    "and val.csv with columns label and youtube_id (or, without them, class folders)",
    "diving48": "rgb/VID_NAME.mp4, Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json",
    "ssv2": "ID.webm below any folder, labels.json, train.json and validation.json",
}
OFFICIAL_COUNTS = {  # train and test videos of each split
    "ucf101": [(9537, 3783), (9586, 3734), (9624, 3696)],
    "hmdb51": [(3570, 1530)] * 3,
    "diving48": [(15027, 1970)],
    "ssv2": [(168913, 24777)],
}


def find_videos(
    dataset: str,
    root: str | Path,
    train: bool,
    split: int = 1,
    list_file: str | Path | None = None,
    exclude: str | Path | None = None,
    unlabeled: bool = False,
) -> VideoList:
    """List the training or test videos of a data set (validation where the test labels are not public: k400, ssv2).

    Reads directory listings and the data set's own lists, never a video. Videos and lists are found by their names
    anywhere below `root`, so that flat folders, class folders and other people's folder names all work (`LAYOUTS`).
    Videos that are listed and not on disk are left out and counted in the report. Class indices follow the data set's
    own list where it has one (UCF101: classInd.txt), else the sorted names.

    Without such lists, a folder that holds a training part (train, training, trainset, train_256, …; any case) and
    a held-out one (test, testing, testset, val, valid, validation, …) divides the videos, at whatever depth; what lies
    outside of these parts is left out and counted in the report. A part without the other divides nothing (a class may
    be called "train"), unless all videos lie in parts. Where there are both, "test" is held out and "val" is not used
    (k400: the other way round). Hidden files and folders, and those of `NOT_READ`, are never read. A training video
    that is a held-out one too, by a link, is left out of training and counted.

    `list_file`, for "folder" only, names a file of "path label" lines instead (`_read_list`): paths below `root`,
    relative to it or absolute (`root` "/" takes any), spaces allowed; labels optional, all integers or names. Links
    below `root` are followed, wherever they lead. `exclude` names a file of videos to leave out, as `check_videos`
    writes it, or several with commas between. `unlabeled` takes those of "synthetic" that are for pretraining, where
    there are any (`make_synthetic`).

    Raises ValueError for an unknown data set or split and for a list that can't be understood or names a path outside
    `root`, FileNotFoundError for a missing folder or list or when no video is found.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; known are {', '.join(DATASETS)}")
    splits = len(OFFICIAL_COUNTS.get(dataset, [None]))
    if not 1 <= split <= splits:
        raise ValueError(f"{dataset} has no split {split}; it has {splits}")
    if list_file is not None and dataset != "folder":
        raise ValueError(f"a list file goes with the data set 'folder', not with {dataset!r}")
    root = os.path.abspath(root)
    if dataset == "synthetic":
        marker = Path(root, SYNTHETIC_MARKER)
        outdated = marker.is_file() and f'"version": {SYNTHETIC_VERSION},' not in marker.read_text()
        if outdated or not os.path.isdir(os.path.join(root, "train")):
            make_synthetic(root)
        elif not marker.is_file():
            raise ValueError(f"{root}: not made by this project; with videos of your own, give --dataset folder")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder; {dataset} expects {LAYOUTS[dataset]}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"{root}: no permission to list this folder")
    part = "train" if train else "validation" if dataset in ("k400", "ssv2") else "test"
    title = f"{dataset} {part} split {split}" if splits > 1 else f"{dataset} {part}"
    expected = f" of {OFFICIAL_COUNTS[dataset][split - 1][not train]} expected" if dataset in OFFICIAL_COUNTS else ""
    outside, passed, twice, closed = 0, Counter(), set(), []
    # Of each video its path (None: not on disk), its name in a list, and its label (-1: none).
    if list_file is not None:
        rows, classes, note = _read_list(root, list_file)
        title = f"{dataset} list {list_file}{note}"
    else:
        videos, lists, passed, closed = _walk(root)
        apart = {path for path in videos if dataset == "synthetic" and Path(path).is_relative_to(Path(root, UNLABELED))}
        if unlabeled and apart:
            rows, classes, title = [(path, path, -1) for path in sorted(apart)], [], f"{dataset} {UNLABELED}"
        elif dataset in OFFICIAL_COUNTS or (dataset == "k400" and lists.named(rf"{K400_TRAIN}|{K400_VALIDATION}")):
            named, classes = _read_official(dataset, root, lists, train, split)
            rows = _match(named, classes, videos, id_only=dataset == "k400")
            expected = expected or f" of {len(rows)} listed"  # copies of k400 differ
        else:
            tree = [path for path in videos if path not in apart]
            rows, classes, held, outside, halved = _read_tree(root, tree, train, dataset == "k400")
            title = title if halved else f"{dataset} (no train/ and test/ folders: one list for both)"
            # By numbers of files first, as few have one in common. They are no proof: each file system has its own.
            paths = [path for path, _, _ in rows]
            numbers = {videos[path] for path in held} & {videos[path] for path in paths} if train else ()
            twice = {*same_files(*([path for path in part if videos[path] in numbers] for part in (paths, held)))}
    excluded = _read_bad(root, exclude) if exclude else set()
    twice -= excluded
    left_out = excluded | twice
    found = [(path, label) for path, _, label in rows if path and path not in left_out]
    missing = [name for path, name, _ in rows if not path]
    report = f"{title}: {len(found)} videos{expected}, {f'{len(classes)} classes' if classes else 'no labels'}"
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        report += f"; {len(missing)} of {len(rows)} listed videos are not on disk: {some}"
    if excluded:
        report += f"; {sum(path in excluded for path, _, _ in rows)} of the {len(excluded)} named in {exclude} left out"
    if outside:
        report += f"; {outside} videos outside of the training and the held-out folder left out"
    if twice:
        report += f"; {len(twice)} that are held-out videos too (links) left out"
    if passed:
        kinds = [f"{count} {kind}" for kind, count in passed.most_common(5)] + ["…"] * (len(passed) > 5)
        report += f"; {passed.total()} other files passed over ({', '.join(kinds)})"
    if closed:
        report += f"; {len(closed)} folders left out, for want of permission to list them, such as {closed[0]}"
    if not found:
        raise FileNotFoundError(f"{root}: no videos found ({report}); {dataset} expects {LAYOUTS[dataset]}")
    paths, labels = [path for path, _ in found], [label for _, label in found]
    return VideoList(paths, labels, classes, report, tuple(sorted(twice)), tuple(closed))


def same_files(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Those of the paths whose file is among the others, by whatever name or link, symbolic or hard."""

    def identity(path: str) -> tuple[int, int] | str:
        try:
            status = os.stat(path)
        except OSError:  # a link to nothing
            return path
        return status.st_dev, status.st_ino

    known = set(map(identity, others))
    return [path for path in paths if identity(path) in known]


def _read_text(file: str | Path) -> str:
    """A list's text, UTF-16 with its mark (as Excel writes it) or UTF-8, lines ended by "\\n"; other bytes stay as in
    file names. Raises ValueError for what is no file, such as a pipe, which might have no end."""
    state = os.stat(file)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{file}: not a file on a disk")
    content = Path(file).read_bytes() if state.st_size else b""  # files of /proc say 0
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", "replace")
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Lists:
    """The lists (.txt, .csv, .json) below a folder, by name; of equal names the topmost."""

    def __init__(self):
        self.paths: dict[str, str] = {}
        self.last_read = ""

    def named(self, pattern: str) -> list[str]:
        """Names that match a regular expression, whatever their case, in alphabetical order."""
        return sorted(name for name in self.paths if re.fullmatch(pattern, name, re.IGNORECASE))

    def read(self, pattern: str) -> str:
        """Text of the first list whose name matches; raises FileNotFoundError."""
        if not (names := self.named(pattern)):
            raise FileNotFoundError(pattern.replace("\\", "").replace("(something-something-v2-)?", ""))
        self.last_read = self.paths[names[0]]
        return _read_text(self.last_read)

    def lines(self, pattern: str) -> list[str]:
        return [line.strip() for line in self.read(pattern).splitlines() if line.strip()]


def _walk(root: str) -> tuple[dict[str, int], _Lists, Counter, list[str]]:
    """Paths of all videos below a folder with the numbers (inodes) of their files, its lists, how many other files
    there are, by suffix, and the folders that may not be listed."""
    videos, lists, passed, closed, seen = {}, _Lists(), Counter(), [], set()
    suffixes = frozenset(SUFFIXES)
    folders = [(root, os.path.realpath(root), "")]
    while folders:
        folder, real, part = folders.pop()
        if (part, real) in seen or re.match(r"/(proc|sys)(/|$)", real):  # seen: by a link, in the same part of the set
            continue
        seen.add((part, real))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            closed.append(folder)
            continue
        below = []
        for entry in entries:
            name, state = entry.name, None
            suffix = os.path.splitext(name)[1][1:].lower()
            if NOT_READ.fullmatch(name):
                continue
            if entry.is_symlink():
                try:
                    state = os.stat(entry.path)
                except OSError as error:  # of a video, reading it will say so
                    if isinstance(error, PermissionError) and suffix not in suffixes:
                        closed.append(entry.path)
                        continue
            if stat.S_ISDIR(state.st_mode) if state else entry.is_dir(follow_symlinks=False):
                target = os.path.realpath(entry.path) if state else os.path.join(real, name)
                if not f"{real}{os.sep}".startswith(f"{target}{os.sep}"):  # a link upwards would find all once more
                    below.append((entry.path, target, part or (entry.path if PART.fullmatch(name) else "")))
                continue
            if suffix in suffixes:
                videos[entry.path] = state.st_ino if state else entry.inode()
            elif suffix in ("txt", "csv", "json"):
                lists.paths.setdefault(name, entry.path)
            else:
                passed[f".{suffix}" if suffix else "without suffix"] += 1
        folders += reversed(below)
    return videos, lists, passed, closed


def _letters(name: str) -> str:
    """A name's letters and digits in lower case: what all ways of making a folder's name from a class's keep."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _match(
    named: list[tuple[str, int]], classes: list[str], videos: Iterable[str], id_only: bool
) -> list[tuple[str | None, str, int]]:
    """The path of each named video (its file name without suffix), by preference in a folder with its class's name.

    id_only: compare only the first 11 characters, a YouTube identifier; what follows it is written in several ways.
    """
    stems, rows = {}, []
    for path in videos:
        stem = os.path.splitext(os.path.basename(path))[0]
        stems.setdefault(stem[:11] if id_only else stem.casefold(), []).append(path)
    for name, label in named:
        paths = stems.get(name if id_only else name.casefold(), [None])
        if len(paths) > 1:
            paths = [p for p in paths if _letters(p.split(os.sep)[-2]) == _letters(classes[label])] or paths
        rows.append((paths[0], name, label))
    return rows


def _read_official(
    dataset: str, root: str, lists: _Lists, train: bool, split: int
) -> tuple[list[tuple[str, int]], list[str]]:
    """Name (without suffix) and label of each listed video, and the classes, by the data set's own lists."""
    read = {"ucf101": _ucf101, "hmdb51": _hmdb51, "k400": _k400, "diving48": _diving48, "ssv2": _ssv2}[dataset]
    try:
        named, classes = read(lists, train, split)
        if wrong := [label for _, label in named if not 0 <= label < len(classes)]:
            raise ValueError(f"label {wrong[0]}, but {len(classes)} classes")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root}: no list {error} below it; {dataset} expects {LAYOUTS[dataset]}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{lists.last_read}: not a list of {dataset} as it is published ({what})") from error
    return named, classes


def _ucf101(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    classes = [line.split()[1] for line in lists.lines(r"classInd\.txt")]
    index = {_letters(name): i for i, name in enumerate(classes)}
    rows = []
    for line in lists.lines(rf"{'train' if train else 'test'}list0{split}\.txt"):
        folder, _, name = line.split()[0].partition("/")  # what follows, in training lists only, is the class again
        rows.append((os.path.splitext(name)[0], index[_letters(folder)]))
    return rows, classes


def _hmdb51(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    end = f"_test_split{split}.txt"
    files = lists.named(rf".+_test_split{split}\.txt")
    if not files:
        raise FileNotFoundError("CLASS" + end)
    rows = []
    for label, file in enumerate(files):
        for line in lists.lines(re.escape(file)):
            name, tag = line.rsplit(maxsplit=1)
            if int(tag) == (1 if train else 2):  # 0: not in this split
                rows.append((os.path.splitext(name)[0], label))
    return rows, [file[: -len(end)] for file in files]


def _k400(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    tables = {}
    for half, pattern in ((True, K400_TRAIN), (False, K400_VALIDATION)):
        if half == train or lists.named(pattern):
            header, *lines = lists.lines(pattern)
            fields = [field.strip().lower() for field in header.split(",")]
            tables[half] = [(row["youtube_id"], row["label"]) for row in csv.DictReader(lines, fields)]
    classes = sorted({label for table in tables.values() for _, label in table})
    index = {name: i for i, name in enumerate(classes)}
    return [(name, index[label]) for name, label in tables[train]], classes


def _diving48(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    classes = [" ".join(dive) for dive in json.loads(lists.read(r"Diving48_vocab\.json"))]
    entries = json.loads(lists.read(rf"Diving48_V2_{'train' if train else 'test'}\.json"))
    return [(str(entry["vid_name"]), entry["label"]) for entry in entries], classes


def _ssv2(lists: _Lists, train: bool, split: int) -> tuple[list[tuple[str, int]], list[str]]:
    prefix = r"(something-something-v2-)?"
    index = {name: int(i) for name, i in json.loads(lists.read(prefix + r"labels\.json")).items()}
    entries = json.loads(lists.read(prefix + ("train" if train else "validation") + r"\.json"))
    rows = [(str(entry["id"]), index[entry["template"].replace("[", "").replace("]", "")]) for entry in entries]
    return rows, sorted(index, key=index.get)


def _read_tree(
    root: str, videos: Iterable[str], train: bool, kinetics: bool
) -> tuple[list[tuple[str, str, int]], list[str], list[str], int, bool]:
    """The videos of a part of a tree whose folders are the classes, the classes, the paths of the held-out part, how
    many videos lie outside of both, and whether there are parts (`find_videos` says what they are).

    A class is named by the folders below a part, and by those above where these differ: ucf/train/jump and
    hmdb/train/jump, or jump/train.
    """
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
    alike = [len(set(level)) == 1 for level in zip(*divided, strict=False)]  # levels of folders above the parts
    common = [*alike, False].index(False)
    rows = {}  # of a folder, its part and class
    for folder, names in folders.items():
        inside = [place for place in places[folder] if place[0] in divided]
        if inside:
            above, kind, below = inside[0]
            rows[folder] = kind, "/".join(below if apart and below else [*above[common:], *below])
        elif not (divided or kinetics):
            rows[folder] = None, "/".join(names)
    fold = _letters if kinetics else str
    classes = {fold(name): name.replace("_", " ") if kinetics else name for _, name in rows.values() if name}
    index = {fold(name): i for i, name in enumerate(sorted(classes.values()))}
    held_out = "val" if kinetics or "test" not in {kind for kind, _ in rows.values()} else "test"
    found = [(*rows.get(os.path.dirname(path), ("outside", "")), path) for path in videos]
    wanted = (None, "train" if train else held_out)
    kept = [(path, path, index.get(fold(name), -1)) for kind, name, path in found if kind in wanted]
    held = [path for kind, _, path in found if kind == held_out]
    outside = sum(kind not in (None, "train", held_out) for kind, _, _ in found)
    return kept, sorted(classes.values()), held, outside, kinetics or bool(divided)


def _ways(line: str, ends: str) -> list[tuple[str, str]]:
    """Ways to read a line of a list as a name, which stops at a match of `ends`, and the rest; long names first."""
    ways = [(line[: match.end()], line[match.end() :]) for match in re.finditer(ends, line, re.IGNORECASE)][::-1]
    if quoted := re.match(QUOTED, line):
        inner = quoted[2].replace(2 * quoted[1], quoted[1])
        ways += [(name, rest + line[quoted.end() :]) for name, rest in _ways(inner, ends)]
    return ways


def _read_list(root: str, list_file: str | Path) -> tuple[list[tuple[str | None, str, int]], list[str], str]:
    """The lines "path label" of a file: path (None: not on disk), name and label (-1: none) of each; classes, a remark.

    Fields stand apart by blanks, tabs, commas, semicolons or bars, and may be quoted; folders may stand apart as on
    Windows, and a suffix may be missing where one video fits. The first way to read a line by which a video is there
    counts, and names as they stand are tried before all others: "#20; (a, b).avi" may be one. Else lines that begin
    with "#" are comments, and the first one may be a header. `_read_labels` tells what lines of more fields mean.
    """
    file = next((f for f in (os.path.abspath(list_file), os.path.join(root, list_file)) if os.path.isfile(f)), None)
    if file is None:
        raise FileNotFoundError(f"{os.path.abspath(list_file)}: no such list file, and none by that name in {root}")

    @functools.cache
    def names_in(folder: str) -> set[str]:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return {name for name in names if not NOT_READ.fullmatch(name)}

    @functools.cache
    def stems_in(folder: str) -> dict[str, list[str]]:
        stems = {}
        for name in sorted(names_in(folder)):
            stem, suffix = os.path.splitext(name)
            if suffix[1:].lower() in SUFFIXES:
                stems.setdefault(stem, []).append(name)
        return stems

    def path_of(name: str) -> str | None:
        path = os.path.normpath(os.path.join(root, name))
        return path if path.startswith(root.rstrip(os.sep) + os.sep) else None

    def fits(name: str, bare: bool) -> list[str]:
        for path in filter(None, map(path_of, dict.fromkeys((name, name.replace("\\", "/"))))):
            folder, last = os.path.split(path)
            if fit := stems_in(folder).get(last, []) if bare else [last] * (last in names_in(folder)):
                return [os.path.join(folder, found) for found in fit]
        return []

    rows, strange, completed, columns, remark = [], "", False, 0, ""
    for number, line in enumerate(map(str.strip, _read_text(file).split("\n")), 1):
        where = f"{file}, line {number}"
        if len(line) > 9000:
            raise ValueError(f"{where}: {len(line)} characters, more than a path and a label: not a list of lines")
        ways = _ways(line, SUFFIXED)
        bare = not ways
        ways = ways or [way for way in _ways(line, BARE) if re.fullmatch(LABEL, way[1])]
        name, rest, paths = next(((*way, fit) for way in ways if (fit := fits(way[0], bare))), ("", "", []))
        if len(paths) > 1:
            raise ValueError(f"{where}: {name!r} may be {' or '.join(map(os.path.basename, paths))}: write its suffix")
        completed |= bool(paths) and bare
        if not paths:
            if not line.strip(" \t,;|") or line.startswith("#"):
                continue
            if re.match(r"[\"']?[a-z]:[\\/]", line, re.IGNORECASE):
                raise ValueError(f"{where}: {line!r} has a drive of Windows: name videos by their path from {root}")
            if bare and not rows and re.fullmatch(HEADER, line, re.IGNORECASE):
                columns, remark = len(re.split(r"[,;|\t]", line)), f" (line {number} is a header)"
                continue
            if bare and not strange:
                strange = f"{where}: no video file in {line!r}, and none that it names without suffix, in {root}"
            name, rest = ways[:2][-1] if bare else ways[0]
            if path_of(name.replace("\\", "/")) is None and not bare:
                raise ValueError(
                    f"{where}: {name!r} is not in {root}: give a folder that holds all (--data), and paths from there"
                )
        rows.append((where, name, rest, *(paths or [None])))
    if strange and not completed:  # else it is missing like others, without suffix too
        raise ValueError(strange)
    labels, classes, more = _read_labels([row[:3] for row in rows], columns)
    listed = [(path, name, label) for (_, name, _, path), label in zip(rows, labels, strict=True)]
    return listed, classes, remark + more


def _read_labels(rows: list[tuple[str, str, str]], columns: int) -> tuple[list[int], list[str], str]:
    """Labels (-1: none) of the lines of a list, of which (where, name, rest) is given; the classes, a remark.

    What numbers before the label are is told by all lines together. One on every line is the number of frames, if it is
    never below 2 and once not below a label that is a number (else the two may be start and end), or if names come with
    several; else it is part of the class's name. Two (start and end) are refused, as videos are read as a whole.
    """
    given, lines = [], []
    for where, name, rest in rows:
        text = re.sub(r"(^|\s)#(\s.*)?$", "", rest).strip(" \t,;|")
        if (quoted := re.match(QUOTED, text)) and quoted.end() == len(text):
            text = quoted[2].replace(2 * quoted[1], quoted[1])
        given.append(text)
        fields = [field.strip("\"'") for field in re.split(SEPARATED, text)]
        numbers = [bool(re.fullmatch(r"[+-]?\d+(\.\d*)?", field)) for field in fields]
        before, after = (len([*itertools.takewhile(bool, flags)]) for flags in (numbers, numbers[::-1]))
        extra = before - all(numbers) or (after if after > 1 and not before else 0)
        if text:
            label = re.split(SEPARATED, text, maxsplit=1)[-1].strip("\"'")
            many = {2: "two", 3: "three"}.get(extra + all(numbers), extra + all(numbers))
            lines.append((f"{where}: {many} numbers after {name!r}", extra, all(numbers), fields[0], label))
    fewest = min((extra for _, extra, *_ in lines), default=0)
    pairs = {line[3:] for line in lines}
    counted = fewest == 1 and all(re.fullmatch(r"0*([2-9]|[1-9]\d+)", frames) for frames, _ in pairs)
    if counted and all(numeric for _, _, numeric, _, _ in lines):
        counted = all(line[1] == 1 for line in lines) and any(int(frames) >= float(label) for frames, label in pairs)
    elif counted:
        counted = 2 * len(pairs) > len(lines) and len({label for _, label in pairs}) < len(pairs)
    for where, extra, numeric, _, _ in lines:
        if fewest > 1 or (numeric and extra > counted):
            raise ValueError(f"{where}; lines are 'path label': start and end are not read, cut the videos instead")
    if columns > 2 and not fewest and any(re.search(SEPARATED, text) for text in given):
        raise ValueError(f"{rows[0][0]}: {columns} columns; lines are 'path label': keep these two")
    if counted:
        given = [re.split(SEPARATED, text, maxsplit=1)[-1].strip("\"'") for text in given]
    named = sorted({label for label in given if label})
    remark = " (lines of path, number of frames, label)" if counted else ""
    if all(re.fullmatch(r"-?\d+", label) for label in named):
        labels = [max(int(label), -1) if label else -1 for label in given]
        if max(labels, default=0) > 1_000_000:
            raise ValueError(f"{rows[0][0].rpartition(',')[0]}: label {max(labels)}; labels count the classes from 0")
        return labels, [str(i) for i in range(max(labels, default=-1) + 1)], remark
    return [named.index(label) if label else -1 for label in given], named, remark


def _read_bad(root: str, file: str | Path) -> set[str]:
    """Paths named by a list of `check_videos`, by a run's bad_videos.log, or by a file of bare paths, one a line."""
    if not os.path.exists(file) and "," in str(file):
        return set().union(*(_read_bad(root, each) for each in str(file).split(",")))
    paths = set()
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        fields = line.split("\t")
        name = next((field for field in fields if field[:1] in ("'", '"')), "")
        try:
            name = os.fspath(ast.literal_eval(name)) if name else fields[0]
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(f"{file}, line {number}: no path in quotes, {name}") from None
        if name:
            paths.add(os.path.normpath(os.path.join(root, name)))
    return paths


class _Checker:
    """Reads the first, middle and last 32 frames of a video, or all."""

    def __init__(self, full: bool):
        self.full = full

    def visit(self, path: str) -> None:
        with Video(path) as video:
            last = max(len(video) - 32, 0)
            step = 32 if self.full else max(math.ceil(last / 2), 1)
            for start in (*range(0, last, step), last):
                for _ in video.stream(range(start, min(start + 32, len(video)))):
                    pass  # they are of no more use


def check_videos(root: str | Path, out: str | Path, workers: int, full: bool = False) -> tuple[int, int]:
    """Reads frames of all videos below a folder, in processes; returns how many there are and how many are bad.

    Reads the first, middle and last 32 frames of each, or with `full` all, several times slower. The bad ones are
    listed in the file `out` (see `visit_videos`).

    Raises FileNotFoundError when there is no video, PermissionError when there is a folder that may not be listed.
    """
    root = os.path.abspath(root)
    paths, _, _, closed = _walk(root)
    paths = [*paths]
    if closed:
        raise PermissionError(f"{closed[0]}: no permission to list this folder, one of {len(closed)} such folders")
    if not paths:
        raise FileNotFoundError(f"{root}: no videos (.{', .'.join(SUFFIXES)}) below it")
    return len(paths), visit_videos(_Checker(full).visit, paths, root, out, workers, f"checking {root}")


@dataclass(frozen=True)
class CheckConfig(Options):
    """Options of `data.py check`."""

    out: str = option("bad_videos.txt", "list to write, for --exclude")
    workers: int = option(os.cpu_count() or 1, "processes, one a core if not given", (1, 1024))
    full: str = option("off", "read all frames, not only 32 at three places: slower", SWITCH)


def check(config: CheckConfig, words: list[str]) -> None:
    """Finds videos that can't be read below ROOT, the --data of training; exit code 1 if there are any."""
    if len(words) != 1:
        raise UserError("name the folder to check, before all flags (--help lists these)")
    with user_errors():
        count, bad = check_videos(*words, config.out, config.workers, config.full == "on")
    advice = f": leave them out with --exclude {shlex.quote(config.out)}" if bad else ""
    print(f"{bad} of {count} videos can't be read{advice}", flush=True)
    if bad:
        sys.exit(1)
