"""Beside `blocks_page.py`, and shipped with it."""


def answer_to(line):
    return line.upper()
