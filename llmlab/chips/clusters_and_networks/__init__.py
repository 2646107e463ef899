"""Clusters and networks."""

from llmlab.chips.clusters_and_networks.flows import Run, fair_rates, simulate
from llmlab.chips.clusters_and_networks.routing import Flow, Routes, routes
from llmlab.chips.clusters_and_networks.topology import *
