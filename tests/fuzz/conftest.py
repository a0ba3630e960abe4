"""The fuzzer itself is no test: it needs atheris, and modules of this folder."""

collect_ignore = ["mutations.py", "run.py", "targets.py"]
