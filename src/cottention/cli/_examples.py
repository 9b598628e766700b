"""Command lines at the end of each --help; those of other commands stand in their own modules."""

from __future__ import annotations

EXAMPLES: dict[str, str] = {
    "quickstart": """
        cottention quickstart
        cottention quickstart --arch bert --minutes 2 --output-dir runs/first-bert""",
    "data": """
        cottention data build gpt books/ --output-dir corpora/books
        cottention data tokenize gpt corpora/books --tokenizer runs/gpt/model --output-dir corpora/books-tokens""",
    "data build": """
        cottention data build gpt books/ wiki.jsonl.gz --output-dir corpora/mixed
        cottention data build bert books/ --output-dir corpora/sentences""",
    "data build gpt": """
        cottention data build gpt books/ wiki.jsonl.gz --output-dir corpora/mixed
        cottention data build gpt dump.jsonl --text-column body --skip-malformed --output-dir corpora/dump""",
    "data build bert": """
        cottention data build bert books/ --output-dir corpora/sentences
        cottention data build bert buecher/ --language de --min-sentences 3 --output-dir corpora/saetze""",
    "data tokenize": """
        cottention data tokenize gpt corpora/books --tokenizer runs/gpt/model --output-dir corpora/books-tokens
        cottention data tokenize bert corpora/sentences --tokenizer runs/bert/model --output-dir corpora/pairs""",
    "data tokenize gpt": """
        cottention data tokenize gpt corpora/books --tokenizer runs/gpt/model --output-dir corpora/books-tokens""",
    "data tokenize bert": """
        cottention data tokenize bert corpora/sentences --tokenizer runs/bert/model --output-dir corpora/pairs""",
    "pretrain": """
        cottention pretrain gpt --config quickstart_gpt --data.source texts/ --output-dir runs/mine
        cottention pretrain bert --config quickstart_bert --data.source texts/ --dry-run""",
    "pretrain gpt": """
        cottention pretrain gpt --config quickstart_gpt --data.source a.txt b.txt --output-dir runs/mine
        cottention pretrain gpt --config gpt_small_cosine --data.source texts/ --dry-run
        cottention pretrain gpt --config runs/mine/recipe.yaml --training.max_steps 9000 --extend --output-dir runs/mine
        cottention pretrain gpt --config runs/mine/recipe.yaml --init-from runs/mine/model --output-dir runs/next""",
    "pretrain bert": """
        cottention pretrain bert --config quickstart_bert --data.source a.txt b.txt --output-dir runs/mine
        cottention pretrain bert --config bert_small_cosine --data.source corpora/pairs --dry-run
        cottention pretrain bert --config runs/mine/recipe.yaml --init-from runs/mine/model --output-dir runs/next""",
    "recipes": """
        cottention recipes
        cottention recipes show quickstart_gpt > mine.yaml""",
    "generate": """
        cottention generate --model runs/mine/model --prompt 'The people' --max-new-tokens 60
        cottention generate --model runs/mine/model --prompt-file book.txt --save-state book.state""",
    "chat": """
        cottention chat --model runs/mine/model
        cottention chat --model runs/mine/model --read book.txt""",
    "compare": """
        cottention compare runs/cosine runs/softmax
        cottention compare runs/cosine runs/softmax --plot compare.png""",
    "slurm": """
        cottention slurm --config gpt_300m_cosine --nodes 2 --gpus-per-node 8 --output-dir runs/300m --dry-run""",
    "playground": """
        cottention playground --model runs/mine/model""",
    "fill-mask": """
        cottention fill-mask --model runs/bert/model 'The [MASK] of the people.'
        cottention fill-mask --model runs/bert/model --file masked.txt --top-k 3 --json""",
    "next-sentence": """
        cottention next-sentence --model runs/bert/model 'It rained.' 'We stayed at home.'
        cottention next-sentence --model runs/bert/model --file pairs.tsv""",
    "evaluate": """
        cottention evaluate perplexity --model runs/mine/model --data held-out.txt
        cottention evaluate glue --runs runs/glue""",
    "evaluate perplexity": """
        cottention evaluate perplexity --model runs/mine/model --data held-out.txt
        cottention evaluate perplexity --model runs/mine/model --data book.txt --carry-state""",
    "evaluate glue": """
        cottention evaluate glue --runs runs/glue
        cottention evaluate glue --model runs/glue/rte/model --task rte --data glue/""",
    "evaluate harness": """
        cottention evaluate harness --model runs/mine/model --tasks hellaswag arc_easy --limit 100""",
    "convert": """
        cottention convert softmax downloads/bert-base converted/bert-cosine
        cottention convert official downloads/checkpoint-400000 converted/gpt""",
    "convert official": """
        cottention convert official downloads/checkpoint-400000 converted/gpt""",
    "convert softmax": """
        cottention convert softmax downloads/bert-base converted/bert-cosine
        cottention convert softmax downloads/bert-base converted/bert --attention-type softmax""",
    "bench": """
        cottention bench attention --lengths 1024,8192
        cottention bench decode --positions 1024,65536""",
    "bench attention": """
        cottention bench attention --lengths 1024,8192 --causal --output-dir runs/bench
        cottention bench attention --full --device cuda""",
    "bench decode": """
        cottention bench decode --positions 1024,65536 --batch-sizes 1,8""",
    "bench figures": """
        cottention bench figures --quick --output-dir runs/figures
        cottention bench figures --from runs/figures/figures.json --output-dir pictures""",
    "bench model": """
        cottention bench model --hidden-size 256 --num-layers 4""",
    "completion": """
        eval "$(cottention completion bash)"
        cottention completion zsh > ~/.zfunc/_cottention""",
    "doctor": """
        cottention doctor
        cottention doctor --model runs/mine/model""",
}
