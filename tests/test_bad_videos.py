"""What scraped files do to the loader: mutated, huge, slow, strangely named and fatal ones; the checker; --exclude."""

import contextlib
import copy
import faulthandler
import itertools
import os
import resource
import signal
import struct
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
from helpers import collate, encode, moving_texture, one_line, same, touch, write_sound
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

import data
import find
import video as reader
from data import PretrainingViews, StepSampler, TestClips, VideoList, load_batches
from find import find_videos
from video import BadVideo, Video

FRAMES = moving_texture(12)
GOOD = {  # a codec, and files of what it makes: its options
    ("libx264", "h264.mp4 stream.ts raw.h264 fatal.mp4"): dict(bf="2", g="6"),
    ("mpeg4", "packed.avi phone.3g2"): dict(bf="2", g="6"),
    ("mpeg2video", "program.mpg broadcast.mxf"): {},
    ("libvpx", "free.ogv web.ivf"): {},
    ("libvpx-vp9", "no_frame_count.webm"): dict(deadline="realtime", cpu_used="8"),
    ("flv", "flash.flv"): {},
    ("wmv2", "windows.wmv"): {},
    ("mjpeg", "nineties.mjpg"): dict(pix_fmt="yuvj420p"),
    ("ffv1", "odd.avi"): dict(images=moving_texture(12, 33, 17), pix_fmt="bgr0"),
    ("qtrle", "alpha.mov"): dict(pix_fmt="argb"),
}


def patched(path: Path, codec: str, layout: str, old: tuple, new: tuple) -> None:
    """A video with other numbers in its header: a huge frame's, or those of a million frames."""
    content = encode(path, FRAMES, codec).read_bytes()
    path.write_bytes(content.replace(struct.pack(layout, *old), struct.pack(layout, *new)))


BAD = {  # how it is made, and why it can't be read
    "empty.mp4": (Path.touch, "empty"),
    "cut.mp4": (lambda path: path.write_bytes(encode(path, FRAMES, "libx264").read_bytes()[:-2000]), "Invalid data"),
    "sound.mkv": (write_sound, "no video stream"),
    "one_frame.mp4": (lambda path: encode(path, FRAMES[:1], "libx264"), "1 frames"),
    "huge.avi": (lambda path: patched(path, "ffv1", "<2i", (64, 48), (16384, 16384)), "no frames of"),
    "million.mp4": (lambda path: patched(path, "libx264", ">3I", (0, 0, 12), (0, 1, 10**6)), ""),
    "playlist.mp4": (lambda path: path.write_text("ffconcat version 1.0\nfile h264.mp4\n"), "in none of the formats"),
    "pipe.mp4": (os.mkfifo, "not a file"),
    "absent.mp4": (lambda path: None, "No such file"),
}


def mutate(content: bytes, n: int, rng: np.random.Generator) -> bytes:
    """A damaged copy: cut, or with noise, zeros or a number that few expect, at its ends or anywhere."""
    size = len(content)
    at = int(rng.integers(size) if n % 2 else rng.integers(min(size, 1024)) * rng.choice([1, -1]) % size)
    number = int(rng.choice([10**6, 16384, 65535, 2**24, 2**31 - 1, 2**32 - 1]))
    new = [bytes(int(rng.choice([1, 16, 1000]))), number.to_bytes(4, "big"), number.to_bytes(4, "little")][n % 3]
    new = rng.bytes(len(new)) if n % 5 == 1 else new[: size - at]
    return content[:at] if n % 5 == 0 else content[:at] + new + content[at + len(new) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for (codec, names), options in GOOD.items():
        for name in names.split():
            encode(root / name, **dict(images=FRAMES, codec=codec) | options)
    for name, (make, _) in BAD.items():
        make(root / name)
    (root / "named_wrongly.mp4").symlink_to("no_frame_count.webm")
    return root


@pytest.fixture
def check(in_process, tmp_path):
    """Runs `data.py check` in this process; gives exit code, output, errors and the list written."""

    def call(root, *flags):
        out = tmp_path / "bad.txt"
        said = in_process(data, "check", root, "--out", out, *flags)
        return *said, out.read_text("ascii") if out.exists() else ""

    return call


def views_of(paths: list) -> PretrainingViews:
    return PretrainingViews(VideoList([str(path) for path in paths], [-1] * len(paths), [], ""), 16, 4)


def load(items: data.Items, *keys) -> dict:
    """A batch of these, made in a process."""
    return next(load_batches(items, BatchSampler(keys, len(keys), False), 1))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_says_why_and_is_closed_again(folder, name):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BadVideo) as error:  # keeps the traceback, and with it the reader, alive
        Video(folder / name)
    assert error.value.reason.startswith(BAD[name][1])
    assert str(error.value) == str(copy.copy(error.value)) == f"{folder / name}: {error.value.reason}"
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.slow
def test_mutated_files_are_read_or_named_with_a_reason(folder, tmp_path, monkeypatch):
    for limit, value in (("MAX_PIXELS", 2**18), ("MAX_BYTES", 2**25), ("DEADLINE", 20)):  # to take less time
        monkeypatch.setattr(reader, limit, value)
    rng = np.random.default_rng(0)
    whole, mutated = sorted(filter(Path.is_file, folder.iterdir())), []
    for path in whole:
        for n in range(25 if path.stat().st_size else 0):
            suffix = path.suffix if n % 6 else f".{rng.choice(find.SUFFIXES)}"
            mutated.append(tmp_path / f"{path.stem}_{n}{suffix}")
            mutated[-1].write_bytes(mutate(path.read_bytes(), n, rng))
    clips = TestClips(views_of([*whole, *mutated]).videos, 16, 4, clips=3)
    batches = load_batches(clips, BatchSampler(range(len(clips)), 1, False), workers=2)
    bad = [entry for batch in batches for entry in batch["bad"]]
    assert all(reason and "\n" not in reason and "died" not in reason for _, reason in bad), bad
    unread = {Path(path).name for path, _ in bad}
    assert unread & {path.name for path in whole} == BAD.keys() - {"absent.mp4", "pipe.mp4"}
    assert len(mutated) / 10 < len(unread) < len(mutated) * 9 / 10  # neither harmless nor hopeless


def test_limits_are_reasons(folder, monkeypatch):
    for limit, value, frames, reason in (
        ("MAX_FRAMES", 11, [], "more than 11 frames"),
        ("MAX_BYTES", 1000, [], "more than 1000000 frames or .* GiB"),
        ("MAX_PIXELS", 48 * 64 - 1, [], "3071 pixels"),
        ("DEADLINE", 0, [], "not read within 0 s"),
        ("DEADLINE", -1, [0], "not read within -1 s"),
        ("MAX_BYTES", 5 * 48 * 64 * 3, range(6), "6 frames of 64 × 48 pixels take more than"),
    ):
        with Video(folder / "h264.mp4") as video, monkeypatch.context() as patch:
            patch.setattr(reader, limit, value)
            with pytest.raises(BadVideo, match=reason):
                video.read(frames) if frames else Video(folder / "h264.mp4")
            if reason.startswith("6"):
                assert len(video.read([0, 3, 5, 7, 11, 11])) == 6


def test_what_a_machine_lacks_is_no_videos_fault(folder, monkeypatch):
    for owner, name, error, short, kind, says in (
        (Video, "_pixels", MemoryError(), False, BadVideo, "not enough memory"),
        (Video, "_pixels", MemoryError(), True, OSError, "Cannot allocate memory: take fewer"),
        (av, "open", av.error.ExitError(int.from_bytes(b"TIXE"), ""), False, OSError, "timed out: mount.*h264"),
    ):
        with monkeypatch.context() as patch, pytest.raises(kind, match=says):
            patch.setattr(owner, name, Mock(side_effect=error))
            patch.setattr(reader, "is_memory_short", lambda short=short: short)
            Video(folder / "h264.mp4").read([0])


def test_a_lost_frame_is_its_neighbour_unless_memory_is_short(folder, monkeypatch):
    pictures = Video._pictures
    monkeypatch.setattr(Video, "_pictures", lambda *given: itertools.islice(pictures(*given), 6))
    with Video(folder / "h264.mp4") as video:
        *_, last, lost = video.read(range(7))
        assert np.array_equal(last, lost)
        monkeypatch.setattr(reader, "is_memory_short", lambda: True)
        with pytest.raises(OSError, match="Cannot allocate memory: take fewer"):
            video.read(range(7))


def test_too_little_memory_for_a_batch_is_no_videos_fault(folder, monkeypatch, before_reading):
    before_reading(Mock(side_effect=MemoryError()))  # not in the reader, which would name the video
    monkeypatch.setattr(reader, "is_memory_short", lambda: True)
    with pytest.raises(OSError, match="Cannot allocate memory: take fewer"):
        load(views_of([folder / "h264.mp4"]), (0, 0))


def test_only_files_on_a_disk_are_opened(tmp_path, folder, monkeypatch, check):
    """Whatever else links lead to, as a device, and a file of /proc that waits for more, is named as bad."""
    monkeypatch.setattr(av, "open", Mock(side_effect=AssertionError))
    (root := tmp_path / "set").mkdir()
    for target in ("/dev/zero", "/proc/kmsg", folder / "pipe.mp4"):
        (root / f"{Path(target).stem}.mp4").symlink_to(target)
    (root / "everything").symlink_to("/proc")  # by "self/root", all of the disk
    code, out, _, listed = check(root, "--workers", 1)
    assert code == 1 and "\n3 of 3 videos" in out and listed.count("\tnot a file\n") == 2
    assert out.startswith("".join(f"  {line}\n" for line in listed.splitlines()))
    (root / "list.json").symlink_to("/proc/kmsg")
    with pytest.raises(FileNotFoundError, match=r"list\.json: 0 videos"):
        find_videos("folder", root, True, list_file=root / "list.json")
    (root / "list.txt").symlink_to(folder / "pipe.mp4")
    with pytest.raises(ValueError, match=r"list\.txt: no file on a disk"):
        find_videos("folder", root, True, exclude=root / "list.txt")


@pytest.fixture
def before_reading(monkeypatch):
    """Has processes do something when they begin to read a video, given its path and what they draw of it."""
    begin, quiet = data._begin, faulthandler.disable  # pytest's, which reports deaths
    return lambda act: monkeypatch.setattr(data, "_begin", lambda *given: (begin(*given), quiet(), act(*given)))


@pytest.mark.slow
def test_a_video_that_kills_its_process_is_replaced_whatever_the_number_of_workers(folder, before_reading):
    before_reading(lambda path, draw: "fatal" in path and draw[0] % 2 == 0 and signal.raise_signal(signal.SIGKILL))
    views, sampler = views_of([folder / name for name in ("h264.mp4", "fatal.mp4", "packed.avi")]), StepSampler(3, 3, 4)
    one, three = (list(map(copy.deepcopy, load_batches(views, sampler, workers))) for workers in (1, 3))
    assert all(map(same, one, three))
    how = (str(folder / "fatal.mp4"), "the process that read it died (exit code -9)")
    assert [set(batch["bad"]) for batch in one] == [{how}, set(), {how}, set()]
    assert [1 in batch["index"] for batch in one] == [False, True, False, True]


DEATHS = [  # of what a process dies, how many Linux has killed for want of memory till then, and what is said
    (signal.SIGKILL, [0] * 99, r"10 videos in a row can't be read; the last: .*fatal\.mp4.* died"),
    (0, [0] * 99, r"11 times in a row, the process that read it died \(exit code 3\)"),  # before it reads
    (signal.SIGBUS, [0] * 99, r"11 times in a row, .*exit code -7\): .*memory.*--workers"),  # as without memory
    (signal.SIGKILL, range(99), r"11 times in a row, .*exit code -9\): .*memory.*--workers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kills", "says"), DEATHS)
def test_processes_that_always_die_end_the_run(folder, monkeypatch, before_reading, number, kills, says):
    monkeypatch.setattr(data, "_memory_kills", Mock(side_effect=kills))
    before_reading(lambda *_: signal.raise_signal(number))
    views = views_of([folder / "fatal.mp4"])
    if not number:
        views.write = lambda *_: os._exit(3)
    with pytest.raises(OSError, match=says):
        load(views, (0, 0))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_a_process_that_dies_once_costs_no_video(folder, before_reading, tmp_path, number):
    """As where somebody or something ends it: another one makes the same again."""
    views = views_of([folder / "h264.mp4", folder / "fatal.mp4"])
    expected = collate([views[0, 0], views[0, 1]])
    (once := tmp_path / "once").touch()
    before_reading(lambda path, _: "fatal" in path and once.exists() and (once.unlink(), signal.raise_signal(number)))
    assert same(load(views, (0, 0), (0, 1)), expected) and not once.exists()


def no_more_files(more: int = 0) -> None:
    with open(os.devnull) as file:
        following = file.fileno()  # the number that the next file gets
    resource.setrlimit(resource.RLIMIT_NOFILE, (following + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_too_few_open_files_are_no_videos_fault(folder, check, before_reading):
    path, before = folder / "h264.mp4", resource.getrlimit(resource.RLIMIT_NOFILE)
    views = views_of([path])
    for more in range(3):  # for a pipe, two; and for the process
        no_more_files(more)
        try:
            with pytest.raises(OSError, match=r"Too many open files\)?: raise `ulimit -n`"):
                load(views, (0, 0)) if more else Video(path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    before_reading(lambda *_: no_more_files())
    for items, key in ((views, (0, 0)), (TestClips(views.videos, 16, 4), 0)):
        with pytest.raises(OSError, match=r"Too many open files: raise `ulimit -n`.*h264\.mp4"):
            load(items, key)
    code, out, err, listed = check(folder, "--workers", 1)
    assert (code, out, listed) == (2, "", "")
    one_line(err, "ulimit -n")


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [0, 1, 4])
def test_too_little_memory_is_no_videos_fault(tmp_path, before_reading, megabytes):
    """Whether it fails in decoding, where FFmpeg calls the video damaged, or elsewhere."""
    path, held = encode(tmp_path / "a.mp4", moving_texture(8, 540, 960), "libx264", preset="ultrafast"), []
    views = views_of([path])

    def no_more_memory(*_):
        resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
        with contextlib.suppress(MemoryError):
            while True:
                held.append(bytearray(2**18))
        del held[: 4 * megabytes]

    before_reading(no_more_memory)
    for items, key in ((views, (0, 0)), (TestClips(views.videos, 16, 4), 0)):
        with pytest.raises((OSError, MemoryError, RuntimeError), match=r"emory|^$"):
            load(items, key)


def test_any_name_is_found_read_checked_and_left_out(folder, tmp_path, check):
    names = ["! # & ; ( ' \".mp4", "new\nline\t  été 視.mp4", os.fsdecode(b"caf\xe9.mp4"), "-rf %03d http:n*?.mp4"]
    touch(root := tmp_path / "any names\n", *[f"bad/{name}" for name in names])
    for name in names:
        (root / name).symlink_to(folder / "h264.mp4")
    code, out, *_ = check(root, "--workers", 2)
    advice = f"4 of 8 videos can't be read: leave them out with --exclude {tmp_path}/bad.txt, which has the reasons\n"
    assert code == 1 and out.count("\tempty\n") == 4 and out.endswith(f"\n{advice}")
    videos = find_videos("folder", root, train=True, exclude=tmp_path / "bad.txt")
    assert videos.paths == [f"{root}/{name}" for name in sorted(names)]
    assert f"; 4 of the 4 named in {tmp_path}/bad.txt" in videos.report


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
    (tmp_path / "1,txt").write_text("a b.mp4\r\n/videos/c/d.mp4\n\n")
    assert find._read_bad("/videos", tmp_path / "1,txt") == {"/videos/a b.mp4", "/videos/c/d.mp4"}
    for line in ("'b.mp4", "'b.mp4','no frames'"):
        (tmp_path / "1,txt").write_text(f"a.mp4\n{line}\n")
        with pytest.raises(ValueError, match=r"1,txt, line 2: no path in quotes, 'b\.mp4"):
            find._read_bad("/videos", tmp_path / "1,txt")


def test_check_reads_the_ends_and_in_full_all(tmp_path, check):
    path = encode(tmp_path / "film.mp4", moving_texture(300), "libx264", g="1", crf="30")
    code, out, err, listed = check(tmp_path)
    assert (code, out, listed) == (0, "0 of 1 videos can't be read\n", "") and "1/1" in err
    good = path.read_bytes()
    with Video(path) as video:
        places = [packet.pos for packet in video._packets]
    for begin, end, normally in ((places[34], places[62], 0), (places[270], places[-1], 1)):
        path.write_bytes(good[:begin] + bytes(end - begin) + good[end:])
        assert check(tmp_path)[0] == normally
        code, *_, listed = check(tmp_path, "--full")
        assert code == 1 and listed.startswith("'film.mp4'\t") and "could not be decoded\n" in listed


def test_what_the_check_cannot_do_is_one_line(tmp_path, check):
    one_line(check(tmp_path)[2], f"{tmp_path}: no videos (")
    touch(tmp_path, "a.mp4")
    one_line(check(tmp_path, "--out", tmp_path / "no" / "bad.txt")[2], "No such file")
    one_line(check("--full")[2], "name the folder")


def test_a_check_that_is_stopped_keeps_the_older_list_and_beside_it_what_it_found(tmp_path, monkeypatch):
    (old := tmp_path / "bad.txt").write_text("'old.mp4'\tempty\n")
    out, rest = tmp_path / "link.txt", iter([("/v/new.mp4", "empty"), KeyboardInterrupt])

    def visited(*_):
        yield next(rest)
        raise next(rest)

    out.symlink_to(old)
    monkeypatch.setattr(data, "_in_processes", visited)
    with pytest.raises(KeyboardInterrupt):
        data.visit_videos(len, ["/v/new.mp4", "/v/b.mp4"], "/v", out, 1, "checking")
    assert old.read_text() == "'old.mp4'\tempty\n" and out.is_symlink()
    assert (tmp_path / "bad.txt.partial").read_text() == "'new.mp4'\tempty\n"
    monkeypatch.setattr(data, "_in_processes", lambda *_: (pair for pair in [("/v/b.mp4", "empty")]))
    assert data.visit_videos(len, ["/v/b.mp4"], "/v", out, 1, "checking") == 1
    assert old.read_text() == "'b.mp4'\tempty\n" and out.is_symlink() and len([*tmp_path.iterdir()]) == 2
    for other in (tmp_path, "/dev/null"):
        with pytest.raises(FileExistsError, match="name another file"):
            data.visit_videos(len, [], "/v", other, 1, "checking")


def test_check_names_a_video_that_kills_its_process(tmp_path, check, before_reading):
    touch(tmp_path, "fatal.mp4", "z.mp4")
    before_reading(lambda path, _: "fatal" in path and signal.raise_signal(signal.SIGKILL))
    code, *_, listed = check(tmp_path, "--workers", 1)
    assert (code, listed) == (1, "'fatal.mp4'\tthe process that read it died (exit code -9)\n'z.mp4'\tempty\n")
