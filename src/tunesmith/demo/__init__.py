"""The whole story on the embedded model: train, inspect, compare, merge, verify, report.

The data set is our own (Apache-2.0): 350 questions about instruments, answered in one recognisable form.
"""

from tunesmith.demo.story import DemoResult, DemoStep, demo

__all__ = ["DemoResult", "DemoStep", "demo"]
