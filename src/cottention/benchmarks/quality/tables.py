"""Markdown of the finished cells: a table for each experiment, means over seeds with their spread, beside the controls.

Differences are paired: each seed against the same seed of the control, so that what a seed does to both drops out.

    print(as_markdown(Lines(Path("docs/quality")), ["lm-1m"]))
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from cottention.benchmarks.quality.cells import ASKED, EXPERIMENTS, PLUS, SOFTMAX_PLUS, Cell, sweep_of
from cottention.benchmarks.quality.lines import Lines, scaled
from cottention.errors import SettingsError, did_you_mean

Line = dict[str, Any]
BySeed = dict[int, Line]

BEGIN, END = "<!-- tables: made by the command `table --page` -->", "<!-- end of tables -->"

_CONTROLS = {
    "cosine": "cosine as published",
    "softmax": "softmax",
    SOFTMAX_PLUS: SOFTMAX_PLUS,
    PLUS: PLUS,
}


def as_markdown(lines: Lines, experiments: Sequence[str] = ()) -> str:
    """A section for each experiment that has finished cells.

    Raises:
        SettingsError: an experiment does not exist.
    """
    for name in experiments:
        if name not in EXPERIMENTS:
            raise SettingsError(f"no experiment is named {name!r}{did_you_mean(name, EXPERIMENTS)}")
    sections = [_section(name, lines) for name in experiments or EXPERIMENTS]
    return "\n\n".join(section for section in sections if section)


def replace_tables(page: str, tables: str) -> str:
    """A page of Markdown with other tables between its two marks.

    Raises:
        SettingsError: the page has no such marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SettingsError(f"the page must have the marks {BEGIN} and {END}, between which the tables go")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def _section(name: str, lines: Lines) -> str:
    plan = EXPERIMENTS[name]
    found = {variant: _by_seed(name, variant, lines) for variant in plan.variants}
    found = {variant: by_seed for variant, by_seed in found.items() if by_seed}
    if not found:
        return ""
    every = [line for by_seed in found.values() for line in by_seed.values()]
    machine = _machine(every[0])
    parts = [f"### {name}", _about(name, every)]
    if plan.task == "text":
        columns = _text_columns(plan.beside or name, lines, machine)
        parts += [_table(columns, found), _by_position(found), _by_context(found)]
    else:
        parts += [_table(_made_columns(ASKED[plan.task], every[0], machine), found)]
    return "\n\n".join(part for part in parts if part)


def _by_seed(experiment: str, variant: str, lines: Lines) -> BySeed:
    cells = [Cell(experiment=experiment, variant=variant, seed=seed) for seed in EXPERIMENTS[experiment].seeds]
    return {cell.seed: line for cell in cells if (line := lines.of(cell)) is not None}


def _machine(line: Line) -> str:
    """What speeds are of, and what the last digits depend on."""
    environment = line["environment"]
    instructions = environment.get("instruction_set")
    return environment["processor"] + (f" with {instructions}" if instructions else "")


def _about(name: str, every: Sequence[Line]) -> str:
    plan, line = EXPERIMENTS[name], every[0]
    made_of = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in plan.settings.items())
    task = plan.task if not made_of else f"{plan.task} ({made_of})"
    steps = f"{plan.steps} steps of {plan.batch_size} x {plan.length} tokens, trained in {plan.precision}"
    first, *others = dict.fromkeys(map(_machine, every))
    machines = first if not others else f"{first} (speeds), {', '.join(others)}"
    versions = dict.fromkeys(each["environment"]["packages"]["torch"] for each in every)
    return f"{task}; {line['parameters']:,} parameters within 1 %, {steps}; {machines}; torch {', '.join(versions)}."


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


Columns = dict[str, Callable[[str, BySeed], str]]


def _text_columns(beside: str, lines: Lines, machine: str) -> Columns:
    columns: Columns = {
        "perplexity": lambda _, by_seed: _spread([each["scores"]["perplexity"] for each in by_seed.values()], 1),
        "nats a byte": lambda _, by_seed: _spread([each["scores"]["nats_per_byte"] for each in by_seed.values()], 4),
    }
    for control, label in _CONTROLS.items():
        controls = _by_seed(beside, control, lines)
        if controls:
            columns[f"against {label}, %"] = lambda name, by_seed, control=control, controls=controls: (
                "" if name == control else _against(by_seed, controls)
            )
    return {**columns, **_common_columns(machine)}


def _made_columns(asked: str, some: Line, machine: str) -> Columns:
    columns: Columns = {
        f"{name} {asked}, %": lambda _, by_seed, name=name: _spread(
            [100 * each["scores"]["accuracy"][name] for each in by_seed.values()], 1
        )
        for name in some["scores"]["accuracy"]
    }
    return {**columns, **_common_columns(machine)}


def _common_columns(machine: str) -> Columns:
    return {
        "rate": lambda variant, by_seed: f"{_first(by_seed)['learning_rate']:.2g}{_edge(variant, by_seed)}",
        "state, bytes": lambda _, by_seed: f"{_first(by_seed)['state_bytes']:,}",
        "tokens a CPU second": lambda _, by_seed: _speed(by_seed, machine),
        "step, MB": lambda _, by_seed: f"{_first(by_seed)['step_bytes'] / 1e6:.0f}",
        "seeds": lambda _, by_seed: str(len(by_seed)),
    }


def _table(columns: Columns, found: dict[str, BySeed]) -> str:
    rows = [[variant, *(value(variant, by_seed) for value in columns.values())] for variant, by_seed in found.items()]
    return _grid(["block", *columns], rows)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_position(found: dict[str, BySeed]) -> str:
    return _nested("Loss by position, nats:", "by_position", found)


def _by_context(found: dict[str, BySeed]) -> str:
    return _nested("Loss of the same tokens, read in windows of so many, nats:", "by_context", found)


def _nested(title: str, name: str, found: dict[str, BySeed]) -> str:
    header = list(_first(next(iter(found.values())))["scores"][name])
    rows = [
        [
            variant,
            *(_spread([each["scores"][name][key] for each in by_seed.values()], 3, shows=False) for key in header),
        ]
        for variant, by_seed in found.items()
    ]
    return f"{title}\n\n{_grid(['block', *header], rows)}"


def _against(by_seed: BySeed, control: BySeed) -> str:
    """How much lower or higher the perplexity is, in percent, seed against seed."""
    both = sorted(set(by_seed) & set(control))
    if not both:
        return ""
    ratios = [100 * math.expm1(by_seed[seed]["scores"]["loss"] - control[seed]["scores"]["loss"]) for seed in both]
    return _spread(ratios, 1, sign="+")


def _spread(values: Sequence[float], digits: int, *, sign: str = "", shows: bool = True) -> str:
    """The mean, and the standard deviation where there is one."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 or not shows else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _speed(by_seed: BySeed, machine: str) -> str:
    """On one kind of machine alone: speeds of several are not compared."""
    speeds = [line["tokens_per_cpu_second"] for line in by_seed.values() if _machine(line) == machine]
    return f"{statistics.mean(speeds):,.0f}" if speeds else ""


def _first(by_seed: BySeed) -> Line:
    return next(iter(by_seed.values()))


def _edge(variant: str, by_seed: BySeed) -> str:
    """Marks a rate at the edge of its sweep: a better one may lie beyond."""
    line = _first(by_seed)
    cell = Cell(experiment=line["cell"].split("/")[0], variant=variant, seed=next(iter(by_seed)))
    rates = [each.rate or 0.0 for each in sweep_of(cell)]
    edges = [scaled(rate, cell) for rate in (min(rates), max(rates))] if rates else []
    return "*" if any(math.isclose(line["learning_rate"], edge) for edge in edges) else ""
