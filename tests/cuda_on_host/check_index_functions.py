"""Promise: the index functions of the kernels are right for any size: they agree with integers that have no end."""

import math

from cuda_on_host.plugin import OPS as HOST
from hypothesis import given, settings
from hypothesis import strategies as st

explored = settings(deadline=None, derandomize=True, max_examples=300)
# Few, or near a power of two.
SIZES = st.integers(1, 40) | st.builds(lambda bits, step: 2**bits + step, st.integers(3, 40), st.integers(-2, 2))
WIDTHS = st.sampled_from([1, 2, 4, 8])
LIMIT = 2**58


def below(limit):
    """A number from 0 on: often one of the last."""
    return st.integers(0, limit - 1) | st.builds(lambda step: max(limit - 1 - step, 0), st.integers(0, 3))


def sizes(count):
    return st.tuples(*[SIZES] * count).filter(lambda drawn: math.prod(drawn) < LIMIT)


@explored
@given(st.integers(0, 2**62), st.integers(1, 2**62) | SIZES)
def test_divide(a, b):
    assert HOST.divide(a, b) == a // b


@explored
@given(st.data(), sizes(3))
def test_location_of_a_row(data, drawn):
    samples, outer, length = drawn
    rows = [samples * outer, length, samples]
    row = data.draw(below(samples * outer))
    step = data.draw(below(samples * outer - row))
    position = HOST.row_location(rows, row)
    assert position == [row % samples, row // samples]
    assert HOST.row_advance(rows, position, HOST.row_location(rows, step)) == HOST.row_location(rows, row + step)


@explored
@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40), st.integers(0, 2**21), st.integers(0, 2**21))
def test_offset_of_a_row(sample_stride, outer_stride, source, outer):
    offset = HOST.row_offset([sample_stride, outer_stride], source, outer)
    assert offset == source * sample_stride + outer * outer_stride


@explored
@given(SIZES, SIZES, st.integers(0, 2**61), st.integers(0, 2**61))
def test_location_of_a_channel(inner, count, position, step):
    channels = [inner, count]
    assert HOST.channel_location(channels, position) == [position // inner % count, position % inner]
    advanced = HOST.channel_advance(channels, *(HOST.channel_location(channels, n) for n in (position, step)))
    assert advanced == HOST.channel_location(channels, position + step)


@explored
@given(st.data(), sizes(3), WIDTHS, st.sampled_from([256, 512, 1024]))
def test_tiles(data, drawn, width, vectors):
    """They follow each other without a gap, hold whole vectors, and no more than a block takes."""
    samples, outer, length = drawn[0], drawn[1], drawn[2] * width
    rows = [samples * outer, length, samples]
    tiles = HOST.tiles(rows, vectors, width)
    index = data.draw(below(tiles))
    row, column, of_rows, columns = HOST.tile(rows, vectors, width, index)
    assert 0 < of_rows * columns <= vectors * width
    assert of_rows <= vectors
    assert column % width == columns % width == 0
    assert of_rows == 1 or columns == length
    if index == 0:
        assert row == column == 0
    after = HOST.tile(rows, vectors, width, index + 1) if index + 1 < tiles else [samples * outer, 0]
    assert row * length + column + (of_rows - 1) * length + columns == after[0] * length + after[1]


@explored
@given(st.data(), sizes(2), WIDTHS)
def test_tiles_of_a_period(data, drawn, width):
    """At most 256 vectors for a block; and a channel meets no more tiles than it has parts."""
    inner, count = drawn[0], drawn[1] * width
    period_vectors, tiles, vectors, periods, segments, threads = HOST.period_tiling([inner, count], width)
    assert period_vectors * width == inner * count
    assert (tiles - 1) * vectors < period_vectors <= tiles * vectors
    assert vectors * periods <= threads <= 256
    assert periods == 1 or tiles == 1
    channel = data.draw(below(count))
    first, last = (position // width // vectors for position in (channel * inner, (channel + 1) * inner - 1))
    assert last - first < segments


@explored
@given(st.data(), sizes(4), st.booleans())
def test_location_of_a_period(data, drawn, rows_hold_periods):
    """The rows of the period's elements, whichever holds the other."""
    samples, outer, inner, many = drawn
    if rows_hold_periods:
        rows, channels, per_row, rows_of_period = [samples * outer, inner * many, samples], [inner, 1], many, 1
    else:
        rows, channels, per_row, rows_of_period = [samples * outer * many, inner, samples], [inner, many], 1, many
    periods = HOST.periods(rows, channels)
    count = samples * outer * (many if rows_hold_periods else 1)
    assert periods == [count, math.prod(channels), per_row, rows_of_period]
    period = data.draw(below(count))
    step = data.draw(below(count - period))
    row_of_period = data.draw(below(rows_of_period))

    def location_of(period):
        row = period // per_row * rows_of_period + row_of_period
        return [row % samples, row // samples, period % per_row]

    assert HOST.period_location(periods, rows, period, row_of_period) == location_of(period)
    advanced = HOST.period_advance(periods, rows, location_of(period), HOST.period_location(periods, rows, step, 0))
    assert advanced == location_of(period + step)
