"""Runs in place of ``lerobot.rl.learner`` when a recipe is selected."""

from lerobot_pirl.learner import main

if __name__ == "__main__":
    main()
