"""Kills a training run again and again, at random moments, and compares its end with that of a run left alone.

Each life of the run is the same command in new processes. Death comes by SIGKILL, a random time after the first step or
as soon as a checkpoint is being written; of several processes it takes all, one rank, or torchrun alone. Now and then
the newest checkpoint is cut off before the next life. After every death the newest checkpoint that was whole must still
be there and whole; in the end weights and metrics must be those of the undisturbed run, bit for bit.

    python -m tests.training.kill_trial --count 30 --processes 2        # make test-kills COUNT=30 PROCESSES=2
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cottention.seals import damage
from cottention.training.checkpoints import checkpoint_step, list_checkpoints, newest_intact_checkpoint
from cottention.training.recipe_files import recipe_text
from tests.training.helpers import assert_same_run, tiny_recipe, write_corpus

_PATIENCE_S = 300.0
_CUT_OFF = 0.2  # of the deaths, how many leave a damaged checkpoint behind


class Trial:
    """One recipe, its undisturbed run, and a run that is killed."""

    def __init__(self, folder: Path, arch: str, num_processes: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_processes = num_processes
        corpus = write_corpus(folder / "text.txt", num_paragraphs=40)
        # Some hundred steps, so that a life of a second is a small part of them.
        recipe = tiny_recipe(arch, corpus, training__max_steps=300, training__eval_every=50)
        (folder / "recipe.yaml").write_text(recipe_text(recipe))
        self.arch, self.folder = arch, folder
        self.run_dir, self.undisturbed = folder / "killed", folder / "undisturbed"
        self.deaths: dict[str, int] = {}
        self.cut_off: set[str] = set()

    def command(self, run_dir: Path) -> list[str]:
        """What starts a life."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.num_processes}"]
        launcher = [sys.executable, *(several if self.num_processes > 1 else ()), "-m", "cottention", "pretrain"]
        return [*launcher, self.arch, "--config", str(self.folder / "recipe.yaml"), "--output-dir", str(run_dir)]

    def run(self, count: int) -> None:
        """Let it die so many times, in as many runs as that takes."""
        subprocess.run(self.command(self.undisturbed), check=True, capture_output=True)
        num_deaths = num_runs = 0
        while num_deaths < count:
            if self.live_and_die():
                num_deaths += 1
                continue
            num_runs += 1
            self.compare()
        self.live_and_die(spared=True)
        self.compare()
        told = ", ".join(f"{number} x {kind}" for kind, number in sorted(self.deaths.items()))
        print(f"{num_deaths} deaths in {num_runs + 1} runs, each ended bit for bit as one left alone: {told}")

    def compare(self) -> None:
        """Hold the finished run to the undisturbed one, and remove it."""
        assert_same_run(self.run_dir, self.undisturbed)
        shutil.rmtree(self.run_dir)

    def live_and_die(self, *, spared: bool = False) -> bool:
        """Start a life; True: it was ended, False: it came to its end."""
        checkpoints = self.run_dir / "checkpoints"
        before = self.newest_step()
        log = self.folder / "log.txt"
        with log.open("w") as output:
            life = subprocess.Popen(
                self.command(self.run_dir), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        in_save = self.random.random() < 0.5
        size = self.size_of_metrics()
        until = time.monotonic() + _PATIENCE_S
        while life.poll() is None:  # until the first line of this life, behind its first steps
            assert time.monotonic() < until, log.read_text()
            if not spared and self.size_of_metrics() > size:
                break
            time.sleep(0.01)
        if life.poll() is None:
            lasts_until = time.monotonic() + self.random.uniform(0, 1.0)
            while life.poll() is None and time.monotonic() < lasts_until:
                if in_save and (checkpoints / ".writing").exists():
                    break
                time.sleep(0.0005)
        if life.poll() is not None:
            assert life.returncode == 0, log.read_text()
            return False
        where = "in a save" if (checkpoints / ".writing").exists() else "in a step"
        self.kill(life, where)
        found = self.newest_step()
        assert found >= before, f"checkpoint {before} is lost; the newest whole one is {found}: {log.read_text()}"
        there = list_checkpoints(checkpoints)
        corrupt = {path.name for path in there if damage(path)} - self.cut_off
        assert not corrupt, f"{corrupt} is damaged: {log.read_text()}"
        if len(there) > 1 and not self.cut_off & {path.name for path in there} and self.random.random() < _CUT_OFF:
            file = self.random.choice(sorted(path for path in there[-1].iterdir() if path.stat().st_size))
            os.truncate(file, self.random.randrange(file.stat().st_size))
            self.cut_off = {there[-1].name}
            self.note("then the newest cut off")
        else:
            self.cut_off = {path.name for path in there if damage(path)}
        return True

    def kill(self, life: subprocess.Popen[bytes], where: str) -> None:
        """SIGKILL to some of its processes; those that it leaves are waited for, or follow."""
        ranks = _children(life.pid) if self.num_processes > 1 else []
        who = self.random.choice(["all", "one rank", "torchrun"]) if ranks else "all"
        if who == "one rank":
            os.kill(self.random.choice(ranks), signal.SIGKILL)
            life.wait(_PATIENCE_S)  # torchrun ends the others
            assert life.returncode != 0
        elif who == "torchrun":
            os.kill(life.pid, signal.SIGKILL)
            life.wait()
            time.sleep(self.random.uniform(0, 0.5))  # its ranks go on, which harms nothing
        life.kill()
        life.wait()
        _end(ranks)
        self.note(f"{who} {where}")

    def note(self, kind: str) -> None:
        """Count it."""
        self.deaths[kind] = self.deaths.get(kind, 0) + 1

    def newest_step(self) -> int:
        """Of the newest checkpoint that is whole; 0: there is none."""
        folder = self.run_dir / "checkpoints"
        newest = newest_intact_checkpoint(folder) if folder.is_dir() else None
        return 0 if newest is None else checkpoint_step(newest)

    def size_of_metrics(self) -> int:
        """Bytes."""
        path = self.run_dir / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0


def _children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def _end(pids: list[int]) -> None:
    """End what is left of a life, and wait until it is gone: it holds the lock of its directory."""
    until = time.monotonic() + _PATIENCE_S
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < until
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip()) and not found.stdout.startswith("Z")


def main() -> None:
    """Run the trial."""
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare its end.")
    parser.add_argument("--count", type=int, default=30, help="deaths (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="ranks of the run (default: %(default)s)")
    parser.add_argument("--arch", choices=("gpt", "bert"), default="gpt", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_DATASETS_CACHE=str(Path(folder, "datasets")), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        Trial(Path(folder), options.arch, options.processes, options.seed).run(options.count)


if __name__ == "__main__":
    main()
