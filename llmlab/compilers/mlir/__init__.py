"""MLIR"""
