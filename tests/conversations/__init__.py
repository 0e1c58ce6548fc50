"""Conversations: rows, data sets, templates and token ids."""
