"""Rollout engines: one protocol, several ways to sample."""
