"""The numbers and functions of the first lessons."""
