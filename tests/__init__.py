"""The checks that `python sanity_check.py` runs after its lesson, one file per component."""
