"""Certify a GPU: correctness, the target table, tuning, rooflines and whole steps, in a given time.

    python -m bench certify --budget 420 --out DIR        # a GPU; 1 where something failed, 2 where nothing ran
    python -m bench certify --plan                        # what a budget is spent on
    python -m bench certify --rehearse --out DIR          # all of it on a CPU, tiny, with faults put in

A hang, a crash, an illegal memory access or an absent peer loses the unit that it happens in and nothing else. Every
result is on the disk as soon as it is there:

    report.md         what passed, failed and was not measured; the targets; the figures
    records.jsonl     the measurements, as `python -m bench run` writes them
    journal.jsonl     what ran, how it ended, how long it took
    environment.json  versions, driver, clocks, power
    tune.json         the tiles that were tried, and the lines of the table for those that won
    log.txt           what the processes printed

DIR belongs under bench/results/, in a folder of its own: `python -m bench report` finds it there.
"""

from bench.certify.command import HELP, add_arguments, main

__all__ = ["HELP", "add_arguments", "main"]
