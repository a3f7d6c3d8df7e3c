"""The commands of the README and of results/, the tables and averages of the recorded runs."""
import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy.stats import ttest_ind

import multitask_classifier
import pretrain_mlm
from data.batches import collate
from data.tasks import TASKS, read_examples
from data.tokenizer import tokenize
from multitask_classifier import MultitaskBERT
from results.scores import difference, examples_seen, spread, verdict, write_tables
from results.study import command_of, commands_of, train
from support import flags, plots
from support.evaluation import predict
from support.files import InputError
from support.run import RunFailed, read_metrics
from tests.helpers import (DEMO, PROJECT, captured, needs_full, quietly, raises, run, same,
                           three_task_model, trained, workspace)

RESULTS = PROJECT / "results"
SCRIPTS = {"multitask_classifier.py": multitask_classifier, "pretrain_mlm.py": pretrain_mlm,
           "support/plots.py": plots}


@functools.cache
def script(name):
    """A script of results/, as a module. name: systems/systems"""
    specification = importlib.util.spec_from_file_location(Path(name).name,
                                                           RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[Path(name).name] = module  # dataclasses look there
    specification.loader.exec_module(module)
    return module


def readme():
    return (PROJECT / "README.md").read_text(encoding="utf-8")


def parsed(command):
    """The checked flags of a command of multitask_classifier.py, in words."""
    python, name, *argv = command
    assert (python, name) == ("python", "multitask_classifier.py")
    with mock.patch.object(flags, "get_device", lambda use_gpu, amp: "cpu"):  # as on any machine
        return flags.parse_flags(multitask_classifier.get_parser, flags.check_training_flags, argv,
                                 "--name")


# ---------------------------------------------------------------- the commands of the reports

def shortened(command, name):
    """(script, flags, the file it leaves) of a command, cut to the tiny encoder and a few steps of
    the demo sets. name: of the run's folder, where the command gives none."""
    root, tiny, data = workspace() / "commands", workspace() / "tiny", workspace() / "data"
    command = command.replace("--name ", "--name runs/").replace("runs/", f"{root}/")
    command = command.replace("bert-base-uncased", str(tiny)).replace("data/demo", str(data))
    python, called, *argv = command.split()
    assert python == "python"
    if called == "support/plots.py":
        return called, argv, Path(argv[-1])

    argv += ["--data_dir", str(data), "--epochs", "1"]
    if called == "pretrain_mlm.py":
        argv += ["--epoch_length", "2", "--batch_size", "4"]
        return called, argv, Path(argv[argv.index("--out") + 1]) / "metrics.jsonl"
    if "--model" not in argv and "--init_from" not in argv:
        argv += ["--model", str(tiny)]
    if "--name" not in argv:
        argv += ["--name", f"{root}/{name}"]
    if "shortest" not in argv:
        argv += ["--epoch_length", "6"]
    return called, argv, Path(argv[argv.index("--name") + 1]) / "metrics.jsonl"


def test_every_system_of_the_reports_has_commands():
    systems = [f"{report}{letter}" for report, letters in enumerate(
        ("abcdef", "abcdefg", "abcde", "abcdef", "abcdefg"), start=1) for letter in letters]
    assert sorted(script("systems/reports").REPORTS) == systems
    known = script("systems/systems").SYSTEMS
    assert {name[:2] for name in known} == set(systems) - {"2g"}


def test_every_command_of_the_reports_runs():
    # in the order of the table, since some start from the runs of others
    done = set()
    for system, (_, commands) in script("systems/reports").REPORTS.items():
        for i, command in enumerate(commands):
            if command in done:
                continue
            done.add(command)
            called, argv, leaves = shortened(command, f"{system}-{i}")
            status, printed = quietly(SCRIPTS[called].main, *argv)
            assert status == 0 and leaves.exists(), (system, command, printed)
            if leaves.suffix == ".jsonl":
                assert read_metrics(leaves.parent, "evaluation"), (system, command)


def test_show_prints_commands_that_are_understood():
    systems = script("systems/systems")
    for name in (*systems.SYSTEMS, "2g"):
        _, printed = captured(systems.show, systems.STUDY, name, 1)
        commands = [line for line in printed.splitlines() if not line.startswith("#")]
        assert len(commands) >= (1 if name in systems.NOT_IN_THE_REPORTS else 2), name
        for command in commands:
            _, called, *argv = command.replace("DATA", "data").split()
            if called != "support/plots.py":
                SCRIPTS[called].get_parser().parse_args(argv)


def test_every_command_of_the_pages_is_understood():
    """Those in the README's and the results' blocks of code and text, with DIR, RATE and the like
    filled in."""
    values = {"DIR": str(DEMO), "RATE": "1e-4", "SENTENCE ...": "sentence", "FILE": "file",
              "runs/NAME": str(workspace())}
    pages = [PROJECT / "README.md", *RESULTS.glob("**/README.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    # an explanation may follow behind some spaces
    commands = [line.split("   ")[0] for line in re.findall("^python .*", blocks, re.MULTILINE)]
    outside = re.sub("^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    commands += re.findall("`(python [^`]*)`", outside.replace("\n", " "))
    understood = 0
    for command in commands:
        for word, value in values.items():
            command = re.sub(rf"\b{re.escape(word)}(?!\w)", value, command)
        _, called, *argv = shlex.split(command, comments=True)
        if called in ("multitask_classifier.py", "pretrain_mlm.py") and "--help" not in argv:
            SCRIPTS[called].get_parser().parse_args(argv)
            understood += 1
        elif called != "-c":
            assert (PROJECT / called).is_file(), command
    assert understood > 10


def test_the_first_command_of_the_readme_learns():
    """With the default encoder, which is fetched once."""
    needs_full()
    folder = workspace() / "demo"
    status, printed = quietly(multitask_classifier.main, "--option", "finetune", "--pcgrad",
                              "--data_dir", DEMO, "--name", folder)
    assert status == 0, printed
    best = max(read_metrics(folder, "evaluation"), key=lambda line: line["overall_2023"])["dev"]
    assert best["sst"] >= 0.40 and best["para"] >= 0.75 and best["sts"] >= 0.70, printed


# ---------------------------------------------------------------- the recorded commands

def test_each_recorded_command_gives_the_recorded_flags():
    folders = [path.parent for path in sorted(RESULTS.glob("**/command.txt"))]
    assert len(folders) > 30
    for folder in folders:
        *_, command = (folder / "command.txt").read_text().replace("DATA", "data").splitlines()
        args = vars(parsed(command.split()))
        args = json.loads(json.dumps(args, default=str))
        recorded = json.loads((folder / "args.json").read_text().replace("DATA", "data"))
        # the machine's, and how the command was typed
        common = args.keys() & recorded.keys() - {"device", "argv", "folder", "model_is_folder"}
        assert len(common) > 40, folder
        for name in common:
            assert args[name] == recorded[name], (folder, name, args[name], recorded[name])


def test_the_commands_of_studies_are_understood():
    """In commands.txt: a command, or the flags that a file adds to the first one."""
    for path in sorted(RESULTS.glob("**/commands.txt")):
        lines, first, understood = path.read_text().splitlines(), None, 0
        for line in lines:
            file, _, rest = line.partition("python ")
            if rest:
                _, called, *argv = f"python {rest.removesuffix(', and')}".split()
            elif re.match(r"[\w-]+\.jsonl +--", line) and first:
                called, argv = "multitask_classifier.py", [*first, *line.split()[1:]]
            else:
                continue
            argv = ["1e-4" if word == "RATE" else word for word in argv]
            SCRIPTS[called].get_parser().parse_args(argv)
            first, understood = first or argv, understood + 1
        assert understood > 0, path


def assert_budgets(study, sizes, budget_of):
    """Each command of a study is understood, and trains on that many examples, to 1 %."""
    for name, system in study.systems.items():
        if not system.same_as:
            command = command_of(study, name, 3, machine="").replace("DATA", "data")
            args = parsed(command.split())
            assert (args.seed, args.name) == (3, f"{study.folder.name}/{name}-3")
            sst = {"sst": 150_962} if args.sst_train else {}  # the phrases instead of the sentences
            seen = sum(examples_seen(vars(args), {**sizes, **sst}).values())
            assert math.isclose(seen, budget_of(name, system), rel_tol=0.01), (name, seen)
        assert system.start in (None, *study.systems, *study.pretraining), name
    for name in study.pretraining:
        pretrain_mlm.get_parser().parse_args(command_of(study, name, 3).split()[2:])


def test_each_system_trains_on_the_examples_of_its_budget():
    systems = script("systems/systems")
    # Yelp's 4 examples per update come on top of the 60
    assert_budgets(systems.STUDY, systems.SIZES,
                   lambda name, system: 32_000 if "yelp" in system.flags else 30_000)


def test_each_system_of_the_search_trains_on_the_examples_of_its_budget():
    sizes = {"sst": 8544, "para": 16169, "sts": 6040}
    budgets = {"default+longer": 120_000, "longer+pal": 120_000}
    assert_budgets(script("search/search").STUDY, sizes, lambda name, system: 30_000
                   if name.startswith("5c") else budgets.get(name, 60_000))


def test_each_system_of_the_recipe_trains_on_the_examples_of_its_budget():
    budgets = {"full": 626_000, "annealed": 610_000, "short+batches": 126_700,
               "short+sentences": 148_200, "cfimdb": 5_121}
    assert_budgets(script("recipe/recipe").STUDY, script("systems/systems").SIZES,
                   lambda name, system: budgets.get(name, 151_000))


def test_each_record_was_made_by_the_command_of_its_system():
    for study in (script(name).STUDY
                  for name in ("systems/systems", "search/search", "recipe/recipe")):
        folders = [path.parent for path in study.folder.glob("*/command.txt")]
        assert folders
        for folder in folders:
            name, _, seed = folder.name.rpartition("-")
            commands = (folder / "command.txt").read_text().splitlines()
            machine = "".join(f" {flag}" for flag in ("--use_gpu", "--amp")
                              if any(flag in command.split() for command in commands))
            assert commands == list(commands_of(study, name, seed, machine).values()), folder


# ---------------------------------------------------------------- tables

def test_the_pages_have_the_tables_that_the_records_give():
    systems = script("systems/tables")
    found = systems.read_all()
    for name, tables in ((".", {"scores": systems.front_table(found)}),
                         ("results/systems", systems.all_tables(found)),
                         ("results/search", script("search/search").tables()),
                         ("results/recipe", script("recipe/recipe").tables())):
        page = (PROJECT / name / "README.md").read_text(encoding="utf-8")
        for marker, lines in tables.items():
            assert "\n".join([f"<!-- {marker} -->", *lines, ""]) in page, (name, marker)


def test_the_means_of_the_recipe_are_of_recorded_runs():
    for path in (RESULTS / "recipe").glob("mean-*.json"):
        scores = json.loads(path.read_text())
        *runs, mean = scores
        seed = path.stem.removeprefix("mean-")
        assert runs == [f"runs/recipe/{name}-{seed}" for name in script("recipe/recipe").RECIPE]
        for name in runs:
            record = read_metrics(RESULTS / name.removeprefix("runs/"), "evaluation")
            best = max(record, key=lambda line: line["overall_2023"])
            for task, score in best["dev"].items():
                assert math.isclose(scores[name][task], score, abs_tol=1e-6), (path, name, task)


def rows_with_a_record(page):
    """[(numbers of a table's row, its record)], of the rows whose last cell is a file or folder."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        *cells, record = [cell.strip() for cell in line.strip("|").split("|")]
        path = page.parent / record
        if line.startswith("|") and record and path.exists():
            numbers = re.findall(r"-?\.\d{3}\b", " ".join(cells[1:]))  # not those of the flags
            found.append((numbers, path if path.is_file() else path / "metrics.jsonl"))
    return found


def test_the_tables_of_single_runs_have_the_numbers_of_their_records():
    for study, count in (("choices", 19), ("smart", 8), ("mlm", 3)):
        rows = rows_with_a_record(RESULTS / study / "README.md")
        assert len(rows) == count, study
        for numbers, path in rows:
            best = max((line for line in map(json.loads, path.read_text().splitlines())
                        if "dev" in line), key=lambda line: sum(line["dev"].values()))
            expected = []
            for task in ("sst", "para", "sts"):
                expected.append(best["dev"][task])
                if study != "choices":  # train minus dev
                    expected.append(best["train"][task] - best["dev"][task])
            expected.append(sum(best["dev"].values()) / 3)
            for number, value in zip(numbers, expected, strict=True):
                assert abs(float(number) - value) < 6e-4, (path, number, value)


def write_record(root, name, seed, mean):
    """A record with two evaluations: the first has the best mean on dev, the second the best sst
    there, and all the best scores on train."""
    trained = ["sst"] if name in ("1a", "3b") else ["sst", "para", "sts"]
    evaluations = [
        {"dev": {"sst": mean - .1, "para": mean, "sts": mean + .1}, "train": .8},
        {"dev": {"sst": mean, "para": mean - .2, "sts": mean}, "train": .9}]
    folder = root / f"{name}-{seed}"
    folder.mkdir()
    heads = {"sts": "cosine" if name in ("3b", "3d") else "uv_diff"}
    (folder / "args.json").write_text(json.dumps({
        "trained": trained, "pair_head": heads, "limit": {"sst": 0.5}, "schedule": "round_robin",
        "batch_size": dict.fromkeys(trained, 20), "epoch_length": 250, "epochs": 2, "seed": seed,
        "upsample": False}))
    with open(folder / "metrics.jsonl", "w") as file:
        for step, line in enumerate(evaluations, start=1):
            line["train"] = dict.fromkeys(line["dev"], line["train"])
            line["f1"] = {"sst": {"macro": 0.3, **{str(label): step / 10 for label in range(5)}},
                          "para": {"positive": 0.7}}
            line["overall_2023"] = sum(line["dev"].values()) / 3
            file.write(json.dumps({"kind": "evaluation", "step": step, **line}) + "\n")


def test_the_tables_hold_what_the_records_hold():
    root = Path(tempfile.mkdtemp(dir=workspace()))
    for name, *means in (("1a", .41, .43), ("1b", .50, .52), ("1d", .60, .62), ("3b", .42),
                         ("3d", .52), ("4b", .10, .30), ("default", .50, .52),
                         ("default+pal", .53), ("default+rate", .60)):
        for seed, mean in enumerate(means, start=1):
            write_record(root, name, seed, mean)
    systems = script("systems/tables")
    tables = {**systems.all_tables(systems.read_all(root)), **script("search/search").tables(root)}
    lines = {line for table in tables.values() for line in table}
    # a claim without its last cell, the conclusion in words
    lines |= {line.rsplit("|", 2)[0] + "|" for line in tables["claims"]}
    for line in (
            # a system on sentiment alone is selected by it, and the best epoch is its second
            "| 1a | sentiment alone | 10.0 / - / - | 2 | 0.420 ± 0.014 | (0.220 ± 0.014) | "
            "(0.420 ± 0.014) |  | 0.416 / 0.376 / 0.019 |",
            "| 2a | sentiment alone | 10.0 / - / - | 2 | 0.420 ± 0.014 |  |  |  | 0.511 / - / - |",
            "| 1d | 1b with PCGrad | 10.0 / 10.0 / 10.0 | 2 | 0.510 ± 0.014 | 0.610 ± 0.014 | "
            "0.710 ± 0.014 | 0.610 ± 0.014 | 0.485 / 0.840 / 0.660 |",
            # without the frozen 4b
            "| standard deviation over seeds | 0.0141 | 0.0141 | 0.0141 | 0.0141 |",
            # 1a, 2a and 2b are one run
            "| degrees of freedom | 3 | 2 | 2 | 2 |",
            # 3.18 and 4.30, the 97.5 % points of t with 3 and 2 degrees of freedom, times .0141
            "| 1 | gradient surgery adds half a point overall | 1b, 1d | sst +0.000<br>para -0.013"
            "<br>sts +0.025<br>overall_2023 +0.004 | sst **+0.100** [+0.055, +0.145]<br>para "
            "**+0.100** [+0.039, +0.161]<br>sts **+0.100** [+0.039, +0.161]<br>"
            "overall_2023 **+0.100** [+0.039, +0.161] |",
            "| 1 | training on all three tasks is far better than on sentiment alone | 1a, 1b | "
            "sst +0.069 | sst -0.010 [-0.055, +0.035] |",
            # for sts a cosine, which counts without training; both best at .42, its second epoch
            "| 3 | training on the pair tasks too does not surpass sentiment alone | "
            "3b, 3d | sst -0.029<br>sts +0.250 | sst +0.000 [-0.064, +0.064]<br>sts **+0.200** "
            "[+0.114, +0.286] |",
            "| default+pal | PAL | 1 | 0.430 (0.800) | 0.530 (0.800) | 0.630 (0.800) | 0.530 | "
            "+0.020 [-0.200, +0.240] |"):
        assert line in lines, line


def test_a_run_of_another_command_is_not_taken_for_this_one():
    folder = Path(tempfile.mkdtemp(dir=workspace())) / "1b-1"
    folder.mkdir()
    (folder / "environment.json").touch()  # the run is complete
    command = "python multitask_classifier.py --lr 2e-4 --data_dir DATA"
    folder.with_name("1b-1.txt").write_text(command.replace("DATA", "here"))
    train(command, folder, Path("here"))
    for other, data_dir in ((command, "there"), (f"{command} --amp", "here")):
        raises(InputError, "is a run of another command", train, other, folder, Path(data_dir))
    folder.with_name("1b-1.txt").unlink()  # a run that somebody has typed
    raises(InputError, "is a run of another command", train, command, folder, Path("here"))


def test_ctrl_c_leaves_a_run_the_time_to_save():
    """At a terminal Ctrl-C interrupts a study and the command that it runs."""
    root = Path(tempfile.mkdtemp(dir=workspace()))
    (root / "slow.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "def save(*_):\n    time.sleep(1)\n    Path(sys.argv[1]).touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\nprint('ready', flush=True)\ntime.sleep(60)\n")
    code = ("from pathlib import Path\nfrom results.study import train\n"
            f"train('python {root}/slow.py {root}/saved', Path('{root}/run-1'), Path('data'))")
    study = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE,
                             text=True, start_new_session=True)
    while study.stdout.readline() != "ready\n":
        assert study.poll() is None
    os.killpg(study.pid, signal.SIGINT)
    assert study.wait() == 130 and (root / "saved").exists()
    study.stdout.close()


def test_a_command_that_was_killed_is_named():
    root = Path(tempfile.mkdtemp(dir=workspace()))
    (root / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with contextlib.redirect_stdout(io.StringIO()):
        raises(RunFailed, "was killed by signal 9", train, f"python {root}/killed.py",
               root / "run-1", Path("data"))


def test_with_two_systems_significance_is_that_of_students_test():
    generator, found = np.random.default_rng(0), set()
    for _ in range(200):
        one, other = generator.normal(0, 1, 3).tolist(), generator.normal(1.5, 1, 4).tolist()
        here, least = difference(other, one, *spread([one, other]))
        significant = ttest_ind(one, other).pvalue < 0.05
        assert ("**" in verdict(here, least)) == significant
        low, high = map(float, re.search(r"\[(.*), (.*)\]", verdict(here, least)).groups())
        assert np.allclose((low, high), ttest_ind(other, one).confidence_interval(), atol=6e-4)
        found.add(bool(significant))
    assert found == {True, False}


def test_a_table_is_written_below_its_marker():
    page = Path(tempfile.mkdtemp(dir=workspace())) / "page.md"
    page.write_text("text\n<!-- a -->\n| old |\n| old |\n\ntext | of pipes\n<!-- b -->\n")
    write_tables(page, {"a": ["| new |"], "b": ["| 1 |", "| 2 |"]})
    assert page.read_text() == ("text\n<!-- a -->\n| new |\n\ntext | of pipes\n<!-- b -->\n"
                                "| 1 |\n| 2 |\n")
    raises(ValueError, "no line <!-- c -->", write_tables, page, {"c": []})


# ---------------------------------------------------------------- averages, SMART's released code

def averages_of(*folders, out=()):
    """{what: its scores} that results/average.py prints."""
    _, printed = captured(script("average").main, [*map(str, folders), "--data_dir",
                                                   str(workspace() / "data"), *out])
    lines = [line for line in printed.splitlines() if "overall_2023" in line]
    return dict(line.split(": ") for line in lines)


@functools.cache
def two_runs():
    return [run("--pair_head", "para=cross,sts=cosine", "--seed", seed, steps=4)[2]
            for seed in (1, 2)]


def mean_similarity(folders, split):
    """The labels of sts, its ids, and the mean of the runs' similarities."""
    similarity = 0
    for folder in folders:
        model = MultitaskBERT.load(folder)
        path = workspace() / "data" / TASKS["sts"].filename(split)
        examples = read_examples(path, TASKS["sts"], labelled=split != "test")
        examples = tokenize(examples, model.tokenizer, 64, model.pair_head["sts"] == "cross")
        similarity = similarity + predict(model, "sts", examples)[:, 0] / len(folders)
    return examples.labels, examples.ids, similarity


def test_average_py_has_the_runs_scores_and_those_of_their_mean_outputs():
    scores = averages_of(*two_runs())
    for folder in two_runs():
        best = max(read_metrics(folder, "evaluation"), key=lambda line: line["overall_2023"])
        expected = f"sts {best['dev']['sts']:.3f}  overall_2023 {best['overall_2023']:.3f}"
        assert expected in scores[str(folder)]
    labels, _, similarity = mean_similarity(two_runs(), "dev")
    assert f"sts {np.corrcoef(similarity, labels)[0, 1]:.3f}" in scores["the mean of their outputs"]


def test_runs_with_unlike_heads_have_mean_outputs_but_no_mean_weights():
    folders = [two_runs()[0], run("--pair_head", "cross", steps=4)[2]]
    out = Path(tempfile.mkdtemp(dir=workspace())) / "mean"
    scores = averages_of(*folders, out=("--out", str(out)))
    assert list(scores) == [*map(str, folders), "the mean of their outputs"]
    labels, _, similarity = mean_similarity(folders, "dev")
    r = np.corrcoef(similarity, labels)[0, 1]
    kept = json.loads((out / "scores.json").read_text())["the mean of their outputs"]
    assert abs(kept["sts"] - r) < 1e-6 and f"sts {r:.3f}" in scores["the mean of their outputs"]

    # one prediction of the mean per id of the test file
    _, ids, similarity = mean_similarity(folders, "test")
    header, *lines = (out / "sts-test-output.csv").read_text().splitlines()
    assert [line.split(" , ")[0] for line in lines] == list(ids)
    np.testing.assert_allclose([float(line.split(" , ")[1]) for line in lines], similarity,
                               rtol=1e-5)
    raises(InputError, "exists already", averages_of, *folders, out=("--out", str(out)))
    raises(InputError, "other tasks", averages_of, folders[0],
           run("--tasks", "sst", steps=4)[2])


def test_the_mean_of_weights_is_a_model_with_the_mean_weights():
    scores = averages_of(*two_runs())
    models = [MultitaskBERT.load(folder) for folder in two_runs()]
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()}
              for model in models]
    mean = script("average").mean_of_weights(models)
    for name, tensor in mean.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)

    averaged = shutil.copytree(two_runs()[0], Path(tempfile.mkdtemp(dir=workspace())) / "averaged")
    mean.save(averaged, two_runs()[0])
    assert averages_of(averaged)[str(averaged)] == scores["the mean of their weights"]


def test_a_constant_added_to_the_logits_of_classes_leaves_the_mean_output():
    p = np.log([[.5, .25, .25]])
    logits = [{"sst": p + shift, "para": np.array([[z]])} for shift, z in ((0, 1.), (7, 3.))]
    means = script("average").mean_of_outputs(logits)
    np.testing.assert_allclose(means["sst"], p)
    assert means["para"] == 2.0


def test_the_released_codes_perturbation_is_the_written_out_one():
    released = script("smart/authors").ReleasedCode({"sts": "regression"}, sigma=0.1)
    model, examples = three_task_model()
    model.heads["sts"].linear.weight.data.mul_(1000)  # for a gradient that is large enough to see
    batch = collate(examples["sts"], np.arange(5))
    mask = batch.attention_mask.unsqueeze(-1)  # (S, L, 1)
    torch.manual_seed(3)
    logits = model.logits("sts", batch)

    torch.manual_seed(4)
    perturbation = released.adversarial_perturbation(model, "sts", batch, logits, seed=3)
    torch.manual_seed(4)
    noise = (0.1 * torch.randn(*mask.shape[:2], 16) * mask).requires_grad_()
    torch.manual_seed(3)
    (model.logits("sts", batch, noise) - logits.detach()).square().sum().backward()
    moved = noise.detach() + 1e-3 * noise.grad
    assert (1e-3 * noise.grad).abs().max() > 1e-5, "else its sign has no effect"
    expected = moved / (moved.abs().amax(dim=-1, keepdim=True) + 1e-6) * mask
    assert (perturbation - expected).abs().max() < 1e-6
    assert not perturbation[batch.attention_mask == 0].any()


def test_the_released_codes_perturbation_is_used_in_training():
    released, flags_of_smart = script("smart/authors").ReleasedCode, ("--smart", "--lr", 1e-3)
    with mock.patch.object(multitask_classifier, "Smoothness", released):
        theirs = trained(*flags_of_smart)
    assert not same(theirs, trained(*flags_of_smart))
