"""The programs here are run in processes of their own, not imported."""

collect_ignore = ["keras_program.py"]
