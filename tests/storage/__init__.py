"""Models in a storage: what is at an address is read, proved and written as if it lay on a disk."""
