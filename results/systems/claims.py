"""What the five reports claim, and what the runs of this folder show: the table of claims in
README.md. tables.py adds the differences and whether they are significant."""
from dataclasses import dataclass


@dataclass
class Claim:
    report: int
    says: str
    base: str  # the two systems that show it
    system: str
    tasks: tuple
    here: str  # what to conclude from the runs here


CLAIMS = []
