"""Break a sound merge in every way that we could think of, and see that verify notices and names the right cause."""
