"""Training by a recorded command, and the record of a run, for results/systems/ and results/rows/.

A record is a folder with command.txt, args.json, metrics.jsonl and environment.json. `DATA` stands
in it for the folder of the data.
"""
import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[1]


def environment(files):
    """What a score depends on beside its command: commit, libraries, processor, threads, data."""
    describe = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "cpu": cpu, "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "sha256": digests}


def has_ended(folder):
    """Whether the run in this folder has ended: environment.json is written last."""
    return (folder / "environment.json").exists()


def train(folder, command, data_dir, files):
    """Run a command, which trains into `folder`, or resume what was interrupted there."""
    surroundings = environment(files)
    print(command, flush=True)
    flags = command.replace("DATA", str(data_dir)).split()[2:]
    if folder.exists():
        flags = ["--resume", str(folder)]
    subprocess.run([sys.executable, command.split()[1], *flags], cwd=PROJECT, check=True)
    (folder / "environment.json").write_text(json.dumps(surroundings, indent=2) + "\n")


def keep(folder, kept, command, data_dir):
    """Keep the record `kept` of the run in `folder`, without what belongs to this machine."""
    args = json.loads((folder / "args.json").read_text().replace(str(data_dir), "DATA"))
    args.pop("folder")
    new = kept.with_name(f".{kept.name}")
    new.mkdir(exist_ok=True)
    (new / "command.txt").write_text(command + "\n")
    (new / "args.json").write_text(json.dumps(args, indent=2) + "\n")
    for file in ("metrics.jsonl", "environment.json"):
        (new / file).write_text((folder / file).read_text())
    new.rename(kept)
