"""The material that `make_capability_suites.py` turns into the shipped suites: one file per suite."""
