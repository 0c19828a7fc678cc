"""`rookery smoke`: the whole chain, small, on one machine, through the commands that a supercomputer run uses.

Every stage is a command of `rookery`, under the MPI launcher where a job would be; this module only starts them, kills
one rank, and compares what they wrote. The run directory is the working directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import psutil

from data_prep.manifest import Manifest
from monitoring.runlog import MetricsFollower, attempts, read_events, read_metrics, replayed, write_atomic
from rookery.display import StageDisplay, figures, summary_table
from slurm.local import rank_command, rank_environment

RANKS = 2
VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 128
DEPTHS = (1, 2, 4, 8, 16)
CORPUS_BYTES = 4_000_000
VALIDATION_BYTES = 80_000
_MARKER = ".rookery-smoke"
_TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")
_POLL_SECONDS = 0.05


class SmokeError(ValueError):
    """The working directory cannot be used."""


class StageError(RuntimeError):
    """A stage did not do what it should; the message says which, and where its output is."""


@dataclass
class Smoke:
    """One smoke run in `workdir`.

    Attributes:
        workdir: directory of everything; also the run directory.
        display: where progress is shown.
        seconds: duration of each finished stage.
        summary: what summary.json will hold.
    """

    workdir: Path
    display: StageDisplay
    seconds: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run all stages in order, filling `summary`."""
        stages = (
            ("corpus", self.corpus),
            ("tokenizer", self.tokenizer),
            ("data", self.data),
            ("train", self.train),
            ("resume", self.resume),
            ("eval", self.evaluate),
            ("export", self.export),
            ("report", self.report),
        )
        for name, stage in stages:
            started = time.perf_counter()
            self.display.start(name)
            figure = stage()
            self.seconds[name] = round(time.perf_counter() - started, 2)
            self.display.finish(figure, self.seconds[name])

    def corpus(self) -> str:
        """List real text: the standard library of the running interpreter, some of it held out by content."""
        root = Path(sysconfig.get_path("stdlib"))
        documents = sorted(_stdlib_texts(root), key=lambda document: document[0])
        train, validation, total, held_out = [], [], 0, 0
        for digest, path, size in documents:
            if digest < "10" and held_out < VALIDATION_BYTES:  # a sixteenth of the documents, by their content
                validation.append(path)
                held_out += size
            elif digest >= "10" and total < CORPUS_BYTES:
                train.append(path)
                total += size
        if total < CORPUS_BYTES // 2 or not held_out:
            raise StageError(f"corpus: only {total} bytes of text under {root}; install the full standard library")
        for name, paths in (("train", train), ("validation", validation)):
            target = self.workdir / "corpus" / f"{name}.list"
            target.parent.mkdir(exist_ok=True)
            target.write_text("".join(f"{path}\n" for path in sorted(paths)), encoding="utf-8")
        return f"{len(train) + len(validation)} files, {(total + held_out) / 1e6:.1f} MB"

    def tokenizer(self) -> str:
        """Train the tokenizer on the training documents."""
        self._rookery(
            "tokenizer",
            "data",
            "train-tokenizer",
            "--input",
            "corpus/train.list",
            "--vocab-size",
            str(VOCAB_SIZE),
            "--out",
            "tokenizer",
        )
        return f"{VOCAB_SIZE} tokens"

    def data(self) -> str:
        """Tokenize both sets on all ranks."""
        manifests = []
        for name in ("train", "validation"):
            self._rookery(
                f"data-{name}",
                "data",
                "build",
                "--input",
                f"corpus/{name}.list",
                "--tokenizer",
                "tokenizer",
                "--sequence-length",
                str(SEQUENCE_LENGTH),
                "--out",
                f"data/{name}",
                ranks=RANKS,
            )
            manifests.append(Manifest.load(self.workdir / "data" / name))
        return f"{manifests[0].tokens:,} + {manifests[1].tokens:,} tokens"

    def train(self) -> str:
        """Train on all ranks until a step between two checkpoints in mid-run, then kill rank 1 without warning."""
        killed: list[int] = []

        def kill_in_mid_run(record: dict[str, Any]) -> None:
            steps, every = self._config.train.steps, self._config.checkpoint.every
            if not killed and record["step"] > steps // 2 and record["step"] % every >= every // 2:
                environment = json.loads((self.workdir / "attempts/0001/environment.json").read_text())
                os.kill(environment["ranks"][1]["pid"], signal.SIGKILL)
                killed.append(record["step"])

        code = self._train("train", attempt=1, on_step=kill_in_mid_run)
        if not killed or code == 0:
            raise StageError(f"train: no rank was killed (exit code {code}); {self._where('train')}")
        return f"rank 1 killed at step {killed[0]}"

    def resume(self) -> str:
        """Start the same command again; it must resume, replay the lost steps exactly, and finish."""
        code = self._train("resume", attempt=2)
        if code != 0:
            raise StageError(f"resume: exit code {code}; {self._where('resume')}")
        records, pairs = read_metrics(self.workdir), replayed(self.workdir)
        starts = [event["step"] for event in read_events(self.workdir) if event["kind"] == "start"]
        last_attempt = [record for record in records if record["attempt"] == attempts(self.workdir)[-1]]
        tokens = last_attempt[-1]["tokens"] - last_attempt[0]["tokens"]
        self.summary |= {
            "first_loss": records[0]["loss"],
            "last_loss": records[-1]["loss"],
            "resumed_from_step": starts[-1],
            "replayed_steps": len(pairs),
            "resume_max_abs_loss_diff": max((abs(new["loss"] - old["loss"]) for old, new in pairs), default=None),
            "tokens_per_second": tokens / sum(record["seconds"] for record in last_attempt[1:]),
        }
        return f"from step {starts[-1]}, {len(pairs)} steps replayed, loss {records[-1]['loss']:.3f}"

    def evaluate(self) -> str:
        """Measure the validation loss by depth."""
        output = self._rookery("eval", "eval", ".", "--depths", ",".join(map(str, DEPTHS)), "--json")
        result = json.loads(output)
        self.summary |= {
            "eval": result["loss"],
            "unigram_entropy": result["unigram_entropy"],
            "mean_recurrence": result["mean_recurrence"],
        }
        return "  ".join(f"r={depth}: {loss:.3f}" for depth, loss in result["loss"].items())

    def export(self) -> str:
        """Write the model in the layout of Hugging Face and compare its logits."""
        output = self._rookery("export", "export", ".", "export", "--json")
        difference = json.loads(output)["max_abs_logit_diff"]
        self.summary["export_max_abs_logit_diff"] = difference
        return f"largest difference of logits {difference:.1e}"

    def report(self) -> str:
        """Write the report page."""
        self._rookery("report", "report", ".", "--out", "report.html")
        return f"{(self.workdir / 'report.html').stat().st_size / 1e6:.1f} MB"

    @cached_property
    def _config(self) -> Any:
        from pipeline.config import load_config

        return load_config("smoke")

    def _train(self, stage: str, attempt: int, on_step: Callable[[dict[str, Any]], None] = lambda record: None) -> int:
        follower = MetricsFollower(self.workdir / "metrics" / f"{attempt:04d}.jsonl")
        total = self._config.train.steps

        def watch() -> None:
            for record in follower.poll():
                self.display.update(f"step {record['step']}/{total}  {figures(record)}", record["step"] / total)
                on_step(record)

        return self._run(stage, ["train", "smoke", "run_dir=."], RANKS, watch)

    def _rookery(self, stage: str, *arguments: str, ranks: int | None = None) -> str:
        """Run a command of `rookery` to its end; return its standard output."""
        code = self._run(stage, list(arguments), ranks)
        if code != 0:
            raise StageError(f"{stage}: exit code {code}; {self._where(stage)}")
        return (self.workdir / "logs" / f"{stage}.out").read_text(encoding="utf-8")

    def _run(
        self, stage: str, arguments: list[str], ranks: int | None, watch: Callable[[], None] = lambda: None
    ) -> int:
        command = [sys.executable, "-m", "rookery", *arguments]
        logs = self.workdir / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{stage}.out").open("wb") as out, (logs / f"{stage}.err").open("wb") as err:
            process = subprocess.Popen(
                command if ranks is None else rank_command(ranks, command),
                cwd=self.workdir,
                env=rank_environment(ranks or 1),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            try:
                while process.poll() is None:
                    watch()
                    time.sleep(_POLL_SECONDS)
            finally:
                process.terminate()  # if we are interrupted: the launcher takes its ranks with it
                process.wait()
        watch()
        return process.returncode

    def _where(self, stage: str) -> str:
        tail = (self.workdir / "logs" / f"{stage}.err").read_text(encoding="utf-8", errors="replace")[-2000:].strip()
        return f"the end of {self.workdir / 'logs' / stage}.err:\n{tail}"


def run_smoke(workdir: Path) -> int:
    """Run the chain in `workdir`, write summary.json and print a table; return the exit code.

    Raises:
        SmokeError: `workdir` holds something that is not an earlier smoke run.
    """
    workdir = workdir.resolve()
    held = _prepare(workdir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end our children too
    with StageDisplay(total=8) as display, _peak_memory() as peak:
        smoke = Smoke(workdir, display)
        problems: list[str] = []
        try:
            smoke.run()
            problems = failed_checks(smoke.summary)
        except StageError as error:
            problems = [str(error)]
    summary = {
        "ok": not problems,
        **smoke.summary,
        "stage_seconds": smoke.seconds,
        "seconds": round(sum(smoke.seconds.values()), 2),
        "peak_memory_bytes": peak[0],
        "problems": problems,
    }
    write_atomic(workdir / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    summary_table(display.finished, summary, workdir)
    held.close()
    return 1 if problems else 0


def failed_checks(summary: dict[str, Any]) -> list[str]:
    """Return what a finished chain shows and should not, in sentences; empty when all is well."""
    loss, mean_depth = summary["eval"], str(summary["mean_recurrence"])
    shallow, deep, mean, entropy = loss["1"], loss["8"], loss[mean_depth], summary["unigram_entropy"]
    replay, logits = summary["resume_max_abs_loss_diff"], summary["export_max_abs_logit_diff"]
    checks = (
        (replay is not None, "no step was replayed after the kill"),
        (replay in (None, 0.0), f"replayed losses differ by up to {replay}"),
        (logits <= 1e-5, f"the export's logits differ by up to {logits}"),
        (deep <= shallow - 0.05, f"loss at depth 8 ({deep:.4f}) is not 0.05 below that at depth 1 ({shallow:.4f})"),
        (mean < entropy, f"loss at depth {mean_depth} ({mean:.4f}) is not below the unigram entropy ({entropy:.4f})"),
    )
    return [problem for holds, problem in checks if not holds]


def _locked(workdir: Path) -> IO[bytes]:
    """Hold `workdir` against a second smoke run for as long as the returned file is open."""
    marker = (workdir / _MARKER).open("rb")
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        marker.close()
        raise SmokeError(f"--workdir {workdir}: another smoke run is at work there; name another") from None
    return marker


def _prepare(workdir: Path) -> IO[bytes]:
    """Make `workdir` empty, mark it as ours, and hold it."""
    if workdir.exists() and not workdir.is_dir():
        raise SmokeError(f"--workdir {workdir}: is not a directory; name another")
    if workdir.is_dir() and any(workdir.iterdir()):
        if not (workdir / _MARKER).is_file():
            raise SmokeError(f"--workdir {workdir}: holds files that are not an earlier smoke run's; name another")
        _locked(workdir).close()
        shutil.rmtree(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / _MARKER).touch()
        (workdir / "attempts").mkdir()  # makes it a run directory, which training would not make of a full one
    except OSError as error:
        raise SmokeError(f"--workdir {workdir}: cannot be written ({error.strerror}); name another") from None
    return _locked(workdir)


def _stdlib_texts(root: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield (sha256 of the content, path, bytes) of the readable texts of a standard library, its tests left out."""
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    for path in root.rglob("*"):
        if path.suffix not in _TEXT_SUFFIXES or skipped & set(path.relative_to(root).parts) or not path.is_file():
            continue
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:  # a few files are in other encodings on purpose
            continue
        yield hashlib.sha256(content).hexdigest(), path, len(content)


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Yield a one-element list that follows the largest resident memory of this process and its descendants."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.25):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
