"""The page: a tab for each thing that the models can do, in gradio, which brings all that it shows.

build_page(open_models(["runs/quickstart-gpt/model"], device="auto")).launch(**LAUNCH)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from cottention.errors import CottentionError, SettingsError
from cottention.generation import Conversation, GenerationResult
from cottention.generation.counting import num_of
from cottention.playground import inside, texts
from cottention.playground.opened import OpenedModel, stream_pieces

# Fonts of the machine: the others would be fetched.
_THEME = gr.themes.Base(  # pyright: ignore[reportPrivateImportUsage]
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
LAUNCH: dict[str, Any] = {
    "share": False,
    "theme": _THEME,
    "footer_links": [],
    "max_file_size": "64mb",
    "enable_monitoring": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
}
"""How a page is served: nothing of it comes from elsewhere, nothing of it goes there."""

_ANSWERS = 120  # tokens of an answer, unless said otherwise


def build_page(models: Sequence[OpenedModel]) -> gr.Blocks:
    """Make the page; GPTs and BERTs have tabs of their own.

    Raises:
        SettingsError: there is no model, or two have one name.
    """
    names = [each.name for each in models]
    if not names or len(set(names)) < len(names):
        raise SettingsError(f"at least one model is needed, and each once; got {', '.join(names) or 'none'}")
    gpts, berts = [x for x in models if x.is_gpt], [x for x in models if not x.is_gpt]
    with gr.Blocks(analytics_enabled=False, title="cottention playground") as page:
        gr.Markdown("# cottention playground\n" + "\n".join(f"- **{x.name}**: {x.description}" for x in models))
        if gpts:
            with gr.Tab("Write"):
                _write_tab(gpts)
            with gr.Tab("Ask a book"):
                _book_tab(gpts)
            with gr.Tab("Chat"):
                _chat_tab(gpts)
        if berts:
            with gr.Tab("Fill a mask"):
                _mask_tab(berts)
            if pairs := [each for each in berts if each.has_next_sentence]:
                with gr.Tab("Next sentence"):
                    _pair_tab(pairs)
            with gr.Tab("Search"):
                _search_tab(berts)
        with gr.Tab("Look inside"):
            _inside_tab(list(models))
    return page


def _spoken(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a visitor did wrong becomes a message on the page."""

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except CottentionError as error:
            raise gr.Error(str(error), duration=10, print_exception=False) from None

    return call


def _spoken_stream(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @wraps(function)
    def call(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except CottentionError as error:
            raise gr.Error(str(error), duration=10, print_exception=False) from None

    return call


def _chooser(models: Sequence[OpenedModel], label: str = "Model") -> gr.Dropdown:
    names = [each.name for each in models]
    return gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1)


def _named(models: Sequence[OpenedModel], name: str) -> OpenedModel:
    return next(each for each in models if each.name == name)


def _sampling() -> list[Any]:
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(1, 1000, value=_ANSWERS, step=1, label="Tokens at most"),
            gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature (0: always the likeliest)"),
            gr.Slider(0.05, 1, value=0.95, step=0.05, label="Among the likeliest with this probability (top-p)"),
            gr.Slider(1, 2, value=1.0, step=0.05, label="Repetition penalty"),
            gr.Number(0, precision=0, minimum=0, label="Seed"),
        ]


def _options(length: float, temperature: float, top_p: float, penalty: float, seed: float) -> dict[str, Any]:
    return {
        "max_new_tokens": int(length),
        "temperature": float(temperature),
        "top_p": float(top_p),
        "repetition_penalty": float(penalty),
        "seed": int(seed),
    }


def _figures(result: GenerationResult, keeps_state: bool) -> str:
    row = result.rows[0]
    kept = "a state of" if keeps_state else "keys and values of"
    return (
        f"{num_of(row.num_prompt_tokens, 'token')} read in {result.prefill_s:.2f} s, {row.num_new_tokens:,} written at "
        f"{result.tokens_per_s:.0f} tokens/s; {kept} {result.state_bytes / 1024:,.0f} KiB at the end"
    )


def _streamed(opened: OpenedModel, generate: Callable[..., GenerationResult]) -> Iterator[tuple[str, str]]:
    """(text so far, figures) after every piece."""
    text = ""
    for piece in stream_pieces(opened, lambda hear: generate(stream=hear)):
        if isinstance(piece, GenerationResult):
            yield text, _figures(piece, opened.model.config.keeps_states)
        else:
            text += piece
            yield text, ""


def _write_tab(models: list[OpenedModel]) -> None:
    prompt = gr.Textbox("My fellow", label="Prompt", lines=3, elem_id="write-prompt")
    sampling = _sampling()
    with gr.Row():
        write, stop = gr.Button("Write", variant="primary", elem_id="write"), gr.Button("Stop")
    # Two models stand side by side, and write one after the other: they share the processor.
    with gr.Row():
        for number in range(min(2, len(models))):
            with gr.Column(min_width=300):
                chosen = gr.Dropdown([x.name for x in models], value=models[number].name, label="Model")
                text = gr.Textbox(label="Text", lines=12, elem_id=f"written-{number}")
                figures = gr.Markdown(elem_id=f"figures-{number}")

                @_spoken_stream
                def run(name: str, start: str, *settings: float) -> Iterator[tuple[str, str]]:
                    opened = _named(models, name)
                    talk = Conversation(opened.model, opened.tokenizer)
                    options = _options(*settings)
                    for written, said in _streamed(opened, lambda stream: talk.ask(start, stream=stream, **options)):
                        yield start + written, said

                event = gr.on([write.click], run, [chosen, prompt, *sampling], [text, figures], concurrency_limit=1)
                stop.click(None, cancels=[event])


def _book_tab(models: list[OpenedModel]) -> None:
    gr.Markdown("The text is read once; each question goes on from there, and nothing of it is remembered.")
    chosen = _chooser([x for x in models if x.model.config.keeps_states] or models)
    book = gr.Textbox(label="Text, of any length", lines=8, elem_id="book")
    file = gr.File(label="or a text file", file_types=[".txt", ".md"])
    read = gr.Button("Read", variant="primary", elem_id="read")
    known, said = gr.State(None), gr.Markdown(elem_id="book-state")
    question = gr.Textbox("The", label="What comes after the text", elem_id="question")
    sampling = _sampling()
    ask = gr.Button("Ask", variant="primary", elem_id="ask")
    answer, figures = gr.Textbox(label="Answer", lines=6, elem_id="answer"), gr.Markdown()

    @_spoken
    def take_in(name: str, text: str, path: str | None) -> tuple[Conversation, str]:
        opened = _named(models, name)
        talk = Conversation(opened.model, opened.tokenizer)
        with opened.lock:
            talk.read(text if path is None else texts.text_of_file(path))
        if not talk.num_tokens:
            raise SettingsError("there is nothing to read: give a text or a file")
        return talk, f"{talk.num_tokens:,} tokens are known, in a state of {talk.state_bytes / 1024:,.0f} KiB"

    @_spoken_stream
    def answered(name: str, talk: Conversation | None, text: str, *settings: float) -> Iterator[tuple[str, str]]:
        if talk is None:
            raise SettingsError("read a text first")
        options = _options(*settings)
        yield from _streamed(_named(models, name), lambda stream: talk.ask(text, stream=stream, **options))

    read.click(take_in, [chosen, book, file], [known, said])
    gr.on(
        [ask.click, question.submit],
        answered,
        [chosen, known, question, *sampling],
        [answer, figures],
        concurrency_limit=1,
    )


def _chat_tab(models: list[OpenedModel]) -> None:
    gr.Markdown("The model goes on from what you write. Models here continue texts; they were not taught to obey.")
    chosen = _chooser(models)
    shown, talk = gr.Chatbot(label="Turns", elem_id="turns", buttons=["copy"]), gr.State(None)
    line = gr.Textbox(label="Your turn", elem_id="turn", submit_btn=True)
    said = gr.Markdown(elem_id="chat-state")
    forget = gr.Button("Forget all", elem_id="forget")
    sampling = _sampling()

    @_spoken_stream
    def reply(name: str, turns: list[Any], known: Conversation | None, text: str, *settings: float) -> Iterator[Any]:
        opened = _named(models, name)
        if known is None or known.model is not opened.model:
            known, turns = Conversation(opened.model, opened.tokenizer), []
        turns = [*turns, {"role": "user", "content": text}]
        options = _options(*settings) | {"seed": int(settings[-1]) + len(turns)}
        for written, _ in _streamed(opened, lambda stream: known.reply(text, stream=stream, **options)):
            yield [*turns, {"role": "assistant", "content": written}], known, "", gr.skip()
        if known.keeps_state:
            kept = (
                f"{known.num_tokens:,} tokens said; the state has {known.state_bytes / 1024:,.0f} KiB, as at the start"
            )
        else:
            kept = f"{known.num_tokens:,} of {opened.model.config.n_positions:,} positions used"
        yield gr.skip(), known, "", kept

    line.submit(reply, [chosen, shown, talk, line, *sampling], [shown, talk, line, said], concurrency_limit=1)
    forget.click(lambda: ([], None, ""), None, [shown, talk, said])


def _mask_tab(models: list[OpenedModel]) -> None:
    chosen = _chooser(models)
    mask = models[0].tokenizer.mask_token or "[MASK]"
    text = gr.Textbox(f"The {mask} of the United States", label=f"Text with {mask}", elem_id="masked")
    with gr.Row():
        fill, split = gr.Button("Fill", variant="primary", elem_id="fill"), gr.Button("Show tokens", elem_id="split")
    tokens = gr.HighlightedText(label="Click a token to hide it", elem_id="tokens", show_legend=False)
    top_k = gr.Slider(1, 20, value=5, step=1, label="Candidates")
    bars = [gr.Label(label=f"Mask {number + 1}", visible=number == 0, elem_id=f"mask-{number}") for number in range(5)]

    @_spoken
    def filled(name: str, masked: str, count: float) -> list[Any]:
        found = texts.fill(_named(models, name), masked, int(count))
        if len(found) > len(bars):
            raise SettingsError(f"at most {len(bars)} masks are shown; the text has {len(found)}")
        return [
            gr.Label(found[number], num_top_classes=int(count), visible=True)
            if number < len(found)
            else gr.Label(visible=False)
            for number in range(len(bars))
        ]

    @_spoken
    def shown(name: str, plain: str) -> list[tuple[str, str | None]]:
        return [(token + " ", None) for token in texts.tokens_of(_named(models, name), plain)]

    @_spoken
    def hide(name: str, plain: str, event: gr.SelectData) -> str:
        return texts.with_mask(_named(models, name), plain, int(event.index))

    hide.__annotations__["event"] = gr.SelectData  # gradio passes what was clicked by this
    gr.on([fill.click, text.submit], filled, [chosen, text, top_k], bars)
    split.click(shown, [chosen, text], tokens)
    tokens.select(hide, [chosen, text], text).then(filled, [chosen, text, top_k], bars)


def _pair_tab(models: list[OpenedModel]) -> None:
    chosen = _chooser(models)
    first = gr.Textbox("It rained all day.", label="First sentence", elem_id="first")
    second = gr.Textbox("We stayed at home.", label="Second sentence", elem_id="second")
    compare, result = gr.Button("Compare", variant="primary", elem_id="compare"), gr.Label(elem_id="follows")

    @_spoken
    def compared(name: str, one: str, two: str) -> dict[str, float]:
        return texts.follows(_named(models, name), one, two)

    compare.click(compared, [chosen, first, second], result)


def _search_tab(models: list[OpenedModel]) -> None:
    chosen = _chooser(models)
    lines = gr.Textbox(label="Texts, one a line", lines=8, elem_id="lines")
    query = gr.Textbox(label="Query", elem_id="query")
    search = gr.Button("Search", variant="primary", elem_id="search")
    table = gr.Dataframe(headers=["cosine", "text"], label="Nearest first", wrap=True, elem_id="nearest")

    @_spoken
    def found(name: str, asked: str, among: str) -> list[list[str]]:
        return texts.nearest(_named(models, name), asked, among)

    gr.on([search.click, query.submit], found, [chosen, query, lines], table)


def _inside_tab(models: list[OpenedModel]) -> None:
    chosen = _chooser(models)
    text = gr.Textbox("My fellow citizens of the United States", label="Text", elem_id="inside-text")
    with gr.Row():
        layer, head = (gr.Number(0, precision=0, minimum=0, label=label) for label in ("Layer", "Head"))
    look = gr.Button("Look", variant="primary", elem_id="look")
    table = gr.Dataframe(headers=list(inside.HEAD_COLUMNS), label="What each head has learned", elem_id="heads")
    said, picture = gr.Markdown(elem_id="inside-said"), gr.Plot(label="Attention map", elem_id="map")

    @_spoken
    def looked(name: str, seen: str, layer_number: float, head_number: float) -> tuple[Any, Any, str]:
        opened = _named(models, name)
        with opened.lock:
            rows = inside.head_rows(opened.model, opened.tokenizer, seen)
            try:
                place = {"layer": int(layer_number), "head": int(head_number)}
                figure = inside.map_picture(opened.model, opened.tokenizer, seen, **place)
            except SettingsError as error:  # a layer that erases has no map, but numbers
                return rows, None, str(error)
        return rows, figure, ""

    look.click(looked, [chosen, text, layer, head], [table, picture, said])
