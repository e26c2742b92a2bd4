"""Damaged inputs of all kinds; :mod:`fuzz.run` is the command."""
