"""Families of methods: each module holds its naive transcriptions and ``CASES``, a table like the one of ``tests/loss/cases.py``."""
