"""Errors in what the user gave, and files that are written whole or not at all. Standard library
only."""
import os


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to
    do."""


def write_atomically(path, write):
    """Write a file whole or not at all: write(temporary path in the same folder), flush, rename.

    Raises OSError with one line that names the file, for example for a full disk. A file that was
    there before is then untouched.
    """
    part = path.with_name(f"{path.name}.part-{os.getpid()}")  # another process may write it too
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except Exception as error:  # torch and safetensors have exceptions of their own for a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise OSError(f"{path} cannot be written ({reason}); "
                      "a file that was there before is untouched") from error
    finally:
        part.unlink(missing_ok=True)  # after an error, or Ctrl-C
