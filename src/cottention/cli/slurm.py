"""`cottention slurm`: a pretraining run as a job of a SLURM cluster.

cottention slurm --config gpt_300m_cosine --nodes 2 --gpus-per-node 8 --output-dir runs/300m --dry-run
"""

from __future__ import annotations

import dataclasses
import shlex

import jsonargparse

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.training.recipe_files import find_recipe, packaged_recipes, read_recipe_file
from cottention.training.slurm import SlurmJob

_DESCRIPTION = """Submit `cottention pretrain` to SLURM: torchrun on every node, saved and requeued before the time
limit and when pre-empted, continued until it is finished, with a log for each rank."""

_HELP = {
    "nodes": "nodes",
    "gpus_per_node": "GPUs, and processes, of each node; 0: CPUs",
    "processes_per_node": "processes of each node; by default one for each GPU, or one",
    "cpus_per_process": "cores of each process",
    "time_limit": "SLURM's time limit; the job goes on in a next one by itself",
    "warning_s": "seconds before the limit at which the run is asked to save",
    "partition": "the partition; by default the cluster's",
    "account": "who is charged; by default as the cluster says",
    "name": "the job's name in the queue",
}


def build_parser() -> jsonargparse.ArgumentParser:
    """The flags of `cottention slurm`."""
    parser = new_parser("slurm", _DESCRIPTION)
    parser.add_argument("--config", required=True, help="a recipe's name or file")
    parser.add_argument("--output-dir", required=True, help="the run directory, on a disk that all nodes see")
    defaults = {field.name: field.default for field in dataclasses.fields(SlurmJob)}
    for name, text in _HELP.items():
        kind = int if name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_process", "warning_s") else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults[name], help=text)
    parser.add_argument("--flags", default="", help="more flags of pretrain, as one word: '--training.max_steps 1000'")
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    return parser


def run(args: jsonargparse.Namespace) -> None:
    """Print the script, or submit it and say what became of it."""
    file = find_recipe(args.config)
    arch = read_recipe_file(file)["arch"]
    config = args.config if args.config in packaged_recipes() else str(file.absolute())
    try:
        flags = shlex.split(args.flags)
    except ValueError as error:
        raise SettingsError(f"flags must be words as a shell takes them ({error}); got {args.flags!r}") from None
    job = SlurmJob(
        words=("pretrain", arch, "--config", config, *flags),
        output_dir=args.output_dir,
        **{name: args[name] for name in _HELP},
    )
    if args.dry_run:
        print(job.script(), end="")
        return
    number, script = job.submit()
    print(f"job {number}: {script}")
    print(f"log:  {script.parent / f'job-{number}.log'}, of each rank {script.parent / number}.*")
