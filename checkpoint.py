"""What the training scripts share: a run's folder (args.json, metrics.jsonl, curves), device and processes, types of flags.

    python checkpoint.py RUN                            draw RUN/curves.png again from RUN/metrics.jsonl
    python checkpoint.py RUN RUN ... --out study.png    best dev scores against --limit, a line for each set of other flags
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import torch
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
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
        if resume:
            self.last = read_last(self.folder / "last.pt")
        self.saved_at = time.perf_counter()
        if writes:
            self.metrics = self.cut_metrics() if resume else self.make(args)

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
            return open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.folder}: this folder cannot be made ({error.strerror or error}); "
                             "choose another --name") from None

    def cut_metrics(self):
        """metrics.jsonl as it was when last.pt was saved."""
        file = open(self.folder / "metrics.jsonl", "a+", encoding="utf-8")
        length = self.last["metrics"] if self.last else 0
        if file.seek(0, os.SEEK_END) < length:
            raise InputError(f"{self.folder}: metrics.jsonl is shorter than when last.pt was saved; it is damaged")
        file.truncate(length)
        file.seek(length)
        return file

    def log(self, kind, **fields):
        """Append one line to metrics.jsonl; kind is "step" or "evaluation"."""
        if self.writes:
            self.metrics.write(json.dumps({"kind": kind, **fields}) + "\n")
            self.metrics.flush()

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
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as tensors and plain values ({type(error).__name__}); it is damaged, or "
                         "holds more than that") from None


def resumed(resolve, argv, folder_flag):
    """The flags of the run that --resume names, resolved, or None where argv has no --resume. Raises InputError where
    argv has other flags that contradict the run's. folder_flag: which names the run's folder, --name or --out."""
    parser = Parser(add_help=False)
    parser.add_argument("--resume")
    known, argv = parser.parse_known_args(argv)
    folder = known.resume
    if folder is None:
        return None
    try:
        args = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))
        of_run = [*map(str, args["argv"]), folder_flag, str(Path(folder).absolute())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder}: no run to go on with ({type(error).__name__} in its args.json)") from None
    args, other = resolve(of_run), resolve([*of_run, *argv])
    differing = [f"--{name} is {value!r} in the run" for name, value in vars(args).items() if vars(other)[name] != value
                 and name != "argv"]
    if differing:
        raise InputError(f"--resume {folder}: {'; '.join(differing)}: leave it out, or start a new run")
    args.resume = True
    return args


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

    def check(self, folder):
        if self.asked:
            raise Interrupted(f"stopped; everything is saved, and --resume {os.path.relpath(folder)} goes on")

    def __exit__(self, *_):
        if self.mine:
            signal.signal(signal.SIGINT, self.before)


def read_metrics(folder, kind):
    with open(Path(folder) / "metrics.jsonl", encoding="utf-8") as file:
        return [line for line in map(json.loads, file) if line["kind"] == kind]


def mean_of(records):
    """The mean of nested dicts of numbers, key by key, over the records that have the key."""
    keys = dict.fromkeys(key for record in records for key in record)
    columns = {key: [record[key] for record in records if key in record] for key in keys}
    return {key: mean_of(values) if isinstance(values[0], dict) else sum(values) / len(values)
            for key, values in columns.items()}


def plot_curves(folder):
    """curves.png: each task's loss over the steps, its score on the train sample (dashed) and on dev by epoch, and the
    cosines between the tasks' gradients where they were logged."""
    steps, evaluations = (read_metrics(folder, kind) for kind in ("step", "evaluation"))
    measured = [line for line in steps if "gradients" in line]
    figure = Figure(figsize=(15 if measured else 10, 4), layout="constrained")
    losses, scores, *gradients = figure.subplots(1, 3 if measured else 2)
    for color, task in zip(itertools.cycle(TABLEAU_COLORS), evaluations[0]["train"]):
        points = [(line["step"], line["losses"][task]) for line in steps if task in line["losses"]]
        if points:  # a task may be scored alone
            losses.plot(*zip(*points), color=color, label=task)
        for split, style in (("dev", "o-"), ("train", "--")):
            points = [(line["epoch"], line[split][task]) for line in evaluations if task in line[split]]
            if points:  # an auxiliary task has no dev set
                scores.plot(*zip(*points), style, ms=3, color=color, label=f"{task} {split}")
    losses.set(xlabel="step", ylabel="loss (mean since the last point)", title="training loss")
    scores.set(xlabel="epoch", ylabel="accuracy; Pearson r for sts", title="scores")
    scores.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in gradients:
        for pair in dict.fromkeys(pair for line in measured for pair in line["gradients"]["cosine"]):
            points = [(line["step"], line["gradients"]["cosine"][pair]) for line in measured
                      if pair in line["gradients"]["cosine"]]
            axes.plot(*zip(*points), lw=1, label=pair)
        axes.axhline(0, color="black", lw=0.5)
        axes.set(xlabel="step", ylabel="cosine (mean since the last point)", title="between the tasks' gradients")
    for axes in (losses, scores, *gradients):
        axes.grid(alpha=0.3)
        axes.legend()
    write_whole(Path(folder) / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))


def plot_study(folders, path):
    """The best dev scores of several runs against the share of a task's rows that they were trained on (--limit); the runs
    that agree in all other flags make a line. Raises InputError where the runs differ in no --limit, or in several."""
    try:
        flags = {folder: json.loads((folder / "args.json").read_text(encoding="utf-8")) for folder in folders}
        best = {folder: max(read_metrics(folder, "evaluation"), key=lambda line: sum(line["dev"].values()))
                for folder in folders}
    except (OSError, ValueError) as error:
        raise InputError(f"not a finished run ({error})") from None
    limits = {folder: args["limit"] or {} for folder, args in flags.items()}
    limited = [task for task in best[folders[0]]["dev"] if len({limit.get(task, 1.0) for limit in limits.values()}) > 1]
    if len(limited) != 1:
        raise InputError(f"the runs differ in --limit of {', '.join(limited) or 'no task'}, and one is wanted")
    task, = limited
    others = [name for name in flags[folders[0]] if name not in ("limit", "name")
              and len({json.dumps(args.get(name)) for args in flags.values()}) > 1]
    lines = {}
    for folder, args in flags.items():
        label = ", ".join(f"{name} {args[name]}" for name in others)
        lines.setdefault(label, []).append((limits[folder].get(task, 1.0), best[folder]["dev"]))
    scored = list(best[folders[0]]["dev"])
    figure = Figure(figsize=(4 * len(scored), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(scored), squeeze=False)[0], scored):
        for label, points in lines.items():
            axes.plot(*zip(*sorted((share, dev[name]) for share, dev in points)), "o-", label=label)
        axes.set(xlabel=f"share of the {task} rows", ylabel="best dev score", title=name)
        axes.grid(alpha=0.3)
    if others:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))


def plot_losses(folder):
    """curve.png of pretraining: the training loss over the steps, and the held-out loss of each evaluation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, style, label in (("step", "-", "train (mean since the last point)"), ("evaluation", "o-", "held out")):
        axes.plot(*zip(*((line["step"], line["loss"]) for line in read_metrics(folder, kind))), style, label=label)
    axes.set(xlabel="step", ylabel="masked-LM loss; its exponential is the perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(Path(folder) / "curve.png", lambda path: figure.savefig(path, dpi=110, format="png"))


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


def join_processes(device):
    """Meet the other processes where torchrun started several: one a GPU over nccl, or several on the CPU over gloo.

    device: "cpu", "cuda" or "mps". They share a file system: the first one writes the run's folder, and all read the best
    epoch from it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "mps":
        raise InputError("--use_gpu with several processes: an Apple machine has one GPU; leave out torchrun")
    if device == "cpu":
        distributed.init_process_group("gloo")
    else:
        local_rank = int(os.environ["LOCAL_RANK"])
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

def exit_status(main, argv=None):
    """Call main(argv). Returns 0, or 2 for bad input, 1 for a run that failed and 130 after Ctrl-C, with one line why."""
    message = None
    try:
        main(argv)
    except InputError as error:
        status, message = 2, str(error)
    except (RunFailed, OSError) as error:  # a full disk, say
        status, message = 1, str(error)
    except (Interrupted, KeyboardInterrupt) as error:
        status, message = 130, str(error) or "stopped at once; what was not saved is lost"
    except RuntimeError as error:
        if not isinstance(error, distributed.DistBackendError) and "gloo" not in str(error):
            raise
        print(f"{Path(sys.argv[0]).name}: lost touch with another process of this run ({str(error).splitlines()[0]})",
              file=sys.stderr, flush=True)
        os._exit(1)  # the interpreter's own way out would meet gloo's waiting threads, and may abort there
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        return status
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


# ---------------------------------------------------------------- types of flags

class Parser(argparse.ArgumentParser):
    """Errors are one line without the usage; help tells the defaults that are not None."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        raise InputError(message)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(convert, least, below=math.inf):
    """A flag's type: a number in [least, below)."""
    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:  # also catches nan
            kind = "a whole number" if convert is int else "a number"
            bound = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} of at least {least}{bound}")
        return value
    return parse


def named_values(text):
    """NAME=value,NAME=value as a dict of strings."""
    values = {}
    for part in text.split(","):
        name, equals, value = map(str.strip, part.partition("="))
        if not equals or name in values:
            raise argparse.ArgumentTypeError(f"{text!r}: {part!r} is not one more NAME=value")
        values[name] = value
    return values


def per_task(convert):
    """A flag's type: one value for all tasks, or NAME=value,NAME=value as a dict."""
    def parse(text):
        return {name: convert(value) for name, value in named_values(text).items()} if "=" in text else convert(text)
    return parse


def names(text):
    """A flag's type: one or more names, as in sst+sts."""
    found = [name.strip() for name in text.split("+")]
    if "" in found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not one or more different names, as in sst+sts")
    return found


def one_of(*choices):
    """A flag's type: one of some words."""
    def parse(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(choices)}")
        return text
    return parse


def settings(**fields):
    """A flag's type: NAME=value,NAME=value as a dict of all fields. fields: {name: (type, default)}."""
    def parse(text):
        given = named_values(text) if text else {}
        for name, value in given.items():
            if name not in fields:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(f'{field}=' for field in fields)}")
            try:
                given[name] = fields[name][0](value)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{name}: {error}") from None
        return {name: given.get(name, default) for name, (_, default) in fields.items()}
    return parse


def for_each(value, tasks, flag):
    """A flag's value as {task: value}. Raises InputError for a task it does not apply to, or one left without a value."""
    if not isinstance(value, dict):
        return dict.fromkeys(tasks, value)
    for name in [*value, *tasks]:
        if name not in tasks:
            raise InputError(f"argument {flag}: {name!r} is none of the tasks it applies to here ({', '.join(tasks)})")
        if name not in value:
            raise InputError(f"argument {flag}: no value for {name}")
    return {name: value[name] for name in tasks}


def main(argv=None):
    parser = Parser(description="Draw a run's curves.png from its metrics.jsonl, or compare runs of several --limit.")
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=None, help="of several runs: the picture to write")
    args = parser.parse_args(argv)
    for folder in args.run:
        if not (folder / "metrics.jsonl").is_file():
            raise InputError(f"{folder}: no metrics.jsonl there")
    if len(args.run) > 1 and not args.out:
        raise InputError("several runs: give --out PICTURE")
    if args.out:
        plot_study(args.run, args.out)
    else:
        plot_curves(args.run[0])
    print(args.out or args.run[0] / "curves.png")


if __name__ == "__main__":
    sys.exit(exit_status(main))
