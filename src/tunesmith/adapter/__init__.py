"""What an adapter means: its configuration and tensors as typed updates on base tensors, by name."""
