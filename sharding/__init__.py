"""Meshes, logical-axis rules and everything else about where arrays live."""
