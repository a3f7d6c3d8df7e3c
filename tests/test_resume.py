"""What surrounds training (support/run.py): a run that was killed, interrupted, moved, or had no
room on the disk resumes bit-identical to an undisturbed one; what cannot be resumed says why."""
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest, mock

import torch

import multitask_classifier
import pretrain_mlm
from data.tasks import data_digest
from multitask_classifier import GradientBuffer
from support import flags as flags_module
from support.files import write_atomically
from support.run import Run, StepLog, read_metrics
from tests.helpers import (Killed, copy_of_tiny, equal, inside, killed_after, needs_full, quietly,
                           raises, resumable, run, three_task_model, workspace)

RESUMED = [  # flags that keep something from step to step
    ["--pcgrad", "--accumulate", 2],
    ["--gradvac", "--schedule", "mixed"],
    ["--smart", "--proximal"],
    ["--pal", "--pal_size", 8, "--schedule", "mtdnn", "--upsample"],
    ["--schedule", "annealed", "--gradvac", "--accumulate", 3],
    ["--schedule", "sequential", "--optimizer_per_task"],
    ["--option", "pretrain", "--pair_head", "cross"],
    ["--aux", "stars=DATA/stars-train.csv", "--sst_loss", "oll1.5", "--limit", 0.5]]


def main(argv):
    """multitask_classifier.py without its curves, whose drawing takes longer than its training."""
    with mock.patch.object(multitask_classifier, "plot_curves"):
        multitask_classifier.main(argv)


def train(*words):
    """(exit status, what was printed)."""
    return quietly(main, *words)


def trained_in(folder, *words):
    """The folder, after a run with these flags ended well in it."""
    status, printed = train(*words, "--name", folder)
    assert status == 0, printed
    return folder


def folders(name):
    """Two folders for runs, of an undisturbed and of a disturbed one."""
    return [workspace() / "runs" / f"{name}-{kind}" for kind in ("whole", "disturbed")]


def saved(folder):
    """The epoch and step of a last.pt."""
    last = torch.load(folder / "last.pt", weights_only=True)
    return last["epoch"], last["step"]


def lines_without_speed(folder):
    """All lines of metrics.jsonl, to compare runs that were saved after the same steps."""
    return [{key: value for key, value in line.items() if not key.endswith("_per_second")}
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


# ---------------------------------------------------------------- killed

def test_a_killed_run_resumes_bit_identical():
    for n, words in enumerate(RESUMED):
        whole, killed = folders(f"resumed-{n}")
        trained_in(whole, *resumable(words))

        # killed twice; what was written after the last save is cut off
        for first, start in ((1, [*resumable(words), "--name", killed]), (2, ["--resume", killed])):
            killed_after(random.randrange(first, 6), main, *start)
            with open(killed / "metrics.jsonl", "a") as file:
                file.write('{"kind": "step", "torn')
        status, printed = train("--resume", killed)
        assert status == 0 and equal(whole, killed), (words, printed)
        assert lines_without_speed(whole) == lines_without_speed(killed), words


def test_a_run_killed_while_it_saves_resumes_bit_identical():
    """Also at the end of an epoch, where the best model and the metrics are written first."""
    words, real = resumable(["--gradvac"]), torch.save
    whole, killed = folders("killed-saving")
    trained_in(whole, *words)

    def killed_in_save(number, written):
        left = [number]

        def save(state, path):
            left[0] -= 1
            if left[0] > 0:
                return real(state, path)
            if written == "half":
                Path(path).write_bytes(b"half of it")
            elif written == "all":  # but not renamed
                real(state, path)
            raise Killed

        return mock.patch.object(torch, "save", save)

    # the first epoch has 6 saves, and a seventh at its end
    start = [*words, "--name", killed]
    for number, written, epoch_and_step in ((7, "nothing", (0, 6)), (1, "half", (0, 6)),
                                            (1, "all", (0, 6)), (2, "half", (1, 0))):
        was_killed = False
        with killed_in_save(number, written):
            try:
                train(*start)
            except Killed:
                was_killed = True
        assert was_killed and saved(killed) == epoch_and_step
        start = ["--resume", killed]
    status, printed = train("--resume", killed)
    assert status == 0 and equal(whole, killed), printed
    assert not list(killed.glob("*.part*"))


def test_a_run_killed_before_anything_was_saved_starts_over():
    """What came from another run is loaded again."""
    root = workspace()
    first, killed = run(steps=1)[2], root / "runs" / "killed-at-once"
    words = ["--init_from", first, "--option", "finetune", "--epochs", 1, "--epoch_length", 3,
             "--data_dir", root / "data", "--aux", f"stars={root / 'data' / 'stars-train.csv'}"]
    whole = trained_in(root / "runs" / "not-killed-at-once", *words)
    killed_after(0, main, *words, "--name", killed)
    assert not (killed / "last.pt").exists()
    status, printed = train("--resume", killed)
    assert status == 0 and equal(whole, killed), printed


def test_a_finished_run_is_left_as_it_is():
    folder, copy = finished(), copy_of_finished()
    status, printed = train("--resume", copy)
    assert status == 0 and equal(folder, copy), printed
    assert lines_without_speed(folder) == lines_without_speed(copy)


def test_kill_9_at_twenty_random_moments():
    needs_full()
    script, undisturbed = [sys.executable, multitask_classifier.__file__], {}
    for n in range(20):
        kind = n % len(RESUMED)
        whole, killed = workspace() / "runs" / f"kill-9-{kind}", folders(f"kill-9-{n}")[1]
        command = [*map(str, [*script, *resumable(RESUMED[kind]), "--epochs", 4])]
        if kind not in undisturbed:
            start = time.perf_counter()
            subprocess.run([*command, "--name", str(whole)], check=True, capture_output=True)
            undisturbed[kind] = time.perf_counter() - start

        process = subprocess.Popen([*command, "--name", str(killed)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while not killed.exists():
            time.sleep(0.01)
        time.sleep(random.random() * 0.4 * undisturbed[kind])
        process.kill()
        process.wait()
        subprocess.run([*script, "--resume", str(killed)], check=True, capture_output=True)
        assert equal(whole, killed), RESUMED[kind]


# ---------------------------------------------------------------- Ctrl-C

def ctrl_c_in(*steps):
    """Ctrl-C in these steps of a process, which counts its steps from 1."""
    count, real = [0], GradientBuffer.begin

    def begin(*args):
        count[0] += 1
        if count[0] in steps:
            signal.raise_signal(signal.SIGINT)
        real(*args)

    return mock.patch.object(GradientBuffer, "begin", begin)


def test_ctrl_c_ends_the_optimizer_step_and_saves():
    # optimizer steps end with steps 3, 6 and 7 of an epoch
    words = resumable(["--accumulate", 3, "--save_every", 100])
    whole, stopped = folders("ctrl-c")
    trained_in(whole, *words)

    start = [*words, "--name", stopped]
    for step, epoch_and_step in ((7, (1, 0)), (1, (1, 3)), (2, (1, 6))):
        with ctrl_c_in(step):
            status, printed = train(*start)
        last = printed.splitlines()[-1]
        assert status == 130 and "everything is saved; resume with: " in last, printed
        assert "--resume" in last and "Traceback" not in printed, printed
        assert saved(stopped) == epoch_and_step
        start = ["--resume", stopped]
    status, printed = train("--resume", stopped)
    assert status == 0 and equal(whole, stopped), printed


def test_ctrl_c_saves_where_it_also_ends_the_program_that_reads_the_output():
    """As in `... 2>&1 | tee log`."""
    folder = workspace() / "runs" / "beside-tee"
    words = resumable(["--save_every", 100, "--epoch_length", 10 ** 6])
    process = subprocess.Popen(
        [sys.executable, multitask_classifier.__file__, *map(str, words), "--name", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:  # until it trains
        assert process.poll() is None
        time.sleep(0.01)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and saved(folder) >= (0, 10)


def test_a_second_ctrl_c_stops_at_once():
    handler = signal.getsignal(signal.SIGINT)
    words = resumable(["--accumulate", 3, "--save_every", 100])
    folder = workspace() / "runs" / "stopped-at-once"
    with ctrl_c_in(8, 9):
        status, printed = train(*words, "--name", folder)
    assert status == 130 and "stopped at once" in printed.splitlines()[-1], printed
    assert saved(folder) == (1, 0), "the end of the first epoch"

    # a shell starts what is in the background with a handler of its own
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_prints_the_command_that_resumes():
    """As it is printed, in the directory where it is printed: also by a run that was resumed,
    elsewhere than it was started, with a path given anew."""
    root = workspace()
    data, folder = root / "ctrl-c's data", root / "runs" / "ctrl-c's run"
    shutil.copytree(root / "data", data)

    def stopped(*words):
        with ctrl_c_in(1), mock.patch.object(sys, "argv", ["../multitask_classifier.py"]):
            status, printed = train(*words)
        assert status == 130, printed
        command = printed.splitlines()[-1].split("resume with: ")[1]
        python, script, *resuming = shlex.split(command)
        assert (python, script) == ("python", "../multitask_classifier.py")
        return resuming

    with inside(data):
        words = stopped(*resumable([]), "--data_dir", ".", "--name", folder)
        assert words == ["--resume", os.path.relpath(folder)]
        assert stopped(*words) == words
    data.rename(root / "data of ctrl-c")
    with inside(folder.parent):
        words = stopped("--resume", folder.name, "--data_dir", "../data of ctrl-c")
        status, printed = train(*words)
    assert status == 0, printed


# ---------------------------------------------------------------- moved

def test_a_run_and_its_project_can_be_moved():
    """Started inside the project with relative paths, killed; project and run are renamed, and it
    is resumed from elsewhere, bit-identical to an undisturbed one."""
    root = workspace()
    old, new = root / "project", root / "project, renamed"
    (old / "runs").mkdir(parents=True)
    for name in ("tiny", "data"):
        shutil.copytree(root / name, old / name)
    words = ["--option", "finetune", "--model", "tiny", "--data_dir", "data",
             "--aux", "stars=data/stars-train.csv", "--sst_dev", "data/ids-sst-train.csv",
             "--sst_dev_out", "runs/sst.csv", "--epochs", 2, "--epoch_length", 3,
             "--batch_size", 4, "--save_every", 0]
    with mock.patch.object(flags_module, "PROJECT", old), inside(old):
        trained_in(old / "runs" / "whole", *words)
        killed_after(4, main, *words, "--name", old / "runs" / "killed")
        status, printed = quietly(
            pretrain_mlm.main, "--model", "tiny", "--data_dir", "data", "--text", "tiny/vocab.txt",
            "--epochs", 1, "--epoch_length", 2, "--out", "runs/mlm")
        assert status == 0, printed

    old.rename(new)
    (new / "runs" / "killed").rename(new / "a run")
    with mock.patch.object(flags_module, "PROJECT", new), inside(root):
        status, printed = train("--resume", f"{new.name}/a run")
        assert status == 0 and equal(new / "a run", new / "runs" / "whole"), printed
        status, printed = quietly(pretrain_mlm.main, "--resume", new / "runs" / "mlm")
        assert status == 0 and "mlm" in printed.splitlines()[-1], printed


MOVED = {"model": "new-tiny", "data_dir": "new-data", "init_from": "new-first",
         "aux": "stars=new-stars.csv", "sst_dev": "new-data/ids-sst-dev.csv",
         "sts_dev_out": "new-out/sts.csv"}


def started_with_paths_that_are_gone():
    """A folder with a killed and an undisturbed run and a pretraining run, all started with
    relative paths to what is named as in MOVED now."""
    root = Path(tempfile.mkdtemp(dir=workspace()))
    for name in ("tiny", "data"):
        shutil.copytree(workspace() / name, root / name)
    shutil.copyfile(root / "data" / "ids-sst-train.csv", root / "tiny" / "text.txt")
    shutil.copyfile(root / "data" / "stars-train.csv", root / "stars.csv")
    run(steps=1, name=str(root / "first"))
    elsewhere = root / "started here"
    for folder in (root / "out", elsewhere):
        folder.mkdir()

    with inside(elsewhere):
        words = ["--option", "finetune", "--model", "../tiny", "--data_dir", "../data",
                 "--init_from", "../first", "--aux", "stars=../stars.csv",
                 "--sst_dev", "../data/ids-sst-dev.csv", "--sts_dev_out", "../out/sts.csv",
                 "--epochs", 2, "--epoch_length", 3, "--batch_size", 4, "--save_every", 0]
        killed_after(4, main, *words, "--name", root / "killed")
        trained_in(root / "whole", *words)
        status, printed = quietly(
            pretrain_mlm.main, "--model", "../tiny", "--text", "../tiny/text.txt", "--epochs", 1,
            "--epoch_length", 2, "--out", "../mlm")
        assert status == 0, printed

    elsewhere.rmdir()
    for name in ("tiny", "data", "first", "stars.csv", "out"):
        (root / name).rename(root / f"new-{name}")
    return root


def test_a_path_that_is_gone_can_be_given_anew():
    root = started_with_paths_that_are_gone()
    given = [word for name, path in MOVED.items() for word in (f"--{name}", path)]
    with inside(root):
        # each that is left out is named, and no other
        for n, left_out in enumerate(MOVED):
            others = given[:2 * n] + given[2 * n + 2:]
            status, printed = train("--resume", "killed", *others)
            assert status == 2 and printed.count("\n") == 1 and "give the flag again" in printed
            assert [name for name in MOVED if f"(--{name}" in printed] == [left_out], printed
        status, printed = train("--resume", "killed")
        assert status == 2 and printed.count("\n") == 1, printed
        assert all(f"(--{name}" in printed for name in MOVED), printed

        # other data under a new path is detected
        status, printed = train("--resume", "killed", *given, "--sst_dev",
                                "new-data/ids-sst-train.csv")
        assert status == 2 and "not those that the run was started with" in printed, printed
        status, printed = train("--resume", "killed", *given)
        assert status == 0 and equal(root / "killed", root / "whole"), printed

        status, printed = quietly(pretrain_mlm.main, "--resume", "mlm")
        assert status == 2 and printed.count("\n") == 1, printed
        assert "(--model)" in printed and "(--text)" in printed, printed
        status, printed = quietly(pretrain_mlm.main, "--resume", "mlm", "--model", "new-tiny",
                                  "--text", "new-tiny/text.txt")
        assert status == 0, printed


# ---------------------------------------------------------------- what cannot be resumed

def finished():
    """The folder of a finished run."""
    folder = workspace() / "runs" / "finished"
    return folder if folder.exists() else trained_in(folder, *resumable([]))


def copy_of_finished():
    """A copy of it, to be changed."""
    folder = Path(tempfile.mkdtemp(dir=workspace())) / "run"
    return shutil.copytree(finished(), folder)


def check_not_resumed(part, folder, *words):
    """--resume ends with status 2 and one line that holds `part`, and leaves metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else None
    status, printed = train("--resume", folder, *words)
    assert status == 2 and part in printed.splitlines()[-1], printed
    assert "Traceback" not in printed
    assert (metrics.read_bytes() if metrics.exists() else None) == before, part


def test_a_flag_that_contradicts_the_run_is_rejected():
    folder = copy_of_finished()
    status, printed = train("--resume", folder, "--epochs", 2)  # as it is in the run
    assert status == 0, printed
    check_not_resumed("--lr is 0.0001 in the run", folder, "--lr", 1e-3)
    check_not_resumed("--epochs is 2 in the run", folder, "--epochs", 3)
    check_not_resumed("--smart is False in the run", folder, "--smart")
    check_not_resumed("no run to resume", workspace() / "nowhere")
    check_not_resumed("no run to resume", workspace() / "tiny")

    of_another_script = json.loads((folder / "args.json").read_text())
    of_another_script["out"] = of_another_script.pop("name")
    (folder / "args.json").write_text(json.dumps(of_another_script))
    check_not_resumed("was made by another script", folder)


def test_a_run_that_is_being_trained_is_not_resumed():
    try:
        import fcntl
    except ImportError as error:
        raise SkipTest("Windows") from error
    folder = copy_of_finished()
    with open(folder / "metrics.jsonl", "a") as file:  # as the process that trains it has it
        fcntl.flock(file, fcntl.LOCK_EX)
        check_not_resumed("another process is training this run", folder)
    assert train("--resume", folder)[0] == 0


def test_a_damaged_last_pt_is_rejected():
    folder = copy_of_finished()
    path = folder / "last.pt"
    whole = path.read_bytes()
    damaged = [b"", whole[:-1000], b"x" * 5000]
    for tenth in range(1, 10):  # one bit of one number
        flipped = bytearray(whole)
        flipped[tenth * len(whole) // 10] ^= 1
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        check_not_resumed("it is damaged, or holds more than that", folder)
    path.write_bytes(whole)
    assert train("--resume", folder)[0] == 0


def test_a_last_pt_of_something_else_is_rejected():
    folder, ran = copy_of_finished(), workspace() / "it-ran"
    path = folder / "last.pt"
    state = torch.load(path, weights_only=True)

    class Payload:
        def __reduce__(self):
            return open, (str(ran), "w")

    state["model"].popitem()
    for content, part in (
            ({"model": Payload()}, "holds more than that"),
            ({"model": {}}, "damaged, or holds more"),
            (torch.zeros(3), "damaged, or holds more"),
            ({"metrics": 0}, "last.pt is not what this script saves"),
            (state, "last.pt is not what this script saves")):
        torch.save(content, path)
        check_not_resumed(part, folder)
    assert not ran.exists(), "no code of a file is run"


def test_metrics_that_are_shorter_than_when_saved_are_rejected():
    folder = copy_of_finished()
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:40])
    check_not_resumed("is shorter than when last.pt was saved", folder)
    path.unlink()
    check_not_resumed("is shorter than when last.pt was saved", folder)


def test_changed_data_is_rejected():
    _, examples = three_task_model()
    before = data_digest({"sts": {"train": examples["sts"]}})
    examples["sts"].labels[3] += 0.25
    assert data_digest({"sts": {"train": examples["sts"]}}) != before, "another label"

    # the same path with other text, and another vocabulary
    root = workspace()
    data = shutil.copytree(root / "data", Path(tempfile.mkdtemp(dir=root)) / "data")
    encoder, name = copy_of_tiny(), Path(tempfile.mkdtemp(dir=root)) / "run"
    folder = trained_in(name, *resumable([]), "--data_dir", data, "--model", encoder)
    for path, old, new in ((data / "ids-sst-train.csv", " film", " movie"),
                           (encoder / "vocab.txt", "\ne\n", "\n\n")):
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        check_not_resumed("not those that the run was started with", folder)
        path.write_text(text, encoding="utf-8")
    assert train("--resume", folder)[0] == 0

    # also where the run was killed before it saved anything
    (folder / "last.pt").unlink()
    check_not_resumed("not those that the run was started with", folder, "--sst_train",
                      data / "ids-sst-dev.csv")


# ---------------------------------------------------------------- saving and metrics

def test_a_full_disk_leaves_the_last_good_checkpoint():
    """/dev/full has no room: writing the temporary file fails, and what was there stays."""
    words, real, saves = resumable([]), torch.save, []
    whole, disturbed = folders("full-disk")
    trained_in(whole, *words)

    def save(state, path):
        saves.append(path)
        if len(saves) == 4:
            Path(path).write_bytes(b"half of it")
            with open("/dev/full", "wb") as full:
                full.write(b"x" * 100000)
        real(state, path)

    with mock.patch.object(torch, "save", save):
        status, printed = train(*words, "--name", disturbed)
    last = printed.splitlines()[-1]
    assert status == 1 and "No space left on device" in last and "last.pt" in last, printed
    assert "Traceback" not in printed
    assert not list(disturbed.glob("*.part*")) and saved(disturbed) == (0, 3)
    status, printed = train("--resume", disturbed)
    assert status == 0 and equal(whole, disturbed), printed


def test_two_processes_may_write_a_file_at_once():
    path = Path(tempfile.mkdtemp(dir=workspace())) / "file"

    def slowly(part):
        part.write_text("first")
        with mock.patch.object(os, "getpid", lambda: -1):  # as another process would
            write_atomically(path, lambda part: part.write_text("second"))
        assert path.read_text() == "second"

    write_atomically(path, slowly)
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file"]

    def interrupted(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "first" and os.listdir(path.parent) == ["file"]


def test_an_error_without_a_message_is_named():
    def fail(argv):
        raise ConnectionResetError

    assert quietly(fail) == (1, f"{Path(sys.argv[0]).name}: ConnectionResetError\n")


def test_metrics_on_a_full_disk_are_an_error_that_names_the_file():
    of_run = Run(Path(tempfile.mkdtemp(dir=workspace())) / "run", {}, "digest")
    of_run.start()
    of_run.metrics.close()
    of_run.metrics = open("/dev/full", "w")
    raises(OSError, "/dev/full cannot be written (No space left on device)", of_run.log, "step")
    with contextlib.suppress(OSError):  # what is still in its buffer
        of_run.metrics.close()


def test_saving_is_due_after_minutes():
    of_run = Run(Path(tempfile.mkdtemp(dir=workspace())) / "run", {}, "digest")
    now = time.perf_counter()
    with mock.patch.object(time, "perf_counter", lambda: now):
        for seconds, minutes, due in ((0, 1, False), (59, 1, False), (61, 1, True),
                                      (299, 5, False), (301, 5, True), (0, 0, True)):
            of_run.saved_at = now - seconds
            assert of_run.due(minutes) == due, (seconds, minutes)
    of_run.start()
    of_run.saved_at = now - 301
    of_run.save({})
    assert not of_run.due(5), "counted from the last save"


def test_a_step_line_has_means_over_examples_and_speed_per_second():
    now, of_run = [100.0], mock.Mock()
    with mock.patch.object(time, "perf_counter", lambda: now[0]):
        log = StepLog(of_run, ["sst", "para"], {"smart": SimpleNamespace(kinds=["sst"])}, "cpu")

        def add(task, loss, examples, tokens):
            batch = SimpleNamespace(attention_mask=torch.ones(tokens))
            log.add(task, torch.tensor(loss), examples, batch)

        # the mean of the examples' losses; none for a task that had no example
        for examples, tokens in ((1, 100), (3, 300)):
            add("sst", float(examples), examples, tokens)
            log.end_step()
        now[0] += 8
        log.write(1, 2, lr=0.5)
        of_run.log.assert_called_once_with(
            "step", epoch=1, step=2, losses={"sst": 10 / 4}, lr=0.5, tokens_per_second=50,
            steps_per_second=0.25)

        # since the line before
        of_run.log.reset_mock()
        add("para", 5.0, 2, 20)
        log.end_step()
        now[0] += 2
        log.write(1, 3)
        of_run.log.assert_called_once_with("step", epoch=1, step=3, losses={"para": 5.0},
                                           tokens_per_second=10, steps_per_second=0.5)
        log.write(1, 3)
        assert of_run.log.call_count == 1, "no line without a step"


def test_the_speed_of_steps_leaves_out_evaluations():
    evaluate = multitask_classifier.evaluate

    def slowly(*arguments):
        time.sleep(5)
        return evaluate(*arguments)

    with mock.patch.object(multitask_classifier, "evaluate", slowly):
        status, printed, folder = run("--epochs", 2)  # of two steps, with a line each
    assert status == 0, printed
    first, second = (line["steps_per_second"] for line in read_metrics(folder, "step"))
    assert second > 2 / 5, (first, second)
