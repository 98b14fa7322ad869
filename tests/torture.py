"""Runs are killed, doubled, starved of disk, damaged and given other videos, at random, until the minutes are over.

Each try ends with a run whose weights, optimiser and log must equal those of an undisturbed one, and with every file
that is not the run's own as it was. Not one of the quick tests: by hand, and for a minute in `.ci/run`.

    python tests/torture.py --minutes 60 --seed 1
    python tests/torture.py --only full_disk --seed 7
"""

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from helpers import alive, descendants, digests, run_two, torchrun, within, write  # noqa: E402
from helpers import lines as log  # noqa: E402
from test_reliability import TINY, end_well, equal_ends, finish, start  # noqa: E402

import synthetic  # noqa: E402


class Torture:
    """The tries: each is given chance and an empty folder, and raises AssertionError where a promise is not kept."""

    def __init__(self, folder: Path):
        self.videos, self.undisturbed = folder / "videos", folder / "undisturbed"
        synthetic.make_synthetic(self.videos, train=18, test=10, frames=40, size=(56, 56))
        self.flags = [*TINY, "--epochs=3", "--out=run", "--save_minutes=0", "--workers=1", "--data", self.videos]
        self.undisturbed.mkdir()
        began = time.monotonic()
        end_well(self.undisturbed, *self.flags)
        self.seconds = time.monotonic() - began
        run_two(ROOT / "fima.py", *self.flags, "--out=of_two", folder=self.undisturbed)

    def ended(self, folder: Path, *flags, file_size: int = 0, **options) -> tuple[int, str]:
        """A run that ends well, or with one line of an error: exit code and output."""
        process = start(folder, *self.flags, *flags, **options)
        if file_size:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_size, file_size))
        code, out = finish(process)
        assert code in (0, 2) and "Traceback" not in out, out
        return code, out

    def ends_as_if_nothing_had_been(self, folder: Path, stopped: bool = False, two: bool = False) -> None:
        """Goes on to the end, which is the undisturbed one's, and so is the log, but for where it `stopped`."""
        flags = *self.flags, "--resume=auto"
        run_two(ROOT / "fima.py", *flags, folder=folder) if two else end_well(folder, *flags)
        undisturbed = self.undisturbed / ("of_two" if two else "run")
        assert equal_ends(undisturbed, folder / "run"), "another end"
        found, expected = log(folder / "run"), log(undisturbed)
        steps, due = ([line["step"] for line in lines] for lines in (found, expected))
        assert found == expected or (stopped and {*steps} > {*due}), f"another log, of steps {steps}"
        assert sorted({*steps}) == steps and not list(folder.rglob("*partial*")), os.listdir(folder / "run")

    def killed(self, chance: Random, folder: Path) -> None:
        """A process, its worker, or both, up to three times."""
        for _ in range(chance.randint(1, 3)):
            process = start(folder, *self.flags, "--resume", "auto")
            time.sleep(chance.uniform(0, self.seconds))
            workers, own = descendants(process.pid), process.pid
            victims = chance.choice(([own], workers, [*workers, own]))
            for victim in victims:
                if process.is_alive():
                    os.kill(victim, signal.SIGKILL)
            process.join(120)
            assert process.exitcode in ((0, -signal.SIGKILL) if own in victims else (0,)), process.exitcode
            assert within(10, lambda workers=workers: not alive(workers)), f"of {workers} some outlive their process"
        self.ends_as_if_nothing_had_been(folder)

    def told_to_stop(self, chance: Random, folder: Path) -> None:
        """Ctrl-C, a scheduler's SIGTERM, a terminal that hangs up."""
        process, number = start(folder, *self.flags), chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        assert within(120, process.output.exists)  # it has begun
        time.sleep(chance.uniform(0.5, self.seconds))
        if process.is_alive():
            os.kill(process.pid, number)
        code, out = finish(process)
        assert code in (0, 128 + number, 128 + signal.SIGINT, -number) and "Traceback" not in out, out
        self.ends_as_if_nothing_had_been(folder, stopped=True)

    def launcher(self, chance: Random, folder: Path) -> None:
        """torchrun is killed, one of its two processes, or all of them at once."""
        running = torchrun(ROOT / "fima.py", *self.flags, folder=folder)
        within(60, (folder / "run" / "run.json").exists)
        time.sleep(chance.uniform(0, self.seconds))
        started = descendants(running.pid)
        for victim in chance.choice(([running.pid], started[:1], started[1:2], [running.pid, *started])):
            if alive([victim]):
                os.kill(victim, signal.SIGKILL)
        running.wait(120)
        assert within(30, lambda: not alive(started)), f"of {started} some outlive torchrun"
        self.ends_as_if_nothing_had_been(folder, stopped=True, two=True)

    def two_at_once(self, chance: Random, folder: Path) -> None:
        """A second run in the folder of the first, or one that would resume it."""
        first = start(folder, *self.flags)
        time.sleep(chance.uniform(0, self.seconds / 2))
        second = start(folder, *self.flags, *chance.choice(([], ["--resume", "auto"])), output="second.txt")
        ends = [finish(first), finish(second)]
        assert sorted(code for code, _ in ends) in ([0, 0], [0, 2]) and "Traceback" not in str(ends), ends
        self.ends_as_if_nothing_had_been(folder)

    def full_disk(self, chance: Random, folder: Path) -> None:
        """Of some size, in the middle of anything; afterwards there is room."""
        most = (self.undisturbed / "run" / "checkpoint.pt").stat().st_size
        size = chance.randint(4096, 5 * most // 2)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "torture", folder]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:  # no root: files have a largest size
            self.ended(folder, file_size=min(size, most))
            return self.ends_as_if_nothing_had_been(folder)
        try:
            code, out = self.ended(folder, output=folder.with_name("full.txt"))
            assert code == 0 or ("No space left" in out and "run" in out.splitlines()[-1]), out
            subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
            self.ends_as_if_nothing_had_been(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)

    def changed_data(self, chance: Random, folder: Path) -> None:
        """A video more, fewer or with another label: it is refused; with the old ones the run goes on."""
        end_well(folder, *self.flags, "--max_steps", chance.randint(1, 20))
        shutil.copytree(self.videos, folder / "other")
        path, change = chance.choice(sorted(folder.glob("other/train/*/*"))), chance.choice(("more", "fewer", "label"))
        if change == "more":
            shutil.copy(path, path.with_name("more.mp4"))
        elif change == "fewer":
            path.unlink()
        else:
            path.parent.rename(path.parents[1] / "another")
        code, out = self.ended(folder, "--data", folder / "other", "--resume", "run/checkpoint.pt")
        assert code == 2 and change in out.splitlines()[-1], (change, out)
        self.ends_as_if_nothing_had_been(folder, stopped=True)

    def damaged(self, chance: Random, folder: Path) -> None:
        """A bit, a hole or the end of the checkpoint is lost: it is refused, or nothing of it was."""
        end_well(folder, *self.flags, "--max_steps", chance.randint(1, 20))
        path = folder / "run" / "checkpoint.pt"
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        flipped = bytes([whole[at] ^ 1 << chance.randrange(8)])
        path.write_bytes(whole[:at] + chance.choice((b"", whole[at + 4096 :], flipped + whole[at + 1 :])))
        if self.ended(folder, "--resume", path)[0]:
            path.write_bytes(whole)
        self.ends_as_if_nothing_had_been(folder, stopped=True)


TRIES = ("killed", "told_to_stop", "launcher", "two_at_once", "full_disk", "changed_data", "damaged")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2, help="start no try after so many (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens, and when (default: 0)")
    parser.add_argument("--only", choices=TRIES, help="this kind alone")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of what killed processes leave, and it cleans up
    tries, failures = Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture = Torture(Path(folder))
        until = time.monotonic() + 60 * options.minutes
        while time.monotonic() < until:
            number = tries.total()
            kind = options.only or TRIES[number % len(TRIES)]
            tries[kind] += 1
            place = Path(folder) / f"{number}-{kind}"
            write(place / "run" / "notes.txt", "theirs")
            theirs = [place / "run" / "notes.txt", torture.videos, torture.undisturbed]
            before = digests(*theirs)
            try:
                getattr(torture, kind)(Random(f"{options.seed} {number}"), place)
                assert digests(*theirs) == before, "files of others have changed"
            except AssertionError as error:
                failures[kind] += 1
                print(f"try {number}, {kind}: {error}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    for kind in tries:
        print(f"{kind:<16}{tries[kind]:>4} tries{failures[kind]:>4} failures")
    return min(failures.total(), 1)


if __name__ == "__main__":
    sys.exit(main())
