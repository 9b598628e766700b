"""cottention data: turns text into corpora on disk, ready for training.

cottention data build bert wiki.jsonl.gz books/ --output-dir corpora/sentences
cottention data tokenize bert corpora/sentences --tokenizer bert-base-cased --output-dir corpora/pairs
"""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser

_SOURCES = (
    "files (.txt, .jsonl, .parquet; text also .gz, .zst), folders, patterns, sotu, or datasets of the Hugging Face "
    "Hub: wikipedia, bookcorpus, pile, OWNER/NAME[:CONFIG][@REVISION]"
)
_TRAIN = "train"


def build_parser() -> ArgumentParser:
    """Make the parser: build and tokenize, each for a BERT and for a GPT."""
    parser = new_parser("data", "Turn text into corpora on disk: memory-mapped shards with a manifest, resumable.")
    build = new_parser("data build", "Read text, clean it, and write it as a corpus.")
    tokenize = new_parser("data tokenize", "Turn text into tokens and write them as a corpus.")
    steps = parser.add_subcommands(dest="step")
    steps.add_subcommand("build", build, help="text to a clean corpus")
    steps.add_subcommand("tokenize", tokenize, help="a corpus to tokens")
    models = build.add_subcommands(dest="model")
    models.add_subcommand("bert", _build_bert(), help="sentences by document")
    models.add_subcommand("gpt", _build_gpt(), help="documents")
    models = tokenize.add_subcommands(dest="model")
    models.add_subcommand("bert", _tokenize_bert(), help="pairs of neighbouring segments")
    models.add_subcommand("gpt", _tokenize_gpt(), help="tokens with the ends of documents")
    return parser


def run(args: Namespace) -> None:
    """Do one step and print the report."""
    step = args[args.step]
    work = {
        ("build", "bert"): _run_build_bert,
        ("build", "gpt"): _run_build_gpt,
        ("tokenize", "bert"): _run_tokenize_bert,
        ("tokenize", "gpt"): _run_tokenize_gpt,
    }[args.step, step.model]
    chosen = step[step.model]
    from cottention.data.shards import check_corpus_directory

    check_corpus_directory(chosen.output_dir)  # before text is read and hashed
    report = work(chosen)
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report.summary())


def _build_bert() -> ArgumentParser:
    parser = new_parser(
        "data build bert",
        "Split documents into sentences. Headings, lists and sentences without a letter are left out, and counted. An "
        "interrupted build goes on when the same command is given again.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCES)
    _add_reading(parser)
    parser.add_argument(
        "--language", default="en", help="code of the text's language (en, de, ...), for the sentence splitter"
    )
    parser.add_argument("--min-sentences", type=int, default=2, help="documents with fewer are left out")
    _add_num_proc(parser)
    _add_output(parser)
    return parser


def _build_gpt() -> ArgumentParser:
    parser = new_parser(
        "data build gpt",
        "Write documents as they are, without those that are empty or very long. An interrupted build goes on when the "
        "same command is given again.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCES)
    _add_reading(parser)
    _add_document_limit(parser)
    _add_output(parser)
    return parser


def _tokenize_bert() -> ArgumentParser:
    parser = new_parser(
        "data tokenize bert",
        "Turn sentences into pairs of neighbouring segments, without special tokens; the collator adds them, and makes "
        "pairs of strangers.",
    )
    parser.add_argument("corpus", metavar="DIR", help="what `cottention data build bert` wrote")
    parser.add_argument("--tokenizer", required=True, help="folder, tokenizer.json, or a name on the Hub")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a pair, with [CLS] and two [SEP]")
    parser.add_argument(
        "--segments",
        default="filled",
        choices=["filled", "sentence"],
        help="filled: whole sentences up to the length; sentence: one on each side, as published",
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths and boundaries")
    _add_num_proc(parser)
    _add_output(parser)
    return parser


def _tokenize_gpt() -> ArgumentParser:
    parser = new_parser(
        "data tokenize gpt",
        "Turn documents into tokens, from which training cuts windows of any length. From a source that is no corpus, "
        "text is read, filtered and tokenised in one step.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help=f"what `cottention data build gpt` wrote; or {_SOURCES}"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help=f"folder, tokenizer.json, a name on the Hub, or {_TRAIN}: byte-level BPE, trained on the text",
    )
    parser.add_argument("--vocab-size", type=int, default=32768, help=f"with --tokenizer {_TRAIN}")
    _add_reading(parser)
    _add_document_limit(parser)
    _add_num_proc(parser)
    _add_output(parser)
    return parser


def _add_reading(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--rows",
        default="documents",
        choices=["documents", "sentences"],
        help="what a row (a line of .txt) is; sentences, as in BookCorpus, are joined in order",
    )
    parser.add_argument(
        "--documents-by",
        default="file",
        metavar="file|blank|column:NAME|rows:N",
        help="with --rows sentences: what tells documents apart",
    )
    parser.add_argument(
        "--split-by",
        default="document",
        choices=["document", "paragraph", "line"],
        help="with --rows documents: what is a document: a .txt file (or a row), a paragraph, a line",
    )
    parser.add_argument("--text-column", default="text", help="column with the text in .jsonl, .parquet and on the Hub")
    parser.add_argument("--hub-split", default="train", help="split of datasets on the Hub")
    parser.add_argument(
        "--skip-malformed",
        action="store_true",
        help="leave out lines and rows of files that are not UTF-8 or not JSON, and count them by reason; without it "
        "the first one ends the build",
    )


def _add_document_limit(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-document-chars", type=int, default=500000, help="longer documents are left out; 0 keeps all"
    )


def _add_num_proc(parser: ArgumentParser) -> None:
    parser.add_argument("--num-proc", type=int, help="processes (default: all cores, or one for little text)")


def _add_output(parser: ArgumentParser) -> None:
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="corpus to write, or to go on with")
    parser.add_argument("--overwrite", action="store_true", help="remove the corpus that is there first")
    parser.add_argument("--shard-size-mb", type=int, default=128, help="size of a shard file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _output(chosen: Namespace) -> dict:
    from cottention.errors import SettingsError

    if chosen.shard_size_mb < 1:
        raise SettingsError(f"shard_size_mb must be at least 1; got {chosen.shard_size_mb}")
    return {"overwrite": chosen.overwrite, "shard_bytes": chosen.shard_size_mb << 20}


def _reading(chosen: Namespace):
    from cottention.data.sources import ReadSettings

    names = ("rows", "documents_by", "split_by", "text_column", "hub_split", "skip_malformed")
    return ReadSettings(**{name: chosen[name] for name in names})


def _run_build_bert(chosen: Namespace):
    from cottention.data.building import build_sentences

    return build_sentences(
        chosen.sources,
        chosen.output_dir,
        reading=_reading(chosen),
        language=chosen.language,
        min_sentences=chosen.min_sentences,
        num_proc=chosen.num_proc,
        **_output(chosen),
    )


def _run_build_gpt(chosen: Namespace):
    from cottention.data.building import build_documents

    return build_documents(
        chosen.sources,
        chosen.output_dir,
        reading=_reading(chosen),
        max_document_chars=chosen.max_document_chars or None,
        **_output(chosen),
    )


def _run_tokenize_bert(chosen: Namespace):
    from cottention.data import load_tokenizer
    from cottention.data.building import tokenize_pairs

    return tokenize_pairs(
        chosen.corpus,
        chosen.output_dir,
        load_tokenizer(chosen.tokenizer),
        max_length=chosen.max_length,
        segments=chosen.segments,
        seed=chosen.seed,
        num_proc=chosen.num_proc,
        **_output(chosen),
    )


def _run_tokenize_gpt(chosen: Namespace):
    from cottention.data import load_tokenizer
    from cottention.data.building import tokenize_text

    return tokenize_text(
        chosen.sources,
        chosen.output_dir,
        None if chosen.tokenizer == _TRAIN else load_tokenizer(chosen.tokenizer),
        vocab_size=chosen.vocab_size,
        reading=_reading(chosen),
        max_document_chars=chosen.max_document_chars or None,
        num_proc=chosen.num_proc,
        **_output(chosen),
    )
