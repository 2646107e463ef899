"""Launch files for clusters: data, to be copied and changed.
`tests/parallelism/frameworks/test_cluster_files.py` checks that they add up.
"""
