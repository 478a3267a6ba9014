"""lerobot-pirl: piRL fine-tuning of flow-matching VLAs, as a plugin of LeRobot."""

__version__ = "0.1.0"
