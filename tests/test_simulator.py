"""What every simulator does, on one without physics."""

import numpy as np
import pytest

pytest.importorskip("pybullet")
pytest.importorskip("gymnasium")

from diwa.envs import make_env  # noqa: E402
from diwa.envs.simulator import Simulator, env_steps_taken  # noqa: E402

STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])


def test_unknown_simulator_is_named():
    with pytest.raises(ValueError, match="'mujoco'.*playtable, calvin"):
        make_env("mujoco")


class Counter(Simulator):
    """A simulator without physics: the drawer opens by the first number of the action."""

    class Arm:
        def observe(self):
            return np.zeros(15)

    def __init__(self, **options):
        super().__init__(**options)
        self.robot, self.scene, self.seen = self.Arm(), np.zeros(24), []

    def _advance(self, action):
        self.seen.append(action)
        self.scene[1] += 0.1 * action[0]

    def _set_state(self, robot, scene):
        self.scene = scene

    def _scene_obs(self):
        return self.scene.copy()

    def _picture(self, camera, size):
        return np.full((size, size, 3), len(camera), np.uint8)

    def fixtures(self):
        return self.scene[:4]

    def link_position(self, name):
        return np.zeros(3)


def test_every_simulator_clips_counts_and_judges():
    env = Counter(task="open_drawer", max_episode_steps=4, cameras=True, image_size=8)
    start = {"robot_obs": np.zeros(15), "scene_obs": np.zeros(24)}
    observation, info = env.reset(options=start)
    assert env.observation_space.contains(observation)
    assert observation["rgb_gripper"].shape == (8, 8, 3)
    before = env_steps_taken()
    assert env.step([3, 0, 0, 0, 0, 0, 1])[1:4] == (0.0, False, False)  # an integer list, clipped
    assert env.seen[0].dtype == np.float64 and env.seen[0][0] == 1.0
    _, reward, solved, late, info = env.step([1, 0, 0, 0, 0, 0, 1])
    assert (reward, solved, late, info["env_steps"]) == (1.0, True, False, 2)
    assert env_steps_taken() - before == 2
    assert not start["scene_obs"].any()  # the caller's array is not the simulator's
    env.reset(options=start)
    assert [env.step(STILL)[3] for _ in range(4)] == [False, False, False, True]


@pytest.mark.parametrize(
    "action, message",
    [(np.zeros(6), "shape"), (np.full(7, np.nan), "finite"), (np.full(7, np.inf), "finite")],
)
def test_bad_actions_are_refused(action, message):
    env = Counter()
    env.reset(options={"robot_obs": np.zeros(15), "scene_obs": np.zeros(24)})
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert not env.seen
