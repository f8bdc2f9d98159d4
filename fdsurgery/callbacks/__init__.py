"""Callbacks for trainers, one module for each; imported only by those who use that trainer.

trainer    for transformers' Trainer
lightning  for Lightning
"""
