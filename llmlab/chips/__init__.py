"""09-chips."""
