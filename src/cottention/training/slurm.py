"""A pretraining run as a SLURM job: one sbatch script, which is requeued until the run is finished.

The script starts one torchrun on each node, which meet by c10d on the first. SLURM warns before the time limit
(--signal) and before a pre-emption; the script hands the warning on, the run saves and stops, the script puts the job
back into the queue, and there the same command continues the same run directory. Every rank has its own log.

    print(SlurmJob(words=("pretrain", "gpt", "--config", "gpt_300m_cosine"), output_dir="runs/a", nodes=2).script())
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cottention.errors import SettingsError
from cottention.files import one_line, write_text

_TEMPLATE = r"""#!/bin/bash
{options}
# Written by `cottention slurm`. To continue a run by hand: sbatch this file again.

stopped=0
step=
# The warning comes {warning_s} s before the time limit, or when other work needs the nodes. A signal to srun would have
# the tasks killed; scancel reaches torchrun, which asks its workers to save and stop.
on_warning() {{
    stopped=1
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap on_warning TERM

export OMP_NUM_THREADS={threads}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
attempt=${{SLURM_RESTART_COUNT:-0}}
logs={logs}/$SLURM_JOB_ID.$attempt
mkdir -p "$logs"

# The ranks' own logs lie in $logs; this one has what rank 0 says.
srun --ntasks-per-node=1 {python} -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={processes} \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.$attempt" \
    --log-dir="$logs" --redirects=3 --tee=0:3 \
    -m cottention {words} &
step=$!
# A trapped signal ends `wait` before the step has ended.
while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

if [ "$stopped" = 1 ] && [ "$code" != 0 ]; then
    echo "stopped before the end: back into the queue"
    # A pre-empted job is there already.
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job: what to run, and where."""

    words: tuple[str, ...]
    """The command behind `cottention`, without --output-dir."""
    output_dir: str
    """The run directory, which all nodes see."""
    nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 8
    """GPUs, and processes, of each node; 0: CPUs."""
    processes_per_node: int | None = None
    """Processes of each node; None: one for each GPU, or one."""
    cpus_per_process: int = 8
    """Cores of each process."""
    time_limit: str = "24:00:00"
    """After which SLURM ends the job, in its notation; the job goes on from there by itself."""
    warning_s: int = 120
    """Seconds before the limit at which the run is asked to save: more than saving takes."""
    partition: str | None = None
    """The partition; None: the cluster's default."""
    account: str | None = None
    """Who is charged; None: the cluster's default."""
    name: str = "cottention"
    """The job's name in the queue."""

    def __post_init__(self) -> None:
        """Check.

        Raises:
            SettingsError: a value makes no sense.
        """
        for field in ("nodes", "cpus_per_process", "warning_s"):
            if getattr(self, field) < 1:
                raise SettingsError(f"{field} must be at least 1; got {getattr(self, field)}")
        if self.gpus_per_node < 0:
            raise SettingsError(f"gpus_per_node must be at least 0; got {self.gpus_per_node}")
        if self.processes_per_node is not None and self.processes_per_node < 1:
            raise SettingsError(f"processes_per_node must be at least 1; got {self.processes_per_node}")
        for field in ("time_limit", "partition", "account", "name"):
            value = getattr(self, field)
            if value is not None and not re.fullmatch(r"[\w.:,@+-]+", value):  # it stands in a line of its own
                raise SettingsError(f"{field} must be a word as sbatch takes it; got {value!r}")
        if "\n" in self.output_dir:
            raise SettingsError(f"output_dir must be one line; got {self.output_dir!r}")

    @property
    def _run(self) -> Path:
        return Path(self.output_dir).expanduser().absolute()

    @property
    def folder(self) -> Path:
        """Script and logs: beside the run directory, which a new run finds empty."""
        return self._run.with_name(f"{self._run.name}.slurm")

    @property
    def processes(self) -> int:
        """Of each node."""
        return self.processes_per_node or max(self.gpus_per_node, 1)

    def script(self) -> str:
        """What sbatch is given."""
        run, folder = self._run, self.folder
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.processes * self.cpus_per_process,
            "gpus-per-node": self.gpus_per_node or None,
            "time": self.time_limit,
            "partition": self.partition,
            "account": self.account,
            # to the script, which knows what to do; to its steps it would come a second time
            "signal": f"B:TERM@{self.warning_s}",
            "requeue": True,
            "open-mode": "append",
            "output": f"{str(folder).replace('%', '%%')}/job-%j.log",
        }
        lines = [
            f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
            for name, value in options.items()
            if value is not None
        ]
        words = [*self.words, "--output-dir", str(run)]
        return _TEMPLATE.format(
            options="\n".join(lines),
            warning_s=self.warning_s,
            threads=self.cpus_per_process,
            logs=shlex.quote(str(folder)),
            python=shlex.quote(sys.executable),
            processes=self.processes,
            words=shlex.join(words),
        )

    def submit(self) -> tuple[str, Path]:
        """Write the script beside the run directory and hand it to sbatch: the job's number, and the script.

        Raises:
            SettingsError: there is no sbatch here, or it refuses.
        """
        if shutil.which("sbatch") is None:
            raise SettingsError("sbatch is not to be found: submit where SLURM is, or add --dry-run")
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for its log
        file = folder / "job.sbatch"
        write_text(file, self.script())
        ran = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise SettingsError(f"sbatch refuses {file}: {one_line(ran.stderr or ran.stdout)}")
        return ran.stdout.strip().partition(";")[0], file
