"""The verbs: each composes the rooms below it, and holds no arithmetic of its own.

One file a verb, or a few that share their secret, so that ``inspect`` loads neither charts nor verification.
"""
