"""The GRPO loop, the update, and what a run leaves on disk."""
