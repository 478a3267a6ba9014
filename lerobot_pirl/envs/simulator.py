"""hf-libero's simulator without what it does over and over, to the same bits.

Three things take its time, none of which changes a state, a reward or a frame that is looked at:

- A frame of every camera in every step, 90 % of a step without a GPU. robosuite samples a camera a fixed number of
  substeps into a control step, so a frame rendered afterwards is not the frame that stepping gives. Here cameras
  keep their timers, and only what they would render is the last frame while nobody looks.
- A model, a simulation and a renderer anew in every hard reset, from the same XML. Here they are kept, with the
  model's numbers as they were compiled; everything else of robosuite's reset runs as it does.
- Three forward passes per substep, where MuJoCo's own split of a step needs one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# meshes and textures: the renderer has copies of its own, so nobody changes them, and they are most of a model
_LARGE = ("mesh_", "tex_", "bvh_")


class FastSimulator:
    """Stand-in for hf-libero's ``OffScreenRenderEnv`` inside LeRobot's ``LiberoEnv``.

    Several may live in one process: robosuite draws in whatever GL context is current, so this one makes its own
    current before it draws or frees anything.

    Args:
        env: hf-libero's environment, built and reset.
        settle_steps: number of steps after a reset of which only the last renders.

    Attributes:
        enabled: whether steps after the settling render.
    """

    def __init__(self, env: Any, settle_steps: int):
        self._inner = env
        self._settle_steps = settle_steps
        self._settle_left = 0
        self._rendering = True
        self.enabled = True
        self._initialize_sim = env.env._initialize_sim
        env.env._destroy_sim = lambda: None
        env.env._initialize_sim = self._reuse_sim
        self._keep(env.env.model.get_xml())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def reset(self) -> dict:
        """Reset, with frames only if no settle step follows to render them."""
        self._rendering = self._settle_steps == 0
        observation = self._inner.reset()
        self._settle_left = self._settle_steps
        return observation

    def set_init_state(self, state: np.ndarray) -> dict:
        """Set the simulator's state, with frames only if no settle step follows to render them."""
        self._rendering = self._settle_steps == 0
        return self._inner.set_init_state(state)

    def step(self, action: Any) -> tuple:
        """Take a control step; during settling the last step alone renders, later ``enabled`` says."""
        if self._settle_left > 0:
            self._settle_left -= 1
            self._rendering = self._settle_left == 0
        else:
            self._rendering = self.enabled
        with one_forward_pass(self._inner.sim):
            return self._inner.step(action)

    def close(self) -> None:
        """Close the environment and free what it has in the renderer."""
        self._free()
        self._inner.close()

    def _keep(self, xml: str) -> None:
        """Take over the present simulation, compiled from ``xml``."""
        import mujoco

        self._xml = xml
        self._compiled = _arrays(mujoco.MjModel.from_xml_string(xml))
        self._frames: dict[tuple, Any] = {}
        self._inner.env.sim.render = self._render

    def _reuse_sim(self, xml_string: str | None = None) -> None:
        """Replace robosuite's ``_initialize_sim``: a new simulation only for another XML."""
        env = self._inner.env
        xml = xml_string or env.model.get_xml()
        if xml != self._xml:
            self._free()
            self._initialize_sim(xml_string)
            self._keep(xml)
            return
        for name, values in self._compiled.items():
            getattr(env.sim.model._model, name)[...] = values
        env.sim.reset()
        env.sim.forward()
        env.initialize_time(env.control_freq)

    def _render(self, **view: Any) -> Any:
        """Replace ``MjSim.render``: draw when somebody looks, else return the view's last frame."""
        sim = self._inner.env.sim
        key = tuple(sorted(view.items()))
        if self._rendering or key not in self._frames:
            self._make_current()
            self._frames[key] = type(sim).render(sim, **view)
        return self._frames[key]

    def _make_current(self) -> None:
        self._inner.env.sim._render_context_offscreen.gl_ctx.make_current()

    def _free(self) -> None:
        """Free the simulation and its renderer, as robosuite's ``_destroy_sim`` does."""
        self._make_current()
        self._inner.env.sim.free()
        self._inner.env.sim = None


@contextmanager
def one_forward_pass(sim: Any) -> Iterator[None]:
    """Let a control step compute a state's positions and velocities once instead of three times per substep.

    robosuite calls ``forward``, again in its controller, and then ``step``, which does the same once more.
    Afterwards the simulation is as it would be. During it, what robosuite notes of the forces at the hand, which
    neither LeRobot nor LIBERO reads, is that of the substep before.

    Args:
        sim: robosuite's ``MjSim``, whose control step must do nothing between ``forward`` and ``step`` but set
            controls.
    """
    import mujoco

    model, data = sim.model._model, sim.data._data
    is_computed = False

    def forward() -> None:
        nonlocal is_computed
        if not is_computed:
            mujoco.mj_step1(model, data)
            is_computed = True

    def step(with_udd: bool = True) -> None:
        nonlocal is_computed
        mujoco.mj_step2(model, data)
        is_computed = False

    sim.forward, sim.step = forward, step
    try:
        yield
    finally:
        del sim.forward, sim.step


def _arrays(model: Any) -> dict[str, np.ndarray]:
    """Return copies of a MuJoCo model's numbers by name, without meshes and textures."""
    names = [name for name in dir(model) if not name.startswith(("_", *_LARGE))]
    found = {name: getattr(model, name) for name in names}
    return {name: np.array(value) for name, value in found.items() if isinstance(value, np.ndarray)}
