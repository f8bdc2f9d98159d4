"""Models of transformers, and converted ones loaded by transformers itself.

library       what the register knows of transformers
allowed       what a saved file may ask of it
inputs        what its models take
registration  hands the quantizer to transformers
quantizer     puts dynamic layers in before a model's weights are read; imports transformers
"""
