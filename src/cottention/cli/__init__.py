"""The command line: one small file per command, no logic of its own; `main` finds and runs them.

cottention generate --model runs/quickstart-gpt/model --prompt "My fellow Americans"
"""
