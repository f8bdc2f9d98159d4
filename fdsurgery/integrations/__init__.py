"""How libraries that build, train or rebuild models themselves get on with dynamic layers: one file a library."""
