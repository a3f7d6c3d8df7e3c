"""The flags of multitask_classifier.py, checked against each other, and the types of flags that pretrain_mlm.py shares."""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

from torch import nn

from checkpoint import get_device
from data.batches import ONE_TASK_A_STEP, SCHEDULES
from data.download import DEFAULT_ENCODER, InputError
from data.tasks import TASKS, task_names

PAIR_HEADS = ("cross", "uv", "uv_diff", "cosine")
SST_LOSSES = {"ce": None, "oll1": 1.0, "oll1.5": 1.5, "oll2": 2.0}  # ordinal log loss: its alpha
DEFAULT_BATCH_SIZE = {"sst": 16, "para": 32, "sts": 12, "cfimdb": 8}
FILES_OF_A_TASK = ("train", "dev", "test", "dev_out", "test_out")
PATH_FLAGS = ("data_dir", "model", "init_from", "text",
              *(f"{task}_{kind}" for task in TASKS for kind in FILES_OF_A_TASK))  # and --aux
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------- types of flags

class Parser(argparse.ArgumentParser):
    """Errors are one line without the usage; help tells the defaults that are not None."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        raise InputError(message)

    def parse_known_args(self, args=None, namespace=None):
        # Python lets the bytes of an argument that are not text pass, as lone surrogates, which
        # neither the tokenizer nor the files of weights take
        for word in sys.argv[1:] if args is None else args:
            if not is_text(word):
                self.error(f"argument {word!a} is not valid text; give it as UTF-8")
        return super().parse_known_args(args, namespace)


def is_text(string):
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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


def name_and_file(text):
    """A flag's type: NAME=FILE as (name, file); FILE may hold commas and equals signs."""
    name, _, file = text.partition("=")
    if not name.strip() or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name.strip(), file


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


def note_start(args, argv):
    """Keep among the flags what --resume needs of a new run: how and where it was started."""
    folder = Path.cwd()
    # relative to the project where it is inside, so that the project can be moved
    inside = folder.is_relative_to(HERE)
    args.argv, args.folder = argv, os.path.relpath(folder, HERE) if inside else str(folder)
    args.model_is_folder = args.model is not None and Path(args.model).is_dir()


def resumed(get_parser, complete, argv, folder_flag):
    """The flags of the run that --resume in argv names, checked by the script's `complete`.

    Of argv's other flags --save_every counts, and paths, since what a run was started with may have
    been moved; other data is found out by its digest. Raises InputError where one contradicts the
    run's, or a path is gone. folder_flag: which names the run's folder, --name or --out.
    """
    # parsed over None in place of every default, so that what is not None was typed
    parser = get_parser()
    untyped = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    typed = vars(parser.parse_args(argv, untyped)).items()
    given = {name: value for name, value in typed if value is not None}
    folder = given.pop("resume")

    # the run is in the folder that is given, wherever it was when it was started
    try:
        saved = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))
        of_run = [*map(str, saved["argv"]), folder_flag, str(Path(folder).absolute())]
        started_in, model_is_folder = HERE / saved["folder"], bool(saved["model_is_folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder}: no run to go on with ({type(error).__name__} in its "
                         "args.json)") from None

    before = complete(parser.parse_args(of_run))
    args = parser.parse_args(of_run)
    given_aux = dict(given.pop("aux", []))
    gone = take_paths(args, started_in, given, given_aux, model_is_folder)
    if gone:
        raise InputError(f"--resume {folder}: gone is what the run was started with: "
                         f"{', '.join(gone)}; give such a flag with the path as it is now")
    vars(args).update(given)
    args = complete(args)

    differing = [f"--{name} is {vars(before)[name]!r} in the run" for name in given
                 if name not in ("save_every", *PATH_FLAGS)
                 and vars(before)[name] != vars(args)[name]]
    differing += [f"--aux {name} is not in the run" for name in given_aux if name not in args.aux]
    if differing:
        raise InputError(f"--resume {folder}: {'; '.join(differing)}: leave it out, or start a new run")
    args.resume, args.argv = True, argv
    return args


def take_paths(args, folder, given, given_aux, model_is_folder):
    """Let relative paths among a run's flags start at `folder`, where it was started. Returns those
    that are not there, and not given anew: ["PATH (--data_dir)", ...]."""
    gone = []
    for name in PATH_FLAGS:
        typed = getattr(args, name, None)
        if name in given or typed is None or (name == "model" and not model_is_folder):
            continue
        path = folder / typed
        setattr(args, name, type(typed)(path))
        if not (path.parent.is_dir() if name.endswith("_out") else path.exists()):
            gone.append(f"{path} (--{name})")

    aux = [(name, given_aux.get(name, folder / path))
           for name, path in getattr(args, "aux", None) or []]
    gone += [f"{path} (--aux {name})" for name, path in aux
             if name not in given_aux and not Path(path).exists()]
    if aux:
        args.aux = [(name, str(path)) for name, path in aux]
    return gone


# ---------------------------------------------------------------- the training script's

def get_parser():
    parser = Parser(description="Train one BERT on several tasks at once.")
    group = parser.add_argument_group("model")
    group.add_argument("--option", choices=("pretrain", "finetune"), default="pretrain",
                       help="pretrain: the encoder is frozen, only the heads learn; finetune: everything learns")
    group.add_argument("--model", default=None, help="BERT folder, or name on the Hugging Face hub (default: "
                       f"{DEFAULT_ENCODER}, or that of --init_from)")
    group.add_argument("--pooling", choices=("cls", "mean"), default="mean",
                       help="what a sequence becomes: BERT's pooled [CLS], or the mean of its tokens' last states")
    group.add_argument("--pair_head", type=per_task(str), default=None, metavar="|".join(PAIR_HEADS),
                       help="for both pair tasks, or each: para=uv_diff,sts=cosine. cross: the pair as one sequence; uv: linear "
                            "on [u; v]; uv_diff: on [u; v; |u - v|]; cosine: cos(u, v) (default: cosine for finetune, "
                            "cross for pretrain)")
    group.add_argument("--hidden_dropout_prob", type=number(float, 0, 1), default=0.3,
                       help="dropout of the heads; the encoder's is in its config.json")
    group.add_argument("--sst_loss", choices=SST_LOSSES, default="ce",
                       help="cross entropy, or ordinal log loss with an exponent of 1, 1.5 or 2 (Castagnos et al. 2022)")
    group.add_argument("--pal", nargs="?", const="", metavar="NAME=VALUE,...", type=settings(
        g=(one_of("attention", "identity"), "attention"), size=(number(int, 1, 10000), 204)),
                       help="projected attention layers for each task (Stickland & Murray 2019): g=attention,size=204; "
                            "g=identity for a low-rank map alone")
    group.add_argument("--init_from", type=Path, default=None, metavar="RUN",
                       help="take over encoder and heads of an earlier run; with --model the heads alone")
    group = parser.add_argument_group("training")
    group.add_argument("--tasks", default="sst,para,sts", help=f"tasks to train, of {','.join(TASKS)}; a step visits them in this order")
    group.add_argument("--aux", type=name_and_file, action="append", metavar="NAME=FILE",
                       help="a further task to train: classes of sentences, in a file like sst's; "
                            "it counts in no score. Repeat the flag for each task")
    group.add_argument("--score_also", default=None, metavar="TASKS",
                       help="tasks that get a head and scores, and no training: how far does sst alone carry?")
    group.add_argument("--limit", type=per_task(number(float, 0)), default=None, metavar="para=0.25",
                       help="train on this share of a task's rows (of each task, with one number)")
    group.add_argument("--schedule", choices=SCHEDULES, default="round_robin",
                       help="round_robin: a batch of each task a step; mixed: the same with batch sizes in proportion to "
                            "the sets. With one batch of one task a step: sequential: task after task; mtdnn: all batches "
                            "shuffled; annealed: tasks drawn, the large ones ever less often")
    group.add_argument("--upsample", action="store_true",
                       help="with --schedule mtdnn: repeat the small sets until they are as large as the largest")
    group.add_argument("--epochs", type=number(int, 1), default=10, help="number of epochs")
    group.add_argument("--epoch_length", default="longest", metavar="longest|shortest|STEPS",
                       help="steps of an epoch: until the longest or the shortest set is through, or a number")
    group.add_argument("--batch_size", type=per_task(number(int, 1)), default=None,
                       help="rows a step, for all tasks or each: sst=2,para=24,sts=2 (default: sst=16,para=32,sts=12, "
                            "cfimdb=8; 20 with --schedule mixed)")
    group.add_argument("--accumulate", type=number(int, 1), default=1,
                       help="steps of the schedule that make one optimizer step. Their mean losses are summed: the "
                            "gradient is N times that of one batch N times as large, so --clip takes effect N times earlier")
    group.add_argument("--lr", type=number(float, 0), default=None,
                       help="peak learning rate (default: 1e-4 for finetune, 1e-3 for pretrain)")
    group.add_argument("--lr_schedule", choices=("linear", "constant"), default="linear",
                       help="after the warm-up: down to 0, or constant")
    group.add_argument("--warmup", type=number(float, 0, 1), default=0.1,
                       help="share of the steps in which the rate rises from 0")
    group.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="of weights; biases and norms have none")
    group.add_argument("--clip", type=number(float, 0), default=1.0, help="largest global gradient norm; 0: no clipping")
    group.add_argument("--optimizer_per_task", action="store_true",
                       help="AdamW moments of its own for each task; where a step has one task")
    group.add_argument("--seed", type=number(int, 0, 2 ** 63), default=11711, help="of new heads, shuffling, dropout, the order of projections, SMART's noise")
    group = parser.add_argument_group("gradient surgery")
    group.add_argument("--pcgrad", nargs="?", const=True, metavar="GROUPS",
                       help="project conflicting task gradients (Yu et al. 2020); GROUPS of tasks share one: sst+para,sts")
    group.add_argument("--gradvac", nargs="?", const=True, metavar="GROUPS",
                       help="Gradient Vaccine (Wang et al. 2021), with groups like --pcgrad")
    group.add_argument("--surgery_scope", choices=("vector", "tensor"), default="vector",
                       help="vector: all shared parameters as one, as in the papers; tensor: each parameter by itself")
    group.add_argument("--log_gradients", action="store_true",
                       help="measure the tasks' gradients (cosines, conflicts, norms) without surgery; surgery always does")
    group = parser.add_argument_group("regularisers (Jiang et al. 2020)")
    group.add_argument("--smart", nargs="?", const="", metavar="NAME=VALUE,...", type=settings(
        weight=(number(float, 0), 5.0), eps=(number(float, 0), 1e-5), sigma=(number(float, 0), 1e-5),
        step=(number(float, 0), 1e-3), steps=(number(int, 1), 1), norm=(one_of("inf", "2"), "inf"), tasks=(names, None)),
                       help="smoothness under small perturbations of the embeddings: weight of the term, eps radius, sigma of the "
                            "first noise, step and steps of the ascent, norm of the ball. What is not given is as in the paper: "
                            "weight=5,eps=1e-5,sigma=1e-5,step=1e-3,steps=1,norm=inf; tasks=sst+sts for these tasks only. A "
                            "perturbation that is as large as the embeddings: eps=1,step=1")
    group.add_argument("--proximal", nargs="?", const="", metavar="NAME=VALUE,...", type=settings(
        mu=(number(float, 0), 1.0), beta=(number(float, 0, 1), None)),
                       help="stay near a running average of the weights: mu=1, and beta one number, or what the paper has: "
                            ".99 in the first tenth of the steps, then .999")
    group = parser.add_argument_group("machine and run")
    group.add_argument("--use_gpu", action="store_true", help="train on CUDA, or on MPS of an Apple machine")
    group.add_argument("--amp", action="store_true", help="the encoder in bfloat16 (CUDA, or a CPU with avx512_bf16)")
    group.add_argument("--name", default=None,
                       help="folder in runs/, or an absolute path (default: option, schedule, surgery and time)")
    group.add_argument("--resume", default=None, metavar="RUN",
                       help="go on with a run that was stopped or killed, with the flags it had; "
                            "what was moved since then is given anew: --data_dir, --model, ...")
    group.add_argument("--save_every", type=number(float, 0), default=5.0, metavar="MINUTES",
                       help="how often the state to go on from is saved; after each epoch it always is")
    group = parser.add_argument_group("data")
    group.add_argument("--data_dir", type=Path, default=None, help="folder with the course's files (default: data/ once "
                       "`python data/download.py` has filled it, the demo sets in data/demo/ until then)")
    group.add_argument("--skip_malformed", action="store_true", help="go on where more than 1 %% of a file is malformed")
    for task in TASKS:  # the course's path flags, explained in the epilog instead of in 20 lines
        for kind in FILES_OF_A_TASK:
            group.add_argument(f"--{task}_{kind}", type=Path, help=argparse.SUPPRESS)
    parser.epilog = ("One file each: --TASK_train, --TASK_dev, --TASK_test FILE in place of the one in the data folder; "
                     "--TASK_dev_out, --TASK_test_out FILE for the predictions (default: predictions/ in its folder).")
    return parser


def resolve(argv):
    """The flags, checked against each other, with every default filled in. Raises InputError."""
    args = get_parser().parse_args(argv)
    if args.resume is not None:
        return resumed(get_parser, complete, argv, "--name")
    note_start(args, argv)
    return complete(args)


def complete(args):
    """Check parsed flags against each other and fill in every default. Raises InputError."""
    args.tasks = task_names(args.tasks)
    args.score_also = task_names(args.score_also, "--score_also") if args.score_also is not None else []
    given = args.aux or []
    args.aux = dict(given)
    if len(args.aux) < len(given):
        raise InputError(f"argument --aux: one of {', '.join(args.aux)} is given twice")
    args.trained = [*args.tasks, *args.aux]
    for name in args.score_also:
        if name in args.tasks:
            raise InputError(f"argument --score_also: {name} is among --tasks, which are scored anyway")
    for name in args.aux:
        # torch's ModuleDict, which holds the heads, has names of its own: train, keys, ...
        if name in TASKS or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
            raise InputError(f"argument --aux: {name!r} is {'a task already' if name in TASKS else 'no plain name'}; "
                             "choose another")
    args.model = args.model or str(args.init_from or DEFAULT_ENCODER)
    if args.limit is not None:
        args.limit = args.limit if isinstance(args.limit, dict) else dict.fromkeys(args.trained, args.limit)
        for name, share in args.limit.items():
            if name not in args.trained or not 0 < share <= 1:
                raise InputError(f"argument --limit: {name}={share:g}: not a share above 0 and up to 1 of one of "
                                 f"{', '.join(args.trained)}")
    if args.upsample and args.schedule != "mtdnn":
        raise InputError("--upsample without --schedule mtdnn: round_robin and mixed repeat the small sets anyway, and "
                         "sequential and annealed take each set as it is")
    if args.optimizer_per_task and (args.schedule not in ONE_TASK_A_STEP or args.accumulate > 1):
        raise InputError(f"--optimizer_per_task: needs steps of one task: one of --schedule {', '.join(ONE_TASK_A_STEP)}, "
                         "and no --accumulate")

    pair_tasks = [name for name in [*args.tasks, *args.score_also] if TASKS[name].is_pair]
    if not pair_tasks and args.pair_head is not None:
        raise InputError(f"argument --pair_head: no pair task among {', '.join(args.tasks)}")
    if args.sst_loss != "ce" and "sst" not in args.tasks:
        raise InputError(f"--sst_loss {args.sst_loss}: sst is not among --tasks {','.join(args.tasks)}")
    if args.pair_head is None:
        args.pair_head = "cosine" if args.option == "finetune" else "cross"
    args.pair_head = for_each(args.pair_head, pair_tasks, "--pair_head")
    for task, head in args.pair_head.items():
        if head not in PAIR_HEADS:
            raise InputError(f"argument --pair_head: unknown head {head!r}; the heads are {', '.join(PAIR_HEADS)}")
        if head == "cosine" and TASKS[task].kind == "similarity" and args.option == "pretrain" and task in args.tasks:
            raise InputError(f"--pair_head cosine for {task} with --option pretrain: 5 cos(u, v) has no parameters and the "
                             f"encoder is frozen, so there is nothing to train; use another head, or leave {task} out")

    if args.batch_size is None:
        args.batch_size = 20 if args.schedule == "mixed" else {name: DEFAULT_BATCH_SIZE.get(name, 16)
                                                                          for name in args.trained}
    elif isinstance(args.batch_size, dict) or args.schedule != "mixed":
        args.batch_size = for_each(args.batch_size, args.trained, "--batch_size")
    if args.epoch_length not in ("longest", "shortest"):
        try:
            args.epoch_length = number(int, 1, 10 ** 7)(args.epoch_length)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"argument --epoch_length: not longest, shortest or a number of steps ({error})") from None
    if args.lr is None:
        args.lr = 1e-4 if args.option == "finetune" else 1e-3
    resolve_surgery(args)
    resolve_smart(args)

    args.device = get_device(args.use_gpu, args.amp)
    if args.name is None:
        args.name = "-".join(filter(None, (args.option, args.schedule, args.surgery, time.strftime("%Y%m%d-%H%M%S"))))
    elif not args.name:
        raise InputError("argument --name: empty")
    return args


def resolve_surgery(args):
    """args.surgery ("pcgrad", "gradvac" or None) and args.gradient_rows (the tasks of each row of J; None: all in one)."""
    args.surgery = "pcgrad" if args.pcgrad is not None else "gradvac" if args.gradvac is not None else None
    flag = f"--{args.surgery}" if args.surgery else "--log_gradients"
    groups = getattr(args, args.surgery) if args.surgery else True
    args.gradient_rows = None
    if args.pcgrad is not None and args.gradvac is not None:
        raise InputError("--pcgrad with --gradvac: one or the other")
    if args.surgery_scope == "tensor" and not args.surgery:
        raise InputError("--surgery_scope tensor: there is no surgery; add --pcgrad or --gradvac")
    if not args.surgery and not args.log_gradients:
        return
    if args.option == "pretrain":
        raise InputError(f"{flag} with --option pretrain: a frozen encoder has no shared gradients; use --option finetune")
    if args.schedule == "sequential":
        raise InputError(f"{flag} with --schedule sequential: one task's batches follow each other, so no two tasks' "
                         "gradients meet; use round_robin or mixed")
    if args.schedule in ONE_TASK_A_STEP and args.accumulate == 1:
        raise InputError(f"{flag} with --schedule {args.schedule}: a step has one task, so no two tasks' gradients meet; "
                         "give --accumulate N to let N steps meet")
    groups_given = args.trained if groups is True else groups.split(",")
    args.gradient_rows = [[name.strip() for name in group.split("+")] for group in groups_given]
    if sorted(sum(args.gradient_rows, [])) != sorted(args.trained):
        raise InputError(f"argument {flag}: {groups!r} does not name each of {', '.join(args.trained)} once, "
                         "as in sst+para,sts")
    if len(args.gradient_rows) < 2:
        raise InputError(f"{flag} with one {'task' if groups is True else 'group'}: there is no second gradient")


def resolve_smart(args):
    """args.smart (the settings of Smoothness, or None) and args.smart_tasks (those it is for)."""
    args.smart_tasks = []
    if not args.smart:
        return
    args.smart_tasks = args.smart.pop("tasks") or args.trained
    for name in args.smart_tasks:
        if name not in args.trained:
            raise InputError(f"argument --smart: tasks: {name!r} is not among --tasks {','.join(args.trained)}")
    if args.smart["sigma"] == 0:
        raise InputError("argument --smart: sigma: 0; the ascent could not start, since the divergence has no slope there")
    moves = min(args.smart["eps"], args.smart["steps"] * args.smart["step"])
    if args.amp and moves < 0.01:
        raise InputError(f"--smart with --amp: bfloat16 has three digits, and a perturbation of {moves:g} "
                         "would be lost in rounding; leave out --amp, or give --smart an eps and a step of .01 or more")
