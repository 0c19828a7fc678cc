"""Offline data: from text files to a dataset of token rows that training reads one at a time.

- `corpus` finds documents and reads them as text; `tokenizer` trains, loads and applies a byte-level BPE.
- `build` turns documents into a dataset, on one rank or on many; `verify` proves a dataset against its manifest.
- `manifest` is a dataset's table of contents, `shards` its rows on disk, `order` the order in which training sees them.
- `world` holds the ranks of a job.

Nothing here imports torch: data is prepared on nodes that may not have it.
"""
