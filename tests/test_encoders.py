"""State codec: rot6d vectors, round trip, physical floors; encoder and decoder shapes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa.nn.encoders import (
    StateCodec,
    StateDecoder,
    StateEncoder,
    euler_from_rot6d,
    rot6d,
    to_tensor,
)

VECTORS = [
    ((0.1, 0.2, 0.3), (0.936293, -0.289629, 0.198669, 0.312992, 0.944702, -0.097843)),
    (
        (3.09045, -0.02909, 1.50014),
        (0.070568, -0.997083, -0.029086, -0.996306, -0.069022, -0.051099),
    ),
]


@pytest.mark.parametrize(("euler", "expected"), VECTORS)
def test_rot6d_of_the_test_vectors(euler, expected):
    got = rot6d(torch.tensor(euler, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


angle = st.floats(-3.1, 3.1)


@settings(max_examples=50, deadline=None)
@given(angle, angle, angle)
def test_rot6d_is_two_rows_of_the_matrix_product(a, b, c):
    def rotation(axis, t):
        i, j = [k for k in range(3) if k != axis]
        m = np.eye(3)
        m[i, i] = m[j, j] = math.cos(t)
        m[i, j], m[j, i] = (-math.sin(t), math.sin(t)) if axis != 1 else (math.sin(t), -math.sin(t))
        return m

    matrix = rotation(0, a) @ rotation(1, b) @ rotation(2, c)
    got = rot6d(torch.tensor([a, b, c], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(got, matrix[:2].ravel(), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(angle, st.floats(-1.5, 1.5), angle, st.floats(0.5, 2.0))
def test_euler_round_trip_also_from_rows_that_are_not_orthonormal(a, b, c, scale):
    euler = torch.tensor([a, b, c], dtype=torch.float64)
    rows = rot6d(euler)
    torch.testing.assert_close(euler_from_rot6d(rows), euler, atol=1e-6, rtol=0)
    skewed = torch.cat([rows[:3] * scale, rows[3:] + 0.3 * rows[:3]])
    torch.testing.assert_close(euler_from_rot6d(skewed), euler, atol=1e-6, rtol=0)


def observations(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    robot, scene = torch.rand(n, 15), torch.rand(n, 24)
    return robot, scene


@pytest.mark.parametrize("blocks", [False, True])
def test_codec_round_trip(blocks):
    codec = StateCodec(blocks)
    robot, scene = observations(200)
    codec.fit(robot, scene)
    state = codec(robot, scene)
    assert state.shape == (200, codec.size) and codec.size == (51 if blocks else 24)
    assert len(codec.column_names()) == codec.size
    back_robot, back_scene = codec.decode(state)
    torch.testing.assert_close(back_robot, robot, atol=1e-4, rtol=0)
    seen = 24 if blocks else 6
    torch.testing.assert_close(back_scene[:, :seen], scene[:, :seen], atol=1e-4, rtol=0)
    assert not back_scene[:, seen:].any()


@pytest.mark.parametrize("blocks", [False, True])
def test_codec_standardises_and_never_divides_by_a_still_column(blocks):
    codec = StateCodec(blocks)
    robot, scene = observations(5000)
    robot[:, :3] *= 2
    scene[:, 2] = 0.25  # a button that never moves
    codec.fit(robot, scene)
    state = codec(robot, scene)
    torch.testing.assert_close(state.mean(0), torch.zeros(codec.size), atol=1e-3, rtol=0)
    torch.testing.assert_close(state[:, :3].std(0), torch.ones(3), atol=1e-3, rtol=0)
    assert torch.isfinite(state).all() and state.std(0).max() < 1.001
    moved = scene.clone()
    moved[:, 2] += 0.004
    assert (codec(robot, moved) - state)[:, 20].abs().max() == pytest.approx(1, rel=1e-3)


def test_columns_and_quantities_agree():
    codec = StateCodec(True)
    names = codec.column_names()
    for name, (columns, unit) in codec.quantities().items():
        assert unit in {"m", "rad", "state"}
        stems = {"tcp_position": "tcp_", "arm_joints": "arm_joint_"}
        assert all(column.startswith(stems.get(name, name)) for column in names[columns]), name
    robot, scene = torch.zeros(15), torch.arange(24.0)
    raw = codec(robot, scene)  # mean 0, std 1 before fit
    assert raw[codec.quantities()["drawer"][0]].tolist() == [1.0]
    assert raw[codec.quantities()["blue_block"][0]].tolist() == [12.0, 13.0, 14.0]


def test_codec_statistics_travel_in_the_state_dict():
    codec, other = StateCodec(), StateCodec()
    codec.fit(*observations(50))
    other.load_state_dict(codec.state_dict())
    robot, scene = observations(3)
    assert torch.equal(codec(robot, scene), other(robot, scene))


def test_decoder_loss_is_half_the_weighted_squared_error():
    torch.manual_seed(0)
    decoder = StateDecoder(6, 8, 5)
    feature, target = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 4.0])
    error = (decoder(feature)["state"] - target).square()
    expected = 0.5 * sum(w * error[..., i] for i, w in enumerate(weight))
    torch.testing.assert_close(decoder.loss(feature, {"state": target}, weight), expected)
    assert StateEncoder(5, 8, 4)({"state": target}).shape == (2, 3, 4)


def test_column_weights_raise_tool_position_and_fixtures():
    codec = StateCodec(observe_blocks=True)
    raised = (codec.column_weights(4.0) == 4.0).tolist()
    names = [name for name, up in zip(codec.column_names(), raised, strict=True) if up]
    fixtures = ["slider", "drawer", "button", "switch", "lightbulb", "led"]
    assert names == ["tcp_x", "tcp_y", "tcp_z", *fixtures]
    assert (codec.column_weights(1.0) == 1).all()


def test_to_tensor_copies():
    array = np.zeros(3)
    tensor = to_tensor(array)
    array[0] = 1
    assert tensor.tolist() == [0, 0, 0] and tensor.dtype == torch.float32
