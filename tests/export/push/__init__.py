"""Pushing to a hub."""
