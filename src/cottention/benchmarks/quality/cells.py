"""What the study runs: sizes, parts of a block, experiments, and the cells that they spread into.

A variant is written as its parts: "cosine+conv+decay" is cosine attention with a short convolution and a forget gate.
An experiment is a row of `EXPERIMENTS`; its cells differ in variant, seed and learning rate alone:

    lm-1m/cosine+conv/rate-0.004    one of the sweep, scored on the text that chooses
    lm-1m/cosine+conv/seed-0        trained at the rate that the sweep chose, scored on the text that is reported

    for cell in all_cells(): print(cell.name)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from cottention.errors import SettingsError, did_you_mean

SWEEP_SEED = 1000
"""Of weights and of the order of the data in a sweep; no scored cell has it."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a model; the feed-forward part is that of the plainest variant, see `models.matched_config`."""

    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    tied: bool = False
    """Whether embedding and head share a matrix, which else would be most of a small model."""


SIZES = {
    "0.2m": Size(n_embd=64, n_layer=2, n_head=2, n_inner=256, tied=True),
    "1m": Size(n_embd=128, n_layer=4, n_head=2, n_inner=512, tied=True),
    "3m": Size(n_embd=192, n_layer=4, n_head=4, n_inner=768),  # of quickstart_gpt_published
    "10m": Size(n_embd=320, n_layer=6, n_head=5, n_inner=1280),
    "125m": Size(n_embd=768, n_layer=12, n_head=12, n_inner=3072, tied=True),
    # For tasks that are made: K = V, so that the state of a layer is n_embd x K numbers at equal parameters.
    "k16": Size(n_embd=64, n_layer=2, n_head=4, n_inner=128, tied=True),
    "k32": Size(n_embd=64, n_layer=2, n_head=2, n_inner=128, tied=True),
    "k64": Size(n_embd=64, n_layer=2, n_head=1, n_inner=128, tied=True),
    "k128": Size(n_embd=128, n_layer=2, n_head=1, n_inner=256, tied=True),
    "one-layer": Size(n_embd=64, n_layer=1, n_head=1, n_inner=128, tied=True),
    "tiny": Size(n_embd=32, n_layer=2, n_head=2, n_inner=64, tied=True),
}

PARTS: dict[str, dict[str, Any]] = {
    "cosine": {"attention_type": "cosine"},
    "softmax": {"attention_type": "softmax"},
    "conv": {"short_conv": 4},
    "norm": {"output_norm": True},
    "gate": {"output_gate": "sigmoid"},
    "silugate": {"output_gate": "silu"},
    "decay": {"decay": "data"},
    "learned": {"decay": "learned"},
    "erase": {"erase": True},
    "perquery": {"divisor": "query"},
    "nodiv": {"divisor": "none"},
    # Rotary turns the whole head unless one of these is there.
    "quarter": {"rotary_share": 0.25},
    "nope": {"rotary_share": 0.0},
    # One layer of softmax attention in four, the last of each four.
    "hybrid": {"softmax_every": 4},
}
"""What the parts of a variant's name set: fields of CottentionGPTConfig, and two that `models.py` turns into such."""

PLUS = "cosine+conv+decay+erase+nodiv+norm+silugate"
"""The recommended block."""
SOFTMAX_PLUS = "softmax+conv+norm+silugate"
"""Softmax attention with the same additions."""
HYBRID = f"{PLUS}+hybrid"

_ALONE = tuple(f"cosine+{part}" for part in ("conv", "decay", "erase+nodiv", "norm", "silugate", "perquery", "nodiv"))
_LADDER = (
    "cosine",
    "softmax",
    SOFTMAX_PLUS,
    PLUS,
    "softmax+conv",
    "cosine+conv",
    "cosine+conv+decay",
    "cosine+conv+erase+nodiv",
    "cosine+conv+decay+erase+nodiv",
)
_BUT_ONE = tuple(PLUS.replace(f"+{part}", "") for part in ("conv", "decay", "erase", "norm", "silugate"))
_SIGMOID = tuple(each.replace("silugate", "gate") for each in (PLUS, SOFTMAX_PLUS))
_DIVISORS = tuple(PLUS.replace("+nodiv", part) for part in ("", "+perquery"))
_TURNED = (f"{PLUS}+quarter", f"{PLUS}+nope")
_ROTARY = (*_TURNED, "cosine+conv+erase+nodiv+nope", "softmax+conv+nope")
_ERASED = "cosine+conv+erase+nodiv+norm"
_RECALL = (
    "cosine",
    "softmax",
    "softmax+conv",
    "cosine+conv",
    "cosine+conv+norm",
    "cosine+conv+nodiv+norm",
    "cosine+conv+decay+norm",
    "cosine+conv+erase+nodiv",
    _ERASED,
    f"{_ERASED}+nope",
    f"{_ERASED}+hybrid",
    PLUS,
)


ASKED = {"mqar": "pairs", "stacked-mqar": "pairs", "copying": "symbols", "permutations": "tokens"}
"""What the tests of a made task differ in."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Cells that share a task, a size and a schedule."""

    task: str
    """A name in `tasks.TASKS`."""
    size: str
    """A name in `SIZES`."""
    variants: tuple[str, ...]
    """In the order in which they are run."""
    steps: int
    batch_size: int
    """Rows of a step."""
    length: int
    """Tokens of a row."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = ()
    """Learning rates of the sweep; none: those that `rates_of` chose, times the ratio of the widths."""
    rate_steps: int = 0
    """Steps of a cell of the sweep."""
    rates_of: tuple[str, ...] = ()
    """The experiments whose sweeps are meant; none: this one."""
    beside: str | None = None
    """The experiment of the same schedule that has the controls; None: this one."""
    rows_at_once: int | None = None
    """Rows of one pass, where a step is more than the memory holds; their gradients are added up."""
    precision: str = "float32"
    """What is multiplied in while training: float32, or bfloat16 by autocast. Scores are of float32 always."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the task is told."""
    unattended: bool = True
    """Whether `run` without a pattern runs it."""


_RATES = (2e-3, 4e-3, 8e-3)
_SMALL_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
_TEXT = {"task": "text", "length": 256, "batch_size": 8, "steps": 500, "precision": "bfloat16"}
_MADE = {"batch_size": 64, "steps": 600, "rates_of": ("mqar",)}

EXPERIMENTS = {
    # Text in a minute a cell: what is worth the time at the sizes below; rotary and length; every option by itself.
    "lm-0.2m": Experiment(
        task="text",
        size="0.2m",
        variants=("cosine", "softmax", SOFTMAX_PLUS, PLUS, *_TURNED, *_ALONE, *_BUT_ONE),
        length=128,
        batch_size=8,
        steps=1000,
        rates=(4e-3, 8e-3, 16e-3),
        rate_steps=200,
        settings={"vocab_size": 1024},
    ),
    # Text: every option, at the scale of the quickstart (1 M tokens).
    "lm-1m": Experiment(
        size="1m",
        variants=(*_LADDER, HYBRID),
        rates=_RATES,
        rate_steps=150,
        **_TEXT,
    ),
    "lm-3m": Experiment(size="3m", variants=(*_LADDER, HYBRID), rates_of=("lm-1m",), **_TEXT),
    # Each option by itself, and the block without each; the places of the divisor.
    "options-1m": Experiment(
        size="1m",
        beside="lm-1m",
        variants=(*_SIGMOID, *_BUT_ONE, *_ALONE, *_DIVISORS),
        rates=_RATES,
        rate_steps=150,
        **_TEXT,
    ),
    # Rotary on a quarter and on none of each head, beside the whole in "lm-1m".
    "rotary-1m": Experiment(size="1m", beside="lm-1m", variants=_ROTARY, rates=_RATES, rate_steps=150, **_TEXT),
    "lm-10m": Experiment(
        **{**_TEXT, "steps": 2000},
        size="10m",
        variants=("cosine", "softmax", SOFTMAX_PLUS, PLUS, HYBRID),
        rates_of=("lm-1m",),
        seeds=(0, 1),
    ),
    # The same text read on and on, the state handed from window to window.
    "carried-1m": Experiment(
        size="1m",
        beside="lm-1m",
        variants=("cosine", "cosine+conv+decay", "cosine+conv+erase+nodiv+nope", PLUS, f"{PLUS}+nope"),
        rates_of=("lm-1m", "rotary-1m"),
        settings={"carried": True},
        **_TEXT,
    ),
    # Recall: 2 layers, state 64 x 64 a layer; tested on other numbers of pairs.
    "mqar": Experiment(
        task="mqar",
        size="k64",
        variants=_RECALL,
        length=64,
        rates=_SMALL_RATES,
        rate_steps=300,
        settings={"pairs": 8, "test_pairs": (4, 8, 12, 16)},
        **{**_MADE, "rates_of": ()},
    ),
    # Trained with as many pairs as are asked.
    "mqar-16": Experiment(
        task="mqar",
        size="k64",
        variants=_RECALL,
        length=64,
        settings={"pairs": 16, "test_pairs": (4, 8, 12, 16)},
        **_MADE,
    ),
    "mqar-32": Experiment(
        task="mqar",
        size="k64",
        variants=_RECALL,
        length=128,
        settings={"pairs": 32, "test_pairs": (8, 16, 32)},
        **{**_MADE, "steps": 1000},
    ),
    **{
        f"mqar-{size}": Experiment(
            task="mqar",
            size=size,
            variants=("softmax+conv", "cosine+conv+norm", _ERASED, PLUS),
            length=64,
            settings={"pairs": 8, "test_pairs": (4, 8, 12, 16)},
            **_MADE,
        )
        for size in ("k16", "k32", "k128")
    },
    "mqar-64": Experiment(
        task="mqar",
        size="k128",
        variants=("softmax+conv", "cosine+conv+norm", _ERASED, PLUS),
        length=512,
        settings={"pairs": 64, "test_pairs": (4, 16, 64)},
        **{**_MADE, "batch_size": 16, "steps": 1500},
    ),
    # Keys with their values in one token: what the state holds, without what a convolution does for pairing.
    "stacked": Experiment(
        task="stacked-mqar",
        size="one-layer",
        variants=("softmax", "cosine", "cosine+norm", "cosine+erase+nodiv", "cosine+erase+nodiv+norm"),
        length=64,
        rates=_SMALL_RATES,
        rate_steps=300,
        settings={"pairs": 16, "test_pairs": (4, 8, 16, 32)},
        **{**_MADE, "rates_of": ()},
    ),
    "copying": Experiment(
        task="copying",
        size="k64",
        variants=_RECALL,
        length=96,
        settings={"symbols": 16},
        **_MADE,
    ),
    "parity": Experiment(
        task="permutations",
        size="k64",
        variants=_RECALL,
        length=32,
        settings={"elements": 2, "test_lengths": (32, 64, 128)},
        **_MADE,
    ),
    "permutations": Experiment(
        task="permutations",
        size="k64",
        variants=_RECALL,
        length=32,
        settings={"elements": 3, "test_lengths": (32, 64, 128)},
        **_MADE,
    ),
    # A day of one GPU: 2.5e9 tokens, rows of 1,024 tokens. Asked for by name, with --device cuda and --texts.
    "gpu-day": Experiment(
        task="text",
        size="125m",
        variants=("softmax", SOFTMAX_PLUS, PLUS, HYBRID, "cosine"),
        length=1024,
        batch_size=256,
        steps=9537,
        rows_at_once=32,
        precision="bfloat16",
        seeds=(0,),
        rates_of=("lm-1m",),
        settings={"vocab_size": 32768},
        unattended=False,
    ),
    # Some minutes for all of it: what the slow test repeats.
    "small": Experiment(
        task="text",
        size="tiny",
        variants=("cosine", "softmax", PLUS),
        length=64,
        batch_size=8,
        steps=400,
        rates=(4e-3, 8e-3, 16e-3),
        rate_steps=100,
        seeds=(0, 1),
        settings={"vocab_size": 1024, "num_scored": 8192},
        unattended=False,
    ),
    "small-mqar": Experiment(
        task="mqar",
        size="tiny",
        variants=("softmax+conv", "cosine+conv+norm", "cosine+conv+erase+nodiv+norm"),
        length=32,
        batch_size=32,
        steps=60,
        rates=_SMALL_RATES,
        rate_steps=30,
        seeds=(0, 1),
        settings={"pairs": 4, "test_pairs": (2, 4), "vocab_size": 96},
        unattended=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model to train and to score."""

    experiment: str
    variant: str
    seed: int
    rate: float | None = None
    """Learning rate of a cell of the sweep; None: what the sweep chose."""

    @property
    def name(self) -> str:
        """Unique, and how it is asked for."""
        last = f"seed-{self.seed}" if self.rate is None else f"rate-{self.rate:g}"
        return f"{self.experiment}/{self.variant}/{last}"

    @property
    def chooses(self) -> bool:
        """Whether it belongs to a sweep: shorter, and scored on what is there to choose by."""
        return self.rate is not None

    @property
    def plan(self) -> Experiment:
        """Its row of the table."""
        return EXPERIMENTS[self.experiment]

    @property
    def steps(self) -> int:
        """Steps that it is trained."""
        return self.plan.rate_steps if self.chooses else self.plan.steps

    @property
    def rates_of(self) -> tuple[str, ...]:
        """The experiments whose sweeps may say its rate."""
        return self.plan.rates_of or (self.experiment,)

    def settings(self) -> dict[str, Any]:
        """All that decides its numbers, as plain data: a line of other settings is not this cell's."""
        plan = self.plan
        size = SIZES[plan.size]
        return {
            "task": plan.task,
            "variant": self.variant,
            "size": {name: getattr(size, name) for name in ("n_embd", "n_layer", "n_head", "n_inner", "tied")},
            "steps": self.steps,
            "batch_size": plan.batch_size,
            "length": plan.length,
            "precision": plan.precision,
            "seed": self.seed,
            "rate": self.rate,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in plan.settings.items()},
        }


def all_cells(experiment: str | None = None) -> Iterator[Cell]:
    """Every cell, or those of one experiment, in the order in which they are run: sweep, then seed by seed."""
    for name, plan in EXPERIMENTS.items():
        if experiment is not None and name != experiment:
            continue
        for variant in plan.variants:
            for rate in plan.rates:
                yield Cell(experiment=name, variant=variant, seed=SWEEP_SEED, rate=rate)
        for seed in plan.seeds:
            for variant in plan.variants:
                yield Cell(experiment=name, variant=variant, seed=seed)


def sweep_of(cell: Cell) -> list[Cell]:
    """The cells that decide the learning rate of a cell; none where no sweep has its variant."""
    for experiment in cell.rates_of:
        swept = [each for each in all_cells(experiment) if each.chooses and each.variant == cell.variant]
        if swept:
            return swept
    return []


def cells_like(patterns: list[str]) -> list[Cell]:
    """The cells whose names fit one of the patterns (`*`, `?`); without patterns all that run unattended.

    Raises:
        SettingsError: a pattern fits no cell.
    """
    cells = list(all_cells())
    if not patterns:
        return [cell for cell in cells if cell.plan.unattended]
    chosen: dict[str, Cell] = {}
    for pattern in patterns:
        fitting = {cell.name: cell for cell in cells if fnmatchcase(cell.name, pattern)}
        if not fitting:
            raise SettingsError(f"no cell is named {pattern!r}{did_you_mean(pattern, [cell.name for cell in cells])}")
        chosen |= fitting
    return list(chosen.values())


def options_of(variant: str) -> dict[str, Any]:
    """What the parts of a variant's name set together.

    Raises:
        SettingsError: it has a part that does not exist.
    """
    options: dict[str, Any] = {}
    for part in variant.split("+"):
        if part not in PARTS:
            raise SettingsError(f"a variant is made of {', '.join(PARTS)}; got {part!r}{did_you_mean(part, PARTS)}")
        options |= PARTS[part]
    return options
