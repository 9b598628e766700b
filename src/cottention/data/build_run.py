"""One step of `cottention data`: tasks through processes into a corpus directory, with a bar, counts and a report.

report = run_build(writer, tasks, work, processes_for(None, num_bytes), "Splitting")
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from cottention.bars import progress
from cottention.data.parallel import ordered_map
from cottention.data.shards import CorpusWriter
from cottention.files import usable_cores
from cottention.logging import get_logger

_SMALL = 16 << 20  # bytes: below it, starting processes takes longer than the work

Task = TypeVar("Task")

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did."""

    directory: str
    """The corpus."""
    kind: str
    """One of `shards.KINDS`."""
    rows: int
    """Rows of the corpus."""
    shards: int
    """Files they lie in."""
    counts: dict[str, int]
    """What was read, kept, and left out, and why; of the whole corpus."""
    was_finished: bool
    """The corpus was there already, and nothing was done."""
    num_proc: int
    """Processes at work."""
    seconds: float
    """Time of this run."""
    megabytes_per_s: float
    """Text that went through in this run, per second."""
    megabytes_per_s_per_core: float
    """The same, per process."""
    tokens_per_s: float | None
    """Tokens made in this run, per second; None where none are."""

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """For people."""
        done = "was there already" if self.was_finished else f"{self.seconds:,.1f} s"
        lines = [f"{self.directory}: {self.kind}, {self.rows:,} rows in {self.shards} shards ({done})"]
        lines += [f"  {name.replace('_', ' '):<38}{count:>16,}" for name, count in self.counts.items()]
        if not self.was_finished:
            tokens = "" if self.tokens_per_s is None else f", {self.tokens_per_s:,.0f} tokens/s"
            per_core = f"{self.megabytes_per_s_per_core:,.2f} per core, {self.num_proc} at work"
            lines.append(f"  {self.megabytes_per_s:,.2f} MB/s ({per_core}){tokens}")
        return "\n".join(lines)


def run_build(
    writer: CorpusWriter,
    tasks: Callable[[Counter[str]], Iterator[Task]],
    work: Callable[[Task], tuple[pa.Table, Counter[str]]],
    num_proc: int,
    what: str,
    *,
    num_rows: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> BuildReport:
    """Do the tasks that are not in finished shards, and report.

    Args:
        writer: the corpus.
        tasks: makes the tasks, always the same, and adds to its counter what is read and left out meanwhile.
        work: turns a task into rows and counts.
        num_proc: processes.
        what: for the bar.
        num_rows: rows that the tasks hold together, where that is known; else the bar counts bytes.
        tokenizer: saved in the corpus.
    """
    was_finished, before, began = writer.is_finished, Counter(writer.counts), time.perf_counter()
    if not was_finished:
        if writer.num_tasks:
            logger.info("%s: going on behind %d finished shards", writer.directory, len(writer.shards))
        # What the reader counted up to a task travels beside it, and is added when the task's rows are.
        read: deque[Counter[str]] = deque()
        results = ordered_map(work, _remaining(tasks, writer.num_tasks, read), num_proc=num_proc)
        with progress(what, "B" if num_rows is None else "row", total=num_rows, delay=3, leave=False) as bar:
            for table, counts in results:
                counts.update(read.popleft())
                writer.add(table, counts)
                bar.update(counts["bytes"] if num_rows is None else counts["rows"])
        if tokenizer is not None:
            writer.save(tokenizer)
        writer.finish()
    seconds = time.perf_counter() - began
    done = Counter(writer.counts)
    done.subtract(before)
    rate = done["bytes"] / 1e6 / seconds
    return BuildReport(
        directory=str(writer.directory),
        kind=str(writer.header["kind"]),
        rows=writer.num_rows,
        shards=len(writer.shards),
        counts=dict(writer.counts),
        was_finished=was_finished,
        num_proc=num_proc,
        seconds=seconds,
        megabytes_per_s=rate,
        megabytes_per_s_per_core=rate / num_proc,
        tokens_per_s=done["tokens"] / seconds if "tokens" in writer.counts else None,
    )


def _remaining(
    tasks: Callable[[Counter[str]], Iterator[Task]], num_done: int, read: deque[Counter[str]]
) -> Iterator[Task]:
    counts: Counter[str] = Counter()
    for number, task in enumerate(tasks(counts)):
        if number >= num_done:
            read.append(Counter(counts))
            yield task
        counts.clear()


def processes_for(num_proc: int | None, num_bytes: int | None) -> int:
    """How many processes: as asked for, else one for little text and one per core for more."""
    if num_proc is not None:
        return num_proc
    return 1 if num_bytes is not None and num_bytes < _SMALL else usable_cores()
