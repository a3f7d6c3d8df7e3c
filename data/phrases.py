"""Write the labelled phrases of the Stanford Sentiment Treebank's training sentences to a file of
the course's format, to train on in place of the sentences.

    python data/phrases.py        fetches the treebank and writes ids-sst-phrases-train.csv here
    python multitask_classifier.py --sst_train data/ids-sst-phrases-train.csv ...    trains on it

The treebank (Socher et al. 2013) has a parse tree of each sentence, and a label from 0 to 4 at
every node: `(3 (2 It) (3 (2 's) (3 good)))` holds five phrases. The course took only the sentences.
"""
import argparse
import csv
import io
import re
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

if not __package__:  # run as `python data/phrases.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download import fetch_file  # noqa: E402
from support.files import InputError, write_atomically  # noqa: E402
from support.run import exit_status  # noqa: E402

TREEBANK = "https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"
NAME = "ids-sst-phrases-train.csv"


def phrases_of(tree):
    """[(phrase, label)] of the nodes of a tree, inner nodes first and the sentence last."""
    words, open_nodes, found = [], [], []
    for label, word, _ in re.findall(r"\((\d)|([^\s()]+)|(\))", tree):
        if label:
            open_nodes.append((label, len(words)))
        elif word:
            words.append(word)
        else:  # a node ends; its phrase is what has come since it began
            label, first = open_nodes.pop()
            found.append((" ".join(words[first:]), label))
    return found


def training_phrases(splits):
    """The (phrase, label) pairs of {"train", "dev", "test": trees}, each once, in the order of the
    trees. A phrase that is a whole sentence of dev or test is left out."""
    held_out = {phrases_of(tree)[-1][0].lower() for split in ("dev", "test")
                for tree in splits[split]}
    found = dict.fromkeys(phrase for tree in splits["train"] for phrase in phrases_of(tree))
    return [(text, label) for text, label in found if text.lower() not in held_out]


def read_treebank(path):
    """{"train", "dev", "test": trees}. Raises InputError where the file is not the treebank."""
    try:
        with zipfile.ZipFile(path) as archive:
            texts = {split: archive.read(f"trees/{split}.txt").decode("utf-8")
                     for split in ("train", "dev", "test")}
        return {split: [line for line in text.splitlines() if line.strip()]
                for split, text in texts.items()}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as the treebank ({error}); it should be "
                         f"{TREEBANK}") from None


def write_phrases(phrases, path):
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("", "id", "sentence", "sentiment"))
    writer.writerows((i, f"phrase{i}", *phrase) for i, phrase in enumerate(phrases))
    write_atomically(path, lambda part: part.write_text(text.getvalue(), encoding="utf-8"))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the phrases of the treebank to a file.")
    parser.add_argument("--treebank", type=Path, metavar="ZIP",
                        help=f"where it is on this machine (default: fetched from {TREEBANK})")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent,
                        help="folder to write to (default: data/)")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as scratch:
        treebank = args.treebank
        if not treebank:
            treebank = Path(scratch) / Path(TREEBANK).name
            try:
                fetch_file(TREEBANK, treebank)
            except OSError as error:
                raise InputError(f"{error}; the treebank is at {TREEBANK}, and --treebank ZIP "
                                 "takes it from this machine") from error
        phrases = training_phrases(read_treebank(treebank))
    args.to.mkdir(parents=True, exist_ok=True)
    write_phrases(phrases, args.to / NAME)
    print(f"{args.to / NAME}: {len(phrases)} phrases")


if __name__ == "__main__":
    sys.exit(exit_status(main))
