import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.chat import ChatFormat
from data_prep.count import SourceCount, count_tokens
from data_prep.errors import DataError
from data_prep.readers import ReaderOptions, plan_items
from data_prep.sampling import Source
from data_prep.tokenizer import Tokenizer
from data_prep.world import World
from slurm.local import rank_command, rank_environment

TURNS = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two, \u00e9."}]


@pytest.fixture
def sources(corpus: Path, tmp_path: Path) -> list[Source]:
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(5)))
    return [Source("code", plan_items([corpus])), Source("chat", plan_items([tmp_path / "chat.jsonl"]))]


def test_counts_are_those_of_encoding_each_document(sources: list[Source], corpus: Path, tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir)
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    code = SourceCount(
        name="code",
        documents=len(texts),
        skipped=0,
        tokens=sum(len(ids) + 2 for ids in tokenizer.encode_batch(texts)),
        text_bytes=sum(len(text.encode()) for text in texts),
    )
    of_chat = len(ChatFormat.load(tokenizer_dir, tokenizer).encode(TURNS)[0])
    chat = SourceCount("chat", 5, 0, 5 * of_chat, 5 * len("One?\nTwo, \u00e9.".encode()))
    seen: list[tuple[int, int]] = []
    counts = count_tokens(sources, tokenizer_dir, ReaderOptions(), World(), progress=lambda *state: seen.append(state))
    assert counts == [code, chat]
    total = sum(item.bytes for source in sources for item in source.items)
    assert seen[-1] == (total, total)
    assert count_tokens(sources, tokenizer_dir, ReaderOptions(), World(), engine="tokenizers") == counts


PROGRAM = """
import sys
from pathlib import Path
from data_prep.count import count_tokens
from data_prep.readers import ReaderOptions, plan_items
from data_prep.sampling import Source
from data_prep.world import World
items = plan_items([Path(sys.argv[1])])
world = World.discover()
counts = count_tokens([Source("a", items[:4]), Source("b", items[4:])], Path(sys.argv[2]), ReaderOptions(), world)
if world.rank == world.size - 1:
    print(counts)
"""


def test_two_ranks_count_what_one_does(corpus: Path, tokenizer_dir: Path) -> None:
    printed = set()
    for ranks in (1, 2):
        command = rank_command(ranks, [sys.executable, "-c", PROGRAM, str(corpus), str(tokenizer_dir)])
        environment = rank_environment(ranks)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        printed.add(done.stdout)
    assert len(printed) == 1
    assert "documents=6" in printed.pop()


def test_bad_documents_end_the_count_or_are_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 5}\n{"text": "good"}\nno json\n')
    with pytest.raises(DataError, match=r"a\.jsonl"):
        count_tokens([Source("a", plan_items([tmp_path / "a.jsonl"]))], tokenizer_dir, ReaderOptions(), World())
    options = ReaderOptions(on_bad_document="skip")
    (count,) = count_tokens([Source("a", plan_items([tmp_path / "a.jsonl"], options))], tokenizer_dir, options, World())
    assert (count.documents, count.skipped, count.text_bytes) == (2, 2, 8)
