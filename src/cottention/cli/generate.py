"""cottention generate: continues a text with a saved GPT.

cottention generate --model runs/quickstart-gpt/model --prompt "My fellow Americans"
cottention generate --model MODEL --prompt-file book.txt --save-state book.state --max-new-tokens 0
cottention generate --model MODEL --load-state book.state --prompt " Who" " When" --no-echo
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import DataError, SettingsError
from cottention.files import check_writable
from cottention.logging import get_logger

if TYPE_CHECKING:
    from cottention.generation import GenerationResult, ReadState

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
    add(
        "--json-lines",
        action="store_true",
        help='every line of the file is JSON: a string, or an object with a "prompt"; so is a file named .jsonl',
    )
    add("--save-state", metavar="FILE", help="write what the model knows after the prompt, to go on from it later")
    add("--load-state", metavar="FILE", help="go on from a saved state; without a prompt, right where it stands")
    add("--max-new-tokens", type=int, default=128, help="tokens to write at most; 0 with --save-state: read only")
    add("--temperature", type=float, help="0 takes the likeliest token, 1 samples as is (default: 0.8; with beams 0)")
    add("--top-k", type=int, help="sample among the k likeliest tokens")
    add("--top-p", type=float, default=0.95, help="sample among the likeliest with this probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--num-beams", type=int, default=1, help="above 1: search for the likeliest text with so many candidates")
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
    _check(args, prompts)

    from cottention.cli._inputs import text_of
    from cottention.generation import generate_text, load_model_and_tokenizer, load_state

    model, tokenizer = load_model_and_tokenizer(args.model, "causal-lm", device=args.device)
    state = None if args.load_state is None else load_state(args.load_state, model, tokenizer)
    shown = prompts
    if args.save_state is not None:
        state = _read_and_save(model, tokenizer, prompts[0], state, args)
        prompts = [""]
        if args.max_new_tokens == 0:
            return
    temperature = args.temperature
    if temperature is None:
        temperature = 0.0 if args.num_beams > 1 else 0.8
    streams = len(prompts) == 1 and args.num_beams == 1 and not args.json
    streamed = _Streamed("" if args.no_echo else shown[0]) if streams else None
    for number, start in enumerate(range(0, len(prompts), args.batch_size)):
        try:
            result = generate_text(
                model,
                tokenizer,
                prompts[start : start + args.batch_size],
                max_new_tokens=args.max_new_tokens,
                temperature=temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                repetition_penalty=args.repetition_penalty,
                num_beams=args.num_beams,
                seed=args.seed + number,
                stop_strings=[text_of(stop) for stop in args.stop],
                stream=streamed,
                prefill_chunk=args.prefill_chunk,
                state=state,
            )
        except KeyboardInterrupt:
            if streamed is not None:
                streamed.end()
            raise
        if streamed is not None:
            streamed.end()
        else:
            _print_rows(result, shown[start : start + args.batch_size], args)
        _log_figures(result)


def _check(args: Namespace, prompts: list[str]) -> None:
    if args.batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1; got {args.batch_size}")
    if args.save_state is None:
        if args.max_new_tokens == 0:
            raise SettingsError("max_new_tokens must be at least 1 (0 reads only, with --save-state); got 0")
    elif len(prompts) != 1:
        raise SettingsError(f"--save-state takes one prompt; got {len(prompts)}")
    else:
        check_writable(args.save_state, "--save-state")
    # What `generate_text` refuses too, but seconds later, behind torch and the model.
    least = {"max_new_tokens": 1, "top_k": 1, "num_beams": 1, "prefill_chunk": 1, "seed": 0}
    if args.save_state is not None:
        least["max_new_tokens"] = 0
    for name, smallest in least.items():
        if args[name] is not None and args[name] < smallest:
            raise SettingsError(f"{name} must be at least {smallest}; got {args[name]}")
    if args.temperature is not None and not args.temperature >= 0:
        raise SettingsError(f"temperature must be 0 or more; got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise SettingsError(f"top_p must be above 0 and at most 1; got {args.top_p}")


def _read_and_save(model: Any, tokenizer: Any, prompt: str, state: ReadState | None, args: Namespace) -> ReadState:
    from cottention.generation import read_text, save_state

    started = time.perf_counter()
    read = read_text(model, tokenizer, prompt, state=state, prefill_chunk=args.prefill_chunk)
    read_s = time.perf_counter() - started
    save_state(args.save_state, read, model, tokenizer)
    num_tokens = read.num_tokens - (0 if state is None else state.num_tokens)
    _logger.info(
        "read %d tokens in %.2f s (%.0f tokens/s), saved the state after %d tokens as %s, state %s bytes",
        num_tokens,
        read_s,
        num_tokens / max(read_s, 1e-9),
        read.num_tokens,
        args.save_state,
        f"{read.cache.nbytes:,}",
    )
    return read


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
    from cottention.cli._inputs import read_json_lines, read_lines, read_text, text_of

    sources = [source for source in (args.prompt, args.prompt_file) if source is not None]
    if len(sources) > 1 or (not sources and args.load_state is None):
        raise SettingsError("give either --prompt TEXT or --prompt-file FILE (- reads stdin)")
    if args.prompt_file is None:
        if args.each_line or args.json_lines:
            raise SettingsError(f"{'--each-line' if args.each_line else '--json-lines'} needs --prompt-file")
        return [""] if args.prompt is None else [text_of(prompt) for prompt in args.prompt]
    if args.each_line and args.json_lines:
        raise SettingsError("--each-line and --json-lines exclude each other")
    if args.json_lines or (args.prompt_file.endswith(".jsonl") and not args.each_line):
        return read_json_lines(args.prompt_file, "prompt")
    if args.each_line:
        return read_lines(args.prompt_file)
    text = read_text(args.prompt_file)
    if not text.strip():
        shown = "stdin" if args.prompt_file == "-" else args.prompt_file
        raise DataError(f"{shown} holds no text; --prompt '' starts a new one")
    return [text]


def _print_rows(result: GenerationResult, prompts: list[str], args: Namespace) -> None:
    for row, prompt in zip(result.rows, prompts, strict=True):
        if args.json:
            figures = {"tokens_per_s": round(result.tokens_per_s, 1), "state_bytes": result.state_bytes}
            print(json.dumps({**asdict(row), "prompt": prompt, **figures}, ensure_ascii=False), flush=True)
        else:
            print(row.text if args.no_echo else prompt + row.text, end="\n\n", flush=True)


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
