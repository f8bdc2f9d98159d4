"""Converted models of transformers, loaded by transformers itself.

description   what a model's config says of its dynamic layers
quantizer     puts them in before the weights are read; imports transformers
registration  hands the quantizer to transformers, whenever that is imported
card          the README of a saved model
"""
