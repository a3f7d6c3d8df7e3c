"""What the training scripts share: a run's folder and how it goes on, Ctrl-C, device and processes, exit status."""
import contextlib
import io
import json
import math
import os
import pickle
import shlex
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
from torch import distributed

from data.download import InputError, write_whole


class RunFailed(RuntimeError):
    """The run cannot go on, through no fault of a flag or a file. The message is one line."""


class Interrupted(RuntimeError):
    """Ctrl-C, after everything was saved. The message is one line that says how to go on."""


class Run:
    """A run's folder: args.json, metrics.jsonl, last.pt. `last` is what last.pt holds where a run goes on, else None.

    args: the flags, of a new run. resume: go on with the run that is there. writes: False for all processes but the
    first. Raises InputError: there is a run of this name, or none to go on with, or last.pt is not what was saved.
    """

    def __init__(self, folder, args, resume=False, writes=True):
        self.folder, self.writes, self.last = Path(folder), writes, None
        # the flags that resume it from this directory: those of now where it is resumed already
        self.flags = args["argv"] if resume else ["--resume", os.path.relpath(self.folder)]
        if resume:
            self.last = read_last(self.folder / "last.pt")
            path, self.length = self.folder / "metrics.jsonl", self.last["metrics"] if self.last else 0
            if self.length > (path.stat().st_size if path.exists() else 0):
                raise InputError(f"{path}: is shorter than when last.pt was saved; it is damaged")
        elif writes:
            self.make(args)
            self.length = 0
        self.saved_at = time.perf_counter()

    def start(self):
        """Open metrics.jsonl, cut back to what it was when last.pt was saved. After this the run is written to."""
        if self.writes:
            self.metrics = open(self.folder / "metrics.jsonl", "a+", encoding="utf-8")
            self.metrics.truncate(self.length)
            self.metrics.seek(self.length)

    def make(self, args):
        new = self.folder.with_name(f"{self.folder.name}.new-{os.getpid()}")  # so that a run's folder has its args.json
        text = json.dumps(args, indent=2, default=str) + "\n"
        try:
            if self.folder.exists():
                raise InputError(f"{self.folder}: there is a run of this name; choose another --name, or go on with "
                                 f"--resume {self.folder}")
            new.mkdir(parents=True)
            write_whole(new / "args.json", lambda path: path.write_text(text, encoding="utf-8"))
            os.rename(new, self.folder)
        except OSError as error:
            raise InputError(f"{self.folder}: this folder cannot be made ({error.strerror or error}); "
                             "choose another --name") from None

    def log(self, kind, **fields):
        """Append one line to metrics.jsonl; kind is "step" or "evaluation"."""
        if self.writes:
            try:
                self.metrics.write(json.dumps({"kind": kind, **fields}) + "\n")
                self.metrics.flush()
            except OSError as error:
                raise OSError(f"{self.metrics.name} cannot be written ({error.strerror})") from error

    def save(self, state):
        """last.pt: tensors and plain values, and how long metrics.jsonl was."""
        if self.writes:
            os.fsync(self.metrics.fileno())
            state = {**state, "metrics": self.metrics.tell()}
            write_whole(self.folder / "last.pt", lambda path: torch.save(state, path))
        self.saved_at = time.perf_counter()

    def due(self, minutes):  # that long since the last save
        return time.perf_counter() - self.saved_at >= 60 * minutes


def read_last(path):
    """What a last.pt holds; None where there is none yet. Raises InputError where it is damaged, or would run code."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format; torch itself does not look at the checksums in it
            if archive.testzip():
                raise ValueError
        last = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(last["metrics"], int):
            raise TypeError
        return last
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, IndexError, TypeError,
            AttributeError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as tensors and plain values ({type(error).__name__}); it is damaged, or "
                         "holds more than that") from None


class Interruption:
    """Ctrl-C while it is open: the first is noted, so that the step can end and be saved; the second stops at once.

    Not with several processes: they would stop at different steps, and wait for each other for ever.
    """

    def __enter__(self):
        self.asked = False
        self.mine = threading.current_thread() is threading.main_thread() and rank_and_world()[1] == 1
        if self.mine:
            self.before = signal.signal(signal.SIGINT, self.note)
        return self

    def note(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nending this step, and saving; Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    def check(self, run):
        if self.asked:
            command = shlex.join(["python", sys.argv[0], *run.flags])
            raise Interrupted(f"stopped; everything is saved; resume with: {command}")

    def __exit__(self, *_):
        if self.mine:
            signal.signal(signal.SIGINT, self.before)


# ---------------------------------------------------------------- device and processes

def get_device(use_gpu, amp):
    """"cpu", "cuda" or "mps". Raises InputError where there is no GPU to use, or no bfloat16 for amp."""
    device = "cpu"
    if use_gpu:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if device is None:
        raise InputError("--use_gpu: torch sees neither a CUDA device nor an Apple GPU; leave the flag out to use the CPU")
    # for the CPU a private name, but the only test that torch 2.11 has too
    bfloat16 = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
                "cpu": torch.cpu._is_avx512_bf16_supported, "mps": lambda: False}
    if amp and not bfloat16[device]():
        raise InputError(f"--amp: this {device} device has no bfloat16 arithmetic (a CPU needs avx512_bf16)")
    return device


def autocast(device, amp):
    return torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext()


def median_times(variants, rounds, device):
    """{name: median seconds} of functions of the round's number. They take turns, since a machine's speed drifts; two more
    rounds warm up."""
    times = {name: [] for name in variants}
    for i in range(rounds + 2):
        for name, function in variants.items():
            start = time.perf_counter()
            function(i)
            torch.get_device_module(device).synchronize()  # a GPU may still be computing
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values[2:])[rounds // 2] for name, values in times.items()}


def process_environment():
    """(rank, rank on this machine, number of processes) as torchrun sets them; (0, 0, 1) without.

    Raises InputError where the variables are set in part, or are not numbers that fit.
    """
    if not {"WORLD_SIZE", "RANK"} & os.environ.keys():
        return 0, 0, 1
    numbers = {}
    for name, least, below in (("WORLD_SIZE", 1, math.inf), ("RANK", 0, math.inf),
                               ("LOCAL_RANK", 0, math.inf), ("MASTER_PORT", 0, 2 ** 16)):
        try:
            numbers[name] = int(os.environ.get(name, ""))
        except ValueError:
            raise wrong_environment(name) from None
        if not least <= numbers[name] < below:
            raise wrong_environment(name)
        if numbers["WORLD_SIZE"] == 1:
            return 0, 0, 1  # alone, whatever the others are
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise wrong_environment("RANK")
    if not os.environ.get("MASTER_ADDR"):
        raise wrong_environment("MASTER_ADDR")
    return numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"]


def wrong_environment(name):
    found = repr(os.environ[name][:40]) if name in os.environ else "not set"
    return InputError(f"the environment variable {name} is {found}: start several processes with "
                      "torchrun, which sets all it takes; for one, unset WORLD_SIZE and RANK")


def join_processes(device):
    """Meet the other processes where torchrun started several: one a GPU over nccl, or several on the CPU over gloo.

    device: "cpu", "cuda" or "mps". They share a file system: the first one writes the run's folder, and all read the best
    epoch from it.
    """
    _, local_rank, world = process_environment()
    if world == 1:
        return
    if device == "mps":
        raise InputError("--use_gpu with several processes: an Apple machine has one GPU; leave out torchrun")
    if device == "cpu":
        distributed.init_process_group("gloo")
    else:
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank)
        distributed.init_process_group("nccl", device_id=torch.device("cuda", local_rank))


def rank_and_world():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def sum_over_processes(tensor):
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


class Meter:
    """Means over the rows of all processes, and speed, since the last reading; only reading makes the host wait."""

    def __init__(self, names, device):
        self.names, self.device = names, device
        self.clear()

    def clear(self):
        self.sums = {name: torch.zeros((), device=self.device) for name in self.names}
        self.rows, self.tokens, self.steps = dict.fromkeys(self.names, 0), 0, 0
        self.start = time.perf_counter()

    def add(self, name, mean, rows, tokens=0):
        self.sums[name] += mean.detach() * rows
        self.rows[name] += rows
        self.tokens += tokens

    def state(self):
        return {"sums": self.sums, "rows": self.rows, "tokens": self.tokens, "steps": self.steps}

    def load_state(self, state):
        self.sums = {name: tensor.to(self.device) for name, tensor in state["sums"].items()}
        self.rows, self.tokens, self.steps = state["rows"], state["tokens"], state["steps"]

    def read(self):
        """({name: mean over the rows} of what was added, {"tokens_per_second", "steps_per_second"}), and start anew."""
        counts = torch.tensor([*self.rows.values(), self.tokens], dtype=torch.float32, device=self.device)
        *numbers, tokens = sum_over_processes(torch.cat([torch.stack([*self.sums.values()]), counts])).tolist()
        sums, rows = numbers[:len(self.names)], numbers[len(self.names):]
        means = {name: total / n for name, total, n in zip(self.names, sums, rows) if n}
        seconds = time.perf_counter() - self.start
        speed = {"tokens_per_second": round(tokens / seconds), "steps_per_second": round(self.steps / seconds, 3)}
        self.clear()
        return means, speed


# ---------------------------------------------------------------- how a script ends

def nowhere():
    """A stream that takes everything that is printed, and keeps nothing."""
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def ready_streams():
    """Standard output and error that can be printed to: one that was closed is replaced, and a
    character that the encoding does not have is shown as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def exit_status(main, argv=None):
    """Call main(argv). Returns 0, or 2 for bad input, 1 for a run that failed and 130 after Ctrl-C, with one line why."""
    ready_streams()
    message = None
    try:
        main(argv)
        sys.stdout.flush()
    except InputError as error:
        status, message = 2, str(error)
    except BrokenPipeError:
        status, message = 1, "stopped, since what read its output is gone (broken pipe)"
    except (RunFailed, OSError) as error:  # a full disk, say
        status, message = 1, str(error)
    except (Interrupted, KeyboardInterrupt) as error:
        status, message = 130, str(error) or "stopped at once; what was not saved is lost"
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: lost touch with another process of this run ({str(error).splitlines()[0]})",
              file=sys.stderr, flush=True)
        os._exit(1)  # the interpreter's own way out would meet gloo's waiting threads, and may abort there
    if message:
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        drop_what_cannot_be_printed()
        return status
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


def drop_what_cannot_be_printed():
    """The interpreter flushes once more at its end, where a failure would be a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
