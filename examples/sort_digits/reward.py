"""1 for exactly the sorted digits, ended by EOS."""


def sorted_digits(completion, answer, truncated):
    return float(completion == answer and not truncated)
