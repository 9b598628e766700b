"""The study of quality: what each option of the block buys, beside softmax with the same additions.

    python -m cottention.benchmarks.quality list             the cells, and which are finished
    python -m cottention.benchmarks.quality run 'lm-1m/*'    those that are not; each finished one is a line
    python -m cottention.benchmarks.quality repeat CELL      one again, compared with its line
    python -m cottention.benchmarks.quality table            Markdown of what is there
    python -m cottention.benchmarks.quality plot             curves

A file per thing: `cells.py` the table of what is run, `models.py` the model of a cell, `training.py` one loop for all,
`tasks.py` the interface of a task, `recall.py`, `copying.py`, `tracking.py` and `language.py` the tasks (`texts.py` the
text under the last), `lines.py` the files of results, `tables.py` and `curves.py` what is made of them.
"""
