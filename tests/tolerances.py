"""The one tolerance table: what "equal" means, by invariant and dtype. Bitwise rows use `torch.equal`."""

LOSS = {"float64": 1e-12, "float32": 1e-6}  # recipe vs loop; vs another trainer on the same tensors
PACKING = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2}  # packed vs padded vs single rows
SPLIT = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2}  # 1×8 vs 8×1 vs any split or order
LOGPROBS = {"float32": 2e-6, "bfloat16": 1e-4}  # times (1 + |logp|), vs float64
HIDDEN_GRADIENT = {"float32": 1e-5, "bfloat16": 6e-3}  # relative


def relative_error(value, reference) -> float:
    """‖value − reference‖ / ‖reference‖ in float64 (absolute where the reference is zero)."""
    difference = (value.double() - reference.double()).norm()
    scale = reference.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)
