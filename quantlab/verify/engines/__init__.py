"""Engines that load folders: each file stands alone, and runs in the environment that has its engine."""
