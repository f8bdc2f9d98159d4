"""timm's models by name, and `timm.create_model("resnet50.fdconv")`: any timm model, converted, by its name.

library       what the register knows of timm
allowed       what a saved file may ask of it
registration  makes the names known to timm
factory       what the names mean, and how a model is built from one
weights       weights of converted models, and of plain ones that a converted model is given
__main__      runs a script, such as timm's train.py, in which these names are known
"""

SUFFIX = ".fdconv"
"""Appended to a timm name, with or without a tag, it names the converted model."""
