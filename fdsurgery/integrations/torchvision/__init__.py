"""Models of torchvision, by the names of their builders."""
