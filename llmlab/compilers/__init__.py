"""08-compilers."""
