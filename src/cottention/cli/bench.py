"""cottention bench: measures speed and memory, beside the peers and the machine's own limits.

cottention bench attention --lengths 4096,16384 --backward --output-dir runs/bench
cottention bench decode --positions 100,100000 --batch-sizes 1,8
cottention bench model --batch-size 32
cottention bench figures --quick
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cottention.benchmarks.settings import (
    ARCHS,
    DEVICES,
    DTYPES,
    FULL_GRID,
    PAIR_LENGTHS,
    PASSES,
    QUICK_FIGURES,
    AttentionSettings,
    DecodeSettings,
    FigureSettings,
    ModelSettings,
)
from cottention.cli.main import new_parser
from cottention.errors import SettingsError

_DESCRIPTION = """Measure every implementation of cosine attention and every peer that is installed, interleaved in one
run: time, peak memory, and the share of what the machine can do. Values are checked first. The defaults take about
two minutes on two cores."""

_DECODE_DESCRIPTION = """Measure one decoded token at several positions of a text: the native step, the same in plain
torch operators, and softmax with its cache of keys and values. Values are checked first. Takes seconds."""

_MODEL_DESCRIPTION = """Measure whole models in one process: cosine, its softmax twin and transformers' own, forward and
a whole training step, after a check that the twin has the loss and gradients of transformers' model. For a BERT also a
step on sentence pairs, packed end to end and padded to the longest. Takes some minutes."""

_FIGURES_DESCRIPTION = """Measure one attention layer over lengths, widths and numbers of heads, and a decoded token, as
the published figures do: cosine attention, softmax with its T x T scores, softmax in one fused pass. One JSON, and
pictures of it as PNG and SVG, with the published readings. Takes half an hour on two cores; --quick five minutes."""

_CLOCK_HELP = "time of the processor, for a machine with other work; needs OMP_NUM_THREADS=1"

_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports

_DEFAULTS = AttentionSettings()
_DECODE_DEFAULTS = DecodeSettings()
_MODEL_DEFAULTS = ModelSettings()


def build_parser() -> ArgumentParser:
    """Make the parser, with one subcommand for each benchmark."""
    parser = new_parser("bench", "Measure time and memory against softmax attention.")
    subcommands = parser.add_subcommands(dest="what", required=True)
    subcommands.add_subcommand("attention", _attention_parser(), help="the operation alone")
    subcommands.add_subcommand("decode", _decode_parser(), help="one token, far into a text")
    subcommands.add_subcommand("model", _model_parser(), help="whole models, forward and a step of training")
    subcommands.add_subcommand("figures", _figures_parser(), help="the published pictures, redrawn")
    return parser


def run(args: Namespace) -> int:
    """Measure, print, write."""
    given = args[args.what]
    runner, settings = {
        "attention": (_run_attention, settings_from),
        "decode": (_run_decode, decode_settings_from),
        "model": (_run_model, model_settings_from),
        "figures": (_run_figures, figure_settings_from),
    }[args.what]
    chosen = settings(given)  # before seconds of torch
    from cottention.benchmarks.journal import report_directory

    with report_directory(Path(given.output_dir)):
        return runner(given, chosen)


def _run_attention(given: Namespace, settings: AttentionSettings) -> int:
    from cottention.benchmarks.attention import benchmark_attention, open_journal, write_report
    from cottention.benchmarks.table import as_text

    directory = Path(given.output_dir)
    with open_journal(settings, directory) as journal:
        report = benchmark_attention(settings, journal)
        paths = write_report(report, directory)
        if not report.interrupted:
            journal.finish()
    _show(given, report.to_dict(), as_text(report), paths)
    return _INTERRUPTED if report.interrupted else 0


def _run_decode(given: Namespace, settings: DecodeSettings) -> int:
    from cottention.benchmarks.decode import benchmark_decode, decode_as_text, write_decode_report

    report = benchmark_decode(settings)
    paths = write_decode_report(report, Path(given.output_dir))
    _show(given, report.to_dict(), decode_as_text(report), paths)
    return 0


def _run_model(given: Namespace, settings: ModelSettings) -> int:
    from cottention.benchmarks.model import benchmark_model, model_as_text, write_model_report

    report = benchmark_model(settings)
    paths = write_model_report(report, Path(given.output_dir))
    _show(given, report.to_dict(), model_as_text(report), paths)
    return 0


def _run_figures(given: Namespace, settings: FigureSettings) -> int:
    from cottention.benchmarks.attention import open_journal
    from cottention.benchmarks.figures import benchmark_figures, figures_as_text, read_figures, write_figures_report

    directory = Path(given.output_dir)
    if given["from"] is not None:
        data = read_figures(Path(given["from"]))
        paths = write_figures_report(data, directory)
    else:
        with open_journal(settings, directory) as journal:
            data = benchmark_figures(settings, journal)
            paths = write_figures_report(data, directory)
            if data["decode"] is not None:
                journal.finish()
    _show(given, data, figures_as_text(data), paths)
    return _INTERRUPTED if data["decode"] is None else 0


def _show(given: Namespace, data: dict[str, object], text: str, paths: list[Path]) -> None:
    if given.json:
        print(json.dumps(data))
    else:
        print(text)
        print("\nwritten: " + "\n         ".join(map(str, paths)))


def _attention_parser() -> ArgumentParser:
    parser = new_parser("bench attention", _DESCRIPTION)
    parser.add_argument("--device", choices=DEVICES, default=_DEFAULTS.device, help="where to run")
    parser.add_argument("--full", action="store_true", help="T 128 to 65536, all sizes and dtypes; causal unless told")
    parser.add_argument("--lengths", metavar="T,T", help="tokens of a sequence (default: 128,512,2048,8192)")
    parser.add_argument("--head-dims", metavar="K,K", help="K = V, numbers per head (default: 64)")
    parser.add_argument("--batch-heads", metavar="H,BxH", help="heads, or batch size x heads: 8,8x12 (default: 8)")
    parser.add_argument("--dtypes", metavar="D,D", help=f"of {', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--causal", action="store_true", help="causal attention (the default)")
    parser.add_argument("--bidirectional", action="store_true", help="bidirectional; with --causal both")
    parser.add_argument("--forward", action="store_true", help="forward alone (default: both)")
    parser.add_argument("--backward", action="store_true", help="forward and backward together alone (default: both)")
    parser.add_argument(
        "--implementations",
        metavar="N,N",
        help="of this package: names, or none (default: all); with gates: native+decay, +erase or +decay+erase",
    )
    parser.add_argument("--peers", metavar="N,N", help="names, or none (default: all that are installed)")
    parser.add_argument("--repeats", type=int, help=f"samples; 0: memory alone (default: {_DEFAULTS.repeats}; full: 3)")
    parser.add_argument(
        "--time-limit-s",
        type=float,
        help=f"seconds for each point; longer is skipped (default: {_DEFAULTS.time_limit_s:g}; full: 0.5)",
    )
    parser.add_argument(
        "--memory-limit-gib", type=float, help="for one call and its inputs (default: half of the free)"
    )
    parser.add_argument("--output-dir", default="runs/bench-attention", help="where JSON and figures go")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    return parser


def _decode_parser() -> ArgumentParser:
    parser = new_parser("bench decode", _DECODE_DESCRIPTION)
    default = _DECODE_DEFAULTS
    parser.add_argument("--positions", metavar="T,T", help="tokens before it (default: 100,1000,10000,100000)")
    parser.add_argument("--batch-sizes", metavar="B,B", help="sequences decoded together (default: 1)")
    parser.add_argument("--num-heads", type=int, default=default.num_heads, help="heads")
    parser.add_argument("--head-dim", type=int, default=default.head_dim, help="K = V, numbers per head")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of q, k and v")
    parser.add_argument("--implementations", metavar="N,N", help="of native, in-place, torch, sdpa (default: all)")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="samples of each point")
    parser.add_argument("--time-limit-s", type=float, default=default.time_limit_s, help="seconds for each point")
    parser.add_argument("--output-dir", default="runs/bench-decode", help="where JSON and figure go")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    return parser


def _model_parser() -> ArgumentParser:
    parser = new_parser("bench model", _MODEL_DESCRIPTION)
    default = _MODEL_DEFAULTS
    parser.add_argument("--device", choices=DEVICES, default=default.device, help="where to run")
    parser.add_argument("--arch", choices=ARCHS, default=default.arch, help="kind of model")
    parser.add_argument("--lengths", metavar="T,T", help="rows of whole models, tokens (default: 128,512)")
    parser.add_argument(
        "--mixes", metavar="N,N", help=f"lengths of pairs: of {', '.join(PAIR_LENGTHS)} (default: both)"
    )
    parser.add_argument("--attention-type", default=default.attention_type, help="cosine or softmax")
    parser.add_argument("--dtype", choices=DTYPES[:2], default=default.dtype, help="what is computed in")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="sentence pairs of a step")
    parser.add_argument("--hidden-size", type=int, default=default.hidden_size, help="width of the model")
    parser.add_argument("--num-layers", type=int, default=default.num_layers, help="its layers")
    parser.add_argument("--num-heads", type=int, default=default.num_heads, help="its attention heads")
    parser.add_argument("--vocab-size", type=int, default=default.vocab_size, help="words it knows")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="timed steps of each")
    parser.add_argument("--time-limit-s", type=float, default=default.time_limit_s, help="seconds for each")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, lengths and tokens")
    parser.add_argument("--processor-time", action="store_true", help=_CLOCK_HELP)
    parser.add_argument("--output-dir", default="runs/bench-model", help="where the JSON goes")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    return parser


def _figures_parser() -> ArgumentParser:
    parser = new_parser("bench figures", _FIGURES_DESCRIPTION)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    parser.add_argument("--processor-time", action="store_true", help=_CLOCK_HELP)
    parser.add_argument("--from", metavar="FILE", help="draw the figures.json of an earlier run; measures nothing")
    parser.add_argument("--output-dir", default="runs/bench-figures", help="where JSON and pictures go")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the tables")
    return parser


def figure_settings_from(given: Namespace) -> FigureSettings:
    """The settings that the flags of `bench figures` say."""
    return FigureSettings(**(QUICK_FIGURES if given.quick else {}), processor_time=given.processor_time)


def model_settings_from(given: Namespace) -> ModelSettings:
    """The settings that the flags of `bench model` say.

    Raises:
        SettingsError: a value makes no sense.
    """
    chosen: dict = {field.name: given[field.name] for field in dataclasses.fields(ModelSettings)}
    mixes, lengths = chosen.pop("mixes"), chosen.pop("lengths")
    if mixes is not None:
        chosen["mixes"] = _words(mixes)
    if lengths is not None:
        chosen["lengths"] = tuple(_whole_number("lengths", word) for word in _words(lengths))
    return ModelSettings(**chosen)


def decode_settings_from(given: Namespace) -> DecodeSettings:
    """The settings that the flags of `bench decode` say.

    Raises:
        SettingsError: a list holds something that is not of its kind.
    """
    chosen: dict = {name: given[name] for name in ("num_heads", "head_dim", "dtype", "repeats", "time_limit_s")}
    for name in ("positions", "batch_sizes"):
        if given[name] is not None:
            chosen[name] = tuple(_whole_number(name, word) for word in _words(given[name]))
    if given.implementations is not None:
        chosen["implementations"] = _words(given.implementations)
    return DecodeSettings(**chosen)


def settings_from(given: Namespace) -> AttentionSettings:
    """The settings that the flags of `bench attention` say.

    Raises:
        SettingsError: a list holds something that is not of its kind.
    """
    chosen: dict = dict(FULL_GRID) if given.full else {}
    for name in ("lengths", "head_dims"):
        if given[name] is not None:
            chosen[name] = tuple(_whole_number(name, word) for word in _words(given[name]))
    if given.batch_heads is not None:
        chosen["batch_heads"] = tuple(_batch_and_heads(word) for word in _words(given.batch_heads))
    if given.dtypes is not None:
        chosen["dtypes"] = _words(given.dtypes)
    for name in ("implementations", "peers"):
        if given[name] is not None:
            chosen[name] = () if given[name] == "none" else _words(given[name])
    directions = tuple(name for name in ("causal", "bidirectional") if given[name])
    passes = tuple(name for name, flag in zip(PASSES, (given.forward, given.backward), strict=True) if flag)
    if directions:
        chosen["directions"] = directions
    if passes:
        chosen["passes"] = passes
    for name in ("repeats", "time_limit_s", "memory_limit_gib"):
        if given[name] is not None:
            chosen[name] = given[name]
    return AttentionSettings(device=given.device, **chosen)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _whole_number(name: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise SettingsError(f"--{name.replace('_', '-')} takes whole numbers, as in 128,512; got {word!r}") from None


def _batch_and_heads(word: str) -> tuple[int, int]:
    """8 is one sequence of 8 heads, 8x12 eight of 12."""
    batch, _, heads = word.rpartition("x")
    return _whole_number("batch_heads", batch or "1"), _whole_number("batch_heads", heads)
