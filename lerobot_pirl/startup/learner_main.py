"""Runs in place of ``lerobot.rl.learner`` when a recipe is selected."""

# worker processes find their main module by this name: it would be LeRobot's own, import and all
__spec__ = None

if __name__ == "__main__":
    from lerobot_pirl.learner import main

    main()
