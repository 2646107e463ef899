"""Scripts that run a method of this part at scale."""
