"""TVM: what is computed, in which order, and which operations run together.
"""
