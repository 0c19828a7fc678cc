"""Offline data: from text files to a dataset of token rows that training reads one at a time.

- `corpus` finds files, `readers` streams documents; `filters`, `dedup`, `split` and `chat` decide what is encoded.
- `tokenizer` trains, loads and applies a byte-level BPE; `engine` chooses a faster encoder of the same ids.
- `plan` cuts a corpus into units, `units` makes one of them, `packing` its rows, `shards` its files.
- `build` makes a dataset on one rank or many (`job`, `dispatch`), in a `workspace` that survives any end.
- `manifest` is a dataset's table of contents; `verify` proves it, `repair` mends it, `order` is how training sees it.
- `world` holds the ranks of a job.

Nothing here imports torch: data is prepared on nodes that may not have it.
"""
