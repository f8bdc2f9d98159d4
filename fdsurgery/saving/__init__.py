"""One converted model on disk, and how it comes back."""
