"""What surrounds training: a run's folder and how it resumes, Ctrl-C, metrics, exit status.

metrics.jsonl has one JSON object per line. `epoch` and `step` count from 1, `step` over the whole
run; pretrain_mlm.py also evaluates before training, at 0. Fields in brackets are there only in the
runs that have them.

    kind "step": means over the steps since the line before, ten or fewer
        losses              {task: loss}, without the regularizers
        lr                  the learning rate of the last update
        tokens_per_second, steps_per_second     tokens without padding, over all processes
        [regularizers]      {"TASK smart" or "TASK proximal": the term, times its weight}
        [gradients]         with surgery or --log_gradients: the number of updates, and what
                            `diagnostics` of pcgrad.py measures, {"norm": {task: ...}, ...}
        [skipped_updates]   their number; float16 skips where a gradient overflows
    kind "evaluation": after an epoch
        dev, train          {task: accuracy, or Pearson's r}, also of --score_also; train on at
                            most 2,000 examples
        f1                  {task: {"macro" or "positive" or a class: F1 on dev}}, not for sts
        overall_2023, overall_2024     of the dev scores, where all three tasks have one
        from pretrain_mlm.py: loss and perplexity instead of these
"""
import contextlib
import io
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm

from support.devices import rank_and_world, sum_over_processes
from support.files import InputError, write_atomically
from support.weights import read_checkpoint, to_float

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


class RunFailed(RuntimeError):
    """The run cannot continue, for example since a loss is not finite. The message is one line."""


class Interrupted(RuntimeError):
    """Ctrl-C, after everything was saved. The message is one line that says how to resume."""


# ---------------------------------------------------------------- the folder of a run

class Run:
    """A run's folder: args.json, metrics.jsonl, last.pt. `last` is what last.pt holds; None for a
    new run, and for one that was killed before its first save, which starts over.

    args: the flags. digest: of the data (`data_digest`), which a resumed run must find unchanged.
    resume: resume the run in this folder. writes: False for all processes but the first. Raises
    InputError where the folder exists already, where the data differs, or where last.pt or
    metrics.jsonl is damaged.
    """

    def __init__(self, folder, args, digest, resume=False, writes=True):
        self.folder, self.writes, self.last = Path(folder), writes, None
        self.length = 0  # of metrics.jsonl when last.pt was saved
        # the flags of the command that resumes it; of a resumed run, those that it was given
        self.resume_flags = args["argv"] if resume else ["--resume", os.path.relpath(self.folder)]
        if resume:
            self._find(digest)
        elif writes:
            self._make({**args, "data_digest": digest})
        self.saved_at = time.perf_counter()

    def _find(self, digest):
        args = json.loads((self.folder / "args.json").read_text(encoding="utf-8"))
        if args.get("data_digest") != digest:
            raise InputError(f"--resume {self.folder}: the data files or the vocabulary are not "
                             "those that the run was started with; name those with --data_dir, "
                             "--model or the flag of the file")
        self.last = read_last(self.folder / "last.pt")
        self.length = self.last["metrics"] if self.last else 0
        path = self.folder / "metrics.jsonl"
        if self.length > (path.stat().st_size if path.exists() else 0):
            raise InputError(f"{path}: is shorter than when last.pt was saved; it is damaged, so "
                             "start a new run")

    def _make(self, args):
        # made under another name and renamed, so that a run's folder always has its args.json
        new = self.folder.with_name(f"{self.folder.name}.new-{os.getpid()}")
        text = json.dumps(args, indent=2, default=str) + "\n"
        try:
            if (self.folder / "args.json").exists():
                raise InputError(f"{self.folder}: a run of this name exists; choose another name, "
                                 f"or resume it with --resume {self.folder}")
            if self.folder.exists():
                raise InputError(f"{self.folder}: exists already; choose another name")
            new.mkdir(parents=True)
            write_atomically(new / "args.json",
                             lambda path: path.write_text(text, encoding="utf-8"))
            os.rename(new, self.folder)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise InputError(f"{self.folder}: this folder cannot be made "
                             f"({error.strerror or error}); choose another name") from None

    def start(self):
        """Open metrics.jsonl, cut back to its length when last.pt was saved.

        Raises InputError where another process is training this run.
        """
        if self.writes:
            self.metrics = open(self.folder / "metrics.jsonl", "a+", encoding="utf-8")
            if fcntl:
                try:
                    fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
                except BlockingIOError:
                    raise InputError(f"{self.folder}: another process is training this run; wait "
                                     "for its end, or stop it") from None
                except OSError:  # a file system without locks
                    pass
            self.metrics.truncate(self.length)
            self.metrics.seek(self.length)

    def log(self, kind, **fields):
        """Append one line to metrics.jsonl; kind is "step" or "evaluation"."""
        if self.writes:
            try:
                self.metrics.write(json.dumps({"kind": kind, **fields}) + "\n")
                self.metrics.flush()
            except OSError as error:
                reason = f"{self.metrics.name} cannot be written ({error.strerror})"
                raise OSError(reason) from error

    def save(self, state):
        """Write last.pt. state: tensors and plain values."""
        if self.writes:
            os.fsync(self.metrics.fileno())
            state = {**state, "metrics": self.metrics.tell()}
            write_atomically(self.folder / "last.pt", lambda path: torch.save(state, path))
        self.saved_at = time.perf_counter()

    def due(self, minutes):
        """True where the last save is that long ago."""
        return time.perf_counter() - self.saved_at >= 60 * minutes


def read_last(path):
    """What a last.pt holds; None where there is none yet. Raises InputError where it is damaged, or
    holds code."""
    try:
        # torch's format is a zip archive; torch itself does not look at the checksums in it
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError
        last = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(last, dict) or not isinstance(last["metrics"], int):
            raise TypeError
        return last
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, KeyError,
            IndexError, TypeError, AttributeError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as tensors and plain values "
                         f"({type(error).__name__}); it is damaged, or holds more than that; "
                         "start a new run") from None


@contextlib.contextmanager
def restoring():
    """Around the restoring of what a last.pt holds: an error there means that another script wrote
    it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError("--resume: last.pt is not what this script saves "
                         f"({' '.join(str(error).split())[:120]})") from error


def read_run(folder):
    """(flags, tensors beside the encoder's) of a run. Raises InputError where it is not a run, or
    where no epoch of it has ended."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; name a run's folder, as in runs/NAME")
    try:
        args = dict(json.loads((Path(folder) / "args.json").read_text(encoding="utf-8")))
        names = {"trained", "score_also", "pair_head", "pal"}
        if not names <= args.keys() or not isinstance(args["pair_head"], dict):
            raise ValueError("its args.json is of another script")
    except (OSError, ValueError, TypeError) as error:
        raise not_a_run(folder, error) from error
    if not (Path(folder) / "model.safetensors").exists():
        raise InputError(f"{folder}: no epoch of this run has ended, so it has no model yet; go on "
                         f"with --resume {folder}")
    path, tensors = read_checkpoint(folder)
    return args, {name: to_float(path, name, tensor) for name, tensor in tensors.items()
                  if name.startswith(("heads.", "pal."))}


def not_a_run(folder, error):
    return InputError(f"{folder}: not a run of multitask_classifier.py "
                      f"({' '.join(str(error).split())[:200]})")


def read_metrics(folder, kind):
    """The lines of a kind, "step" or "evaluation". The last line may be incomplete, where a run was
    killed."""
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(text) for text in file if text.endswith("\n")]
    return [line for line in lines if line["kind"] == kind]


class Interruption:
    """Ctrl-C while it is open: the first is noted, so that the step can end and be saved; the
    second stops at once.

    Not with several processes: they would stop at different steps, and wait for each other forever.
    """

    def __enter__(self):
        self.asked, self.pipes = False, {}
        main_thread = threading.current_thread() is threading.main_thread()
        self.mine = main_thread and rank_and_world()[1] == 1
        if self.mine:
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(OSError):
            print("\nstopping after this update, and saving; Ctrl-C again to stop at once",
                  file=sys.stderr, flush=True)

        # in `... | tee log` the same Ctrl-C ends tee; until all is saved, write into no pipe
        for number in (1, 2):  # standard output and error
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.fstat(number).st_mode):
                    self.pipes[number] = os.dup(number)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), number)

    def check(self, run):
        """After a save: raises Interrupted where Ctrl-C was pressed."""
        if self.asked:
            command = shlex.join(["python", sys.argv[0], *run.resume_flags])
            raise Interrupted(f"stopped; everything is saved; resume with: {command}")

    def __exit__(self, *_):
        for number, pipe in self.pipes.items():
            os.dup2(pipe, number)
        if self.mine:
            signal.signal(signal.SIGINT, self.before)


# ---------------------------------------------------------------- metrics

class StepLog:
    """The "step" lines of metrics.jsonl: mean losses over the examples of all processes, speed, and
    what was measured of the gradients, each since the line before.

    Losses stay on the device until a line is written; there the host waits.
    """

    def __init__(self, run, losses, regularizers, device):
        terms = [f"{task} {name}" for name, term in regularizers.items() for task in term.kinds]
        self.run, self.losses, self.names, self.device = run, losses, [*losses, *terms], device
        self.clear()

    def clear(self):
        self.sums = {name: torch.zeros((), device=self.device) for name in self.names}
        self.counts = dict.fromkeys(self.names, 0)
        self.tokens = self.steps = self.skipped = 0  # skipped: updates
        self.unchecked = []  # (name, loss, step since the last line, batch)
        self.diagnosed = []  # pcgrad.diagnostics of each update
        self.start = time.perf_counter()

    def add(self, name, mean, count, batch=None):
        """mean: of a loss or another term over `count` examples. batch: of a loss, whose tokens
        count for the speed, and which is named if the loss is not finite."""
        self.sums[name] += mean.detach() * count
        self.counts[name] += count
        if batch is not None:
            self.tokens += int(batch.attention_mask.sum())
            self.unchecked.append((name, mean.detach(), self.steps + 1, batch))

    def end_step(self, diagnostics=None):
        """diagnostics: what was measured of the gradients of an update."""
        self.steps += 1
        if diagnostics is not None:
            self.diagnosed.append(diagnostics)

    def write(self, epoch, step, **fields):
        """Write a line for the steps up to `step`; nothing where there was none since the last.
        Returns what a progress bar shows."""
        if not self.steps:
            return ""
        self.check_losses(epoch, step)

        # one sum over the processes, and one copy to the host
        counts = torch.tensor([*self.counts.values(), self.tokens], dtype=torch.float32,
                              device=self.device)
        numbers = torch.cat([torch.stack([*self.sums.values()]), counts])
        *numbers, tokens = sum_over_processes(numbers).tolist()
        pairs = zip(self.names, numbers[:len(self.names)], numbers[len(self.names):])
        means = {name: total / count for name, total, count in pairs if count}
        losses = {name: means.pop(name) for name in self.losses if name in means}

        seconds = time.perf_counter() - self.start
        fields |= {"tokens_per_second": round(tokens / seconds),
                   "steps_per_second": round(self.steps / seconds, 3)}
        if self.skipped:
            fields["skipped_updates"] = self.skipped
        if means:
            fields["regularizers"] = means
        if self.diagnosed:
            fields["gradients"] = {"updates": len(self.diagnosed), **mean_of(self.diagnosed)}
        self.run.log("step", epoch=epoch, step=step, losses=losses, **fields)
        self.clear()
        shown = " ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        return f"{shown}, {fields['tokens_per_second']} tokens/s"

    def check_losses(self, epoch, step):
        """Raises RunFailed for the first loss since the last line that is not finite."""
        if not self.unchecked:  # a process whose shards were all empty
            return
        losses = torch.stack([loss for _, loss, _, _ in self.unchecked]).tolist()
        for (name, _, number, batch), loss in zip(self.unchecked, losses):
            if not math.isfinite(loss):
                at = step - self.steps + number
                raise RunFailed(f"the loss of {name} is {loss} at step {at} (epoch {epoch}), "
                                f"{batch.describe()}; what was saved before is intact; start a "
                                "new run with a lower --lr")


def progress_bar(schedule, epoch, first, epochs):
    """The steps of an epoch from step `first` on, under a bar."""
    return tqdm(schedule.epoch(epoch, first), desc=f"epoch {epoch + 1}/{epochs}", initial=first,
                total=schedule.steps_per_epoch, unit="step", leave=False,
                disable=rank_and_world()[0] > 0)


def mean_of(records):
    """The mean of nested dicts of numbers, key by key, over the records that have the key."""
    keys = dict.fromkeys(key for record in records for key in record)
    columns = {key: [record[key] for record in records if key in record] for key in keys}
    return {key: mean_of(values) if isinstance(values[0], dict) else sum(values) / len(values)
            for key, values in columns.items()}


def check_weights(model, epoch, step):
    """Raises RunFailed where a parameter is not finite."""
    names, parameters = zip(*model.named_parameters())
    finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).tolist()
    if not all(finite):
        raise RunFailed(f"{names[finite.index(False)]} is not finite after step {step} of epoch "
                        f"{epoch}; what was saved before is intact; start a new run with a "
                        "lower --lr")


# ---------------------------------------------------------------- how a script ends

def null_stream():
    """A stream that accepts everything and keeps nothing."""
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def prepare_streams():
    """Make standard output and error printable: a closed one is replaced, and a character that the
    encoding does not have is printed as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, null_stream())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_status(main, argv=None):
    """Call main(argv). Returns 0, or with one line that says why: 2 for bad input, 1 for a run that
    failed, 130 after Ctrl-C. An error of the program itself stays a traceback. With several
    processes it may end the process itself."""
    prepare_streams()
    script = Path(sys.argv[0]).name
    message = None
    try:
        main(argv)
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, str(error)
    except BrokenPipeError:
        status, message = 1, "stopped: the program that read its output has ended (broken pipe)"
    except (RunFailed, OSError) as error:  # a full disk, for example
        status, message = 1, str(error) or type(error).__name__
    except (Interrupted, KeyboardInterrupt) as error:
        status, message = 130, str(error) or (
            "stopped at once; a run that had begun can be resumed from its last save")
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        print(f"{script}: lost the connection to another process of this run "
              f"({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
        os._exit(1)  # the normal exit would meet gloo's waiting threads, and may abort there
    if message:
        with contextlib.suppress(OSError):
            print(f"{script}: {message}", file=sys.stderr)
        flush_or_drop()
        return status
    if distributed.is_initialized():
        # all is done and written; the normal exit may abort in gloo's threads (seen on torch 2.11)
        flush_or_drop()
        os._exit(0)
    return 0


def flush_or_drop():
    """The interpreter flushes once more at its end, where a failure would be a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
