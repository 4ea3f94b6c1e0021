import hashlib

import numpy as np

from grpo.seeds import permutation, seed_for, uniforms


def splitmix64(seed, counter):
    """The published generator in Python integers."""
    mask = (1 << 64) - 1
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64():
    seeds = np.array([0, 1, 2**61, 12345678901234567], dtype=np.uint64)
    got = uniforms(seeds[:, None], np.arange(50, dtype=np.uint64)[None])
    want = [[(splitmix64(int(s), t) >> 11) / 2**53 for t in range(50)] for s in seeds]
    assert got.tolist() == want


def test_uniforms_look_uniform():
    seeds = np.array([seed_for("uniform", index) for index in range(2000)], dtype=np.uint64)
    values = uniforms(seeds[:, None], np.arange(20, dtype=np.uint64)[None]).ravel()
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 43.8  # 99.9 % quantile at 19 degrees of freedom
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


def test_seeds_separate_every_part_of_the_key():
    keys = [
        (0, "rollout", 1, 2),
        (0, "rollout", 12),
        (0, "rollout", "1", 2),
        (0, "rollout", 2, 1),
        (1, "rollout", 1, 2),
    ]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert all(seed_for(*key) < 2**62 for key in keys)
    text = "\x1f".join(["int:0", "str:rollout", "int:1", "int:2"])
    assert seed_for(0, "rollout", 1, 2) == int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def test_permutation_is_a_function_of_seed_and_epoch():
    first = permutation(100, 7, 0)
    assert sorted(first) == list(range(100))
    assert permutation(100, 7, 0) == first
    assert permutation(100, 7, 1) != first != permutation(100, 8, 0)
