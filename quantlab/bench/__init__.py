"""bench: how fast a folder runs on this machine's CPU, beside the 16-bit checkpoint that it was made from.

config.py     what is asked for
bench.py      sides in turn, each in a process of its own; what came of it
process.py    one side in a fresh process
worker.py     what runs there
engines.py    the engines, and what each can load
results.py    measurements, ratios with their intervals, and the verdict
tables.py     the result for people
"""
