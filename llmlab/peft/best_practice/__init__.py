"""The room `best_practice`."""
