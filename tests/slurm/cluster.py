"""A SLURM cluster of one node on this machine, as Debian's slurm-wlm and munge make it; needs root.

with Cluster(folder) as cluster: cluster.run("squeue")
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

_CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=60
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
NodeName={host} CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 OverSubscribe=NO
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
"""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def why_not() -> str | None:
    """What is missing here, or None."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{missing[0]} is not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "a cluster is started by root"


class Cluster:
    """Starts the daemons, and ends those that it started."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._daemons = folder, []
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(parents=True)
        config = folder / "slurm.conf"
        config.write_text(_CONFIG.format(host=socket.gethostname().partition(".")[0], folder=folder))
        self.environment = {**os.environ, "SLURM_CONF": str(config), "PATH": os.environ["PATH"] + ":/usr/sbin"}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        munge = self._folder / "munge"
        key = munge / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge.chmod(0o755)
        files = {"key-file": key, "pid-file": munge / "pid", "log-file": munge / "log", "seed-file": munge / "seed"}
        words = [f"--{name}={file}" for name, file in files.items()]
        # SLURM looks for munge's own socket.
        Path("/run/munge").mkdir(exist_ok=True)
        Path("/run/munge").chmod(0o755)
        self._daemon("munged", "--foreground", "--force", *words)
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D")
        self.wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T").stdout, "the node to be idle", 60)

    def _daemon(self, *command: str) -> None:
        with (self._folder / f"{command[0]}.out").open("w") as out:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=subprocess.STDOUT))

    def run(self, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """A command with this cluster."""
        ran = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or ran.returncode == 0, ran.stderr
        return ran

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run("scontrol", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, holds: Any, what: str, timeout_s: float) -> None:
        """Wait for something.

        Raises:
            TimeoutError: it did not come; with the end of the daemons' logs.
        """
        end = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > end:
                logs = [
                    file.read_text(errors="replace")[-1500:] for file in sorted(self._folder.glob("*.[lo][ou][gt]"))
                ]
                raise TimeoutError(f"waited {timeout_s} s for {what}\n" + "\n".join(logs))
            time.sleep(0.5)

    def __exit__(self, *_: Any) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
