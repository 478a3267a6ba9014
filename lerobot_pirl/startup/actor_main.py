"""Runs in place of ``lerobot.rl.actor`` when a recipe is selected."""

from lerobot_pirl.actor import main

if __name__ == "__main__":
    main()
