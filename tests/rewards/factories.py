"""Factories and rewards for tests of arguments; imports nothing, so that a worker starts fast."""


def times(factor, *, offset=0.0, name="times"):
    """A factory."""
    if factor == 0:
        raise ValueError("factor is 0 (want another)")

    def reward(completion):
        return factor * len(completion) + offset

    reward.__name__ = name
    return reward


def anything(**options):
    return lambda completion: float(len(options))


def no_reward(size):
    return size


def length(completion, *, factor=1.0):
    return factor * len(completion)


def batch_length(completions, factor, **columns):
    return [factor * len(text) for text in completions]


def prefilled(completion, prefill="unset"):
    return float(len(prefill)) if prefill != "unset" else -1.0


def prefilled_batch(completions, prefill):
    return [float(len(text)) for text in prefill]


def takes_the_column(completions, **columns):
    return [float(columns["prefill"][0])] * len(completions)
