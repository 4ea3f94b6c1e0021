"""The one tolerance table: what "equal" means, by invariant and dtype. Bitwise rows use `torch.equal`."""

import torch

LOSS = {"float64": 1e-12, "float32": 1e-6}  # recipe vs loop; vs another trainer on the same tensors
PACKING = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2}  # packed vs padded vs single rows
SPLIT = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2}  # 1×8 vs 8×1 vs any split or order
LOGPROBS = {"float32": 2e-6, "bfloat16": 1e-4}  # times (1 + |logp|), vs float64
HIDDEN_GRADIENT = {"float32": 1e-5, "bfloat16": 6e-3}  # relative

# Fused against stock models, log-probs and gradients: stock norms, rotations and eager softmax are float32 throughout.
FUSED = {"float64": 2e-5, "float32": 2e-5}
# LoRA functions against float64: values, gradients.
LORA_VALUE = {"float64": 1e-10, "float32": 2e-6, "bfloat16": 6e-3}
LORA_GRADIENT = {"float64": 1e-10, "float32": 5e-6, "bfloat16": 2e-2}
# Elementwise kernels: (relative, absolute) per element. Sixteen bits: a step for each rounding, since the interpreter
# truncates where the device rounds. For RMSNorm and RoPE the absolute part is in units of the largest value.
GLU = {"float64": (1e-12, 1e-13), "float32": (1e-5, 5e-6), "bfloat16": (2**-7, 1e-5), "float16": (2**-10, 1e-5)}
ROPE = {"float64": (1e-12, 1e-13), "float32": (1e-5, 5e-7), "bfloat16": (2**-7, 1e-6), "float16": (2**-10, 1e-6)}
RMSNORM = {"float64": (1e-11, 1e-12), "float32": (1e-5, 2e-6), "bfloat16": (2**-6, 2e-6), "float16": (2**-9, 2e-6)}
# 8-bit optimizer state (dynamic code, one scale for 256 elements) against float64: first moment, second moment, sum of
# ten updates; and one float32 update from a state that was not rounded yet.
STATE_8BIT, SECOND_8BIT, UPDATES_8BIT, EXACT_STEP = 0.04, 0.02, 0.05, 1e-6
# 8-bit scales of NF4, relative to their largest deviation from the mean in 256; a float32 projection and its formula.
SCALE_ERROR, FORMULA = 0.05, 1e-6


def by_dtype(row) -> dict:
    """The row with torch dtypes for keys."""
    return {getattr(torch, name): value for name, value in row.items()}


def relative_error(value, reference) -> float:
    """‖value − reference‖ / ‖reference‖ in float64 (absolute where the reference is zero)."""
    difference = (value.double() - reference.double()).norm()
    scale = reference.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)
