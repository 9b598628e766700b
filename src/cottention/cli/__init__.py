"""The command line: one small file per command, no logic of its own; `main` finds and runs them.

cottention generate runs/quickstart-gpt --prompt "My fellow Americans"
"""
