"""The operator on GPUs: one file a kernel, each beside its launch; what they share; and which way serves."""
