"""A page in the browser to try models on: writing, reading a book once and asking, filling masks, looking inside.

    cottention playground --model runs/quickstart-gpt/model --model runs/quickstart-bert/model

It is served on this machine alone unless told otherwise, and asks nothing of any other.
"""
