"""Learner and actor over LeRobot's own gRPC ``LearnerService``; the only modules that speak gRPC.

The learner publishes weights; every open ``StreamParameters`` stream gets the newest version, so a late or a
second actor is served like the first, and behind it the shares of episodes that are for its actor alone. Rollouts
come through ``SendTransitions``, refusals and the wish for episodes through ``SendInteractions``. A message travels in
pieces of 512 KiB between BEGIN and END; metadata of every call say which actor makes it.
"""

from lerobot_pirl.transport.client import LearnerClient
from lerobot_pirl.transport.server import LearnerServer

__all__ = ["LearnerClient", "LearnerServer"]
