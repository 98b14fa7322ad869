"""What scraped files do to the loader: mutated, huge, slow, strangely named and fatal ones; the checker; --exclude."""

import contextlib
import copy
import faulthandler
import functools
import itertools
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoding import encode, moving_texture, write_sound
from helpers import one_line, same
from hypothesis import example, given
from hypothesis import strategies as st

import cli
import data
import find
import moco
import video as reader
from data import PretrainingViews, VideoList, load_batches
from find import find_videos
from video import BadVideo, Video

FRAMES = moving_texture(12)
LOSSLESS = dict(codec="ffv1", pix_fmt="bgr0")


def patched(path: Path, mark: bytes, offset: int, numbers: bytes, codec: str, **options: str) -> Path:
    """A video with other numbers in its header, so far behind a mark."""
    content = bytearray(encode(path, FRAMES, codec, **options).read_bytes())
    at = content.index(mark) + offset
    content[at : at + len(numbers)] = numbers
    path.write_bytes(content)
    return path


GOOD = {
    "h264.mp4": lambda path: encode(path, FRAMES, "libx264", bf="2", g="6"),
    "index_first.mp4": lambda path: encode(path, FRAMES, "libx264", index_first=True),
    "packed.avi": lambda path: encode(path, FRAMES, "mpeg4", bf="2", g="6"),
    "no_frame_count.webm": lambda path: encode(path, FRAMES, "libvpx-vp9", deadline="realtime", cpu_used="8"),
    "stream.ts": lambda path: encode(path, FRAMES, "libx264", bf="2"),
    "program.mpg": lambda path: encode(path, FRAMES, "mpeg2video", bf="2"),
    "flash.flv": lambda path: encode(path, FRAMES, "flv"),
    "windows.wmv": lambda path: encode(path, FRAMES, "wmv2"),
    "raw.h264": lambda path: encode(path, FRAMES, "libx264"),
    "uneven.mp4": lambda path: encode(path, FRAMES, "libx264", times=np.cumsum(np.arange(12) % 4 + 1).tolist()),
    "odd.avi": lambda path: encode(path, moving_texture(12, 33, 17), **LOSSLESS),
    "tiny.avi": lambda path: encode(path, moving_texture(12, 2, 2), **LOSSLESS),
    "ten_bit.mkv": lambda path: encode(path, FRAMES, "libx264", pix_fmt="yuv420p10le"),
    "gray.mkv": lambda path: encode(path, FRAMES, "ffv1", pix_fmt="gray"),
    "alpha.mov": lambda path: encode(path, FRAMES, "qtrle", pix_fmt="argb"),
    "intra.mov": lambda path: encode(path, FRAMES, "prores_ks", pix_fmt="yuv422p10le"),
}
BAD = {  # how it is made, and why it can't be read
    "empty.mp4": (lambda path: path.write_bytes(b""), "empty"),
    "text.avi": (lambda path: path.write_text("no video\n" * 100), "Invalid data"),
    "noise.mp4": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(10_000)), "Invalid data"),
    "cut.mp4": (lambda path: path.write_bytes(encode(path, FRAMES, "libx264").read_bytes()[:-2000]), "Invalid data"),
    "sound.mkv": (write_sound, "no video stream"),
    "one_frame.mp4": (lambda path: encode(path, FRAMES[:1], "libx264"), "1 frames, where a video has at least 2"),
    "picture.mp4": (
        lambda path: encode(path.with_suffix(".png"), FRAMES[:1], "png", pix_fmt="rgb24").rename(path),
        "in none of the formats",
    ),
    "huge.avi": (
        lambda path: patched(path, b"strf", 12, struct.pack("<2i", 16384, 16384), **LOSSLESS),
        "no frames of 1 to 35389440 pixels",
    ),
    "million.mp4": (  # frames of one byte
        lambda path: patched(path, b"stsz", 8, struct.pack(">2I", 1, 10**6), "libx264"),
        "",
    ),
    "playlist.mp4": (
        lambda path: path.write_text("ffconcat version 1.0\nfile h264.mp4\n"),
        "in none of the formats",
    ),
    "pipe.mp4": (os.mkfifo, "not a file"),
    "absent.mp4": (lambda path: None, "No such file"),
}


def mutate(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A damaged copy. Headers lie at the beginning or the end; "header" and "number" aim there."""
    content = bytearray(content)
    size = len(content)
    near = int(rng.integers(min(size, 1024))) * rng.choice([1, -1]) % size
    at = int(rng.integers(size))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        for i in rng.integers(size, size=int(rng.choice([1, 10, 100]))):
            content[i] ^= 1 << rng.integers(8)
    elif kind == "header":
        content[near] ^= 1 << rng.integers(8)
    elif kind == "number":
        number = int(rng.choice([0, 10**6, 16384, 65535, 2**24, 2**31 - 1, 2**32 - 1]))
        content[near : near + 4] = number.to_bytes(4, str(rng.choice(["big", "little"])))[: size - near]
    elif kind == "zero":
        end = min(at + int(rng.choice([1, 16, 1000])), size)
        content[at:end] = bytes(end - at)
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, make in {**GOOD, **{name: make for name, (make, _) in BAD.items()}}.items():
        make(root / name)
    (root / "named_wrongly.mp4").write_bytes((root / "no_frame_count.webm").read_bytes())
    return root


def views_of(paths: list, **options) -> PretrainingViews:
    return PretrainingViews(VideoList([str(path) for path in paths], [-1] * len(paths), [], ""), 16, 4, **options)


class Keys(list):
    def __init__(self, keys, batch_size=1):
        super().__init__(keys)
        self.batch_size = batch_size


@pytest.fixture
def small_limits(monkeypatch):
    """So that a mutated size takes little memory and time."""
    monkeypatch.setattr(reader, "MAX_PIXELS", 2**18)
    monkeypatch.setattr(reader, "MAX_BYTES", 2**25)
    monkeypatch.setattr(reader, "DEADLINE", 20)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_says_why_and_is_closed_again(folder, name):
    before, caught = os.listdir("/proc/self/fd"), []
    for _ in range(3):
        with pytest.raises(BadVideo) as error:
            Video(folder / name)
        caught.append(error)  # keeps the traceback, and with it the reader, alive
    assert error.value.path == str(folder / name) and error.value.reason.startswith(BAD[name][1])
    assert str(error.value) == str(copy.copy(error.value)) == f"{folder / name}: {error.value.reason}"
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.slow
def test_mutated_files_are_read_or_named_with_a_reason(folder, tmp_path, small_limits):
    """Over 500 of them: no process dies or hangs, every item has its shape, every skip is named once."""
    rng = np.random.default_rng(0)
    whole, mutated = sorted(filter(Path.is_file, folder.iterdir())), []
    for path in whole:
        content = path.read_bytes()
        for kind in ("cut", "flip", "header", "number", "zero") if content else ():
            for n in range(5):
                other = str(rng.choice(find.SUFFIXES)) if n == 0 else path.suffix[1:]
                mutated.append(tmp_path / f"{path.stem}_{kind}_{n}.{other}")
                mutated[-1].write_bytes(mutate(content, kind, rng))
    assert len(mutated) > 500
    views = views_of([*whole, *mutated, *[folder / "h264.mp4"] * 5000])  # most replacements can be read
    keys = Keys([(0, index)] for index in range(len(whole) + len(mutated)))
    unread = {}
    for [(_, index)], batch in zip(keys, load_batches(views, keys, workers=2), strict=True):
        assert {name: value.shape for name, value in batch.items() if name != "bad"} == {
            name: value.shape for name, value in views.empty(1).items()
        }
        assert all(reason and "\n" not in reason and "died" not in reason for _, reason in batch["bad"]), batch["bad"]
        named = [path for path, _ in batch["bad"]]
        assert len(set(named)) == len(named)
        assert (batch["index"].item() == index) == (not named)
        if named:
            assert named[0] == views.videos.paths[index]
            unread[Path(named[0]).name] = batch["bad"][0][1]
    assert unread.keys() & {path.name for path in whole} == BAD.keys() - {"absent.mp4", "pipe.mp4"}
    assert len(mutated) / 10 < len(unread) < len(mutated) * 9 / 10  # neither harmless nor hopeless
    assert len(set(unread.values())) > 10


def test_limits_are_reasons(folder, monkeypatch):
    path = folder / "h264.mp4"
    for limit, value, reason in (
        ("MAX_FRAMES", 11, "more than 11 frames or 4 GiB of video: cut it into clips"),
        ("MAX_BYTES", 1000, "more than 1000000 frames or .* GiB of video"),
        ("MAX_PIXELS", 48 * 64 - 1, r"no frames of 1 to 3071 pixels \(said to have \d+ × \d+\)"),
        ("DEADLINE", 0, "not read within 0 s"),
    ):
        with monkeypatch.context() as patch, pytest.raises(BadVideo, match=reason):
            patch.setattr(reader, limit, value)
            Video(path)
    with Video(path) as video:
        monkeypatch.setattr(reader, "MAX_BYTES", 5 * 48 * 64 * 3)
        assert len(video.read([0, 3, 5, 7, 11, 11])) == 6
        with pytest.raises(BadVideo, match="6 frames of 64 × 48 pixels take more than"):
            video.read(range(6))
        monkeypatch.setattr(reader, "DEADLINE", -1)
        with pytest.raises(BadVideo, match="not read within -1 s"):
            video.read([0])


@pytest.mark.parametrize("error", [av.error.OSError(95, "Operation not supported"), MemoryError()])
def test_pixels_that_cannot_be_converted_make_a_bad_video(folder, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(Video, "_pixels", refuse)
    with (
        Video(folder / "h264.mp4") as video,
        pytest.raises(BadVideo, match=r"Operation not supported|not enough memory"),
    ):
        video.read([0])
    monkeypatch.setattr(reader, "is_memory_short", lambda: True)
    if isinstance(error, MemoryError):
        with Video(folder / "h264.mp4") as video, pytest.raises(OSError, match="Cannot allocate memory: take fewer"):
            video.read([0])


def test_only_files_on_a_disk_are_opened(tmp_path, folder, monkeypatch, check):
    """Whatever else links lead to, as a device, a socket, and a file of /proc that waits for more, is named as bad."""
    root = tmp_path / "set"
    root.mkdir()
    shutil.copy(folder / "h264.mp4", root / "good.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for target in ("/dev/zero", "/dev/tty", "/proc/kmsg", folder / "pipe.mp4", tmp_path / "socket"):
        (root / f"{Path(target).stem}.mp4").symlink_to(target)
    (root / "everything").symlink_to("/proc")
    opened, av_open = [], av.open
    monkeypatch.setattr(av, "open", lambda name, *rest, **options: opened.append(name) or av_open(name, **options))
    assert len(find_videos("folder", root, True)) == 6
    code, out, _, listed = check(root, "--workers", 1)
    assert code == 1 and out.startswith("5 of 6 videos") and listed.count("\tnot a file\n") == 4
    for path in find_videos("folder", root, True, exclude=tmp_path / "bad.txt").paths:
        Video(path).close()
    assert opened == [f"file:{root}/good.mp4"]
    for target in ("/dev/zero", folder / "pipe.mp4"):
        (tmp_path / "list.txt").unlink(missing_ok=True)
        (tmp_path / "list.txt").symlink_to(target)
        with pytest.raises(ValueError, match=r"list\.txt: not a file on a disk"):
            find_videos("folder", root, True, exclude=tmp_path / "list.txt")
    (root / "classInd.txt").symlink_to(folder / "pipe.mp4")
    with pytest.raises(ValueError, match=r"classInd\.txt: not a"):
        find_videos("ucf101", root, True)


@pytest.fixture
def fatal(folder, tmp_path):
    """A video whose name makes processes die, below."""
    return shutil.copy(folder / "h264.mp4", tmp_path / "fatal.mp4")


class Mortal(PretrainingViews):
    """Its process dies of videos named fatal, in even epochs or where a file is, which it takes away if `once`."""

    def __init__(self, paths: list, number: int = signal.SIGKILL, file: Path | None = None, once: bool = False):
        super().__init__(views_of(paths).videos, 16, 4)
        self.number, self.file, self.once = number, file, once
        if file:
            file.touch()

    def write(self, key, item):
        self.dies = self.file.exists() if self.file else key[0] % 2 == 0
        return super().write(key, item)

    def write_views(self, rng, path, item):
        if "fatal" in path and self.dies:
            if self.once:
                self.file.unlink()
            faulthandler.disable()  # pytest's
            os.kill(os.getpid(), self.number)
        return super().write_views(rng, path, item)


@pytest.mark.slow
def test_a_video_that_kills_its_process_is_replaced_whatever_the_number_of_workers(folder, fatal):
    views = Mortal([folder / "h264.mp4", fatal, folder / "packed.avi"])
    sampler = data.StepSampler(3, batch_size=3, epochs=4)
    one, three = (list(map(copy.deepcopy, load_batches(views, sampler, workers))) for workers in (1, 3))
    assert all(map(same, one, three))
    how = (str(fatal), "the process that read it died (exit code -9)")
    assert [set(batch["bad"]) for batch in one] == [{how}, set(), {how}, set()]
    assert [1 in batch["index"] for batch in one] == [False, True, False, True]


class Broken(Mortal):
    def write(self, key, item):
        os._exit(3)


@pytest.mark.slow
def test_processes_that_always_die_end_the_run(fatal):
    for kind, says in (
        (Mortal, r"10 videos in a row can't be read; the last: .*fatal\.mp4.* died"),
        (Broken, r"11 times in a row, the process that read it died \(exit code 3\)"),  # before they read
    ):
        with pytest.raises(OSError, match=says):
            next(load_batches(kind([fatal]), data.StepSampler(1, 1, 1), workers=1))


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_process_that_dies_once_costs_no_video(folder, fatal, tmp_path, number):
    """As where somebody or something ends it: another one makes the same again."""
    views = Mortal([folder / "h264.mp4", fatal], number, tmp_path / "mortal", once=True)
    expected = data.collate([PretrainingViews.__getitem__(views_of(views.videos.paths), (0, i)) for i in range(2)])
    (batch,) = load_batches(views, Keys([[(0, 0), (0, 1)]], 2), workers=1)
    assert same(batch, expected) and batch["bad"] == [] and not views.file.exists()


@pytest.mark.slow
def test_a_process_that_lacks_memory_costs_no_video(fatal, tmp_path, monkeypatch):
    """It dies of SIGBUS, or Linux has killed it, which it counts: the run ends, with the advice."""
    counts = map(str, range(100))
    monkeypatch.setattr(data, "_memory_kills", lambda: next(counts))
    for number in (signal.SIGBUS, signal.SIGKILL):
        views = Mortal([fatal], number)
        says = rf"11 times in a row, the process that read it died \(exit code -{number:d}\): .*memory.*--workers"
        with pytest.raises(OSError, match=says):
            next(load_batches(views, data.StepSampler(1, 1, 1), workers=1))


@contextlib.contextmanager
def lower(limit: int, value: int):
    """Lowers a limit of this process, for a block."""
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def next_file() -> int:
    """The number that the next file to be opened gets, above which this process may have none."""
    with open(os.devnull) as file:
        return file.fileno()


def no_more_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file(), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


HELD = []


def no_more_memory(megabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
    with contextlib.suppress(MemoryError):
        while True:
            HELD.append(bytearray(2**18))
    del HELD[: 4 * megabytes]


def lacking(items: data.Items, limit) -> data.Items:
    """The same items, made in a process that first sets itself a limit."""
    write = items.write
    items.write = lambda *item: (limit(), write(*item))[1]
    return items


def test_too_few_open_files_are_no_videos_fault(folder):
    path = folder / "h264.mp4"
    says = r"Too many open files\)?: raise `ulimit -n`"
    with (
        lower(resource.RLIMIT_NOFILE, next_file()),
        pytest.raises(OSError, match=r"Too many open files: raise `ulimit -n`.*h264\.mp4"),
    ):
        Video(path)
    for more in range(5):  # for memory to share, two; for a pipe, two; and for the process
        with lower(resource.RLIMIT_NOFILE, next_file() + more), pytest.raises(OSError, match=says):
            next(load_batches(views_of([path]), Keys([[(0, 0)]]), workers=1))
    for items, key in ((views_of([path]), (0, 0)), (data.TestClips(views_of([path]).videos, 16, 4), 0)):
        with pytest.raises(OSError, match=says):
            next(load_batches(lacking(items, no_more_files), Keys([[key]]), 1))


def test_too_few_open_files_stop_the_checker(folder, check, monkeypatch):
    monkeypatch.setattr(find._Checker, "visit", lambda checker, path: (no_more_files(), Video(path)))
    code, out, err, listed = check(folder, "--workers", 1)
    assert (code, out, listed) == (2, "", "")
    one_line(err, "Too many open files: raise `ulimit -n`")


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [0, 1, 4])
def test_too_little_memory_is_no_videos_fault(tmp_path, megabytes):
    """Whether it fails in decoding, where FFmpeg calls the video damaged, or elsewhere."""
    path = encode(tmp_path / "large.mp4", moving_texture(8, 540, 960), "libx264", preset="ultrafast")
    views, clips = views_of([path]), data.TestClips(views_of([path]).videos, 16, 4)
    for items, key in ((views, (0, 0)), (clips, 0)):
        assert next(load_batches(items, Keys([[key]]), 1))["bad"] == []
        with pytest.raises((OSError, MemoryError, RuntimeError), match=r"emory|^$"):
            next(load_batches(lacking(items, functools.partial(no_more_memory, megabytes)), Keys([[key]]), 1))


def test_a_disk_that_does_not_answer_is_no_videos_fault(folder, monkeypatch):
    def wait(*_arguments, **_options):
        raise av.error.ExitError(int.from_bytes(b"TIXE"), "Immediate exit requested")

    monkeypatch.setattr(av, "open", wait)
    with pytest.raises(OSError, match=r"timed out: mount the disk again.*h264\.mp4"):
        Video(folder / "h264.mp4")


NAMES = [
    "! # & ; ( ' \".mp4",
    "a  b.mp4",
    "new\nline\tand tab.mp4",
    os.fsdecode(b"caf\xe9.mp4"),
    "été 視.mp4",
    "$(touch owned); `touch owned`.mp4",
    "-rf %03d http:name*?.mp4",
]


@pytest.fixture
def names(folder, tmp_path):
    """A folder of good videos named NAMES in bow/ and class/, and bad ones of the same names in bad/."""
    root = tmp_path / "any names\n"
    for part in ("bad", "bow", "class"):
        (root / part).mkdir(parents=True)
    content = (folder / "h264.mp4").read_bytes()
    for name in NAMES:
        try:
            (root / "bow" / name).write_bytes(content)
        except OSError:
            pytest.skip(f"the file system has no {name!r}")
        (root / "class" / name).symlink_to(root / "bow" / name)
        (root / "bad" / name).write_bytes(content[:100])
    return root


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Runs `data.py check` in this process; gives exit code, output, errors and the list written."""

    def call(root, *flags):
        out = tmp_path / "bad.txt"
        monkeypatch.setattr(sys, "argv", ["data.py", "check", str(root), "--out", str(out), *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            cli.command_line(data.main)
        return stop.value.code, *capsys.readouterr(), out.read_text(encoding="ascii") if out.exists() else ""

    return call


def paths_in(root: Path, *folders: str) -> list[str]:
    return [str(root / folder / name) for folder in folders for name in sorted(NAMES)]


def test_any_name_is_found_read_checked_and_left_out(names, tmp_path, check):
    good = paths_in(names, "bow", "class")
    assert find_videos("folder", names, train=True).paths == paths_in(names, "bad") + good
    for path in good:
        Video(path).close()
    code, out, _, listed = check(names, "--workers", 2)
    assert code == 1
    assert out == f"7 of 21 videos can't be read: leave them out with --exclude {tmp_path}/bad.txt\n"
    lines = listed.splitlines()
    assert len(lines) == 7 and all(line.endswith("\tInvalid data found when processing input") for line in lines)
    videos = find_videos("folder", names, train=True, exclude=tmp_path / "bad.txt")
    assert videos.paths == good
    assert videos.report.endswith(f"; 7 of the 7 named in {tmp_path}/bad.txt left out")


@pytest.mark.slow
def test_a_runs_log_of_bad_videos_can_be_left_out(names, run):
    flags = ["--dataset", "folder", "--data", names, "--max_bad", 1, "--frames", 8, "--crop", 32, "--epochs", 1]
    code, _, err = run(moco, *flags, "--batch_size", 21, "--out", "first", dataset=None)
    assert code == 0, err
    log = run.path / "first" / "bad_videos.log"
    good = paths_in(names, "bow", "class")
    assert find_videos("folder", names, train=True, exclude=log).paths == good
    code, out, err = run(moco, *flags, "--batch_size", 14, "--out", "second", "--exclude", log, dataset=None)
    assert code == 0, err
    assert "7 of the 7 named in" in out
    assert not (run.path / "second" / "bad_videos.log").exists()


def test_no_shell_sees_a_name():
    """Videos' names reach FFmpeg as files, and no other program."""
    for path in Path(data.__file__).parent.glob("*.py"):
        assert not re.search(r"shell\s*=|os\.system|os\.popen|getoutput", path.read_text(encoding="utf-8")), path.name


@given(name=st.binary(min_size=1).filter(lambda name: not set(name) & {0, 47} and name not in (b".", b"..")))
@example(b"'")
@example(b"\"'\t\r\n\\")
def test_any_name_comes_back_from_a_list_of_bad_videos(tmp_path_factory, name):
    file = tmp_path_factory.getbasetemp() / "list.txt"
    path = os.path.join("/videos", os.fsdecode(name))
    for line in (f"{os.fsdecode(name)!a}\tno reason\n", f"step 3\t{path!r}\tit's\n"):
        file.write_text(line, encoding="utf-8")
        assert find._read_bad("/videos", file) == {path}


def test_lists_of_bad_videos_may_be_written_by_hand(tmp_path):
    (tmp_path / "list.txt").write_text("a b.mp4\r\n/videos/c/d.mp4\n\n")
    assert find._read_bad("/videos", tmp_path / "list.txt") == {"/videos/a b.mp4", "/videos/c/d.mp4"}
    for line in ("'b.mp4", "'b.mp4','no frames'"):
        (tmp_path / "list.txt").write_text(f"a.mp4\n{line}\n")
        with pytest.raises(ValueError, match=r"list\.txt, line 2: no path in quotes, 'b\.mp4"):
            find._read_bad("/videos", tmp_path / "list.txt")


def test_check_reads_the_ends_and_in_full_all(tmp_path, check):
    path = encode(tmp_path / "film.mp4", moving_texture(300), "libx264", g="1", crf="30")
    code, out, err, listed = check(tmp_path)
    assert (code, out, listed) == (0, "0 of 1 videos can't be read\n", "")
    assert f"checking {tmp_path}: 100%" in err and "1/1" in err
    with Video(path) as video:
        damaged = [(packet.pos, packet.size) for packet in video._packets[64:100]]
    content = bytearray(path.read_bytes())
    for position, size in damaged:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    assert check(tmp_path)[0] == 0
    code, *_, listed = check(tmp_path, "--full")
    assert (code, listed) == (1, "'film.mp4'\t32 of 32 frames could not be decoded\n")


def test_what_the_check_cannot_do_is_one_line(tmp_path, check):
    one_line(check(tmp_path)[2], f"{tmp_path}: no videos (")
    (tmp_path / "a.mp4").touch()
    one_line(check(tmp_path, "--out", tmp_path / "no" / "bad.txt")[2], "No such file")
    one_line(check("--full")[2], "name the folder")


def test_an_interrupted_check_keeps_what_it_found(tmp_path, monkeypatch, check):
    for n in range(5):
        (tmp_path / f"{n}.mp4").touch()

    def interrupted(items, *_, **options):
        yield from itertools.islice(items, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "tqdm", interrupted)
    code, _, err, listed = check(tmp_path)
    assert (code, err, listed.count("\n")) == (130, "interrupted\n", 3)
    assert not torch.multiprocessing.active_children()


def test_check_names_a_video_that_kills_its_process(tmp_path, monkeypatch):
    for name in ("a", "fatal", "z"):
        (tmp_path / f"{name}.mp4").touch()
    visit = find._Checker.visit

    def die(checker, path):
        if "fatal" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        visit(checker, path)

    monkeypatch.setattr(find._Checker, "visit", die)
    assert find.check_videos(tmp_path, tmp_path / "bad.txt", workers=1) == (3, 3)
    assert "'fatal.mp4'\tthe process that read it died (exit code -9)\n" in (tmp_path / "bad.txt").read_text()
