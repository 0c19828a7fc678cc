"""One build as its ranks know it: what has been planned, what is finished, and what the manifest will say."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.config import BuildConfig
from data_prep.documents import find_duplicates
from data_prep.engine import Engine, agree_on_engine
from data_prep.errors import DataError
from data_prep.manifest import MANIFEST_FILE, Manifest, smallest_dtype
from data_prep.plan import Plan, Unit, make_plan
from data_prep.readers import ReaderOptions, read_item
from data_prep.sampling import plain_text
from data_prep.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer
from data_prep.units import Encoded, Recipe, UnitBuilder, UnitResult, pack_counts, unpack_counts
from data_prep.workspace import Workspace
from data_prep.world import World

PLAN_FILE, SKIPPED_FILE, TOKENIZER_DIRECTORY = "plan.json", "skipped.txt", "tokenizer"
_SAMPLED_UNITS, _SAMPLED_CHARACTERS = 8, 2**15


class Job:
    """What all ranks of one build know.

    Attributes:
        plan: all its units.
        workspace: where they are built.
        settings: what the result depends on besides the inputs.
        deduplicates: whether a unit's result depends on the whole corpus.
    """

    def __init__(
        self, inputs: Sequence[Path], tokenizer_dir: Path, sequence_length: int, config: BuildConfig, out: Path
    ) -> None:
        if sequence_length < 1:
            raise DataError(f"--sequence-length {sequence_length}: a row needs at least 1 token to train on")
        self.tokenizer = Tokenizer.load(tokenizer_dir)
        self._tokenizer_files = tokenizer_files(tokenizer_dir)
        self.workspace = Workspace(out)
        self.plan = Plan((), 0)
        self.settings = {
            "sequence_length": sequence_length,
            "tokenizer": {name: sha256_of(content) for name, content in self._tokenizer_files.items()},
            **config.settings(),
        }
        self._inputs, self._tokenizer_dir = [str(path) for path in inputs], tokenizer_dir
        self._sequence_length, self._config = sequence_length, config
        self.deduplicates = config.filters.deduplicate != "none"
        self._skips = config.readers.on_bad_document == "skip"
        self._builder: UnitBuilder | None = None

    @classmethod
    def prepare(
        cls,
        inputs: Sequence[Path],
        tokenizer_dir: Path,
        sequence_length: int,
        config: BuildConfig,
        out: Path,
        world: World,
    ) -> Job:
        """Check everything that can be checked before anything is written. A collective."""
        job: Job | None = None
        with world.guard("check arguments"):
            job = cls(inputs, tokenizer_dir, sequence_length, config, out)
        assert job is not None
        job.plan = make_plan(inputs, config.readers, sequence_length, config.unit_bytes, world)
        return job

    def start(self, world: World) -> None:
        """Choose the encoder. A collective."""
        engine = choose_engine_for(self._tokenizer_dir, self.plan.units, self._config, world)
        recipe = Recipe(self._config, self._sequence_length, self._tokenizer_dir, self.tokenizer, engine)
        self._builder = UnitBuilder(recipe, self.workspace)

    def existing(self) -> Manifest | None:
        """Return the manifest of `out` if it is just what this build would make; None if there is nothing.

        Raises:
            DataError: there is something else.
        """
        out = self.workspace.out
        if not (out / MANIFEST_FILE).is_file():
            return None
        manifest = Manifest.load(out)
        if manifest.provenance.get("plan_sha256") != sha256_of(self.plan_file()):
            return None
        self.workspace.remove()
        return manifest

    def plan_file(self) -> bytes:
        """Return the content of plan.json."""
        record = {"settings": self.settings, "inputs": self._inputs, **self.plan.as_record()}
        return (json.dumps(record) + "\n").encode()

    def result(self, unit: Unit) -> UnitResult | None:
        """Return what became of a unit in an earlier build, or None if it has to be built."""
        found = self._finished_record(unit)
        return None if found is None else UnitResult.from_record(found[0])

    def counts(self, unit: Unit) -> npt.NDArray[np.int64]:
        """Return how often each token is stored by a finished unit, shape (vocab_size,)."""
        found = self._finished_record(unit)
        assert found is not None
        return unpack_counts(found[1])

    def _finished_record(self, unit: Unit) -> tuple[dict[str, Any], str] | None:
        record = self.workspace.record(unit.index)
        if record is None or record["key"] != self._key(unit):
            return None
        if record["result"]["counters"].get("skipped") and not self._skips:
            return None  # this time, a bad document ends the build
        return record["result"], record["histogram"]

    def _key(self, unit: Unit) -> str:
        """Return what a unit's result depends on: on the whole corpus, if duplicates are left out."""
        return f"{unit.key} {self.plan.key}" if self.deduplicates else unit.key

    def find_duplicates(self, world: World) -> None:
        """Look for duplicates, if asked for and not done by an earlier build. A collective."""
        if not self.deduplicates:
            return
        if world.broadcast(self.workspace.has_flags(self.plan.key) if world.rank == 0 else False):
            return
        flags = find_duplicates(self.plan, self._config, world)
        with world.guard("keep duplicates"):
            for unit, of_unit in flags.items():
                self.workspace.keep_flags(unit, of_unit)
        with world.guard("keep duplicates"):
            if world.rank == 0:
                self.workspace.finish_flags(self.plan.key)

    def finished(self) -> list[Unit]:
        """Return the units that need not be built."""
        units = [self.plan.units[index] for index in self.workspace.finished_units() if index < len(self.plan.units)]
        return [unit for unit in units if self._finished_record(unit) is not None]

    def done_bytes(self, units: Iterable[Unit]) -> int:
        """Return the text of `units`, bytes."""
        return sum(unit.bytes for unit in units)

    def encode(self, unit: Unit, on_batch: Callable[[int], None]) -> Encoded:
        """Read and encode a unit."""
        assert self._builder is not None
        self.workspace.forget_unit(unit.index)
        flags = self.workspace.flags(unit.index) if self.deduplicates else None
        return self._builder.encode(unit, flags, on_batch)

    def finish(self, unit: Unit, encoded: Encoded) -> tuple[UnitResult, npt.NDArray[np.int64]]:
        """Write the parts of a unit, and then its record."""
        result, histogram = encoded.write()
        with self.workspace.writing():
            self.workspace.finish_unit(
                unit.index, {"key": self._key(unit), "result": result.as_record(), "histogram": pack_counts(histogram)}
            )
        return result, histogram

    def kept(self) -> int:
        """Return how many units are finished; if there are none, remove the workspace, provided this build made it."""
        count = len(self.workspace.finished_units())
        if not count:
            self.workspace.discard()
        return count

    def publish_if_complete(self) -> Manifest | None:
        """Publish if every unit is finished, see `build_share`."""
        results, histogram = {}, np.zeros(self.tokenizer.vocab_size)
        for unit in self.plan.units:
            found = self._finished_record(unit) if self.workspace.data.exists() else None
            if found is None:
                return self.existing()
            results[unit.index] = UnitResult.from_record(found[0])
            histogram += unpack_counts(found[1])
        return self.publish(results, histogram)

    def publish(self, results: dict[int, UnitResult], histogram: npt.NDArray[np.float64]) -> Manifest:
        """Write the manifest and what goes with it, and give the dataset its name."""
        plan_file = self.plan_file()
        ordered = [results[unit.index] for unit in self.plan.units]
        try:
            manifest = self._manifest(ordered, histogram, plan_file)
        except DataError:
            self.workspace.remove()  # there is nothing to continue
            raise
        files = {PLAN_FILE: plan_file, MANIFEST_FILE: manifest.as_bytes()}
        files |= {f"{TOKENIZER_DIRECTORY}/{name}": content for name, content in self._tokenizer_files.items()}
        messages = [message for result in ordered for message in result.messages]
        if messages:
            files[SKIPPED_FILE] = ("\n".join(messages) + "\n").encode()
        self.workspace.publish(files, {part.path for part in manifest.parts})
        self.workspace.remove()
        return manifest

    def _manifest(
        self, results: Sequence[UnitResult], histogram: npt.NDArray[np.float64], plan_file: bytes
    ) -> Manifest:
        length, tokenizer = self._sequence_length, self.tokenizer
        parts = tuple(part for result in results for part in result.parts)
        dropped = sum(result.dropped_tokens for result in results)
        if not parts:
            raise DataError(
                f"--sequence-length {length}: the corpus does not fill one row of {length + 1} tokens ({dropped} tokens"
                f" in {len(results)} units of work); add text or choose shorter rows"
            )
        counters: Counter[str] = Counter()
        for result in results:
            counters.update(result.counters)
        files = {item.path: item.file_bytes for unit in self.plan.units for item in unit.items}
        return Manifest(
            sequence_length=length,
            dtype=smallest_dtype(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
            documents=sum(result.documents for result in results),
            dropped_tokens=dropped,
            text_bytes=sum(result.text_bytes for result in results),
            unigram_entropy=_entropy(histogram),
            parts=parts,
            packing=self._config.packing,
            padding_tokens=sum(result.padding_tokens for result in results),
            split_documents=sum(result.split_documents for result in results),
            counters=dict(sorted(counters.items())),
            provenance={
                "inputs": self._inputs,
                "files": len(files),
                "file_bytes": sum(files.values()),
                "plan_sha256": sha256_of(plan_file),
                "settings": self.settings,
            },
        )


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer that decide what it makes of documents, by name."""
    paths = (directory / name for name in (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE))
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def choose_engine_for(tokenizer_dir: Path, units: Sequence[Unit], config: BuildConfig, world: World) -> Engine:
    """Return the fastest encoder that is right about a sample of `units`, a part of its own on every rank.

    A collective; every rank gets the same. See `agree_on_engine`.
    """
    with world.guard("sample the corpus"):
        sample = _sample(units[world.rank :: world.size] or units[:1], config.readers)
    return agree_on_engine(tokenizer_dir, sample, config.engine, world)


def sha256_of(content: bytes) -> str:
    """Return the digest in hex."""
    return hashlib.sha256(content).hexdigest()


def _sample(units: Sequence[Unit], options: ReaderOptions) -> list[str]:
    """Return texts from a few units that lie far apart; what is bad in them is for the build to find."""
    texts: list[str] = []
    step = max(1, len(units) // _SAMPLED_UNITS)
    for unit in units[::step][:_SAMPLED_UNITS]:
        size = 0
        for document in read_item(unit.items[0], options, lambda problem: None):
            texts.append(plain_text(document)[:_SAMPLED_CHARACTERS])
            size += len(texts[-1]) + 1
            if size >= _SAMPLED_CHARACTERS:
                break
    return texts


def _entropy(histogram: npt.NDArray[np.float64]) -> float:
    """Return the entropy of the counts in nats, equal on every machine: exact sum, no vectorised logarithm."""
    total = float(histogram.sum())
    shares = [float(count) / total for count in histogram if count > 0]
    return round(math.fsum(-share * math.log(share) for share in shares), 9) + 0.0
