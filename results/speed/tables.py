"""Write the tables of results/speed/README.md from the files of results/speed/measure.py beside it,
one column per device.

    python results/speed/tables.py
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from results.scores import table, write_tables  # noqa: E402

PAGE = HERE / "README.md"
NO_GPU = "not measured on a GPU"


def read_devices(folder=HERE):
    """{heading of a column: the figures of a device}, GPUs last; None where there is no GPU."""
    records = [json.loads(path.read_text(encoding="utf-8"))
               for path in sorted(Path(folder).glob("*.json"))]
    records.sort(key=lambda record: record["kind"] != "cpu")
    devices = {record["device"]: record for record in records}
    if not any(record["kind"] != "cpu" for record in records):
        devices["on a GPU"] = None
    return devices


def column_table(devices, head, cells):
    """cells: {heading of a column: {row (a tuple as long as head): its text}}. There is a row for
    every figure that any device has, or one row of dashes where no device has any."""
    rows = dict.fromkeys(row for column in cells.values() for row in column)
    rows = list(rows) or [("-",) * len(head)]

    def text(heading, row):
        return NO_GPU if devices[heading] is None else cells[heading].get(row, "-")

    return table((*head, *devices),
                 [(*row, *(text(heading, row) for heading in devices)) for row in rows])


def in_words(step):
    """("packed", "float32" or "half precision") of "packed, bfloat16"."""
    name, precision = step.split(", ")
    return name, precision if precision == "float32" else "half precision"


# ---------------------------------------------------------------- what a device has for each table

def devices_cells(record):
    half = record["precisions"][1:] or ["-"]
    agree = f"{len(record['attention'])} pass, to {max(record['attention'].values()):.0e}"
    names = {"command": f"`{record['command']}`", "torch": record["torch"],
             "CPU threads": record["threads"], "rounds": record["rounds"],
             "half precision": half[0], "checks of attention (path, precision, head size)": agree,
             "transformers": "measured" if record["transformers"] else "not installed, left out"}
    return {(name,): value for name, value in names.items()}


def steps_cells(record):
    """On a GPU tokens per second. CPUs are shared and differ too much for that: on a CPU the speed
    over that of the packed step in float32."""
    cells = {}
    for encoder, figures in record["encoders"].items():
        plain = {line["examples"]: line["milliseconds"] for line in figures["steps"]
                 if line["step"] == "packed, float32"}
        for line in figures["steps"]:
            row = encoder, line["examples"], *in_words(line["step"])
            cells[row] = "out of memory"
            if line["milliseconds"] is not None:
                speed = f"{line['tokens_per_second']:,}"
                if record["kind"] == "cpu":
                    speed = f"{plain[line['examples']] / line['milliseconds']:.2f}"
                cells[row] = f"{speed} ({line['share']:.0%})"
    return cells


def ratios_cells(record):
    return {(encoder, name): f"{ratio:.2f}" for encoder, figures in record["encoders"].items()
            for name, ratio in figures["ratios"].items()}


def peaks_cells(record):
    return {(encoder, name): f"{peak / 1e6:,.0f} MB"
            for encoder, figures in record["encoders"].items()
            for name, peak in (figures["peak_memory"] or {}).items()}


def epoch_cells(record):
    epoch = record["epoch"]
    if epoch is None or record["kind"] == "cpu":
        return {}
    cells = {("encoder",): epoch["encoder"], ("steps per epoch",): f"{epoch['steps']:,}"}
    for precision, hours in epoch["our_hours"].items():
        _, words = in_words(f"packed, {precision}")
        cells[(f"one epoch, {words}",)] = f"{60 * hours / epoch['epochs']:.0f} min"
        cells[(f"{epoch['epochs']} epochs, {words}",)] = f"{hours:.1f} h"
    cells[(f"report 1, {epoch['epochs']} epochs on its GPU",)] = f"{epoch['hours']} h"
    return cells


TABLES = {"devices": (("",), devices_cells),
          "steps": (("encoder", "examples per task", "step", "precision"), steps_cells),
          "ratios": (("encoder", "over a plain step"), ratios_cells),
          "epoch": (("",), epoch_cells),
          "peaks": (("encoder", "step"), peaks_cells)}


def make_tables(devices):
    """{name of a table: its lines}"""
    tables = {}
    for name, (head, cells_of) in TABLES.items():
        cells = {heading: cells_of(record) for heading, record in devices.items() if record}
        tables[name] = column_table(devices, head, cells)
    return tables


if __name__ == "__main__":
    write_tables(PAGE, make_tables(read_devices()))
    print(f"{PAGE}: its tables are written; those of memory are memory.py's")
