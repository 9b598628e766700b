"""cottention evaluate: scores a model on text that it was not trained on.

cottention evaluate perplexity --model runs/quickstart-gpt/model --data sotu:test
cottention evaluate harness --model runs/quickstart-gpt/model --tasks lambada_openai
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cottention.cli import evaluate_glue
from cottention.cli.main import new_parser

_UNITS = {
    "perplexity": "per token",
    "word_perplexity": "per word (white space)",
    "nats_per_token": "",
    "nats_per_byte": "",
    "num_tokens": "end of each document included",
    "num_bytes": "UTF-8",
    "num_words": "",
    "num_documents": "each from a fresh start",
    "context": "tokens per window",
    "stride": "tokens that a window moves on",
    "carry_state": "whether windows hand their state on",
}
_BUCKET_COLUMNS = ("num_tokens", "nats_per_token", "perplexity")


def build_parser() -> ArgumentParser:
    """Make the parser, with one subcommand for each score."""
    parser = new_parser("evaluate", "Score a model: on held-out text, or on tasks.")
    scores = parser.add_subcommands(dest="score")
    scores.add_subcommand("perplexity", _perplexity_parser(), help="how well a GPT predicts a text")
    scores.add_subcommand("glue", evaluate_glue.build_parser(), help="how well a BERT solves the tasks of GLUE")
    scores.add_subcommand("harness", _harness_parser(), help="tasks of lm-evaluation-harness, LAMBADA and others")
    return parser


def run(args: Namespace) -> None:
    """Score and print."""
    _RUN[args.score](args[args.score])


def _perplexity_parser() -> ArgumentParser:
    perplexity = new_parser(
        "evaluate perplexity",
        "Perplexity and nats per byte of a causal model on held-out text. Every token and the end of every document is "
        "scored exactly once, in windows that begin afresh, overlap (--stride) or hand on their state (--carry-state); "
        "also by position in the window or, with --carry-state, in the document.",
    )
    perplexity.add_argument("--model", required=True, metavar="DIR", help="model directory, or a name on the hub")
    perplexity.add_argument(
        "--data",
        default="sotu:validation",
        metavar="SOURCE",
        help="file (.txt, .jsonl, .parquet; .gz, .zst), folder or glob; or a split of the default corpus: "
        "sotu:validation (the default, also as sotu), sotu:test, sotu:train",
    )
    perplexity.add_argument("--context", type=int, help="tokens per window (default: the model's training window)")
    perplexity.add_argument(
        "--stride",
        type=int,
        help="tokens that a window moves on: below --context they overlap, so that each token has at least the rest of "
        "a window before it (default: the context)",
    )
    perplexity.add_argument(
        "--carry-state",
        action="store_true",
        help="cosine models: predict each token from all of its document, the state being handed on from window to "
        "window",
    )
    perplexity.add_argument(
        "--batch-size", type=int, default=8, help="windows per pass: speed and memory, not the result"
    )
    perplexity.add_argument(
        "--split-by",
        default="document",
        choices=["document", "paragraph", "line"],
        help="what is a document: a file (or row), a paragraph, a line",
    )
    perplexity.add_argument("--text-column", default="text", help="column with the text in .jsonl and .parquet")
    perplexity.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    perplexity.add_argument("--json", action="store_true", help="print the result as JSON")
    return perplexity


def _run_perplexity(chosen: Namespace) -> None:
    from cottention.data import load_corpus
    from cottention.data.corpus import DEFAULT_CORPUS
    from cottention.data.source_files import files_of
    from cottention.evaluation import evaluate_perplexity
    from cottention.generation.loading import load_model_and_tokenizer

    # All of "sotu" holds what the package's own models were trained on, which nobody wants a score of.
    data = "sotu:validation" if chosen.data == "sotu" else chosen.data
    if not data.startswith(DEFAULT_CORPUS):
        files_of(data)
    # Before the text is read: a wrong directory shall not cost that time.
    model, tokenizer = load_model_and_tokenizer(chosen.model, "causal-lm", device=chosen.device)
    corpus = load_corpus(data, split_by=chosen.split_by, text_column=chosen.text_column)
    result = evaluate_perplexity(
        model,
        tokenizer,
        corpus,
        context=model.config.n_positions if chosen.context is None else chosen.context,
        stride=chosen.stride,
        carry_state=chosen.carry_state,
        batch_size=chosen.batch_size,
        show_progress=True,
    )
    figures = result.to_dict()
    print(_json({"model": chosen.model, "data": data, **figures}) if chosen.json else _table(figures))


def _harness_parser() -> ArgumentParser:
    parser = new_parser(
        "evaluate harness",
        "Run tasks of EleutherAI's lm-evaluation-harness (pip install 'cottention[harness]'). Its own tasks fetch "
        "their data from the Hugging Face Hub; task files of a folder with local data work offline.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model directory, or a name on the hub")
    add("--tasks", required=True, metavar="NAME", nargs="+", help="tasks, groups or tags; also separated by commas")
    add("--include-path", metavar="DIR", help="folder of task files (YAML), looked at first")
    add("--num-fewshot", type=int, help="worked examples before each question (default: as the task says)")
    add("--limit", type=int, help="questions per task at most, for a first look")
    add("--context", type=int, help="tokens that a text may have (default: the model's training window)")
    add("--batch-size", type=int, default=8, help="texts per pass: speed and memory, not the result")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _run_harness(chosen: Namespace) -> None:
    from cottention.evaluation import evaluate_harness
    from cottention.generation.loading import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(chosen.model, "causal-lm", device=chosen.device)
    result = evaluate_harness(
        model,
        tokenizer,
        [task for names in chosen.tasks for task in names.split(",") if task],
        include_path=chosen.include_path,
        num_fewshot=chosen.num_fewshot,
        limit=chosen.limit,
        context=chosen.context,
        batch_size=chosen.batch_size,
    )
    figures = result.to_dict()
    print(_json({"model": chosen.model, **figures}) if chosen.json else _harness_table(figures))


def _harness_table(figures: Mapping[str, Any]) -> str:
    """Aligned lines: task, metric, score, its standard error, questions."""
    rows = [["task", "metric", "filter", "value", "stderr", "num_samples"]]
    for score in figures["scores"]:
        stderr = "" if score["stderr"] is None else _shown(score["stderr"])
        names = [score[name] for name in rows[0][:3]]
        rows.append([*names, _shown(score["value"]), stderr, _shown(score["num_samples"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = "  ".join(f"{{:{'<' if i < 3 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(aligned.format(*row) for row in rows)


def _json(figures: Mapping[str, object]) -> str:
    return json.dumps(_finite(figures), indent=2)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; what a model that diverged scores is null there."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(figures: Mapping[str, Any]) -> str:
    """Aligned lines: name, value, unit; below them a line for every bucket of positions."""
    shown = {name: _shown(figures[name]) for name in _UNITS}
    name_width, value_width = max(map(len, _UNITS)), max(map(len, shown.values()))
    lines = [f"{name:<{name_width}}  {shown[name]:>{value_width}}  {unit}".rstrip() for name, unit in _UNITS.items()]
    row = "{:<17}  {:>14}  {:>14}  {:>14}"
    lines += ["", row.format("position", *_BUCKET_COLUMNS)]
    for bucket in figures["by_position"]:
        where = f"{bucket['first']}-{bucket['last']}"
        lines.append(row.format(where, *(_shown(bucket[name]) for name in _BUCKET_COLUMNS)))
    return "\n".join(lines)


def _shown(value: float | int) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


_RUN = {"glue": evaluate_glue.run, "perplexity": _run_perplexity, "harness": _run_harness}
