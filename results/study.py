"""A study: systems that are trained by one command each and leave a record. For results/systems/,
results/search/ and results/recipe/.

A record is a folder NAME-SEED beside the study's script. command.txt in it has the commands that
made the run; where there are several, the last trains the system and the others what it starts
from. `DATA` stands for the folder of the data. args.json, metrics.jsonl and environment.json are
those of the last command, and where it was resumed, environment.json is of the session that ended
it. A system whose record exists is not trained again, and a run that was interrupted is resumed.
"""
import argparse
import hashlib
import json
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from support.files import InputError
from support.run import RunFailed, exit_status

PROJECT = Path(__file__).resolve().parents[1]


@dataclass
class System:
    what: str
    flags: str  # of multitask_classifier.py
    # a report's own dev scores, None where it has none: accuracy of sst (or CFIMDB), accuracy of
    # para, Pearson's r of sts
    report: tuple = (None, None, None)
    start: str | None = None  # a system, or a pretraining of the study, that it starts from
    same_as: str | None = None  # a system that trains the same weights


@dataclass
class Study:
    folder: Path  # of its records; its runs are in runs/ under the same name
    systems: dict  # {name: System}
    pretraining: dict = field(default_factory=dict)  # {name: flags of pretrain_mlm.py}


# ---------------------------------------------------------------- commands

def command_of(study, name, seed, machine=" --amp"):
    """The command of a system or a pretraining, as typed in the project's folder.

    machine: the flags that depend on the machine, with a space before each.
    """
    runs = study.folder.name
    if name in study.pretraining:
        return (f"python pretrain_mlm.py {study.pretraining[name]}{machine} --seed {seed} "
                f"--out runs/{runs}/{name}-{seed} --data_dir DATA")
    system = study.systems[name]
    start = ""
    if system.start:
        flag = "--model" if system.start in study.pretraining else "--init_from"
        start = f" {flag} runs/{runs}/{system.start}-{seed}"
    if "--smart" in system.flags:  # bfloat16 would round its perturbations away, 1e-5 or less
        machine = machine.replace(" --amp", "")
    return (f"python multitask_classifier.py {system.flags}{start}{machine} --seed {seed} "
            f"--name {runs}/{name}-{seed} --data_dir DATA")


def commands_of(study, name, seed, machine=" --amp"):
    """{name: command} of what a system starts from and, last, of the system."""
    start = study.systems[name].start if name in study.systems else None
    before = commands_of(study, start, seed, machine) if start else {}
    return {**before, name: command_of(study, name, seed, machine)}


def show(study, name, seed):
    """Print the commands of a system."""
    print("\n".join(commands_of(study, study.systems[name].same_as or name, seed).values()))


# ---------------------------------------------------------------- training

def run(study, name, seed, data_dir, machine):
    """Train a system and keep its record, unless the record exists."""
    name = study.systems[name].same_as or name
    record = study.folder / f"{name}-{seed}"
    if record.exists():
        print(f"{name}, seed {seed}: the record exists")
        return
    commands = commands_of(study, name, seed, machine)
    runs = PROJECT / "runs" / study.folder.name
    for each, command in commands.items():
        train(command, runs / f"{each}-{seed}", data_dir)
    keep(runs / f"{name}-{seed}", record, commands.values(), data_dir)


def train(command, folder, data_dir):
    """Run a command in the project's folder, unless it has been run already. folder: the run's.

    The command is kept beside the folder, so that a run of another command, or with another folder
    of data, is neither resumed nor taken for this one. Raises InputError there, and RunFailed where
    the command was killed.
    """
    words = [word.replace("DATA", str(data_dir)) for word in command.split()]
    typed = folder.with_name(f"{folder.name}.txt")
    if folder.exists() and not (typed.exists() and typed.read_text() == " ".join(words)):
        raise InputError(f"{folder} is a run of another command; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    typed.write_text(" ".join(words))

    if (folder / "environment.json").exists():  # which is written last
        return
    surroundings = environment(data_dir)
    print(command, flush=True)
    flags = ["--resume", str(folder)] if folder.exists() else words[2:]
    process = subprocess.Popen([sys.executable, words[1], *flags], cwd=PROJECT)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command: it saves
    status = process.wait()
    signal.signal(signal.SIGINT, handler)
    if status < 0:
        raise RunFailed(f"{words[1]} was killed by signal {-status}; run this again to resume it")
    if status:  # the script has said why
        sys.exit(status)
    (folder / "environment.json").write_text(json.dumps(surroundings, indent=2) + "\n")


def processor():
    """Its name."""
    cpuinfo, names = Path("/proc/cpuinfo"), []
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(data_dir):
    """What a score depends on beside its command: commit, libraries, processor, threads, data."""
    describe = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    files = [path for split in ("train", "dev") for path in sorted(data_dir.glob(f"*-{split}.csv"))]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "cpu": processor(), "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "sha256": digests}


def keep(folder, record, commands, data_dir):
    """Write the folder `record` of the run in `folder`, without what belongs to this machine."""
    as_in_json = json.dumps(str(data_dir))[1:-1]
    args = json.loads((folder / "args.json").read_text().replace(as_in_json, "DATA"))
    args.pop("folder")
    new = record.with_name(f".{record.name}")
    new.mkdir(exist_ok=True)
    (new / "command.txt").write_text("\n".join(commands) + "\n")
    (new / "args.json").write_text(json.dumps(args, indent=2) + "\n")
    for file in ("metrics.jsonl", "environment.json"):
        (new / file).write_text((folder / file).read_text())
    new.rename(record)


# ---------------------------------------------------------------- main

def main(study, description, show=show, names=None, write_tables=None):
    """The command line of a study.

    show: the function for the command `show`. names: what can be shown (default: the systems).
    write_tables: the function for the command `table`; without it there is none.
    """
    parser = argparse.ArgumentParser(description=description)
    what = parser.add_subparsers(dest="what", required=True)
    shown = what.add_parser("show", help="print the commands of a system")
    shown.add_argument("system", choices=names or study.systems, metavar="SYSTEM")
    runs = what.add_parser("run", help="train systems and keep their records")
    runs.add_argument("systems", nargs="+", choices=study.systems, metavar="SYSTEM")
    runs.add_argument("--seeds", type=int, nargs="+", default=[1])
    runs.add_argument("--data_dir", type=Path, default=PROJECT / "data")
    runs.add_argument("--float32", action="store_true",
                      help="without --amp, for a machine that has no bfloat16")
    runs.add_argument("--use_gpu", action="store_true")
    if write_tables:
        what.add_parser("table", help="write the tables of README.md")
    args = parser.parse_args()
    if args.what == "table":
        write_tables()
        return
    if args.what == "show":
        show(study, args.system, seed=1)
        return
    machine = (" --use_gpu" if args.use_gpu else "") + ("" if args.float32 else " --amp")

    def run_all(_):
        for seed in args.seeds:
            for name in args.systems:
                run(study, name, seed, args.data_dir.resolve(), machine)
    sys.exit(exit_status(run_all))
