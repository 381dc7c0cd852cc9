"""Layers: immutable differences of disks and memories, how they are kept, and the file system that serves them."""
