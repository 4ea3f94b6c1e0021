"""NF4 dequantisation: both twins against a loop over nibbles in float64, and bit for bit against the packing library."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from grpo.kernels.nf4 import SCRATCH, NF4Weight, Scratch, dequantize

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NF4 = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379,
                    0.4407, 0.5626, 0.7230, 1.0])  # fmt: skip
SHAPES = [(1, 1), (3, 5), (8, 64), (7, 130), (64, 520), (33, 1001)]  # short last blocks, odd counts, > 256 blocks


def random_weight(shape, dtype=FLOAT32, double=True, device="cpu", blocksize=64, absmax_blocksize=256):
    values = shape[0] * shape[1]
    blocks = -(-values // blocksize)
    generator = torch.Generator().manual_seed(values)
    packed = torch.randint(0, 256, (-(-values // 2),), generator=generator, dtype=torch.uint8).to(device)
    code = NF4.to(device)
    if not double:
        absmax = torch.rand(blocks, generator=generator).to(device) + 0.1
        return NF4Weight(packed, absmax, shape, dtype, code, blocksize=blocksize)
    return NF4Weight(
        packed,
        torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8).to(device),
        shape,
        dtype,
        code,
        absmax_code=torch.randn(256, generator=generator).to(device),
        absmax_scale=(torch.rand(-(-blocks // absmax_blocksize), generator=generator) + 0.5).to(device),
        offset=torch.tensor(0.7, device=device),
        blocksize=blocksize,
        absmax_blocksize=absmax_blocksize,
    )


def reference(weight):
    """One value at a time, in float64."""
    out = []
    packed, q = weight.packed.tolist(), weight.absmax.tolist()
    code = weight.code.double().tolist()
    for i in range(weight.shape[0] * weight.shape[1]):
        byte, block = packed[i // 2], i // weight.blocksize
        nibble = byte // 16 if i % 2 == 0 else byte % 16
        absmax = q[block]
        if weight.absmax_code is not None:
            scale = float(weight.absmax_scale[block // weight.absmax_blocksize])
            absmax = float(weight.absmax_code[absmax]) * scale + float(weight.offset)
        out.append(code[nibble] * absmax)
    return torch.tensor(out, dtype=torch.float64).view(weight.shape)


def error(value, wanted):
    """Largest difference, relative to 1 (all factors are of size one)."""
    return float((value.double().cpu() - wanted).abs().max())


# --- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
def test_formula(twin, shape, double):
    weight = random_weight(shape, double=double, device=twin.device)
    assert error(dequantize(weight, backend=twin.backend), reference(weight)) < 2e-6


@pytest.mark.parametrize(("blocksize", "absmax_blocksize"), [(32, 4), (128, 256), (4096, 2)])
def test_other_blocks(twin, blocksize, absmax_blocksize):
    weight = random_weight((37, 301), device=twin.device, blocksize=blocksize, absmax_blocksize=absmax_blocksize)
    assert error(dequantize(weight, backend=twin.backend), reference(weight)) < 2e-6


def test_every_byte_gives_its_high_nibble_first(twin):
    packed = torch.arange(256, dtype=torch.uint8, device=twin.device)
    code = torch.arange(16, dtype=FLOAT32, device=twin.device)
    weight = NF4Weight(packed, torch.ones(8, device=twin.device), (2, 256), FLOAT32, code)
    wanted = [nibble for byte in range(256) for nibble in (byte >> 4, byte & 15)]
    assert dequantize(weight, backend=twin.backend).view(-1).tolist() == wanted


def test_twins_agree_bit_for_bit(twin):
    for dtype in (FLOAT32, torch.float16, *([BFLOAT16] if twin.device == "cuda" else [])):  # interpreted: truncates
        weight = random_weight((65, 1025), dtype, device=twin.device)
        assert torch.equal(dequantize(weight, backend=twin.backend), dequantize(weight, backend="torch"))


def test_long_offsets_give_the_same_bits(twin):
    if twin.backend == "torch":
        pytest.skip("torch has no such switch")
    from grpo.kernels import nf4_triton

    weight = random_weight((33, 1001), device=twin.device)
    out = torch.full(weight.shape, torch.nan, device=twin.device)
    nf4_triton.dequantize(weight, out, long_index=True)
    assert torch.equal(out, dequantize(weight, backend=twin.backend))


def test_writes_into_out_and_nowhere_else(twin):
    weight = random_weight((7, 131), device=twin.device)
    around = torch.full((7 * 131 + 200,), 5.0, device=twin.device)
    out = around[100:-100].view(7, 131)
    assert dequantize(weight, out=out, backend=twin.backend) is out
    assert error(out, reference(weight)) < 2e-6
    assert (around[:100] == 5).all() and (around[-100:] == 5).all()


def test_float64_is_the_float32_value(twin):
    if twin.backend == "triton":
        pytest.skip("no float64")
    weight = random_weight((7, 131), device=twin.device)
    wide = dequantize(dataclasses.replace(weight, dtype=torch.float64))
    assert torch.equal(wide, dequantize(weight, backend="torch").double())


@pytest.mark.gpu
def test_beyond_32_bit_offsets_on_a_gpu():
    """2^31 + 2^20 values: the last rows equal those of a small matrix with the same bytes."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows, columns = 2**15 + 16, 2**16
    generator = torch.Generator(device="cuda").manual_seed(1)
    packed = torch.randint(0, 256, (rows * columns // 2,), generator=generator, dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * columns // 64, generator=generator, device="cuda")
    weight = NF4Weight(packed, absmax, (rows, columns), BFLOAT16, NF4.cuda())
    tail = NF4Weight(packed[-16 * columns // 2 :], absmax[-16 * columns // 64 :], (16, columns), BFLOAT16, NF4.cuda())
    assert torch.equal(dequantize(weight, backend="triton")[-16:], dequantize(tail, backend="torch"))


# --- the library that packed it --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
# Not 48×352: where blocks of 64 straddle rows, its AVX512 kernel is off by more than the quantisation error itself.
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (48, 320), (129, 256), (11, 13)])
def test_bits_of_bitsandbytes(dtype, double, rows, columns):
    functional = pytest.importorskip("bitsandbytes").functional
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    packed, state = functional.quantize_4bit(dense, compress_statistics=double, quant_type="nf4")
    wanted = functional.dequantize_4bit(packed, state)
    weight = NF4Weight.of(SimpleNamespace(weight=with_state(packed, state)))
    assert weight.is_double is double and weight.shape == (rows, columns) and weight.dtype == dtype
    assert torch.equal(dequantize(weight, backend="torch"), wanted)
    if dtype != BFLOAT16:  # Triton's interpreter truncates there
        pytest.importorskip("triton")
        backend = "triton" if not torch.cuda.is_available() else "torch"
        assert torch.equal(dequantize(weight, backend=backend), wanted)


def with_state(packed, state):
    packed.quant_state = state
    return packed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", [torch.uint8, BFLOAT16])
def test_a_layer_of_bitsandbytes(storage):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=True, quant_storage=storage).to("cpu")
    wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for source in (layer, layer.weight):
        weight = NF4Weight.of(source)
        assert weight.packed.data_ptr() == layer.weight.data_ptr()  # a view, no second copy
        assert torch.equal(dequantize(weight), wanted)


def test_what_of_refuses():
    def state(**changes):
        return SimpleNamespace(weight=SimpleNamespace(quant_state=SimpleNamespace(shape=(2, 3), **changes)))

    for source, message in [
        (torch.nn.Linear(2, 2), "no quant_state"),
        (state(quant_type="fp4"), "fp4"),
        (state(packing_format_for_cpu=True), "repacked"),
        (SimpleNamespace(quant_state=SimpleNamespace(shape=(2, 3, 4))), "want a matrix"),
        (torch.zeros(2, 2), "Tensor: no quant_state"),
    ]:
        with pytest.raises(ValueError, match=message):
            NF4Weight.of(source)


def test_parts_that_do_not_fit_are_refused():
    weight = random_weight((8, 64))
    for changes in (
        {"packed": weight.packed[:-1]},
        {"shape": (8, 66)},
        {"code": weight.code[:8]},
        {"absmax": weight.absmax[:-1]},
        {"absmax_code": None},
        {"absmax_scale": weight.absmax_scale.double()},
        {"blocksize": 48},
    ):
        with pytest.raises(ValueError, match="want"):
            dataclasses.replace(weight, **changes)
    for out in (torch.empty(64, 8), torch.empty(8, 64, dtype=BFLOAT16), torch.empty(64, 8).t()):
        with pytest.raises(ValueError, match="out: "):
            dequantize(weight, out=out)


# --- the scratch -----------------------------------------------------------------------------------------------------


def test_scratch_is_one_buffer_per_dtype_grown_to_the_largest():
    scratch, cpu = Scratch(), torch.device("cpu")
    large = scratch.view((6, 7), FLOAT32, cpu)
    small = scratch.view((2, 5), FLOAT32, cpu)
    assert large.data_ptr() == small.data_ptr() and small.shape == (2, 5) and small.is_contiguous()
    assert scratch.num_bytes == 6 * 7 * 4
    assert scratch.view((2, 5), BFLOAT16, cpu).data_ptr() != small.data_ptr()
    scratch.view((6, 8), FLOAT32, cpu)
    assert scratch.num_bytes == 6 * 8 * 4 + 2 * 5 * 2
    scratch.release()
    assert scratch.num_bytes == 0


def test_scratch_made_in_inference_mode_can_be_written_outside():
    SCRATCH.release()
    weight = random_weight((8, 64))
    with torch.inference_mode():
        dequantize(weight, out=SCRATCH.view(weight.shape, FLOAT32, weight.device))
    out = dequantize(weight, out=SCRATCH.view(weight.shape, FLOAT32, weight.device))
    assert not out.is_inference() and error(out, reference(weight)) < 2e-6
    SCRATCH.release()


@pytest.mark.gpu
def test_scratch_of_two_streams():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scratch, device = Scratch(), torch.device("cuda", 0)
    first = scratch.view((4, 4), FLOAT32, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert scratch.view((4, 4), FLOAT32, device).data_ptr() != first.data_ptr()
    assert scratch.view((4, 4), FLOAT32, device).data_ptr() == first.data_ptr()
