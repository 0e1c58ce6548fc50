"""Tests of where units of work run."""
