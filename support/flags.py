"""Types of flags, the flags of a resumed run, and the checks of multitask_classifier.py's flags
against each other. The flags themselves are in the scripts that have them."""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

from torch import nn

from data.batches import ONE_TASK_PER_STEP
from data.download import DEFAULT_ENCODER
from data.tasks import TASKS, task_names
from support.devices import get_device
from support.files import InputError

PROJECT = Path(__file__).resolve().parents[1]
PAIR_HEADS = ("cross", "uv", "uv_diff", "cosine")
SST_LOSSES = {"ce": None, "oll1": 1.0, "oll1.5": 1.5, "oll2": 2.0}  # ordinal log loss: its alpha
DEFAULT_BATCH_SIZE = {"sst": 16, "para": 32, "sts": 12, "cfimdb": 8}
# the settings of a switch, with the papers' values; beta None is the paper's schedule
SETTINGS = {
    "pal": {"size": 204, "g": "attention"},
    "smart": {"weight": 5.0, "eps": 1e-5, "sigma": 1e-5, "step_size": 1e-3, "steps": 1,
              "norm": "inf", "tasks": None},
    "proximal": {"mu": 1.0, "beta": None}}
TASK_FILES = ("train", "dev", "test", "dev_out", "test_out")
PATH_FLAGS = ("data_dir", "model", "init_from", "text",
              *(f"{task}_{kind}" for task in TASKS for kind in TASK_FILES))  # and --aux


# ---------------------------------------------------------------- types of flags

class Parser(argparse.ArgumentParser):
    """Errors are one line without the usage; the help shows the defaults."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        raise InputError(message)

    def parse_known_args(self, args=None, namespace=None):
        # Python passes the bytes of an argument that are not text as lone surrogates, which neither
        # the tokenizer nor the files of weights accept
        for word in sys.argv[1:] if args is None else args:
            if not is_text(word):
                self.error(f"argument {word!a} is not valid text; give it as UTF-8")
        return super().parse_known_args(args, namespace)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows no default of switches, and none where a flag is simply not given."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def is_text(string):
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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


def per_task(convert):
    """A flag's type: one value for all tasks, or NAME=value,NAME=value as a dict."""
    def parse(text):
        if "=" not in text:
            return convert(text)
        values = {}
        for part in text.split(","):
            name, equals, value = map(str.strip, part.partition("="))
            if not equals or name in values:
                raise argparse.ArgumentTypeError(f"{text!r}: {part!r} is not one more NAME=value")
            values[name] = convert(value)
        return values
    return parse


def name_and_file(text):
    """A flag's type: NAME=FILE as (name, file); FILE may hold commas and equals signs."""
    name, _, file = text.partition("=")
    if not name.strip() or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name.strip(), file


def for_each(value, tasks, flag):
    """A flag's value as {task: value}. Raises InputError for a task it does not apply to, or one
    left without a value."""
    if not isinstance(value, dict):
        return dict.fromkeys(tasks, value)
    for name in [*value, *tasks]:
        if name not in tasks:
            raise InputError(f"argument {flag}: {name!r} is none of the tasks it applies to here "
                             f"({', '.join(tasks)})")
        if name not in value:
            raise InputError(f"argument {flag}: no value for {name}")
    return {name: value[name] for name in tasks}


# ---------------------------------------------------------------- new and resumed runs

def parse_flags(get_parser, check, argv, folder_flag):
    """The flags of a new run, or of the run that --resume names, checked by the script's `check`.

    folder_flag: the flag that names the run's folder, --name or --out. Raises InputError.
    """
    args = get_parser().parse_args(argv)
    if args.resume is not None:
        return resumed(get_parser(), check, argv, folder_flag)

    # what --resume needs: how and where the run was started; relative to the project where it is
    # inside, so that the project can be moved
    folder = Path.cwd()
    inside = folder.is_relative_to(PROJECT)
    args.argv, args.folder = argv, os.path.relpath(folder, PROJECT) if inside else str(folder)
    args.model_is_folder = args.model is not None and Path(args.model).is_dir()
    return check(args)


def resumed(parser, check, argv, folder_flag):
    """The flags of the run that --resume in argv names.

    Of the other flags --save_every is used, and paths, since what a run was started with may have
    been moved; `Run` detects other data by its digest. Raises InputError where one contradicts the
    run's, or a path does not exist any more.
    """
    # parsed with None for every default, so that what is not None was typed
    untyped = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    typed = vars(parser.parse_args(argv, untyped)).items()
    given = {name: value for name, value in typed if value is not None}
    folder = given.pop("resume")

    # the run is in the folder that is given, wherever it was when it was started
    try:
        saved = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))
        of_run = [*map(str, saved["argv"]), folder_flag, str(Path(folder).absolute())]
        started_in, model_is_folder = PROJECT / saved["folder"], bool(saved["model_is_folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder}: no run to resume ({type(error).__name__} in its "
                         "args.json); name the run's folder, as in runs/NAME") from None
    if folder_flag.strip("-") not in saved:
        raise InputError(f"--resume {folder}: this run was made by another script; resume it with "
                         "that one")

    # the run's flags as they were, and with the new paths and what was typed now
    try:
        before = check(parser.parse_args(of_run))
    except InputError as error:  # a GPU, for example
        raise InputError(f"--resume {folder}: this machine lacks what the run was started with "
                         f"({error})") from None
    args = parser.parse_args(of_run)
    given_aux = dict(given.pop("aux", []))
    missing = take_paths(args, started_in, given, given_aux, model_is_folder)
    if missing:
        raise InputError(f"--resume {folder}: the run was started with {', '.join(missing)}, which "
                         "does not exist any more; give the flag again with the new path")
    vars(args).update(given)
    args = check(args)

    differing = [f"--{name} is {shown(vars(before)[name])} in the run" for name in given
                 if name not in ("save_every", *PATH_FLAGS)
                 and vars(before)[name] != vars(args)[name]]
    differing += [f"--aux {name} is not in the run" for name in given_aux if name not in args.aux]
    if differing:
        raise InputError(f"--resume {folder}: {'; '.join(differing)}: leave it out, or start a new "
                         "run")
    args.resume, args.argv = True, argv
    return args


def shown(value):
    """A flag's value in a message."""
    return repr(str(value) if isinstance(value, Path) else value)


def take_paths(args, folder, given, given_aux, model_is_folder):
    """Let relative paths among a run's flags start at `folder`, where it was started. Returns those
    that do not exist and are not given anew: ["PATH (--data_dir)", ...]."""
    missing = []
    for name in PATH_FLAGS:
        saved = getattr(args, name, None)
        if name in given or saved is None or (name == "model" and not model_is_folder):
            continue
        path = folder / saved
        setattr(args, name, type(saved)(path))
        if not (path.parent.is_dir() if name.endswith("_out") else path.exists()):
            missing.append(f"{path} (--{name})")

    aux = [(name, given_aux.get(name, folder / path))
           for name, path in getattr(args, "aux", None) or []]
    missing += [f"{path} (--aux {name})" for name, path in aux
                if name not in given_aux and not Path(path).exists()]
    if aux:
        args.aux = [(name, str(path)) for name, path in aux]
    return missing


# ---------------------------------------------------------------- checks of the training flags

def check_training_flags(args):
    """Check the flags of multitask_classifier.py against each other, and fill in every default.
    Raises InputError."""
    check_tasks(args)
    check_schedule(args)
    check_heads(args)
    for switch, settings in SETTINGS.items():
        check_settings(args, switch, settings)
    check_surgery(args)
    check_smart(args)
    if args.lr is None:
        args.lr = 1e-4 if args.option == "finetune" else 1e-3

    args.device = get_device(args.use_gpu, args.amp)
    if args.name is None:
        parts = (args.option, args.schedule, args.surgery, time.strftime("%Y%m%d-%H%M%S"))
        args.name = "-".join(filter(None, parts))
    elif not args.name:
        raise InputError("argument --name: empty")
    return args


def check_tasks(args):
    """Adds args.trained: the names of --tasks and --aux."""
    args.tasks = task_names(args.tasks)
    given, args.score_also = args.score_also, []
    if given is not None:
        args.score_also = task_names(given, "--score_also")
    for name in args.score_also:
        if name in args.tasks:
            raise InputError(f"argument --score_also: {name} is among --tasks, which are scored "
                             "anyway")

    for task in TASKS:
        for flag in (f"{task}_{kind}" for kind in TASK_FILES):
            if getattr(args, flag) and task not in (*args.tasks, *args.score_also):
                raise InputError(f"--{flag}: {task} is not among --tasks {','.join(args.tasks)}")

    given, args.aux = args.aux, dict(args.aux)
    if len(args.aux) < len(given):
        raise InputError(f"argument --aux: one of {', '.join(args.aux)} is given twice")
    for name in args.aux:
        if name in TASKS:
            raise InputError(f"argument --aux: {name!r} is a task already; choose another")
        # torch's ModuleDict, which holds the heads, has names of its own: train, keys, ...; and
        # "text" has the sentences in the answers of support/predict.py
        if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or name == "text":
            raise InputError(f"argument --aux: {name!r} is not a plain name; choose another")

    args.trained = [*args.tasks, *args.aux]
    args.model = args.model or str(args.init_from or DEFAULT_ENCODER)
    if args.limit is not None:
        if not isinstance(args.limit, dict):
            args.limit = dict.fromkeys(args.trained, args.limit)
        for name, fraction in args.limit.items():
            if name not in args.trained or not 0 < fraction <= 1:
                raise InputError(f"argument --limit: {name}={fraction:g}: not a fraction above 0 "
                                 f"and up to 1 of one of {', '.join(args.trained)}")


def check_schedule(args):
    if args.upsample and args.schedule != "mtdnn":
        raise InputError("--upsample without --schedule mtdnn: round_robin and mixed repeat the "
                         "small sets anyway, sequential and annealed use each set as it is")
    if args.optimizer_per_task and (args.schedule not in ONE_TASK_PER_STEP or args.accumulate > 1):
        raise InputError("--optimizer_per_task: needs steps of one task: one of --schedule "
                         f"{', '.join(ONE_TASK_PER_STEP)}, and no --accumulate")

    # examples per step, of each task; "mixed" takes one number for all and divides it
    if args.batch_size is None:
        args.batch_size = {name: DEFAULT_BATCH_SIZE.get(name, 16) for name in args.trained}
        if args.schedule == "mixed":
            args.batch_size = 20
    elif isinstance(args.batch_size, dict) or args.schedule != "mixed":
        args.batch_size = for_each(args.batch_size, args.trained, "--batch_size")
    if args.epoch_length not in ("longest", "shortest"):
        try:
            args.epoch_length = number(int, 1, 10 ** 7)(args.epoch_length)
        except argparse.ArgumentTypeError as error:
            raise InputError("argument --epoch_length: not longest, shortest or a number of steps "
                             f"({error})") from None


def check_heads(args):
    # heads of pairs are for the pair tasks, those that are only scored included
    pair_tasks = [name for name in [*args.tasks, *args.score_also] if TASKS[name].is_pair]
    if not pair_tasks and args.pair_head is not None:
        raise InputError(f"argument --pair_head: no pair task among {', '.join(args.tasks)}")
    if args.sst_loss != "ce" and "sst" not in args.tasks:
        raise InputError(f"--sst_loss {args.sst_loss}: sst is not among --tasks "
                         f"{','.join(args.tasks)}")
    if args.pair_head is None:
        args.pair_head = "cosine" if args.option == "finetune" else "cross"
    args.pair_head = for_each(args.pair_head, pair_tasks, "--pair_head")
    for task, head in args.pair_head.items():
        if head not in PAIR_HEADS:
            raise InputError(f"argument --pair_head: unknown head {head!r}; the heads are "
                             f"{', '.join(PAIR_HEADS)}")
        if head == "cosine" and TASKS[task].kind == "classification":
            raise InputError(f"--pair_head cosine for {task}: a cosine is one number, which cannot "
                             "tell classes apart; name another head")
        no_weights = head == "cosine" and TASKS[task].kind == "regression"
        if no_weights and args.option == "pretrain" and task in args.tasks:
            raise InputError(f"--pair_head cosine for {task} with --option pretrain: 5 cos(u, v) "
                             "has no parameters and the encoder is frozen, so there is nothing to "
                             f"train; use another head, or leave {task} out")


def check_settings(args, switch, settings):
    """The defaults of a switch's settings, --smart_weight for --smart. A setting without its switch
    is an error."""
    for name, default in settings.items():
        flag = f"{switch}_{name}"
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif not getattr(args, switch):
            raise InputError(f"--{flag} without --{switch}")


def check_surgery(args):
    """Adds args.surgery ("pcgrad", "gradvac" or None) and args.gradient_rows (the tasks of each row
    of J; None: all in one)."""
    if args.pcgrad is not None and args.gradvac is not None:
        raise InputError("--pcgrad with --gradvac: one or the other")
    args.surgery, flag, groups = None, "--log_gradients", True
    for surgery in ("pcgrad", "gradvac"):
        if getattr(args, surgery) is not None:
            args.surgery, flag, groups = surgery, f"--{surgery}", getattr(args, surgery)
    args.gradient_rows = None
    if args.surgery_scope == "tensor" and not args.surgery:
        raise InputError("--surgery_scope tensor: there is no surgery; add --pcgrad or --gradvac")
    if not args.surgery and not args.log_gradients:
        return

    # two tasks' gradients must meet in an update
    if args.option == "pretrain":
        raise InputError(f"{flag} with --option pretrain: a frozen encoder has no shared "
                         "gradients; use --option finetune")
    if args.schedule == "sequential":
        raise InputError(f"{flag} with --schedule sequential: one task's batches follow each "
                         "other, so no two tasks' gradients meet; use round_robin or mixed")
    if args.schedule in ONE_TASK_PER_STEP and args.accumulate == 1:
        raise InputError(f"{flag} with --schedule {args.schedule}: a step has one task, so no two "
                         "tasks' gradients meet; give --accumulate N to let N steps meet")
    given = args.trained if groups is True else groups.split(",")
    args.gradient_rows = [[name.strip() for name in group.split("+")] for group in given]
    if sorted(sum(args.gradient_rows, [])) != sorted(args.trained):
        raise InputError(f"argument {flag}: {groups!r} does not name each of "
                         f"{', '.join(args.trained)} once, as in sst+para,sts")
    if len(args.gradient_rows) < 2:
        one = "task" if groups is True else "group"
        raise InputError(f"{flag} with one {one}: there is no second gradient")


def check_smart(args):
    if not args.smart:
        return
    given = args.smart_tasks.split(",") if args.smart_tasks is not None else args.trained
    args.smart_tasks = [name.strip() for name in given]
    for name in args.smart_tasks:
        if name not in args.trained:
            raise InputError(f"argument --smart_tasks: {name!r} is not among --tasks "
                             f"{','.join(args.trained)}")
    if len(set(args.smart_tasks)) < len(args.smart_tasks):
        raise InputError("argument --smart_tasks: a task is named twice")
    if args.smart_sigma == 0:
        raise InputError("argument --smart_sigma: 0; the ascent could not start, since the "
                         "divergence has no slope there")
    # how far noise and ascent can move an embedding
    moved = max(args.smart_sigma, args.smart_steps * args.smart_step_size)
    moved = min(args.smart_eps, moved)
    if args.amp and moved < 0.01:
        raise InputError("--smart with --amp: half precision has three digits, and a perturbation "
                         f"of {moved:g} would be lost in rounding; leave out --amp, or give "
                         "--smart_eps and --smart_step_size of .01 or more")
