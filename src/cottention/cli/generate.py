"""cottention generate: continues a text with a saved GPT.

cottention generate --model runs/quickstart-gpt/model --prompt "My fellow Americans"
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.logging import get_logger

if TYPE_CHECKING:
    from cottention.generation import GenerationResult

_logger = get_logger(__name__)


def build_parser() -> ArgumentParser:
    """Make the parser; the settings of the sampling are those of `generate_text`."""
    parser = new_parser(
        "generate",
        "Continue a text. A cosine model reads prompts of any length and writes as long as asked, at constant memory. "
        "The text goes to stdout while it is written, speed and memory go to stderr.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="directory of a saved GPT, or OWNER/NAME on the Hub")
    add("--prompt", metavar="TEXT", nargs="+", help="text to continue; several are continued together; '' starts anew")
    add("--prompt-file", metavar="FILE", help="read the prompt from a file; - reads stdin")
    add("--each-line", action="store_true", help="every line of the file is a prompt of its own")
    add("--max-new-tokens", type=int, default=128, help="tokens to write at most")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token, 1 samples as is")
    add("--top-k", type=int, help="sample among the k likeliest tokens")
    add("--top-p", type=float, default=0.95, help="sample among the likeliest with this probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--stop", metavar="TEXT", nargs="+", default=[], help="end before any of these texts")
    add("--seed", type=int, default=0, help="decides the samples")
    add("--batch-size", type=int, default=16, help="prompts continued together")
    add("--prefill-chunk", type=int, default=2048, help="prompt tokens read at a time")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--no-echo", action="store_true", help="print the new text only, without the prompt")
    add("--json", action="store_true", help="print one JSON object per prompt")
    return parser


def run(args: Namespace) -> None:
    """Generate, print the texts on stdout and the figures on stderr."""
    prompts = _prompts(args)
    if args.batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1; got {args.batch_size}")

    from cottention.generation import generate_text, load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(args.model, "causal-lm", device=args.device)
    streamed = _Streamed("" if args.no_echo else prompts[0]) if len(prompts) == 1 and not args.json else None
    for number, start in enumerate(range(0, len(prompts), args.batch_size)):
        try:
            result = generate_text(
                model,
                tokenizer,
                prompts[start : start + args.batch_size],
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                repetition_penalty=args.repetition_penalty,
                seed=args.seed + number,
                stop_strings=args.stop,
                stream=streamed,
                prefill_chunk=args.prefill_chunk,
            )
        except KeyboardInterrupt:
            if streamed is not None:
                streamed.end()
            raise
        if streamed is not None:
            streamed.end()
        else:
            _print_rows(result, args)
        _log_figures(result)


class _Streamed:
    """Prints the prompt and behind it each piece as it comes; nothing before the first, so a mistake prints nothing."""

    def __init__(self, prompt: str) -> None:
        self._waiting = prompt

    def __call__(self, piece: str) -> None:
        print(self._waiting + piece, end="", flush=True)
        self._waiting = ""

    def end(self) -> None:
        print(self._waiting, flush=True)


def _prompts(args: Namespace) -> list[str]:
    from cottention.cli._inputs import read_lines, read_text

    if (args.prompt is None) == (args.prompt_file is None):
        raise SettingsError("give either --prompt TEXT or --prompt-file FILE (- reads stdin)")
    if args.prompt is not None:
        if args.each_line:
            raise SettingsError("--each-line needs --prompt-file")
        return args.prompt
    return read_lines(args.prompt_file) if args.each_line else [read_text(args.prompt_file)]


def _print_rows(result: GenerationResult, args: Namespace) -> None:
    for row in result.rows:
        if args.json:
            figures = {"tokens_per_s": round(result.tokens_per_s, 1), "state_bytes": result.state_bytes}
            print(json.dumps({**asdict(row), **figures}, ensure_ascii=False), flush=True)
        else:
            print(row.text if args.no_echo else row.prompt + row.text, end="\n\n", flush=True)


def _log_figures(result: GenerationResult) -> None:
    num_read = sum(row.num_prompt_tokens for row in result.rows)
    _logger.info(
        "read %d tokens in %.2f s, wrote %d in %.2f s (%.0f tokens/s), state %s bytes",
        num_read,
        result.prefill_s,
        result.num_new_tokens,
        result.decode_s,
        result.tokens_per_s,
        f"{result.state_bytes:,}",
    )
