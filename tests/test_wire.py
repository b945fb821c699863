"""The formats: what they keep of a number, what they leave out, and how many bytes they take."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_localsgd import Mean
from lightning_localsgd.wire import FORMATS, noise

# The largest error of one number, relative to the largest in its block, and bytes relative to float32.
LIMITS = {"bfloat16": (2**-8, 0.5), "float16": (2**-11, 0.501), "int8": (0.51 / 127, 0.254), "int4": (0.51 / 7, 0.133)}


def there_and_back(form, values, generator=None):
    code = torch.full((len(values), form.size(values.shape[1])), 255, dtype=torch.uint8)
    rest, decoded = values.clone(), torch.full_like(values, math.nan)
    form.encode(rest, code, generator)
    form.decode(code, decoded)
    return code, rest, decoded


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-30, 30), rows=st.integers(1, 3), blocks=st.integers(1, 4))
def test_what_arrives_is_near_and_what_is_left_out_is_the_difference(name, seed, exponent, rows, blocks):
    form, (limit, _) = FORMATS[name], LIMITS[name]
    block = max(form.block, 4)
    values = torch.randn(rows, blocks * block, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    _, rest, decoded = there_and_back(form, values)
    torch.testing.assert_close(rest, values - decoded, atol=0, rtol=0)
    largest = values.view(rows, blocks, block).abs().amax(-1, keepdim=True)
    assert ((values - decoded).view(rows, blocks, block).abs() <= limit * largest).all()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes(name):
    form, (_, share) = FORMATS[name], LIMITS[name]
    assert form.size(5120) / (4 * 5120) <= share


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-44, -1e-38, 3e38])
def test_the_ends_of_the_range_stay_finite(name, value):
    form = FORMATS[name]
    values = torch.zeros(1, 512)
    values[0, 3] = value
    _, rest, decoded = there_and_back(form, values)
    assert decoded.isfinite().all()
    assert rest.isfinite().all()
    assert decoded[0, :3].eq(0).all()
    torch.testing.assert_close(decoded, values, rtol=0.01, atol=1e-35)


def test_known_integers():
    values = torch.tensor([[127.0, -127, 1.4, -0.6] + [0.0] * 124])
    code, rest, decoded = there_and_back(FORMATS["int8"], values)
    assert code.view(torch.int8)[0, :4].tolist() == [127, -127, 1, -1]
    assert decoded[0, :4].tolist() == [127, -127, 1, -1]
    assert rest[0, :4].tolist() == pytest.approx([0, 0, 0.4, 0.4])
    values = torch.tensor([[7.0, -7, 2.6, -0.2] + [0.0] * 28 + [1.0, -1, 3, 0] + [0.0] * 28])
    code, _, decoded = there_and_back(FORMATS["int4"], values)
    assert code[0, :4].tolist() == [15 | 9 << 4, 1 | 7 << 4, 11 | 11 << 4, 8 | 8 << 4]  # with 8 added, low and high
    assert decoded[0, [0, 1, 2, 3, 32, 33, 34]].tolist() == [7, -7, 3, 0, 1, -1, 3]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_noise_is_right_on_average_and_always_the_same(name):
    form, values = FORMATS[name], torch.linspace(-1, 1, 128).repeat(1, 1)
    many = [there_and_back(form, values, noise(values.device, 0, 1, 2, index))[2] for index in range(400)]
    scale = 1 / (127 if name == "int8" else 7)
    assert (torch.stack(many).mean(0) - values).abs().max() < 5 * 0.5 * scale / math.sqrt(400)
    again = there_and_back(form, values, noise(values.device, 0, 1, 2, 7))[2]
    assert again.equal(many[7])
    assert not again.equal(many[8])
    nearest = there_and_back(form, values)[2]
    assert (torch.stack(many).mean(0) - values).abs().mean() < (nearest - values).abs().mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wire": "int2"}, "`wire` must be one of float32, bfloat16, float16, int8, int4, got 'int2'"),
        ({"delay": -1}, "`delay` must be an int of at least 0, got -1"),
        ({"delay": True}, "`delay` must be an int of at least 0, got True"),
        ({"delay": 1.5}, "`delay` must be an int of at least 0, got 1.5"),
        ({"wire": "int8", "rounding": "up"}, "`rounding` must be 'nearest' or 'stochastic', got 'up'"),
        ({"rounding": "stochastic"}, "`rounding` has an effect only on a wire of integers"),
        ({"wire": "bfloat16", "error_feedback": False}, "`error_feedback` has an effect only on a wire of integers"),
        ({"wire": "int8", "error_feedback": 1}, "`error_feedback` must be True or False, got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mean(**arguments)
